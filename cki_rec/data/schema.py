"""What an encoded row is: ``Feature``, ``FeatureSchema``, ``Batch``.

Shape legend: B rows, F features, N ids of all rows and features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

PADDING_ID = 0
"""Fills fixed-length sequences; never counted, never pooled."""
OOV_ID = 1
"""Stands for every token that no (or too few) training rows hold."""
FIRST_ID = 2
"""Id of the most frequent token; ids follow the order (-count, token)."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input field. Features that share ``table`` share vocabulary and embeddings."""

    name: str
    table: str
    """Empty for a number."""
    kind: str
    """``categorical`` (one id a row), ``multi`` (a set of ids), ``history`` (ids by time) or
    ``numeric`` (a float)."""


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """The fields of a data set and the size of each vocabulary, reserved ids included."""

    features: tuple[Feature, ...]
    table_sizes: dict[str, int]
    vocabulary_hashes: dict[str, str]
    """sha256 of each table's tokens in id order: equal hash, equal meaning of every row. Of fields
    made of numbers, by their name, also of what was learnt about them (scale, edges)."""

    @property
    def lookups(self) -> tuple[Feature, ...]:
        """Return the features that are looked up in tables: all but numbers."""
        return tuple(f for f in self.features if f.kind != "numeric")

    @property
    def numbers(self) -> tuple[Feature, ...]:
        """Return the features of kind ``numeric``."""
        return tuple(f for f in self.features if f.kind == "numeric")

    def without_histories(self) -> FeatureSchema:
        """Return the schema without features of kind ``history``."""
        return replace(self, features=tuple(f for f in self.features if f.kind != "history"))

    def to_json(self) -> dict[str, Any]:
        """Return a form that ``json.dumps`` takes and ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FeatureSchema:
        """Return the schema that ``to_json`` wrote."""
        return cls(
            features=tuple(Feature(**f) for f in value["features"]),
            table_sizes=dict(value["table_sizes"]),
            vocabulary_hashes=dict(value["vocabulary_hashes"]),
        )


@dataclass(slots=True)
class Batch:
    """Rows as the tables read them: the content of a KeyedJaggedTensor, numbers, and labels."""

    values: Tensor
    """``(N,)`` int64 ids: all of feature 0 row by row, then all of feature 1, ..."""
    lengths: Tensor | None
    """``(F * B,)`` int32 ids per feature and row, in the order of ``values``; None: one each."""
    label: Tensor
    """``(B,)`` float32, 0 or 1."""
    numbers: Tensor | None = None
    """``(B, features of kind numeric)`` float32; None: there are none."""
    step_rows: int | None = None
    """Rows of the step that the batch is a share of, all processes together; None: B."""
    stride: int | None = None
    """Rows of the largest share, whose shape all processes look up; None: B."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.label)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which CUDA copies asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the batch until ``stream`` has used it."""
        for tensor in (self.values, self.lengths, self.label, self.numbers):
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.values),
            None if self.lengths is None else change(self.lengths),
            change(self.label),
            None if self.numbers is None else change(self.numbers),
            self.step_rows,
            self.stride,
        )
