"""Batches hold the rows asked for, feature by feature."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cki_rec.config import Data, Partition, Split, UserError
from cki_rec.data.encode import Ragged
from cki_rec.data.loader import batches
from cki_rec.data.schema import Batch, Feature, FeatureSchema
from cki_rec.data.store import EncodedDataset, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> EncodedDataset:
    data = Data(
        name="small",
        format="movielens",
        raw=str(ROOT / "data" / "ml-latest-small.zip"),
        fields=["genres", "user", "history", "item", "year"],
        label_threshold=4.0,
        history_length=5,
        min_count=1,
        on_bad_row="error",
        split=Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0),
        partition=Partition(by="none", parts=1, seed=0),
        part=None,
    )
    return prepare(data, tmp_path_factory.mktemp("encoded"))


def by_hand(dataset: EncodedDataset, schema: FeatureSchema, rows) -> tuple[list[int], list[int]]:
    values, lengths = [], []
    for feature in schema.features:
        column = dataset.column(feature.name)
        for row in rows:
            if isinstance(column, Ragged):
                ids = column.values[column.starts[row] :][: column.lengths[row]].tolist()
            else:
                ids = [int(column[row])]
            values += ids
            lengths.append(len(ids))
    return values, lengths


def check(batch: Batch, dataset: EncodedDataset, schema: FeatureSchema, rows) -> None:
    values, lengths = by_hand(dataset, schema, rows)
    assert batch.values.tolist() == values
    assert batch.lengths.tolist() == lengths
    assert batch.label.tolist() == dataset.label[rows].tolist()
    assert (batch.values.dtype, batch.lengths.dtype) == (torch.int64, torch.int32)
    assert batch.label.dtype == torch.float32


@pytest.mark.parametrize("has_histories", [True, False])
def test_batches_in_order_equal_rows(dataset, has_histories):
    schema = dataset.schema if has_histories else dataset.schema.without_histories()
    rows = dataset.rows("test")[:100]
    found = list(batches(dataset, schema, rows, 32, None))
    assert [len(batch) for batch in found] == [32, 32, 32, 4]
    for number, batch in enumerate(found):
        check(batch, dataset, schema, rows[32 * number : 32 * number + 32])


def test_shuffled_batches_hold_each_row_once_in_the_generators_order(dataset):
    rows = dataset.rows("valid")[:200]
    order = np.random.default_rng(7).permutation(rows)
    found = list(batches(dataset, dataset.schema, rows, 64, np.random.default_rng(7)))
    assert sum(len(batch) for batch in found) == 200
    for number, batch in enumerate(found):
        check(batch, dataset, dataset.schema, order[64 * number : 64 * number + 64])
    assert order.tolist() != rows.tolist()


def test_second_epoch_has_another_order(dataset):
    generator = np.random.default_rng(0)
    rows = dataset.rows("valid")
    first, second = (
        next(iter(batches(dataset, dataset.schema, rows, 64, generator))).values.tolist()
        for _ in range(2)
    )
    assert first != second


def test_rows_without_any_id_have_length_zero(dataset):
    genres = dataset.column("genres")
    rows = np.flatnonzero(genres.lengths == 0)[:3]
    assert len(rows) == 3
    schema = FeatureSchema((Feature("genres", "genres", "multi"),), {"genres": 22}, {})
    (batch,) = batches(dataset, schema, rows, 8, None)
    assert batch.values.tolist() == []
    assert batch.lengths.tolist() == [0, 0, 0]


def test_change_of_schema_changes_the_batch(dataset):
    rows = dataset.rows("valid")[:10]
    for schema in (dataset.schema, dataset.schema.without_histories(), dataset.schema):
        check(next(iter(batches(dataset, schema, rows, 10, None))), dataset, schema, rows)


def test_batch_larger_than_rows_is_short(dataset):
    (batch,) = batches(dataset, dataset.schema, dataset.rows("valid")[:7], 4096, None)
    assert len(batch) == 7


def test_batch_size_below_one_is_refused_at_once(dataset):
    with pytest.raises(UserError, match="batch_size=0"):
        batches(dataset, dataset.schema, dataset.rows("valid"), 0, None)
