"""Batches hold the requested rows, feature by feature."""

import numpy as np
import pytest
import torch
from samples import EMBEDDED, make_data

from cki_rec.config import Split, UserError
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding.store import EncodedDataset, prepare
from cki_rec.data.loader import SHUFFLE_STREAM, Loader
from cki_rec.data.permutation import Permutation
from cki_rec.data.schema import Batch, Feature, FeatureSchema
from cki_rec.data.test_labels import all_labels
from cki_rec.evaluation.metrics import auc

FIELDS = ["genres", "user", "history", "item", "year"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> EncodedDataset:
    split = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)
    data = make_data(raw=str(EMBEDDED), fields=FIELDS, history_length=5, split=split)
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
    np.testing.assert_array_equal(batch.label, dataset.labels(rows))
    assert (batch.values.dtype, batch.lengths.dtype) == (torch.int64, torch.int32)
    assert batch.label.dtype == torch.float32


def test_labels_of_test_rows_are_nan_in_batches_and_elsewhere(dataset):
    rows = np.arange(len(dataset))
    (batch,) = Loader(dataset, dataset.schema, rows, len(rows))
    is_test = dataset.split == 2
    known = np.where(is_test, np.nan, all_labels(dataset))
    np.testing.assert_array_equal(batch.label, known)
    np.testing.assert_array_equal(dataset.labels(rows), known)
    assert is_test.sum() == len(dataset.rows("test")) > 0
    with pytest.raises(ValueError, match="is nan, not 0 or 1"):
        auc(dataset.labels(dataset.rows("test")), np.zeros(is_test.sum()))


@pytest.mark.parametrize("has_histories", [True, False])
def test_batches_in_order_equal_rows(dataset, has_histories):
    schema = dataset.schema if has_histories else dataset.schema.without_histories()
    rows = dataset.rows("test")[:100]
    result = list(Loader(dataset, schema, rows, 32))
    assert [len(batch) for batch in result] == [32, 32, 32, 4]
    for number, batch in enumerate(result):
        check(batch, dataset, schema, rows[32 * number : 32 * number + 32])


def test_shuffled_batches_hold_each_row_once_in_the_order_of_the_seed(dataset):
    rows = dataset.rows("valid")[:200]
    order = rows[Permutation(200, 7, 0, SHUFFLE_STREAM)(np.arange(200))]
    assert sorted(order.tolist()) == rows.tolist()
    result = list(Loader(dataset, dataset.schema, rows, 64, seed=7))
    assert sum(len(batch) for batch in result) == 200
    for number, batch in enumerate(result):
        check(batch, dataset, dataset.schema, order[64 * number : 64 * number + 64])
    assert order.tolist() != rows.tolist()


def test_second_epoch_has_another_order(dataset):
    loader = Loader(dataset, dataset.schema, dataset.rows("valid"), 20_000, seed=0)
    (first,), (second,) = list(loader), list(loader)
    assert first.values.tolist() != second.values.tolist()
    assert sorted(first.values.tolist()) == sorted(second.values.tolist())


def test_rows_without_any_id_have_length_zero(dataset):
    genres = dataset.column("genres")
    rows = np.flatnonzero(genres.lengths == 0)[:3]
    assert len(rows) == 3
    schema = FeatureSchema((Feature("genres", "genres", "multi"),), {"genres": 22}, {})
    (batch,) = Loader(dataset, schema, rows, 8)
    assert batch.values.tolist() == []
    assert batch.lengths.tolist() == [0, 0, 0]


def test_change_of_schema_changes_the_batch(dataset):
    rows = dataset.rows("valid")[:10]
    for schema in (dataset.schema, dataset.schema.without_histories(), dataset.schema):
        check(next(iter(Loader(dataset, schema, rows, 10))), dataset, schema, rows)


def test_batch_larger_than_rows_is_short(dataset):
    (batch,) = Loader(dataset, dataset.schema, dataset.rows("valid")[:7], 4096)
    assert len(batch) == 7


def test_batch_size_below_one_is_refused_at_once(dataset):
    with pytest.raises(UserError, match="batch_size=0"):
        Loader(dataset, dataset.schema, dataset.rows("valid"), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_copied_to_cuda_equal_those_on_the_cpu(dataset):
    rows, device = dataset.rows("train"), torch.device("cuda")
    on_cpu = Loader(dataset, dataset.schema, rows, 512, seed=1)
    on_cuda = Loader(dataset, dataset.schema, rows, 512, seed=1, device=device)
    for expected, result in zip(on_cpu, on_cuda, strict=True):
        assert result.values.device.type == "cuda"
        assert torch.equal(result.values.cpu(), expected.values)
        assert torch.equal(result.label.cpu(), expected.label)
