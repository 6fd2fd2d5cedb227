"""Open files of a checkpoint, and rows of the tensors that lie in one piece in them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cki_rec.checkpoints.formats.stored import Place, check_range, damaged
from cki_rec.config import UserError


class Files:
    """Open files, and the tensors in them."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._numbers: dict[Path, int] = {}
        self._states: dict[Path, tuple[int, int]] = {}

    def read(self, place: Place, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor, and read no others.

        Raises:
            UserError: The file ends too early.
        """
        stop, shape = check_range(place.entry, first, stop), list(place.entry.shape)
        if shape:
            shape[0] = stop - first
        target = torch.empty(shape, dtype=place.entry.dtype)
        begin = place.start + first * place.row_bytes()
        left = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
        while len(left):
            count = os.preadv(self._number(place.file), [left], begin)
            if not count:
                raise damaged(place.file, "it ends too early; has it changed while it was read?")
            left, begin = left[count:], begin + count
        return target

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened.

        Raises:
            UserError: One has changed.
        """
        for path, state in self._states.items():
            if _state(os.stat(path)) != state:
                raise UserError(
                    f"{path}: has changed while it was merged; the result would mix two models."
                    " Start again when nothing writes there"
                )

    def close(self) -> None:
        """Close all files."""
        self._open.close()
        self._numbers.clear()

    def _number(self, file: Path) -> int:
        if file not in self._numbers:
            self._numbers[file] = number = os.open(file, os.O_RDONLY)
            self._open.callback(os.close, number)
            self._states[file] = _state(os.fstat(number))
        return self._numbers[file]


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
