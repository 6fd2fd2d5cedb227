"""Merge several trained models into one model of the same size, above all recommenders.

Names are imported when they are used: ``import cki_rec`` itself does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers: the same names as in _NAMES
    from cki_rec.merging.aligning import AlignedModels, align
    from cki_rec.merging.api import merge, methods
    from cki_rec.merging.assessment import Assessment, assess
    from cki_rec.merging.discovery import Symmetries, find_symmetries, verify
    from cki_rec.merging.extras import Extras
    from cki_rec.merging.keyed import KeyedMerge, merge_by_key
    from cki_rec.merging.params import MergeError, MixingWeights, Params
    from cki_rec.merging.refinement import refine
    from cki_rec.merging.registry import MethodInfo, method
    from cki_rec.merging.result import MergeResult, Recipe
    from cki_rec.merging.symmetry import Slice, Symmetry

__version__ = "0.2.0"
COMMAND_VARIABLE = "CKI_REC_COMMAND"
"""The command line as typed, for runs in this process and in those a launcher starts."""
JOB_VARIABLE = "CKI_REC_JOB"
"""Sweep and number of the running job, for its entry in the list of a name."""
_NAMES = {
    "AlignedModels": "merging.aligning",
    "Assessment": "merging.assessment",
    "Extras": "merging.extras",
    "KeyedMerge": "merging.keyed",
    "MergeError": "merging.params",
    "MergeResult": "merging.result",
    "MethodInfo": "merging.registry",
    "MixingWeights": "merging.params",
    "Params": "merging.params",
    "Recipe": "merging.result",
    "Slice": "merging.symmetry",
    "Symmetries": "merging.discovery",
    "Symmetry": "merging.symmetry",
    "align": "merging.aligning",
    "assess": "merging.assessment",
    "find_symmetries": "merging.discovery",
    "merge": "merging.api",
    "merge_by_key": "merging.keyed",
    "method": "merging.registry",
    "methods": "merging.api",
    "refine": "merging.refinement",
    "verify": "merging.discovery",
}
"""Public name -> the module that defines it."""

__all__ = [
    "COMMAND_VARIABLE",
    "AlignedModels",
    "Assessment",
    "Extras",
    "KeyedMerge",
    "MergeError",
    "MergeResult",
    "MethodInfo",
    "MixingWeights",
    "Params",
    "Recipe",
    "Slice",
    "Symmetries",
    "Symmetry",
    "align",
    "assess",
    "find_symmetries",
    "merge",
    "merge_by_key",
    "method",
    "methods",
    "project_root",
    "refine",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'cki_rec' has no attribute {name!r}")
    value = getattr(import_module(f"cki_rec.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


def project_root() -> Path:
    """Return the folder that holds ``conf/`` and the embedded data, installed or in a clone."""
    package = Path(__file__).resolve().parent
    bundled = package / "_project"
    return bundled if bundled.is_dir() else package.parent
