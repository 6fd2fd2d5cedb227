"""Run folders and checkpoints of this project, by the same seam as those of others."""

from __future__ import annotations

from pathlib import Path

from cki_rec.checkpoints.checkpoint import DESCRIPTION, TENSORS, content_digest, describe, locate
from cki_rec.checkpoints.formats.dcp import Dcp


class Own(Dcp):
    """A checkpoint of cki_rec: tensors in the groups ``model``, ``accumulator`` and ``counts``.

    Args:
        path: A run directory or a checkpoint folder.

    Raises:
        UserError: It is damaged.
    """

    form, title = "own", "cki_rec"

    def __init__(self, path: Path) -> None:
        self._folder = locate(path)
        describe(self._folder)
        super().__init__(self._folder / TENSORS)
        self.path = path

    def digest(self) -> str:
        """Return a digest of the content."""
        return content_digest(self._folder)


def recognizes(path: Path) -> bool:
    """Return whether a path is a run directory or a checkpoint folder of this project."""
    return (locate(path) / DESCRIPTION).is_file()
