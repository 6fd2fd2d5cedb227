"""Real Criteo and Avazu rows against a second implementation of the published preprocessing.

The reference reads with pandas, counts by itself, and shares nothing with the package but the
split of every row.
"""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
from samples import composed, make_data, shared_data

from cki_rec.config import Partition
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.store import prepare
from cki_rec.data.test_labels import all_labels

FILES = {"criteo": "criteo/train_head10k.txt.gz", "avazu": "avazu/train_14077.csv.gz"}
ROWS = {"criteo": 10_000, "avazu": 14_077}
PUBLISHED_MIN_COUNT = {"criteo": 10, "avazu": 2}
INTEGERS = [f"I{i}" for i in range(1, 14)]
CRITEO_COLUMNS = ["label", *INTEGERS, *(f"C{i}" for i in range(1, 27))]
OOV, FIRST = 1, 2
CASES = [(choice, count) for choice in FILES for count in (None, 1, 2, 10)]


def bucket(text: str) -> str:
    """Return floor(ln(x)^2) above 2, else the integer; a missing number is 0."""
    number = int(text) if text else 0
    return str(math.floor(math.log(number) ** 2) if number > 2 else number)


@lru_cache
def criteo_tokens() -> tuple[pd.DataFrame, list[int]]:
    rows = pd.read_csv(
        shared_data(FILES["criteo"]),
        sep="\t",
        header=None,
        names=CRITEO_COLUMNS,
        dtype=str,
        keep_default_na=False,
    )
    for name in INTEGERS:
        rows[name] = rows[name].map(bucket)
    return rows.drop(columns="label"), rows["label"].astype(int).tolist()


@lru_cache
def avazu_tokens() -> tuple[pd.DataFrame, list[int]]:
    rows = pd.read_csv(shared_data(FILES["avazu"]), dtype=str, keep_default_na=False)
    time = pd.to_datetime("20" + rows["hour"], format="%Y%m%d%H")
    rows["hour"] = [str(moment.hour) for moment in time]
    rows["weekday"] = [moment.strftime("%w") for moment in time]  # Sunday: 0
    rows["weekend"] = ["1" if day in ("0", "6") else "0" for day in rows["weekday"]]
    return rows.drop(columns=["id", "click"]), rows["click"].astype(int).tolist()


TOKENS = {"criteo": criteo_tokens, "avazu": avazu_tokens}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Function (choice, min_count; None: as configured) -> the encoded real rows."""
    folder = tmp_path_factory.mktemp("encoded")

    def make(choice: str, min_count: int | None = None) -> EncodedDataset:
        data = make_data(choice, raw=str(shared_data(FILES[choice])))
        return prepare(data if min_count is None else replace(data, min_count=min_count), folder)

    return make


def vocabulary_of(tokens: pd.Series, min_count: int) -> list[str]:
    counts = tokens.value_counts()
    remaining = [(-int(count), token) for token, count in counts.items() if count >= min_count]
    return [token for _, token in sorted(remaining)]


def ids_of(tokens: pd.Series, vocabulary: list[str]) -> np.ndarray:
    id_of = {token: FIRST + place for place, token in enumerate(vocabulary)}
    return tokens.map(id_of).fillna(OOV).to_numpy(np.int64)


def counts_of(ids: np.ndarray, size: int) -> list[int]:
    counts = pd.Series(ids).value_counts()
    return [int(counts.get(i, 0)) for i in range(size)]


@pytest.mark.parametrize("choice", FILES)
def test_configuration_is_the_published_one(choice):
    data = composed(choice)
    assert data.min_count == PUBLISHED_MIN_COUNT[choice]
    assert data.fields == (
        CRITEO_COLUMNS[1:]
        if choice == "criteo"
        else ["hour", "weekday", "weekend", *TOKENS["avazu"]()[0].columns.drop(
            ["hour", "weekday", "weekend"])]
    )  # fmt: skip
    if choice == "criteo":
        assert (data.numeric, data.numeric_missing) == ("ln_squared", 0)


@pytest.mark.parametrize("choice", FILES)
def test_every_row_is_there_in_order(choice, encoded):
    dataset = encoded(choice)
    tokens, label = TOKENS[choice]()
    assert len(dataset) == len(tokens) == ROWS[choice]
    assert all_labels(dataset).tolist() == label
    assert dataset.manifest["skipped"] == {}


def test_avazu_times_are_those_of_the_text(encoded):
    rows = pd.read_csv(shared_data(FILES["avazu"]), usecols=["hour"], dtype=str)
    time = pd.to_datetime("20" + rows["hour"], format="%Y%m%d%H", utc=True)
    want = [int(moment.timestamp()) for moment in time]
    assert encoded("avazu").timestamp.tolist() == want


@pytest.mark.parametrize(("choice", "min_count"), CASES)
def test_vocabularies_ids_and_counts_equal_pandas(choice, min_count, encoded):
    dataset = encoded(choice, min_count)
    tokens, _ = TOKENS[choice]()
    is_train = dataset.split == 0
    counts = dataset.row_counts(dataset.schema)
    assert [feature.name for feature in dataset.schema.features] == composed(choice).fields
    assert sum(dataset.schema.table_sizes.values()) > 2 * len(tokens.columns)
    for name in dataset.schema.table_sizes:
        want = vocabulary_of(tokens[name][is_train], min_count or PUBLISHED_MIN_COUNT[choice])
        assert dataset.vocabulary(name) == want, name
        assert dataset.schema.table_sizes[name] == FIRST + len(want), name
        ids = ids_of(tokens[name], want)
        np.testing.assert_array_equal(dataset.column(name), ids, err_msg=name)
        assert counts[name].tolist() == counts_of(ids[is_train], FIRST + len(want)), name
        for code, split in ((1, "valid"), (2, "test")):
            share = float((ids[dataset.split == code] == OOV).mean())
            assert dataset.manifest["unseen_share"][name][split] == pytest.approx(share), name


@pytest.mark.parametrize("choice", FILES)
@pytest.mark.parametrize("by", ["random", "time"])
@pytest.mark.parametrize("min_count", [None, 1])
def test_counts_of_parts_equal_pandas(choice, by, min_count, encoded):
    dataset = encoded(choice, min_count)
    partition = Partition(by=by, parts=3, seed=5)
    part = np.asarray(dataset.parts(partition).part)
    assert np.ptp(np.bincount(part, minlength=3)) <= 1
    is_train = dataset.split == 0
    result = [dataset.row_counts(dataset.schema, partition, number) for number in range(3)]
    total = dataset.row_counts(dataset.schema)
    for name, size in dataset.schema.table_sizes.items():
        ids = np.asarray(dataset.column(name))
        for number in range(3):
            want = counts_of(ids[is_train & (part == number)], size)
            assert result[number][name].tolist() == want, (name, number)
        np.testing.assert_array_equal(sum(counts[name] for counts in result), total[name])
        assert total[name].sum() == is_train.sum()


@pytest.mark.parametrize("choice", FILES)
def test_parts_of_time_are_windows_of_the_text(choice, encoded):
    dataset = encoded(choice)
    part = np.asarray(dataset.parts(Partition(by="time", parts=3, seed=0)).part)
    if choice == "criteo":  # rows stand in the order of time
        order = np.arange(len(dataset))
    else:
        hours = pd.read_csv(shared_data(FILES["avazu"]), usecols=["hour"])["hour"]
        order = np.argsort(hours.to_numpy(), kind="stable")
    assert (np.diff(part[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("choice", FILES)
def test_rows_of_parts_are_those_of_the_column(choice, encoded):
    dataset = encoded(choice)
    partition = Partition(by="random", parts=3, seed=5)
    part = np.asarray(dataset.parts(partition).part)
    for code, split in enumerate(("train", "valid", "test")):
        np.testing.assert_array_equal(dataset.rows(split), np.flatnonzero(dataset.split == code))
        for number in range(3):
            want = np.flatnonzero((dataset.split == code) & (part == number))
            np.testing.assert_array_equal(dataset.rows(split, partition, number), want)
