"""Rows of the tensors of a checkpoint, read from their place in the files."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

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
            chunks = {
                (key, tuple(chunk.offsets)): chunk
                for key, entry in self.entries.items()
                for chunk in entry.chunks
            }
            heads = _Heads(reader)
            for index, place in metadata.storage_data.items():
                if index.fqn in self.entries:
                    chunk = chunks[index.fqn, tuple(index.offset or ())]
                    parts[index.fqn].append(self._part(heads, place, chunk))
            self._parts = {k: sorted(v, key=lambda part: part.first) for k, v in parts.items()}
            self._firsts = {k: [part.first for part in v] for k, v in self._parts.items()}
            self._longest = {
                k: max((part.size[0] for part in v if part.size), default=0)
                for k, v in self._parts.items()
            }

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

    def _overlapping(self, key: str, first: int, stop: int) -> list[_Part]:
        """Return the parts of a tensor that may hold some of a range of rows."""
        parts, firsts = self._parts[key], self._firsts[key]
        begin = bisect_right(firsts, first - self._longest[key])
        return parts[begin : bisect_left(firsts, stop)]

    def _part(self, heads: _Heads, place: Any, chunk: ChunkStorageMetadata) -> _Part:
        path = str(self.folder / place.relative_path)
        if place.transform_descriptors:
            raise ValueError("its tensors are compressed")
        if path not in self._files:
            number = os.open(path, os.O_RDONLY)
            self._open.callback(os.close, number)
            self._files[path] = number
            self._states[number] = _state(os.fstat(number))
        start, size = heads.entries_of(self._files[path], place)
        if size != chunk.sizes:
            raise ValueError(f"{place.relative_path} is of another checkpoint")
        width = size[1] if len(size) > 1 else 1
        column = chunk.offsets[1] if len(size) > 1 else 0
        columns = slice(column, column + width)
        first = chunk.offsets[0] if len(size) else 0
        return _Part(self._files[path], start, first, size, columns)

    def _fill(self, target: Tensor, part: _Part, skipped: int) -> None:
        remaining = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
        place = part.start + skipped
        while len(remaining):
            count = os.preadv(part.file, [remaining], place)
            if not count:
                path = next(p for p, number in self._files.items() if number == part.file)
                raise UserError(f"{path}: ends too early; has it changed while it was read?")
            remaining, place = remaining[count:], place + count


class _Heads:
    """The bytes before the entries of stored tensors.

    Torch parses the first of those that are alike. They are alike for all blocks of one shape, up
    to the checksum of the entries.

    Args:
        reader: Reader of the checkpoint.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._known: dict[tuple[int, bytes], tuple[int, torch.Size]] = {}
        self._lengths: dict[int, int] = {}

    def entries_of(self, file: int, place: Any) -> tuple[int, torch.Size]:
        """Return the first byte of the entries of a stored tensor, and its shape.

        Raises:
            ValueError: It is not stored in one piece.
        """
        if length := self._lengths.get(place.length):
            head = _without_checksum(os.pread(file, length, place.offset))
            if (place.length, head) in self._known:
                begin, size = self._known[place.length, head]
                return place.offset + begin, size
        with os.fdopen(os.dup(file), "rb") as content:
            part: Any = self._reader._slice_file(content, place)
            stored: Tensor = torch.load(part, map_location="meta", weights_only=True)
        length = stored.untyped_storage()._checkpoint_offset
        if length is None or not stored.is_contiguous():
            raise ValueError("a tensor is not stored in one piece")
        head = _without_checksum(os.pread(file, length, place.offset))
        begin = int(length + stored.storage_offset() * stored.element_size())
        self._known[place.length, head] = begin, stored.shape
        self._lengths[place.length] = length
        return place.offset + begin, stored.shape


def _without_checksum(head: bytes) -> bytes:
    """Return the bytes before entries without their checksum, which the last header holds."""
    header = head.rfind(b"PK\x03\x04")
    return head[: header + 14] + head[header + 18 :]


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
