"""Every option, its type and its checks; values live in ``conf/``. Imports no torch.

``parse`` turns Hydra's text into these objects once; inside, there are only typed objects.
"""

from cki_rec.config.data_options import Data, Download, Partition, Split, Synthetic
from cki_rec.config.errors import RankLost, ReportedElsewhere, Stopped, UserError, nearest
from cki_rec.config.merge_options import Align, Assess, Learn, Merge
from cki_rec.config.options import (
    Attention,
    Config,
    Cross,
    Evaluate,
    Finetune,
    Model,
    Monitor,
    Runtime,
    Streams,
    Suite,
    Train,
)
from cki_rec.config.parsing import (
    EVIDENCE,
    OF_OTHERS,
    check_source,
    first_comment,
    model_options,
    parse,
    preset_method,
    register_resolvers,
    run_id,
    section,
    texts_as_typed,
    with_delta,
)
from cki_rec.config.section import choices
from cki_rec.config.texts import check_name

__all__ = [
    "EVIDENCE",
    "OF_OTHERS",
    "Align",
    "Assess",
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
    "check_name",
    "check_source",
    "choices",
    "first_comment",
    "model_options",
    "nearest",
    "parse",
    "preset_method",
    "register_resolvers",
    "run_id",
    "section",
    "texts_as_typed",
    "with_delta",
]
