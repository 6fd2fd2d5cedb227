"""Rows of the tensors of a checkpoint, read from their place in the files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cki_rec.checkpoints.checkpoint import TENSORS
from cki_rec.checkpoints.reader import Reader
from cki_rec.checkpoints.tensors import untrusted
from cki_rec.config import UserError

NEAR = 4096
"""Bytes between two rows below which they are read together: disks read such pages anyway."""
MOST_TOGETHER = 4096
"""Rows that are read together at most."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows, and some of their columns, that lie in one piece in a file."""

    file: int
    start: int
    """Byte of the first entry."""
    first: int
    """Number of the first row."""
    size: torch.Size
    columns: slice


class RowReader:
    """The tensors of an undamaged checkpoint, any of their rows at a time.

    Memory is needed for the rows alone. Tensors may be stored in parts, by rows or columns, as
    any sharding plan writes them.

    Args:
        folder: The checkpoint.
        name: Name of the source, for messages.
        tensors: Folder of the tensors in it; "": the folder itself.

    Raises:
        UserError: The folder is not readable, or tensors are compressed.
    """

    def __init__(self, folder: Path, name: str, tensors: str = TENSORS) -> None:
        self.folder, self.name = folder / tensors, name
        self._open = ExitStack()
        self._files: dict[str, int] = {}
        self._states: dict[int, tuple[int, int]] = {}
        with untrusted(folder):
            reader = Reader(self.folder)
            metadata = reader.read_metadata()
            self.entries = {
                key: entry
                for key, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            parts: dict[str, list[_Part]] = {key: [] for key in self.entries}
            mode = FakeTensorMode()
            for index, place in metadata.storage_data.items():
                if index.fqn in self.entries:
                    entry = self.entries[index.fqn]
                    chunks = [c for c in entry.chunks if c.offsets == index.offset]
                    part = self._part(reader, place, chunks[0].offsets, mode)
                    if part.size != chunks[0].sizes:
                        raise ValueError(f"{place.relative_path} is of another checkpoint")
                    parts[index.fqn].append(part)
            self._parts = {k: sorted(v, key=lambda part: part.first) for k, v in parts.items()}

    def __enter__(self) -> RowReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def read(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor; all of it without ``stop``.

        Raises:
            UserError: A file is shorter than before, or cannot be read.
        """
        entry = self.entries[key]
        shape = list(entry.size)
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape[0] = stop - first
        target = torch.empty(shape, dtype=entry.properties.dtype)
        if not shape:
            self._fill(target, self._parts[key][0], 0)
            return target
        assert stop is not None
        for part in self._overlapping(key, first, stop):
            begin, end = max(first, part.first), min(stop, part.first + part.size[0])
            if begin >= end:
                continue
            rows = target[begin - first : end - first]
            skipped = (begin - part.first) * part.size[1:].numel() * target.element_size()
            if rows.ndim < 2 or part.size[1:] == rows.shape[1:]:
                self._fill(rows, part, skipped)
            else:
                columns = torch.empty((end - begin, *part.size[1:]), dtype=target.dtype)
                self._fill(columns, part, skipped)
                rows[:, part.columns] = columns
        return target

    def read_rows(self, key: str, rows: Tensor) -> Tensor:
        """Return single rows of a tensor; those that lie near each other are read together.

        Args:
            key: Name of the tensor.
            rows: ``(R,)`` int64, ascending.

        Raises:
            UserError: A file is shorter than before, or cannot be read.
        """
        size, dtype = self.entries[key].size, self.entries[key].properties.dtype
        target = torch.empty((len(rows), *size[1:]), dtype=dtype)
        near = max(1, NEAR // max(1, self.row_bytes([key])))
        ends = [*(rows.diff() > near).nonzero()[:, 0].add(1).tolist(), len(rows)]
        begin = 0
        for end in ends if len(rows) else ():
            for start in range(begin, end, MOST_TOGETHER):
                wanted = rows[start : min(start + MOST_TOGETHER, end)]
                first = int(wanted[0])
                block = self.read(key, first, int(wanted[-1]) + 1)
                target[start : start + len(wanted)] = block[wanted - first]
            begin = end
        return target

    def keys(self, prefix: str) -> list[str]:
        """Return the names of the tensors that begin with ``prefix``."""
        return [key for key in self.entries if key.startswith(prefix)]

    def row_bytes(self, keys: Iterable[str]) -> int:
        """Return the bytes of one row of each of some tensors."""
        return sum(
            self.entries[key].size[1:].numel() * self.entries[key].properties.dtype.itemsize
            for key in keys
        )

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened.

        Raises:
            UserError: One has changed.
        """
        for path, file in self._files.items():
            if _state(os.stat(path)) != self._states[file]:
                raise UserError(
                    f"{path}: has changed while {self.name} was merged; the result would mix two"
                    " models. Start again when nothing writes there"
                )

    def _overlapping(self, key: str, first: int, stop: int) -> Iterator[_Part]:
        """Yield the parts of a tensor that hold some of a range of rows."""
        parts = self._parts[key]
        begin = bisect_right(parts, first, key=lambda part: part.first + part.size[0])
        for part in parts[begin:]:
            if part.first >= stop:
                return
            yield part

    def _part(self, reader: Any, place: Any, offsets: Any, mode: FakeTensorMode) -> _Part:
        path = self.folder / place.relative_path
        if place.transform_descriptors:
            raise ValueError("its tensors are compressed")
        with path.open("rb") as file, mode:  # without values
            stored: Tensor = torch.load(reader._slice_file(file, place), weights_only=True)
        begin = stored.untyped_storage()._checkpoint_offset
        if begin is None or not stored.is_contiguous():
            raise ValueError("a tensor is not stored in one piece")
        start = place.offset + begin + stored.storage_offset() * stored.element_size()
        if str(path) not in self._files:
            number = os.open(path, os.O_RDONLY)
            self._open.callback(os.close, number)
            self._files[str(path)] = number
            self._states[number] = _state(os.fstat(number))
        width = stored.shape[1] if stored.ndim > 1 else 1
        column = offsets[1] if len(offsets) > 1 else 0
        columns = slice(column, column + width)
        first = offsets[0] if len(offsets) else 0
        return _Part(self._files[str(path)], start, first, stored.shape, columns)

    def _fill(self, target: Tensor, part: _Part, skipped: int) -> None:
        remaining = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
        place = part.start + skipped
        while len(remaining):
            count = os.preadv(part.file, [remaining], place)
            if not count:
                path = next(p for p, number in self._files.items() if number == part.file)
                raise UserError(f"{path}: ends too early; has it changed while it was read?")
            remaining, place = remaining[count:], place + count


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
