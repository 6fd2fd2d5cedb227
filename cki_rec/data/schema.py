"""What an encoded row is: ``Feature``, ``FeatureSchema``, ``Batch``.

Shape legend: B rows, F features, N ids of all rows and features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

PADDING_ID = 0
"""Fills fixed-length sequences; never counted, never pooled."""
UNSEEN_ID = 1
"""Stands for every token that no (or too few) training rows hold."""
FIRST_ID = 2
"""Id of the most frequent token; ids follow the order (-count, token)."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One input field. Features that share ``table`` share vocabulary and embeddings."""

    name: str
    table: str
    kind: str
    """``categorical`` (one id a row), ``multi`` (a set of ids) or ``history`` (ids by time)."""


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """The fields of a data set and the size of each vocabulary, reserved ids included."""

    features: tuple[Feature, ...]
    table_sizes: dict[str, int]
    vocabulary_hashes: dict[str, str]
    """sha256 of each table's tokens in id order: equal hash, equal meaning of every row."""

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
    """Rows as the tables read them: the content of a KeyedJaggedTensor, and the labels."""

    values: Tensor
    """``(N,)`` int64 ids: all of feature 0 row by row, then all of feature 1, ..."""
    lengths: Tensor
    """``(F * B,)`` int32 ids per feature and row, in the order of ``values``."""
    label: Tensor
    """``(B,)`` float32, 0 or 1."""

    def __len__(self) -> int:
        """Return B."""
        return len(self.label)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.values.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
            self.label.to(device, non_blocking=non_blocking),
        )
