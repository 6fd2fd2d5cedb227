"""Checkpoints that a path names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import checkpoint
from cki_rec.config import UserError

EXTERNAL = "external-"
"""Begins the identity of a checkpoint named by path."""


def folder_of(named: Mapping[str, Any], where: str) -> Path:
    """Return the checkpoint folder of a source named ``{path: ...}``.

    Args:
        named: The source; its path is a run directory or a checkpoint folder.
        where: Option that it stands in, for messages.

    Raises:
        UserError: The path is no text, or other keys stand beside it.
    """
    path = named["path"]
    if not isinstance(path, str) or len(named) > 1:
        raise UserError(
            f"{where}: {dict(named)} shall be {{path: FOLDER}}, a text and no other key"
        )
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
