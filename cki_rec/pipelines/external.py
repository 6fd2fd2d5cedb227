"""Checkpoints that a path names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cki_rec.config import UserError
from cki_rec.engine import checkpoint

EXTERNAL = "external-"
"""Begins the identity of a checkpoint named by path."""


def folder_at(path: str) -> Path:
    """Return the checkpoint folder that a run directory or a checkpoint folder names."""
    folder = Path(path)
    nested = folder / "checkpoint"
    return nested if nested.is_dir() else folder


def identity(folder: Path) -> str:
    """Return the identity of an external checkpoint: its description names file digests.

    Raises:
        UserError: There is no checkpoint.
    """
    description = folder / checkpoint.DESCRIPTION
    if not description.is_file():
        raise UserError(f"{folder}: no checkpoint here ({description.name} is missing)")
    return f"{EXTERNAL}{hashlib.sha256(description.read_bytes()).hexdigest()[:16]}"


def is_external(identity: str) -> bool:
    """Return whether a source is a checkpoint that no run of ours made."""
    return identity.startswith(EXTERNAL)
