"""Random rows follow the row counts of checkpoints, and load like rows of a data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cki_rec.data.loader import Loader
from cki_rec.data.random_rows import LONGEST, RandomRows, mean_lengths
from cki_rec.data.schema import OOV_ID, Feature, FeatureSchema

SCHEMA = FeatureSchema(
    features=(
        Feature("user", "user", "categorical"),
        Feature("item", "item", "categorical"),
        Feature("genres", "genres", "multi"),
        Feature("history", "item", "history"),
        Feature("price", "price", "numeric"),
    ),
    table_sizes={"user": 6, "item": 5, "genres": 4},
    vocabulary_hashes={},
)
COUNTS = {  # 100 rows: histories of 3 items, 1.5 genres each
    "user": np.array([0, 0, 10, 20, 30, 40]),
    "item": np.array([0, 40, 0, 120, 240]),
    "genres": np.array([0, 0, 100, 50]),
}


def drawn(num_rows=20_000, seed=1, counts=COUNTS) -> RandomRows:
    return RandomRows(SCHEMA, counts, num_rows, seed)


def ids_of(rows: RandomRows, name: str) -> np.ndarray:
    column = rows.column(name)
    return column if isinstance(column, np.ndarray) else column.values


@pytest.mark.parametrize("name", ["user", "item", "genres", "history"])
def test_ids_are_drawn_as_often_as_they_were_looked_up(name):
    table = "item" if name == "history" else name
    ids = ids_of(drawn(), name)
    found = np.bincount(ids, minlength=len(COUNTS[table])) / len(ids)
    np.testing.assert_allclose(found, COUNTS[table] / COUNTS[table].sum(), atol=0.015)
    assert not np.isin(ids, np.flatnonzero(COUNTS[table] == 0)).any()


def test_lengths_follow_the_counts():
    assert mean_lengths(SCHEMA, COUNTS) == {"genres": 1.5, "history": 3.0}
    rows = drawn()
    lengths = {name: rows.column(name).lengths for name in ("genres", "history")}
    assert lengths["history"].mean() == pytest.approx(3, abs=0.05)
    assert lengths["genres"].min() == 1  # a set has one id at least
    assert lengths["history"].min() == 0
    long = drawn(200, counts=COUNTS | {"item": COUNTS["item"] * 1000})
    assert long.column("history").lengths.max() == LONGEST


def test_lengths_are_1_if_no_field_of_one_id_has_its_own_table():
    features = tuple(f for f in SCHEMA.features if f.name in ("item", "history"))
    alone = FeatureSchema(features, {"item": 5}, {})
    assert mean_lengths(alone, COUNTS) == {"history": 1.0}
    assert mean_lengths(SCHEMA, {t: c * 0 for t, c in COUNTS.items()})["genres"] == 1.0


def test_fields_are_independent():
    rows = drawn()
    both = np.corrcoef(ids_of(rows, "user"), ids_of(rows, "item"))[0, 1]
    assert abs(both) < 0.03


def test_a_table_without_counts_gives_the_id_of_unknown_tokens():
    rows = drawn(50, counts=COUNTS | {"user": COUNTS["user"] * 0})
    assert (ids_of(rows, "user") == OOV_ID).all()


def test_equal_seeds_give_equal_rows():
    for name in ("user", "history", "price"):
        one, same, other = (ids_of(drawn(100, seed), name) for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_they_load_like_rows_of_a_data_set():
    rows = drawn(64)
    assert len(rows) == 64
    targets = np.arange(64, dtype=np.float32)
    numbers = np.arange(64)
    loader = Loader(rows, SCHEMA, numbers, 16, seed=3, targets=lambda rows: targets[rows])
    seen = []
    for batch in loader:
        lengths_FB = batch.lengths.view(4, -1)
        parts = batch.values.split(lengths_FB.sum(1).tolist())
        numbers = batch.target.long().numpy()
        assert parts[0].tolist() == rows.column("user")[numbers].tolist()
        values, lengths = rows.column("history").ids(numbers)
        assert parts[3].tolist() == values.tolist()
        assert lengths_FB[3].tolist() == lengths.tolist()
        np.testing.assert_array_equal(batch.numbers[:, 0], rows.column("price")[numbers])
        assert bool(torch.isnan(batch.label).all())
        seen += numbers.tolist()
    assert sorted(seen) == list(range(64))


def test_no_rows():
    rows = drawn(0)
    assert len(rows) == 0
    assert len(ids_of(rows, "history")) == len(ids_of(rows, "user")) == 0
