"""Rows that are matched by raw key, and their parts on disk."""

import numpy as np
import polars as pl
import pytest
import torch
from keyed import draw, merged

import cki_rec
from cki_rec.checkpoints import partitions
from cki_rec.checkpoints.formats.keyed import Column, mixed
from cki_rec.checkpoints.partitions import Partitions, ids_of, smallest
from cki_rec.merging.keyed import DuplicateKey, match

SOURCES = [draw(0, range(-5, 30)), draw(1, range(20, 50)), draw(2, range(0, 60, 7))]


def as_tables(sources):
    return [
        (
            list(source),
            torch.tensor(np.stack([v for v, _ in source.values()])),
            torch.tensor([use for _, use in source.values()]),
        )
        for source in sources
    ]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("method", ["average", "evidence"])
def test_a_merge_equals_that_of_dictionaries(number, method):
    sources = SOURCES[:number]
    result = cki_rec.merge_by_key(as_tables(sources), method)
    expected = merged(sources, method)
    assert result.keys.tolist() == list(expected)
    values = np.stack([values for values, _ in expected.values()])
    np.testing.assert_allclose(result.values.numpy(), values, atol=1e-6)
    assert result.counts.tolist() == [use for _, use in expected.values()]
    assert sum(result.shares) == pytest.approx(1)
    lone = [i for i, key in enumerate(expected) if sum(key in s for s in sources) == 1]
    owner = [next(s for s in sources if list(expected)[i] in s) for i in lone]
    for i, source in zip(lone, owner, strict=True):
        assert np.array_equal(result.values[i].numpy(), source[list(expected)[i]][0])


@pytest.mark.parametrize("method", ["slerp", "cki", "random", "ties"])
def test_other_methods_take_rows_of_one_source_whole(method):
    first, second = as_tables(SOURCES[:2])
    if method not in cki_rec.methods():
        pytest.skip("no method of this name")
    needs = cki_rec.methods()[method].needs
    if set(needs) - {"counts"}:
        with pytest.raises(cki_rec.MergeError, match="raw key do not have"):
            cki_rec.merge_by_key([first, second], method)
        return
    result = cki_rec.merge_by_key([first, second], method)
    rows = {key: i for i, key in enumerate(result.keys.tolist())}
    for source, other in ((SOURCES[0], SOURCES[1]), (SOURCES[1], SOURCES[0])):
        for key in source.keys() - other.keys():
            assert np.array_equal(result.values[rows[key]].numpy(), source[key][0])


def test_the_rows_of_most_use_stay_and_smaller_keys_of_equal_ones():
    for number in (1, 10, 40):
        result = cki_rec.merge_by_key(as_tables(SOURCES), "evidence", max_rows=number)
        assert result.keys.tolist() == list(merged(SOURCES, "evidence", number))
    without = [table[:2] for table in as_tables(SOURCES)]
    with pytest.raises(cki_rec.MergeError, match="give counts"):
        cki_rec.merge_by_key(without, max_rows=3)


def test_texts_are_keys_too():
    tables = [(["b", "a"], torch.ones(2, 3)), (["c", "a"], 3 * torch.ones(2, 3))]
    result = cki_rec.merge_by_key(tables)
    assert result.keys == ["a", "b", "c"]
    assert result.values[:, 0].tolist() == [2, 1, 3]
    assert result.counts is None


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "no tables"),
        ([([1, 1], torch.ones(2, 3))], "one key in rows 0 and 1"),
        ([([1], torch.ones(2, 3))], "one row per key"),
        ([([1], torch.ones(1, 3)), ([1], torch.ones(1, 4))], "columns differ"),
        ([([1], torch.ones(1, 3)), (["a"], torch.ones(1, 3))], "texts in all sources"),
        ([([0.5], torch.ones(1, 3))], "integers, or texts"),
        ([([1], torch.ones(1, 3), torch.ones(2))], "one number per key"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tables, message):
    with pytest.raises(cki_rec.MergeError, match=message):
        cki_rec.merge_by_key(tables)


def test_no_shared_key_and_empty_tables():
    empty = (torch.empty(0, dtype=torch.int64), torch.empty(0, 3))
    result = cki_rec.merge_by_key([empty, ([3], torch.ones(1, 3))])
    assert result.keys.tolist() == [3]
    assert len(cki_rec.merge_by_key([empty, empty]).keys) == 0


def test_a_key_that_is_there_twice_is_named_with_its_source():
    with pytest.raises(DuplicateKey) as caught:
        match([np.array([1, 2]), np.array([5, 7, 5])])
    assert (caught.value.source, caught.value.rows) == (1, (0, 2))


def test_numbers_of_keys_are_distinct_and_even():
    keys = np.concatenate([np.arange(-500, 500), np.arange(1000) << 40])
    numbers = mixed(keys)
    assert len(set(numbers.tolist())) == len(set(keys.tolist()))
    parts = np.bincount((numbers >> np.uint64(61)).astype(int), minlength=8)
    assert parts.min() > 150


@pytest.mark.parametrize("count", [1, 2, 500, 999, 1000])
def test_the_smallest_numbers_are_found_in_blocks(count):
    numbers = np.random.default_rng(count).integers(0, 1 << 63, 1000).astype(np.uint64)
    numbers[:400] >>= np.uint64(50)
    numbers[400:410] = numbers[3]
    blocks = np.array_split(numbers, 7)
    assert smallest(lambda: blocks, count) == np.sort(numbers)[count - 1]


def test_texts_of_one_hash_are_different_keys():
    texts = [["b", "a"], ["c", "b"]]
    hashes = np.array([7, 7], np.uint64)
    rows = [{"keys": pl.Series(each), "hashes": hashes} for each in texts]
    found = match(ids_of(rows, True))
    assert found.rows.tolist() == [[1, 0, -1], [-1, 1, 0]]
    rows[1] = {"keys": pl.Series(["b"]), "hashes": hashes[:1]}
    rows[0] = {"keys": pl.Series(["b"]), "hashes": hashes[:1]}
    assert match(ids_of(rows, True)).ids.tolist() == [7]


@pytest.mark.parametrize("is_text", [False, True])
def test_parts_hold_all_rows_once_whatever_their_number(tmp_path, is_text, monkeypatch):
    keys = np.random.default_rng(0).permutation(np.arange(-300, 300))
    values = keys[:, None] * np.ones((1, 2), np.float32)
    columns = {"values": Column(np.dtype(np.float32), 2)}
    texts = pl.Series([f"é{key}\n" for key in keys])
    orders = []
    for num in (1, 4, 64):
        parts = Partitions(tmp_path / str(num), columns, num, is_text)
        halves = [slice(0, 250), slice(250, 600)]
        blocks = [{"keys": (texts if is_text else keys)[h], "values": values[h]} for h in halves]
        parts.fill(blocks, lambda _: None)
        found = []
        for part in range(num):
            rows = parts.read(part)
            (ids,) = ids_of([rows], is_text)
            found += [rows["keys"][int(i)] for i in np.argsort(ids)]
            for key, value in zip(rows["keys"], rows["values"], strict=True):
                number = int(str(key).strip("é\n"))
                assert value.tolist() == [number, number]
        assert sorted(found) == sorted((texts if is_text else keys).to_list() if is_text else keys)
        orders.append(found)
    assert orders[0] == orders[1] == orders[2]
    assert partitions.number_of_parts(0, is_text) == 1
    most = partitions.MOST_PARTS // (2 if is_text else 1)
    assert partitions.number_of_parts(1 << 60, is_text) == most
