"""Which rows of a table a process holds, and means over the rows of all."""

from __future__ import annotations

import pytest

from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.engine import distributed, sharded

TABLE = "sparse.collection.embedding_bags.item.weight"


def schema_of(rows: int) -> FeatureSchema:
    return FeatureSchema((Feature("item", "item", "categorical"),), {"item": rows}, {"item": "h"})


@pytest.mark.parametrize("num", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 101])
def test_shares_are_even_and_cover_a_table_once(monkeypatch, num, size):
    monkeypatch.setattr(distributed, "world_size", lambda: num)
    shares = [list(range(size)[sharded.rows_of(size, number)]) for number in range(num)]
    if size < num or num == 1:
        assert shares == [list(range(size))] * num
        return
    assert [row for share in shares for row in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.setattr(distributed, "rank", lambda: num - 1)
    assert sharded.local_schema(schema_of(size)).table_sizes == {"item": len(shares[-1])}


def test_means_are_over_rows_and_not_over_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = [{TABLE: [1.0, 0.0], "bias": [0.5, 0.5]}, {TABLE: [0.25, 0.75], "bias": [0.5, 0.5]}]
    monkeypatch.setattr(distributed, "exchange", lambda _: parts)
    actual = sharded.mean_shares(parts[0], schema_of(3))  # one row and two
    assert actual == {TABLE: [0.5, 0.5], "bias": [0.5, 0.5]}
