"""Every option, its type and its checks; values live in ``conf/``. Imports no torch.

``parse`` crosses the edge from Hydra's text to these objects once; inside, only typed objects.
"""

from cki_rec.config.checks import AT_LEAST, CHOICES, check
from cki_rec.config.errors import UserError, nearest
from cki_rec.config.options import (
    Config,
    Data,
    Download,
    Evaluate,
    Finetune,
    Gate,
    Integrate,
    Model,
    Partition,
    Runtime,
    Split,
    Suite,
    Synthetic,
    Train,
)
from cki_rec.config.parsing import (
    first_comment,
    parse,
    register_resolvers,
    run_id,
    section,
    with_delta,
)

__all__ = [
    "AT_LEAST",
    "CHOICES",
    "Config",
    "Data",
    "Download",
    "Evaluate",
    "Finetune",
    "Gate",
    "Integrate",
    "Model",
    "Partition",
    "Runtime",
    "Split",
    "Suite",
    "Synthetic",
    "Train",
    "UserError",
    "check",
    "first_comment",
    "nearest",
    "parse",
    "register_resolvers",
    "run_id",
    "section",
    "with_delta",
]
