"""Encoded data set -> batches, gathered from columns held in memory.

Shape legend: B rows, F features, N rows of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from cki_rec.config import UserError
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encode import Ids, Ints, Ragged
from cki_rec.data.schema import Batch, FeatureSchema


class Columns:
    """The columns of a schema in memory, laid out for gathering random rows.

    Args:
        dataset: Where they come from.
        schema: Which, in order.
    """

    def __init__(self, dataset: EncodedDataset, schema: FeatureSchema) -> None:
        names = [feature.name for feature in schema.features]
        columns = {name: dataset.column(name) for name in names}
        fixed = [ids for ids in columns.values() if not isinstance(ids, Ragged)]
        # row by row: one cache line serves all fields of a randomly chosen row
        self.fixed_NF: Ids = np.empty((len(dataset), len(fixed)), dtype=np.int32)
        for position, ids in enumerate(fixed):
            self.fixed_NF[:, position] = ids
        self.ragged: list[Ragged | None] = [_in_memory(columns[name]) for name in names]
        self.label_N: NDArray[np.uint8] = np.array(dataset.label)

    def batch(self, rows: Ints) -> Batch:
        """Return ``rows`` as one batch."""
        size = len(rows)
        fixed_FB = self.fixed_NF[rows].T
        positions = [None if r is None else r.positions(rows) for r in self.ragged]
        total = sum(size if p is None else len(p) for p in positions)
        values = np.empty(total, dtype=np.int64)
        lengths = np.ones((len(positions), size), dtype=np.int32)
        start = next_fixed = 0
        for feature, (ragged, position) in enumerate(zip(self.ragged, positions, strict=True)):
            if ragged is None or position is None:
                values[start : start + size] = fixed_FB[next_fixed]
                next_fixed += 1
                start += size
            else:
                values[start : start + len(position)] = ragged.values[position]
                lengths[feature] = ragged.lengths[rows]
                start += len(position)
        return Batch(
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            label=torch.from_numpy(self.label_N[rows].astype(np.float32)),
        )


def batches(
    dataset: EncodedDataset,
    schema: FeatureSchema,
    rows: Ints,
    batch_size: int,
    generator: np.random.Generator | None,
) -> Iterator[Batch]:
    """Yield ``rows`` in batches, the last one shorter where they do not divide evenly.

    Args:
        dataset: Where rows come from; keeps the columns of the last schema used in memory.
        schema: Features, in the order of the batch.
        rows: Row numbers.
        batch_size: Rows per batch.
        generator: Draws the order; None: the order of ``rows``.

    Raises:
        UserError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"train.batch_size={batch_size}: expected 1 or more")
    return _batches(_columns(dataset, schema), rows, batch_size, generator)


def _batches(
    columns: Columns, rows: Ints, batch_size: int, generator: np.random.Generator | None
) -> Iterator[Batch]:
    order = rows if generator is None else generator.permutation(rows)
    for start in range(0, len(order), batch_size):
        yield columns.batch(order[start : start + batch_size])


def _columns(dataset: EncodedDataset, schema: FeatureSchema) -> Columns:
    if schema.features not in dataset.cache:
        dataset.cache.clear()
        dataset.cache[schema.features] = Columns(dataset, schema)
    columns = dataset.cache[schema.features]
    assert isinstance(columns, Columns)
    return columns


def _in_memory(column: Ids | Ragged) -> Ragged | None:
    """Return the arrays of a ragged column read into memory; None for one id a row."""
    if not isinstance(column, Ragged):
        return None
    return Ragged(np.array(column.values), np.array(column.starts), np.array(column.lengths))
