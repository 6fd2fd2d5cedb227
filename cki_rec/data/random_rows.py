"""Random rows, drawn from the row counts of checkpoints: no data is needed.

Fields are drawn independently, each id as often as training rows looked it up. Fields that share a
table share its counts. The mean length of sets and histories follows from the counts, if another
table has one id per row. Numbers are standard normal.

Shape legend: N rows, C columns of ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.data.columns import Ints, Ragged
from cki_rec.data.schema import OOV_ID, FeatureSchema

LONGEST = 50
"""Most ids of a set or a history."""


class RandomRows:
    """Rows without labels, in memory, in the form of an encoded data set.

    Args:
        schema: The features.
        counts: Per table ``(V,)``, the lookups of each id by training rows.
        num_rows: N.
        seed: Seed of all draws.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        counts: Mapping[str, NDArray[Any]],
        num_rows: int,
        seed: int,
    ) -> None:
        draw = np.random.default_rng(seed)
        lengths = mean_lengths(schema, counts)
        self.schema, self._num_rows = schema, num_rows
        self.id_columns = [f.name for f in schema.lookups if f.kind == "categorical"]
        self.ids = np.empty((num_rows, len(self.id_columns)), np.int32)
        self._ragged: dict[str, Ragged] = {}
        for feature in schema.lookups:
            count = counts[feature.table]
            if feature.kind == "categorical":
                place = self.id_columns.index(feature.name)
                self.ids[:, place] = _drawn(count, num_rows, draw)
                continue
            length = np.minimum(draw.poisson(lengths[feature.name], num_rows), LONGEST)
            if feature.kind == "multi":
                length = np.maximum(length, 1)
            ends = np.cumsum(length, dtype=np.int64)
            values = _drawn(count, int(ends[-1]) if num_rows else 0, draw)
            self._ragged[feature.name] = Ragged(values, ends - length, length.astype(np.int32))
        self.numbers = draw.standard_normal((num_rows, len(schema.numbers)), np.float32)

    def __len__(self) -> int:
        """Return N."""
        return self._num_rows

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field."""
        if name in self._ragged:
            return self._ragged[name]
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        return self.numbers[:, [feature.name for feature in self.schema.numbers].index(name)]

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return NaN: random rows have no labels."""
        return np.full(len(rows), np.nan, np.float32)


def mean_lengths(schema: FeatureSchema, counts: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return the mean number of ids a row of every set and history.

    It is 1 if no table has one id per row.
    """
    kinds: dict[str, list[str]] = {}
    for feature in schema.lookups:
        kinds.setdefault(feature.table, []).append(feature.kind)
    plain = [t for t, of_table in kinds.items() if set(of_table) == {"categorical"}]
    rows = min((float(counts[t].sum()) / len(kinds[t]) for t in plain), default=0.0)
    lengths = {}
    for feature in schema.lookups:
        if feature.kind == "categorical":
            continue
        of_table = kinds[feature.table]
        single = of_table.count("categorical")
        several = len(of_table) - single
        length = (float(counts[feature.table].sum()) / rows - single) / several if rows else 1.0
        lengths[feature.name] = max(length, 0.0)
    return lengths


def _drawn(count: NDArray[Any], num: int, draw: np.random.Generator) -> NDArray[np.int32]:
    """Return ``num`` ids, each with a probability in proportion to its count."""
    if not count.sum():
        return np.full(num, min(OOV_ID, len(count) - 1), np.int32)
    ends = np.cumsum(count, dtype=np.float64)
    ids = np.searchsorted(ends, draw.random(num) * ends[-1], side="right")
    inside: NDArray[np.int32] = np.minimum(ids, len(count) - 1).astype(np.int32)
    return inside
