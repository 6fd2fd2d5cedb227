"""Checkpoints of any program: one class per format, behind the seam ``Stored``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cki_rec.checkpoints.formats import dcp, own, safetensors, torch_save
from cki_rec.checkpoints.formats.layout import Layout, layout
from cki_rec.checkpoints.formats.stored import Blank, Entry, Place, Stored
from cki_rec.checkpoints.missing import no_checkpoint
from cki_rec.config import UserError
from cki_rec.merging.params import Params

__all__ = [
    "BLANKS",
    "WRITERS",
    "Blank",
    "Entry",
    "Layout",
    "Place",
    "Stored",
    "is_own",
    "layout",
    "open_stored",
]

READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Stored]], ...] = (
    (own.recognizes, own.Own),
    (dcp.recognizes, dcp.Dcp),
    (safetensors.recognizes, safetensors.Safetensors),
    (torch_save.recognizes, torch_save.TorchSave),
)
"""Recognition and reader of every format; the first that recognizes a path reads it."""
WRITERS: dict[str, Callable[[Params, Path], Path]] = {
    "safetensors": safetensors.write,
    "torch": torch_save.write,
    "dcp": dcp.write,
}
"""``merge.format`` -> writer of tensors into a folder."""
BLANKS: dict[str, Callable[[Mapping[str, Entry], Path], Blank]] = {
    "safetensors": safetensors.blank,
    "torch": torch_save.blank,
    "dcp": dcp.blank,
}
"""``merge.format`` -> writer of files without values, which a merge from disk to disk fills."""


def open_stored(path: Path) -> Stored:
    """Return the checkpoint at a path, whatever its format.

    Raises:
        UserError: There is none, or it is damaged or of an unknown format.
    """
    for recognizes, reader in READERS:
        if recognizes(path):
            return reader(path)
    raise UserError(no_checkpoint(path, "checkpoint.json"))


def is_own(path: Path) -> bool:
    """Return whether a path is a checkpoint of this project, or none of any known format."""
    return own.recognizes(path) or not any(recognizes(path) for recognizes, _ in READERS[1:])
