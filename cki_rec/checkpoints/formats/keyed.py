"""The seam over tables by raw key: keys and the rows that belong to them, in blocks.

Shape legend: V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
KeyedRows = dict[str, Any]
"""Some rows: ``KEYS`` ``(V,)`` int64 or a Series of texts, and per column ``(V, width)``."""
KEYS, VALUES, COUNTS, SCORES, STATE = "keys", "values", "counts", "scores", "state"
"""Columns. Counts are training rows that looked a key up; scores are another measure of use, of
one word or more; state is that of the optimizer."""
EMPTY = np.iinfo(np.int64).max
"""The raw id of an empty slot in TorchRec."""
_M1, _M2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers beside every key."""

    dtype: np.dtype[Any]
    width: int


class KeyedTable(Protocol):
    """A table by raw key. Opening it reads no values."""

    @property
    def path(self) -> str:
        """Return its checkpoint, as the user named it."""

    @property
    def name(self) -> str:
        """Return its name there."""

    @property
    def title(self) -> str:
        """Return its form in words."""

    @property
    def num_rows(self) -> int:
        """Return the number of keys."""

    @property
    def is_text(self) -> bool:
        """Return whether keys are texts, not integers."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of its values at rest; blocks hold float32, or float64."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Return ``VALUES``, and those of ``COUNTS``, ``SCORES`` and ``STATE`` that it has."""

    def blocks(self, size: int) -> Iterator[KeyedRows]:
        """Yield all rows, ``size`` at a time."""

    def files(self) -> list[Path]:
        """Return the files that hold the keys, and values if no checkpoint does."""


def mixed(keys: Array) -> Array:
    """Return ``(V,)`` uint64 numbers that are spread evenly, one for every int64 key.

    Different keys have different numbers, so rows that are equal in them belong together.

    Reference:
        The finalizer of MurmurHash3 (Appleby, public domain).
    """
    x = keys.view(np.uint64).copy()
    for factor in (_M1, _M2):
        x ^= x >> np.uint64(33)
        x *= factor
    x ^= x >> np.uint64(33)
    return x


def values_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the type in which values of a type are merged."""
    return np.dtype(np.float64 if dtype == torch.float64 else np.float32)
