"""Every option, its type and its checks; values live in ``conf/``. Imports no torch.

``parse`` crosses the edge from Hydra's text to these objects once; inside, only typed objects.
"""

from cki_rec.config.checks import AT_LEAST, CHOICES, check
from cki_rec.config.data_options import Data, Download, Partition, Split, Synthetic
from cki_rec.config.errors import RankLost, ReportedElsewhere, Stopped, UserError, nearest
from cki_rec.config.options import (
    Align,
    Attention,
    Config,
    Cross,
    Evaluate,
    Finetune,
    Learn,
    Merge,
    Model,
    Monitor,
    Runtime,
    Streams,
    Suite,
    Train,
)
from cki_rec.config.parsing import (
    first_comment,
    model_options,
    parse,
    register_resolvers,
    run_id,
    section,
    with_delta,
)

__all__ = [
    "AT_LEAST",
    "CHOICES",
    "Align",
    "Attention",
    "Config",
    "Cross",
    "Data",
    "Download",
    "Evaluate",
    "Finetune",
    "Learn",
    "Merge",
    "Model",
    "Monitor",
    "Partition",
    "RankLost",
    "ReportedElsewhere",
    "Runtime",
    "Split",
    "Stopped",
    "Streams",
    "Suite",
    "Synthetic",
    "Train",
    "UserError",
    "check",
    "first_comment",
    "model_options",
    "nearest",
    "parse",
    "register_resolvers",
    "run_id",
    "section",
    "with_delta",
]
