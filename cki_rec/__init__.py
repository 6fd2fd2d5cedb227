"""Merge several trained click-through-rate models into one model of the same size."""

from pathlib import Path

__version__ = "0.2.0"
COMMAND_VARIABLE = "CKI_REC_COMMAND"
"""The command line as typed, for runs in this process and in those a launcher starts."""


def project_root() -> Path:
    """Return the folder that holds ``conf/`` and the embedded data, installed or in a clone."""
    package = Path(__file__).resolve().parent
    bundled = package / "_project"
    return bundled if bundled.is_dir() else package.parent
