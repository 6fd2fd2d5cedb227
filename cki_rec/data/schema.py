"""The schema of encoded rows and batches of them: ``Feature``, ``FeatureSchema``, ``Batch``.

Shape legend: B rows, F features, N ids of all rows and features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cki_rec.data.columns import FIRST_ID as FIRST_ID
from cki_rec.data.columns import OOV_ID as OOV_ID
from cki_rec.data.columns import PADDING_ID as PADDING_ID


@dataclass(frozen=True, slots=True)
class Feature:
    """One input field. Features that share ``table`` share vocabulary and embeddings."""

    name: str
    table: str
    """Table of embeddings; empty for a number."""
    kind: str
    """``categorical`` (one id a row), ``multi`` (a set of ids), ``history`` (ids by time) or
    ``numeric`` (a float)."""


@dataclass(frozen=True, slots=True)
class FeatureSchema:
    """The features of a data set and the size of each vocabulary, reserved ids included."""

    features: tuple[Feature, ...]
    table_sizes: dict[str, int]
    vocabulary_hashes: dict[str, str]
    """Table -> sha256 of its tokens in id order; equal hashes mean equal ids. Numeric fields have
    an entry too, by name, which covers the facts learned about them (scale, edges)."""

    @property
    def lookups(self) -> tuple[Feature, ...]:
        """Return the features that are looked up in tables, which are all but numbers."""
        return tuple(f for f in self.features if f.kind != "numeric")

    @property
    def numbers(self) -> tuple[Feature, ...]:
        """Return the features of kind ``numeric``."""
        return tuple(f for f in self.features if f.kind == "numeric")

    def without_histories(self) -> FeatureSchema:
        """Return the schema without features of kind ``history``."""
        return replace(self, features=tuple(f for f in self.features if f.kind != "history"))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, which ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FeatureSchema:
        """Return the schema that ``to_json`` returned."""
        return cls(
            features=tuple(Feature(**f) for f in value["features"]),
            table_sizes=dict(value["table_sizes"]),
            vocabulary_hashes=dict(value["vocabulary_hashes"]),
        )


@dataclass(slots=True)
class Batch:
    """Rows of a batch: the content of a KeyedJaggedTensor, numbers and labels."""

    values: Tensor
    """``(N,)`` int64 ids: all of feature 0 row by row, then all of feature 1, ..."""
    lengths: Tensor | None
    """``(F * B,)`` int32 ids per feature and row, in the order of ``values``; None: all 1."""
    label: Tensor
    """``(B,)`` float32, 0 or 1."""
    numbers: Tensor | None = None
    """``(B, features of kind numeric)`` float32; None: the schema has no numbers."""
    step_rows: int | None = None
    """Rows of the step on all processes, of which the batch is a share; None: B."""
    stride: int | None = None
    """Rows of the largest share of the step; all processes look up this many. None: B."""
    target: Tensor | None = None
    """``(B,)`` float32 logits of a teacher; None: there is no teacher."""

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
        for tensor in (self.values, self.lengths, self.label, self.numbers, self.target):
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
            None if self.target is None else change(self.target),
        )


def random_batch(schema: FeatureSchema, rows: int, seed: int) -> Batch:
    """Return a batch of random rows, whose ids are drawn from the whole vocabularies.

    Sets and histories of a row all hold the same number of ids, 1 to 5. Labels are 0.
    """
    draw = torch.Generator().manual_seed(seed)
    several = torch.randint(1, 6, (rows,), generator=draw)
    values, lengths = [], []
    for feature in schema.lookups:
        length = torch.ones_like(several) if feature.kind == "categorical" else several
        size = schema.table_sizes[feature.table]
        lowest = min(1, size - 1)  # 0 is padding, but in a table of one row
        values.append(torch.randint(lowest, size, (int(length.sum()),), generator=draw))
        lengths.append(length)
    numbers = torch.randn(rows, len(schema.numbers), generator=draw) if schema.numbers else None
    return Batch(
        torch.cat(values) if values else torch.zeros(0, dtype=torch.int64),
        torch.cat(lengths).to(torch.int32) if lengths else None,
        torch.zeros(rows),
        numbers,
    )
