"""Columns on disk: ``.npy`` files that are written block by block, and ragged columns.

Shape legend: N rows, M ids of all rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 1 << 16
"""Rows of a block. It must not change: sums are taken block by block."""
RAGGED = ("values", "starts", "lengths")
"""Files of a column with several ids per row."""
DOMAINS = "domain.values.json"
"""File with the values of the column by which rows are partitioned, in the order of indices."""
_HEADER_BYTES = 128

PADDING_ID = 0
"""Id that pads sequences; it is never counted and never pooled."""
OOV_ID = 1
"""Id of all tokens out of vocabulary: those in no training row, or in too few."""
FIRST_ID = 2
"""Id of the most frequent token; ids are ordered by (-count, token)."""
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]


class ColumnFile:
    """A ``.npy`` file of rows that is appended to, read and rewritten in blocks.

    Threads may read and write it at once. A pickled copy, in another process, opens the same file
    when it is used.

    Args:
        path: Path of the file; an existing file is replaced.
        dtype: Type of the values.
        width: Values per row; None: the array is one-dimensional.
    """

    def __init__(self, path: Path, dtype: type[np.generic], width: int | None = None) -> None:
        self.path, self._dtype, self._width = path, np.dtype(dtype), width
        self._row_bytes = self._dtype.itemsize * (1 if width is None else width)
        self.rows = 0
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._write_at(0, bytes(_HEADER_BYTES))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        self._release()

    def append(self, array: NDArray[Any]) -> None:
        """Append rows."""
        self.write(self.rows, array)
        self.rows += len(array)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of the rows ``start`` to ``stop``."""
        stop = max(start, min(stop, self.rows))
        shape = (stop - start,) if self._width is None else (stop - start, self._width)
        array = np.empty(shape, dtype=self._dtype)
        if not array.size:
            return array
        view, position = array.data.cast("B"), self._position(start)
        while len(view) and (count := os.preadv(self._open(), [view], position)):
            view, position = view[count:], position + count
        return array

    def write(self, start: int, array: NDArray[Any]) -> None:
        """Overwrite the rows from ``start`` on."""
        content = np.ascontiguousarray(array, dtype=self._dtype)
        if content.size:
            self._write_at(self._position(start), content.data.cast("B"))

    def mapped(self) -> NDArray[Any]:
        """Return the rows so far, memory-mapped."""
        self._finish()
        array: NDArray[Any] = np.load(self.path, mmap_mode="r")
        return array

    def close(self) -> None:
        """Write the header and close the file; do nothing if it is closed."""
        if self._fd is not None:
            try:
                self._finish()
            finally:
                self._release()

    def delete(self) -> None:
        """Close and delete the file."""
        self._release()
        self.path.unlink()

    def _position(self, row: int) -> int:
        return _HEADER_BYTES + row * self._row_bytes

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR)
        return self._fd

    def _release(self) -> None:
        fd, self._fd = self.__dict__.get("_fd"), None
        if fd is not None:
            os.close(fd)

    def _write_at(self, position: int, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while len(view):
            count = os.pwrite(self._open(), view, position)
            view, position = view[count:], position + count

    def _finish(self) -> None:
        """Write the header of a ``.npy`` file."""
        shape = (self.rows,) if self._width is None else (self.rows, self._width)
        header = repr({"descr": self._dtype.str, "fortran_order": False, "shape": shape})
        text = f"{header:<{_HEADER_BYTES - 11}}\n".encode("latin-1")
        length = (_HEADER_BYTES - 10).to_bytes(2, "little")
        self._write_at(0, b"\x93NUMPY\x01\x00" + length + text)


def allocate(path: Path, dtype: type[np.generic], num_rows: int) -> NDArray[Any]:
    """Create a ``.npy`` column of zeros, and return it memory-mapped and writable.

    The zeros are written to disk first, because a mapped file that outgrows the disk would kill
    the process.
    """
    file = ColumnFile(path, dtype)
    try:
        for start, stop in blocks(num_rows):
            file.append(np.zeros(stop - start, dtype=dtype))
    finally:
        file.close()
    array: NDArray[Any] = np.load(path, mmap_mode="r+")
    return array


def blocks(num_rows: int, size: int = BLOCK_ROWS) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each block of rows."""
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)


def add_counts(counts: Ints, codes: NDArray[Any]) -> None:
    """Add the number of occurrences of each code to ``counts``, in place."""
    if len(counts) <= 4 * len(codes):
        counts += np.bincount(codes, minlength=len(counts))
    else:
        np.add.at(counts, codes, 1)


@dataclass(frozen=True, slots=True)
class Ragged:
    """A column of several ids per row: row r holds ``values[starts[r] : starts[r] + lengths[r]]``.

    Rows may overlap, e.g. the histories of a user are windows on one list of liked items.
    """

    values: Ids
    """``(M,)``."""
    starts: Ints
    """``(N,)``."""
    lengths: Ids
    """``(N,)``."""

    def ids(self, rows: Ints | slice) -> tuple[Ids, Ids]:
        """Return the concatenated ids of ``rows``, and ``(len(rows),)`` ids per row."""
        lengths = np.asarray(self.lengths[rows])
        ends = np.cumsum(lengths, dtype=np.int64)
        shift = self.starts[rows] - (ends - lengths)
        positions: Ints = np.repeat(shift, lengths)
        positions += np.arange(len(positions), dtype=np.int64)
        return self.values[positions], lengths
