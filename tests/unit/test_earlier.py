"""Data sets that take over tokens and learned facts of numbers from earlier ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from samples import make_data, one_line_error

from cki_rec.config import Partition, Split
from cki_rec.data.encoding import earlier, tokens
from cki_rec.data.encoding.store import prepare
from cki_rec.data.schema import FIRST_ID, OOV_ID
from cki_rec.pipelines import names, vocabularies

FIELDS = [
    "shop",
    {"name": "price", "kind": "numeric", "transform": "log1p"},
    {"name": "age", "kind": "numeric", "transform": "quantile"},
]


@pytest.fixture
def encode(tmp_path):
    """Function (seed, first, last, **changes) -> a day with shops of these numbers, encoded."""

    def make(seed, first, last, **changes):
        draw = np.random.default_rng(seed)
        lines = ["label,shop,price,age"]
        for row in range(300):
            price = "" if row % 50 == 7 else f"{draw.lognormal(seed, 1):.4f}"
            shop, age = draw.integers(first, last), draw.integers(10 * seed, 10 * seed + 60)
            lines.append(f"{row % 2},s{shop},{price},{age}")
        path = tmp_path / f"day{seed}.csv"
        path.write_text("\n".join(lines) + "\n")
        options = {
            "fields": FIELDS, "raw": str(path), "name": f"day{seed}", "buckets": 4, "min_count": 2,
            "split": Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0),
            "partition": Partition(by="none", parts=1, seed=0), **changes,
        }  # fmt: skip
        return prepare(make_data("csv", **options), tmp_path / "encoded")

    return make


def test_new_tokens_follow_the_listed_ones_by_count(encode):
    one = encode(1, 0, 20, fields=["shop"])
    known = one.vocabulary("shop")
    two = encode(2, 10, 30, fields=["shop"], vocabularies=[str(one.folder)], new_tokens="add")
    grown = two.vocabulary("shop")
    assert grown[: len(known)] == known
    learned = encode(2, 10, 30, fields=["shop"]).vocabulary("shop")
    assert grown[len(known) :] == [token for token in learned if token not in known]
    assert two.schema.vocabulary_hashes["shop"] == tokens.hash_of(grown)
    assert two.schema.table_sizes["shop"] == FIRST_ID + len(grown)
    frozen = encode(2, 10, 30, fields=["shop"], vocabularies=[str(one.folder)])
    assert frozen.vocabulary("shop") == known
    is_new = two.column("shop") >= FIRST_ID + len(known)
    assert is_new.any()
    assert (frozen.column("shop")[is_new] == OOV_ID).all()
    assert (frozen.column("shop") == two.column("shop"))[~is_new].all()
    assert len({one.hash, two.hash, frozen.hash}) == 3


def test_numbers_from_gives_equal_numbers_equal_meanings(encode, tmp_path):
    one = encode(1, 0, 20)
    alone, two = encode(2, 0, 20), encode(2, 0, 20, numbers_from=str(one.folder))
    for name in ("price", "age"):
        hashes = [d.schema.vocabulary_hashes[name] for d in (one, two, alone)]
        assert hashes[0] == hashes[1] != hashes[2]
    assert two.manifest["numbers"]["price"] == one.manifest["numbers"]["price"]
    assert two.manifest["quantile_edges"]["age"] == one.manifest["quantile_edges"]["age"]
    shift, scale = one.manifest["numbers"]["price"]
    own = alone.manifest["numbers"]["price"]
    raw = alone.column("price").astype(np.float64) * own[1] + own[0]
    filled = alone.column("price") == 0  # an empty price is the mean
    expected = np.where(filled, 0.0, (raw - shift) / scale)
    np.testing.assert_allclose(two.column("price"), expected, atol=1e-5)
    listed = [None, None, *two.vocabulary("age")]
    edges = one.manifest["quantile_edges"]["age"]
    lines = (tmp_path / "day2.csv").read_text().splitlines()[1:]
    buckets = np.searchsorted(edges, [int(line.split(",")[3]) for line in lines])
    assert [listed[code] for code in two.column("age")] == [str(bucket) for bucket in buckets]
    assert two.manifest["unseen_share"]["age"]["train"] == 0


def test_listed_tokens_and_learned_numbers_go_together(encode):
    one = encode(1, 0, 20)
    folder = str(one.folder)
    two = encode(2, 10, 30, vocabularies=[folder], new_tokens="add", numbers_from=folder)
    assert two.schema.vocabulary_hashes["age"] == one.schema.vocabulary_hashes["age"]
    assert two.vocabulary("shop")[: len(one.vocabulary("shop"))] == one.vocabulary("shop")
    assert two.manifest["options"]["new_tokens"] == "add"
    assert "new_tokens" not in one.manifest["options"]


def test_a_run_carries_both(encode, tmp_path):
    one = encode(1, 0, 20)
    home = tmp_path / "run" / tokens.FOLDER
    vocabularies.carry(home, one.schema, [tmp_path / "nowhere", one.folder])
    assert json.loads((home / tokens.NUMBERS).read_text())["quantile_edges"].keys() == {"age"}
    (tmp_path / "run" / tokens.CHECKPOINT).mkdir()
    for name in ("run", "run/checkpoint"):
        folder = str(tmp_path / name)
        options = {"new_tokens": "add", "numbers_from": folder, "vocabularies": [folder]}
        two = encode(2, 10, 30, **options)
        assert two.schema.vocabulary_hashes["age"] == one.schema.vocabulary_hashes["age"]
    assert tokens.find_tokens([home], one.schema.vocabulary_hashes | {}) is None  # price: no list
    hashes = {table: one.schema.vocabulary_hashes[table] for table in one.schema.table_sizes}
    assert tokens.find_tokens([home], hashes) == home
    again = tmp_path / "again" / tokens.FOLDER
    vocabularies.carry(again, one.schema, [home])
    assert (again / tokens.NUMBERS).read_bytes() == (home / tokens.NUMBERS).read_bytes()
    other = tmp_path / "other" / tokens.FOLDER
    vocabularies.carry(other, encode(2, 0, 20).schema, [home])
    assert not (other / tokens.NUMBERS).exists()


def test_facts_that_are_missing_are_refused_in_one_line(encode, tmp_path):
    one = encode(1, 0, 20, fields=["shop", FIELDS[1]])
    folder = str(one.folder)
    message = one_line_error(encode, 2, 0, 20, numbers_from=folder)
    assert "holds no transform=quantile of field 'age'" in message
    message = one_line_error(encode, 2, 0, 20, numbers_from="/nowhere")
    assert "/nowhere/numbers.json: missing; name an encoded data set" in message
    message = one_line_error(encode, 2, 0, 20, vocabularies=[folder])
    assert "set data.numbers_from to the set or run" in message
    message = one_line_error(encode, 2, 0, 20, new_tokens="add")
    assert "data.new_tokens=add: requires the lists that it adds to" in message
    broken = tmp_path / "broken" / tokens.FOLDER
    shutil.copytree(one.folder, broken, ignore=lambda *_: ["manifest.json", "parts-none"])
    (broken / tokens.NUMBERS).write_text('{"numbers": 3}')
    message = one_line_error(encode, 2, 0, 20, numbers_from=str(tmp_path / "broken"))
    assert "numbers.json: damaged" in message
    assert earlier.NOTHING.options() == {}


def test_names_stand_for_folders_of_lists(run_config, tmp_path):
    (tmp_path / "out" / "names").mkdir(parents=True)
    (tmp_path / "out" / "train-1").mkdir()
    (tmp_path / "out" / "names" / "monday").symlink_to("../train-1")
    words = ["data.vocabularies=[monday,/elsewhere]", "data.numbers_from=monday"]
    config = names.resolved(run_config(tmp_path, *words, "merge.deltas=[monday]"))
    run = str(tmp_path / "out" / "train-1")
    assert config.data.vocabularies == [run, "/elsewhere"]
    assert (config.data.numbers_from, config.merge.deltas) == (run, [run])


def test_a_list_that_grew_is_recognized_without_reading_tokens(tmp_path):
    for name, listed in (("one", "abc"), ("two", "abcd"), ("three", "axc")):
        tokens.write_tokens(tmp_path / name, "t", listed)
    one, two, three = (tokens.path_of(tmp_path / n, "t") for n in ("one", "two", "three"))
    assert tokens.begins_with(two, one)
    assert not tokens.begins_with(one, two)
    assert not tokens.begins_with(three, one)
    assert not tokens.begins_with(two, tmp_path / "nowhere")
