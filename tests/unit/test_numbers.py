"""Numbers as categories and as floats; selections, windows and sorts by blocks."""

import csv
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_data

from cki_rec.config import Split, UserError
from cki_rec.data.columns import blocks
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.history import histories
from cki_rec.data.encoding.numbers import (
    MISSING_KEY,
    as_number,
    as_token,
    bucket_codes,
    bucket_tokens,
    ordered_keys,
)
from cki_rec.data.encoding.split import Blocks, order_statistics, rows_by_user, sort_rows, windows
from cki_rec.data.encoding.store import prepare
from cki_rec.data.schema import FIRST_ID

INT64 = np.iinfo(np.int64)
SPLIT = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
ANY_INT64 = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([INT64.min, INT64.min + 1, -1, 0, INT64.max - 1, INT64.max]),
    st.integers(INT64.min, INT64.max),
)


@contextmanager
def blocks_of(size: int):
    """Let all passes over integers read blocks of ``size`` rows."""
    before = blocks.__defaults__
    blocks.__defaults__ = (size,)
    try:
        yield
    finally:
        blocks.__defaults__ = before


def number_field(transform: str, edges: tuple[float, ...] | None = None) -> Field:
    return Field(
        name="x", kind="numeric", column="x", table="x", transform=transform, min_count=1,
        hash_size=None, separator=None, max_length=None, prefix=None, edges=edges,
    )  # fmt: skip


def tokens_of(values: list, transform: str, edges=None, missing=None, dtype=pl.Float64):
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    return frame.select(as_token(number_field(transform, edges), missing)).to_series().to_list()


def numbers_of(values: list, transform: str, missing=None, dtype=pl.Float64) -> np.ndarray:
    frame = pl.DataFrame({"x": pl.Series(values, dtype=dtype)})
    return frame.select(as_number(number_field(transform), missing)).to_series().to_numpy()


@pytest.fixture
def encode_numbers(tmp_path):
    """Function (texts of column x, field, **options) -> the encoded rows of a csv."""
    made = []

    def make(texts: list[str], transform: str, **changes) -> EncodedDataset:
        made.append(tmp_path / f"{len(made)}.csv")
        with made[-1].open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["label", "x", "id"])
            writer.writerows([number % 2, text, "a"] for number, text in enumerate(texts))
        field = {"name": "x", "kind": "numeric", "transform": transform}
        field |= {"edges": changes.pop("edges")} if "edges" in changes else {}
        options = {"format": "csv", "raw": str(made[-1]), "fields": [field, "id"], "split": SPLIT}
        return prepare(make_data("default", **(options | changes)), tmp_path / "encoded")

    return make


def decoded(dataset: EncodedDataset) -> list[str | None]:
    tokens = [None, None, *dataset.vocabulary("x")]
    return [tokens[i] for i in dataset.column("x")]


def test_ln_squared_of_integers():
    values = list(range(-5, 1_000_001))
    want = [str(math.floor(math.log(x) ** 2) if x > 2 else x) for x in values]
    assert tokens_of(values, "ln_squared", dtype=pl.Int64) == want
    assert want[:12] == ["-5", "-4", "-3", "-2", "-1", "0", "1", "2", "1", "1", "2", "3"]


@settings(max_examples=200, deadline=None)
@given(x=st.floats(-1e6, 1e15, allow_nan=False))
def test_ln_squared_of_floats(x):
    want = math.floor(math.log(x) ** 2) if x > 2 else int(x)
    assert tokens_of([x], "ln_squared") == [str(want)]


def test_ln_squared_missing():
    assert tokens_of([None, 7], "ln_squared", dtype=pl.Int64) == [None, "3"]
    assert tokens_of([None, 7], "ln_squared", missing=0.0, dtype=pl.Int64) == ["0", "3"]
    assert tokens_of([None, 7.0], "ln_squared", missing=100.0) == ["21", "3"]


def test_ln_squared_of_a_number_below_int64(encode_numbers):
    try:
        dataset = encode_numbers(["1", "2", "-1e30"] * 20, "ln_squared")
    except UserError:
        return
    assert decoded(dataset)[:2] == ["1", "2"]
    assert decoded(dataset)[2] not in ("1", "2")


@pytest.mark.parametrize(
    ("value", "token"),
    [(-3, None), (0, None), (0.5, "0"), (10, "0"), (10.5, "1"), (20, "1"), (20.1, "2"), (95, "2"),
     (95.1, None), (None, None)],
)  # fmt: skip
def test_edges(value, token):
    assert tokens_of([value], "edges", edges=(0.0, 10.0, 20.0, 95.0)) == [token]


def test_edges_of_a_column(encode_numbers):
    dataset = encode_numbers(["5", "15", "", "99", "7"] * 20, "edges", edges=[0, 10, 20])
    assert decoded(dataset) == ["0", "1", "", "", "0"] * 20


def test_missing_number_of_edges():
    assert tokens_of([None], "edges", edges=(0.0, 10.0, 20.0), missing=15.0) == ["1"]


def test_two_edges_make_one_bucket():
    assert tokens_of([0, 1, 5, 6, None], "edges", edges=(0.0, 5.0)) == [
        None, "0", "0", None, None
    ]  # fmt: skip


def test_tokens_are_the_numbers():
    assert tokens_of([3, -1, None], "token", dtype=pl.Int64) == ["3", "-1", None]
    assert tokens_of([0.05, 3.5, None], "token") == ["0.05", "3.5", None]


def test_missing_number_leaves_tokens_of_others_alone():
    assert tokens_of([3, -1, None], "token", missing=0.0, dtype=pl.Int64) == ["3", "-1", "0"]


def test_numbers_before_standardization():
    result = numbers_of([0, 1, -1, 1e6, None], "log1p")
    np.testing.assert_allclose(result[:4], [0, math.log(2), -math.log(2), math.log1p(1e6)])
    assert math.isnan(result[4])
    assert numbers_of([None, 4], "as_is", missing=-1.0).tolist() == [-1, 4]


def test_log1p_is_standardized_by_training_rows(encode_numbers):
    draw = np.random.default_rng(0)
    texts = [str(int(x)) for x in draw.exponential(50, 3000) - 20]
    texts[::7] = [""] * len(texts[::7])
    dataset = encode_numbers(texts, "log1p")
    result, is_train = np.asarray(dataset.column("x"), np.float64), dataset.split == 0
    is_known = np.array([text != "" for text in texts])
    raw = np.array([float(text or "nan") for text in texts])
    logs = np.sign(raw) * np.log1p(np.abs(raw))
    mean, deviation = logs[is_train & is_known].mean(), logs[is_train & is_known].std()
    np.testing.assert_allclose(
        result[is_known], (logs[is_known] - mean) / deviation, rtol=1e-6, atol=1e-6
    )
    assert abs(result[is_train & is_known].mean()) < 1e-6
    assert abs(result[is_train & is_known].std() - 1) < 1e-6
    assert (result[~is_known] == 0).all()
    np.testing.assert_allclose(dataset.manifest["numbers"]["x"], [mean, deviation], rtol=1e-12)


def test_constant_and_empty_numbers_are_zero(encode_numbers):
    for texts in (["7"] * 50, [""] * 50, ["7", ""] * 25):
        assert (encode_numbers(texts, "log1p").column("x") == 0).all()


def test_as_is_keeps_values_and_fills_by_the_mean_of_training_rows(encode_numbers):
    texts = [str(x) for x in np.random.default_rng(1).normal(0.3, 2, 500).round(3)]
    texts[3::10] = [""] * len(texts[3::10])
    dataset = encode_numbers(texts, "as_is")
    raw = np.array([np.float32(text or "nan") for text in texts])
    is_train = (dataset.split == 0) & ~np.isnan(raw)
    mean = np.float32(raw[is_train].astype(np.float64).mean())
    assert dataset.column("x").tolist() == np.where(np.isnan(raw), mean, raw).tolist()
    assert dataset.manifest["numbers"]["x"] == [0.0, 1.0]


def test_numeric_missing_takes_the_place_of_missing_numbers(encode_numbers):
    dataset = encode_numbers(["1", "", "2.5"] * 20, "as_is", numeric_missing=-1.0)
    assert dataset.column("x").tolist() == [1.0, -1.0, 2.5] * 20


def test_number_too_large_for_float32_is_refused_or_stays_finite(encode_numbers):
    try:
        dataset = encode_numbers([*["1", "", "3"] * 20, "1e39"], "as_is")
    except UserError:
        return
    assert np.isfinite(dataset.column("x")).all()


def quantiles_by_hand(values: np.ndarray, is_train: np.ndarray, buckets: int) -> np.ndarray:
    known = np.sort(values[is_train & ~np.isnan(values)])
    ends = [known[math.ceil(len(known) * k / buckets) - 1] for k in range(1, buckets)]
    return np.searchsorted(np.unique(ends), values, side="left")


@pytest.mark.parametrize("buckets", [2, 5, 20])
@pytest.mark.parametrize("kind", ["distinct", "ties", "few"])
def test_quantile_buckets(buckets, kind, encode_numbers):
    draw = np.random.default_rng(2)
    size = 4 if kind == "few" else 1001
    values = {"distinct": draw.normal(size=1001) * 1e3, "ties": draw.integers(-9, 9, 1001) / 1.0,
              "few": draw.integers(0, size, 1001) / 2}[kind]  # fmt: skip
    texts = [str(x) for x in values]
    texts[::13] = [""] * len(texts[::13])
    values[::13] = np.nan
    dataset = encode_numbers(texts, "quantile", buckets=buckets)
    is_train = dataset.split == 0
    want = quantiles_by_hand(values, is_train, buckets)
    result = decoded(dataset)
    assert result == ["" if np.isnan(v) else str(b) for v, b in zip(values, want, strict=True)]
    sizes = np.bincount(want[is_train & ~np.isnan(values)])
    if kind == "distinct":
        assert len(sizes) == buckets
        assert sizes.max() - sizes.min() <= 1
    assert len(sizes) <= buckets


def test_quantiles_are_learned_from_training_rows_only(encode_numbers):
    draw = np.random.default_rng(3)
    texts = [str(x) for x in draw.normal(size=400)]
    first = encode_numbers(texts, "quantile", buckets=7)
    held_out = np.flatnonzero(first.split != 0)
    for row in held_out[::2]:
        texts[row] = "" if row % 3 else str(-1e9)
    other = encode_numbers(texts, "quantile", buckets=7)
    assert np.array_equal(first.split, other.split)
    assert first.vocabulary("x") == other.vocabulary("x")
    same = np.setdiff1d(np.arange(400), held_out[::2])
    assert np.array_equal(first.column("x")[same], other.column("x")[same])
    assert set(other.column("x")[held_out[::2]]) == {
        1,
        FIRST_ID + first.vocabulary("x").index("0"),
    }


def test_quantiles_without_a_known_training_number(encode_numbers):
    dataset = encode_numbers([""] * 50, "quantile")
    assert dataset.vocabulary("x") == [""]
    assert set(dataset.column("x").tolist()) == {FIRST_ID}


def test_codes_of_buckets():
    edges = ordered_keys(np.array([-1.0, 0.0, 5.0]))
    keys = ordered_keys(np.array([np.nan, -2.0, -1.0, -0.5, -0.0, 0.0, 5.0, 5.1]))
    assert bucket_codes(keys, edges).tolist() == [0, 1, 1, 2, 2, 2, 3, 4]
    assert bucket_tokens(3) == ["", "0", "1", "2"]


@given(values=st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=50))
def test_keys_keep_the_order_of_floats(values):
    values = np.array([*values, 0.0, -0.0, 5e-324, -5e-324, 1.7e308, -1.7e308, np.inf, -np.inf])
    keys = ordered_keys(values)
    assert (keys > MISSING_KEY).all()
    assert np.array_equal(keys[:, None] < keys, values[:, None] < values)
    assert np.array_equal(keys[:, None] == keys, values[:, None] == values)
    assert ordered_keys(np.array([np.nan, -np.nan])).tolist() == [MISSING_KEY] * 2


@settings(max_examples=40, deadline=None)
@given(values=st.lists(ANY_INT64, min_size=1, max_size=40), size=st.integers(1, 50),
       data=st.data())  # fmt: skip
def test_order_statistics_equal_sorting(values, size, data):
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=8))
    array = np.array(values, np.int64)
    with blocks_of(size):
        assert order_statistics(array, ranks).tolist() == np.sort(array)[ranks].tolist()


def test_order_statistics_of_many_rows_and_ranks():
    values = np.random.default_rng(0).integers(-(10**12), 10**12, 200_000)
    ranks = list(range(0, 200_000, 9_973))
    assert order_statistics(values, ranks).tolist() == np.sort(values)[ranks].tolist()


@settings(max_examples=100, deadline=None)
@given(times=st.lists(st.integers(-2, 4), min_size=1, max_size=40), size=st.integers(1, 9),
       data=st.data())  # fmt: skip
def test_windows_go_by_time_then_row(times, size, data):
    ends = sorted(data.draw(st.lists(st.integers(0, len(times)), max_size=4)))
    times = np.array(times)
    place = np.empty(len(times), np.int64)
    place[np.argsort(times, kind="stable")] = np.arange(len(times))
    with blocks_of(size):
        result = np.concatenate(list(windows(times, len(times), ends)))
        in_order = np.concatenate(list(windows(None, len(times), ends)))
    assert result.tolist() == np.searchsorted(ends, place, side="right").tolist()
    assert in_order.tolist() == np.searchsorted(ends, np.arange(len(times)), "right").tolist()


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 6), min_size=1, max_size=40), size=st.integers(1, 9))
def test_sort_rows_is_a_stable_sort(keys, size):
    keys = np.array(keys)
    with tempfile.TemporaryDirectory() as folder, blocks_of(size):
        path = Path(folder) / "order.npy"
        sizes = sort_rows(Blocks(keys), path, len(keys))
        assert np.load(path).tolist() == np.argsort(keys, kind="stable").tolist()
    assert sizes.tolist() == np.bincount(keys).tolist()


rows_of_users = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.booleans(), st.integers(1, 9)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_users, size=st.integers(1, 9), most_rows=st.integers(1, 50))
def test_rows_come_user_by_user(rows, size, most_rows):
    user, time = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    user = np.unique(user, return_inverse=True)[1].astype(np.int32)
    with tempfile.TemporaryDirectory() as folder, blocks_of(size):
        result = list(rows_by_user(user, time, Path(folder), most_rows))
        assert list(Path(folder).iterdir()) == []
    want = np.lexsort((np.arange(len(user)), time, user))
    assert np.concatenate(result).tolist() == want.tolist()
    users = [set(user[part].tolist()) for part in result]
    assert sum(map(len, users)) == user.max() + 1  # nobody is in two
    assert all(len(part) <= most_rows or len(set(user[part])) == 1 for part in result)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_users, length=st.integers(1, 4), most_rows=st.integers(1, 20))
def test_histories_in_blocks_of_users_equal_those_in_one_go(rows, length, most_rows):
    user, time, liked, item = (np.array(column) for column in zip(*rows, strict=True))
    user = np.unique(user, return_inverse=True)[1].astype(np.int32)
    whole = histories(item, liked, user, time, length)
    with tempfile.TemporaryDirectory() as folder:
        for part in rows_by_user(user, time, Path(folder), most_rows):
            some = histories(item[part], liked[part], user[part], time[part], length)
            for place, row in enumerate(part):
                ids = some.ids(slice(place, place + 1))[0].tolist()
                assert ids == whole.ids(slice(row, row + 1))[0].tolist()
                is_earlier = (user == user[row]) & (time < time[row]) & liked
                earlier = [r for r in np.argsort(time, kind="stable") if is_earlier[r]]
                assert ids == item[earlier][-length:].tolist()
