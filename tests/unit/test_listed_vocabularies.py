"""Data sets that are encoded with listed tokens; rows that a model may have seen."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from samples import FIELDS, LATEST, make_data, one_line_error

from cki_rec.config import Split
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.split import codes_by_key, row_keys
from cki_rec.data.encoding.store import prepare
from cki_rec.data.provenance import Provenance, Rows
from cki_rec.data.raw.reading import TIME
from cki_rec.data.schema import FIRST_ID, OOV_ID

TABLES = ("user", "item", "genres", "year", "hour")


class Column:
    """An array as a file of a column."""

    def __init__(self, array):
        self.rows, self.read = len(array), lambda start, stop: array[start:stop]


@pytest.fixture
def encode(tmp_path):
    return lambda **changes: prepare(
        make_data(**{"raw": str(LATEST), "fields": FIELDS, **changes}), tmp_path / "encoded"
    )


def decoded(dataset: EncodedDataset, name: str) -> list[str | None]:
    listed = [None, None, *dataset.vocabulary(name)]
    return [listed[number] for number in dataset.column(name)]


def test_ids_are_places_in_the_lists_and_other_tokens_are_unseen(encode, tmp_path):
    original = encode()
    remaining = original.vocabulary("user")[1:]
    for table in TABLES:
        listed = original.vocabulary(table)
        tokens.write_tokens(
            tmp_path / "one", table, remaining if table == "user" else listed[::-1]
        )
    tokens.write_tokens(tmp_path / "one", "of no field", ["x"])
    result = encode(vocabularies=[str(tmp_path / "one")])
    gone = original.vocabulary("user")[0]
    users = decoded(original, "user")
    assert decoded(result, "user") == [None if user == gone else user for user in users]
    assert (result.column("user")[np.array(users) == gone] == OOV_ID).all()
    size = FIRST_ID + len(original.vocabulary("hour"))
    hours, before = result.column("hour"), original.column("hour")
    is_known = before >= FIRST_ID
    assert (hours[is_known] == FIRST_ID + size - 1 - before[is_known]).all()
    assert result.schema.table_sizes["hour"] == size
    assert result.schema.vocabulary_hashes["user"] == tokens.hash_of(remaining)
    assert result.manifest["unseen_share"]["user"]["test"] is not None
    assert result.source_rows == original.source_rows
    assert result.hash != original.hash


def test_lists_are_joined_in_order_and_named_by_content(encode, tmp_path):
    original = encode()
    for table in TABLES:
        tokens.write_tokens(
            tmp_path / "run" / "vocabulary", table, ["new", original.vocabulary(table)[-1]]
        )
    result = encode(vocabularies=[str(original.folder), str(tmp_path / "run")])
    for table in TABLES:
        assert result.vocabulary(table) == [*original.vocabulary(table), "new"]
    for name in ("user", "item", "hour"):
        known = original.column(name) != OOV_ID
        assert (result.column(name)[known] == original.column(name)[known]).all()
    again = encode(vocabularies=[str(result.folder)])
    assert again.folder == result.folder


def test_folder_without_a_vocabulary_is_refused(encode, tmp_path):
    assert "vocabulary.user.txt: missing" in one_line_error(encode, vocabularies=["/nowhere"])
    original = encode()
    (original.folder / "vocabulary.hour.txt").write_text("1\n")
    damaged = one_line_error(encode, vocabularies=[str(original.folder)])
    assert "vocabulary.hour.txt: damaged" in damaged
    tokens.write_tokens(tmp_path / "bad", "user", ["1"])
    (tmp_path / "bad" / "vocabulary.user.txt").write_bytes(b"\xff\n")
    assert "not UTF-8" in one_line_error(encode, vocabularies=[str(tmp_path / "bad")])


@pytest.mark.parametrize("transform", ["log1p", "quantile"])
def test_transform_that_is_learned_from_rows_is_refused(tmp_path, transform):
    raw = tmp_path / "raw.csv"
    raw.write_text("label,price\n" + "".join(f"{i % 2},{i}.5\n" for i in range(40)))
    price = {"name": "price", "kind": "numeric", "transform": transform}
    fields = [price, {"name": "again", "column": "price"}]
    split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
    data = make_data("frappe_x1", raw=str(raw), fields=fields, split=split, published=None)
    data = replace(data, user=None, item=None, time=None, vocabularies=[str(tmp_path)])
    message = one_line_error(prepare, data, tmp_path / "encoded")
    assert f"data.vocabularies: transform={transform} of field 'price' is learned" in message


def test_rows_do_not_depend_on_vocabularies_but_on_split_and_labels(encode):
    original = encode().source_rows
    assert encode(min_count=2, fields=["user", "item"]).source_rows == original
    other = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=1)
    for changes in ({"split": other}, {"label_threshold": 3.0}):
        changed = encode(**changes).source_rows
        assert changed.files == original.files
        assert changed.division != original.division


def test_split_by_hash_requires_users_or_items(tmp_path):
    raw = tmp_path / "raw.csv"
    raw.write_text("label,price\n" + "".join(f"{i % 2},{i}.5\n" for i in range(40)))
    split = Split(by="hash", fractions=[0.6, 0.2, 0.2], seed=0)
    data = make_data("frappe_x1", raw=str(raw), fields=["price"], split=split, published=None)
    data = replace(data, user=None, item=None, time=None)
    assert "neither users nor items" in one_line_error(prepare, data, tmp_path / "encoded")


def test_files_that_describe_items_have_no_rows(encode):
    assert (LATEST / "movies.csv").is_file()
    (only,) = encode().source_rows.files
    assert only == hashlib.sha256((LATEST / "ratings.csv").read_bytes()).hexdigest()


def test_a_division_by_hash_refuses_users_and_items_that_are_numbers(tmp_path):
    raw = tmp_path / "rows.csv"
    raw.write_text("u,i,label\n" + "".join(f"{n % 5},{n % 7},{n % 2}\n" for n in range(40)))
    split = Split(by="hash", fractions=[0.6, 0.2, 0.2], seed=0)
    fields = ["u", {"name": "i", "kind": "numeric", "transform": "as_is"}]
    named = {"format": "csv", "user": "u", "item": "i", "label": "label"}
    data = make_data(raw=str(raw), fields=fields, split=split, **named)
    message = one_line_error(prepare, data, tmp_path / "encoded")
    assert "field i is numeric" in message


def mixed(value: int) -> int:
    """SplitMix64 with Python's integers."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_keys_are_the_same_everywhere_and_shares_are_met():
    count = 60_000
    users, items = (
        pl.Series([str(i // d) for i in range(count)], dtype=pl.String) for d in (7, 3)
    )
    frame = pl.DataFrame({"user": users, "item": items, TIME: np.arange(count) - 30_000})
    keys = row_keys(frame, ["user", "item"])
    assert len(np.unique(keys)) == count
    for row in (0, 1, 59_999):
        key = 0
        for token in (str(row // 7), str(row // 3)):
            key = mixed(key + FIRST_ID + zlib.crc32(token.encode()) % 2**31)
        assert keys[row] == mixed(key + row - 30_000)
    assert (row_keys(frame[::-1], ["user", "item"])[::-1] == keys).all()
    drawn = []
    for seed in (0, 1):
        split = Split(by="hash", fractions=[0.7, 0.2, 0.1], seed=seed)
        drawn.append(np.concatenate(list(codes_by_key(split, Column(keys)))))
        np.testing.assert_allclose(np.bincount(drawn[-1]) / count, [0.7, 0.2, 0.1], atol=0.01)
    table = np.histogram2d(*drawn, bins=3)[0] / count
    np.testing.assert_allclose(table, np.outer([0.7, 0.2, 0.1], [0.7, 0.2, 0.1]), atol=0.01)


ONE, OTHER = Rows(("a", "b"), "1"), Rows(("b", "c"), "1")


@pytest.mark.parametrize(
    ("seen", "is_leak", "has_others"),
    [
        ((ONE,), False, False),
        ((Rows(("a", "b"), "2"),), True, False),
        ((ONE, OTHER), True, False),
        ((OTHER,), True, False),
        ((ONE, Rows(("x",), "1")), False, True),
        ((Rows(("x",), "1"),), False, True),
    ],
)
def test_a_file_with_two_splits_may_leak_and_other_files_are_reported(seen, is_leak, has_others):
    origin = Provenance("several", seen)
    assert origin.may_have_seen(ONE) is is_leak
    assert origin.has_other_files(ONE) is has_others
    assert Provenance.from_json(origin.to_json()) == origin


def test_one_rule_for_every_row_agrees_with_itself_in_any_file():
    one, other = Rows(("a",), "1", "seed 0"), Rows(("a", "b"), "2", "seed 0")
    assert not one.agree(Rows(("a",), "3", "seed 0"))  # the same file
    assert not Provenance("h", (one,)).may_have_seen(other)
    assert not Provenance("h", (one,)).has_other_files(Rows(("c",), "3", "seed 0"))
    assert Provenance("h", (one,)).has_other_files(Rows(("c",), "3", "seed 1"))
    assert Provenance("h", (one,)).may_have_seen(Rows(("a",), "4"))
    assert Provenance("h", (Rows(("a",), "4"),)).may_have_seen(one)
    assert Provenance.from_json(Provenance("h", (one,)).to_json()) == Provenance("h", (one,))


def test_a_merged_model_has_seen_the_rows_of_its_sources():
    one, other = Provenance("h", (ONE,)), Provenance("i", (ONE, OTHER))
    assert Provenance.union([one, one]) == one
    both = Provenance.union([one, other])
    assert both == Provenance("several", (ONE, OTHER), ("h", "i"))
    assert Provenance.union([both, one]) == both
    assert (both.hashes, one.hashes, Provenance("several").hashes) == (("h", "i"), ("h",), ())
    assert Provenance.from_json(both.to_json()) == both
    assert Provenance.union([Provenance("several"), one]) == Provenance("several")
    assert Provenance.union([one, Provenance("h")]) == Provenance("h", None)
    assert Provenance.from_json({"data_hash": "h"}) == Provenance("h", None)
