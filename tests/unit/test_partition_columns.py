"""Parts by the values of a column or by files: names, uneven sizes, overlap, rows left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from conftest import compose_tree
from hydra.core.override_parser.overrides_parser import OverridesParser
from samples import make_data, one_line_error

from cki_rec.config import Partition, Split, UserError, parse, with_delta
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.partition import groups_of
from cki_rec.data.encoding.store import prepare
from cki_rec.data.encoding.summary import part_lines
from cki_rec.data.parts import NO_PARTITION
from cki_rec.pipelines.sources import are_disjoint

CITIES = ["31"] * 60 + ["35"] * 30 + ["40"] * 20 + [""] * 10
"""Of the rows, before they are mixed."""


def column(parts, by="city") -> Partition:
    return Partition(by=by, parts=parts, seed=0)


@pytest.fixture(scope="module")
def config():
    return parse(compose_tree())


@pytest.fixture
def csv(tmp_path):
    """Function (partition, **options) -> options of a csv of 120 rows, and the city of each."""
    draw = np.random.default_rng(0)
    cities = draw.permutation(CITIES)
    path = tmp_path / "rows.csv"
    lines = [f"{draw.integers(2)},u{n % 7},i{n % 5},{city}" for n, city in enumerate(cities)]
    path.write_text("label,user,item,city\n" + "\n".join(lines) + "\n")

    def make(partition: Partition, **changes):
        split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
        options = {"raw": str(path), "split": split, "fields": ["user", "item"]}
        options |= {"user": "user", "item": "item", "partition": partition}
        return make_data("csv", **(options | changes)), cities

    return make


def check_parts(dataset: EncodedDataset, partition: Partition, cities, parts) -> None:
    """Check rows, counts of ids and groups of every part against the cities of all rows."""
    found = dataset.parts(partition)
    for name, values in parts.items():
        for code, split in enumerate(("train", "valid", "test")):
            expected = np.flatnonzero(np.isin(cities, values) & (dataset.split == code))
            rows = dataset.rows(split, partition, name)
            assert rows.tolist() == expected.tolist()
        train = dataset.rows("train", partition, name)
        counts = dataset.row_counts(dataset.schema, partition, name)
        ids = dataset.column("user")[train]
        assert counts["user"].tolist() == np.bincount(ids, minlength=len(counts["user"])).tolist()
    assert found.names is not None
    named = np.array(found.names)[found.part]
    for city in set(cities.tolist()):
        own = " & ".join(name for name, values in parts.items() if city in values)
        assert set(named[cities == city].tolist()) == {own}
    every = dataset.parts(NO_PARTITION).counts("user")[0]
    train = dataset.column("user")[dataset.split == 0]
    assert every.tolist() == np.bincount(train, minlength=len(every)).tolist()


def test_values_are_parts_and_rows_of_others_are_left_out(csv, tmp_path):
    partition = column([35, 31])
    data, cities = csv(partition)
    dataset = prepare(data, tmp_path / "encoded")
    kept = cities[np.isin(cities, ["31", "35"])]
    assert len(dataset) == len(kept) == 90
    check_parts(dataset, partition, kept, {"35": ["35"], "31": ["31"]})
    assert dataset.manifest["options"]["domain"] == {"column": "city", "values": ["31", "35"]}
    assert not (dataset.folder / "vocabulary.city.txt").exists()


def test_named_parts_may_overlap(csv, tmp_path):
    entries = [{"name": "coast", "values": [31, 35]}, {"name": "inland", "values": ["35", 40]}]
    partition = column(entries)
    data, cities = csv(partition)
    dataset = prepare(data, tmp_path / "encoded")
    parts = {"coast": ["31", "35"], "inland": ["35", "40"]}
    kept = cities[cities != ""]
    check_parts(dataset, partition, kept, parts)
    assert partition.overlaps
    assert len(dataset) == len(kept)
    assert part_lines(dataset, partition) == [
        "  parts by city",
        "    coast                     60 rows",
        "    inland                    20 rows",
        "    coast & inland            30 rows",
    ]
    assert part_lines(dataset, NO_PARTITION) == []
    inside = column([{"name": "all", "values": [31, 35, 40]}, {"name": "one", "values": [40]}])
    again = prepare(replace(data, partition=inside), tmp_path / "encoded")
    assert again.folder == dataset.folder  # the same rows
    check_parts(again, inside, kept, {"all": ["31", "35", "40"], "one": ["40"]})


def test_a_number_of_parts_is_that_of_all_values(csv, tmp_path):
    data, cities = csv(column(4))
    dataset = prepare(data, tmp_path / "encoded")
    assert len(dataset) == len(cities)
    parts = dataset.parts(data.partition)
    assert parts.names == ["(empty)", "31", "35", "40"]
    assert [len(dataset.rows("train", data.partition, n)) for n in range(4)] == [
        int(((cities == city) & (dataset.split == 0)).sum()) for city in ("", "31", "35", "40")
    ]
    message = one_line_error(dataset.parts, column(2))
    assert "city has 4 values; name those that are parts, e.g. the largest: data.part" in message
    assert "data.partition.parts=[31,35,40,'']" in message


def test_the_values_that_a_message_names_can_be_copied():
    values = ["31", "1.50", "007", "null", "München, Süd", "it's \\", "back\\", "-", "", "a=b"]
    for some in (values[:5], values[5:]):
        message = one_line_error(groups_of, column(3), some, np.arange(5, 0, -1))
        (word,) = re.findall(r"data\.partition\.parts=\[.*\](?=, or set)", message)
        parsed = OverridesParser.create().parse_override(word).value()
        assert [str(value) for value in parsed] == some


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_files_are_parts(tmp_path, form):
    draw, paths = np.random.default_rng(1), []
    for name, rows in (("north", 50), ("south", 30), ("west", 20)):
        frame = pl.DataFrame(
            {"label": draw.integers(0, 2, rows), "user": draw.integers(0, 9, rows)}
        )
        paths.append(str(tmp_path / f"{name}.{form}"))
        frame.write_csv(paths[-1]) if form == "csv" else frame.write_parquet(paths[-1])
    partition = column(3, "file")
    data = make_data(form, raw=paths, fields=["user"], partition=partition)
    dataset = prepare(data, tmp_path / "encoded")
    parts = dataset.parts(partition)
    assert parts.names == ["north", "south", "west"]
    assert parts.part.tolist() == [0] * 50 + [1] * 30 + [2] * 20
    two = replace(data, partition=column(["south", "north"], "file"))
    smaller = prepare(two, tmp_path / "encoded")
    assert len(smaller) == 80
    rows = np.concatenate(
        [smaller.rows(s, two.partition, "south") for s in ("train", "valid", "test")]
    )
    assert sorted(rows) == list(range(50, 80))


def test_splits_do_not_depend_on_the_column(csv, tmp_path):
    split = Split(by="hash", fractions=[0.6, 0.2, 0.2], seed=0)
    plain, parted = (
        prepare(csv(p, split=split)[0], tmp_path / "encoded") for p in (NO_PARTITION, column(4))
    )
    assert parted.split.tolist() == plain.split.tolist()
    assert "domain" not in plain.manifest["options"]
    assert plain.domain is None


@pytest.mark.parametrize(
    ("by", "parts", "part", "problem"),
    [
        ("user", [1, 2], None, "parts: a list requires by=file or by=COLUMN (got by=user"),
        ("city", [1, 1], None, "must list one part or more, each once"),
        ("city", [], None, "must list one part or more"),
        ("city", [{"name": "a", "values": []}], None, "must list a value or more for every part"),
        ("city", [{"name": "a"}], None, "parts as {name: north"),
        ("user", 0, None, "data.partition.parts=0: must be at least 1"),
        ("user", "few", None, "must be a whole number or a list of parts"),
        ("city", [31, 35], 0, "data.part=0: data.partition has parts 31, 35"),
        ("city", [31, 35], "40", "data.part=40: data.partition has parts 31, 35"),
        ("user", 2, "north", "data.part=north: data.partition has parts 0 to 1"),
    ],
)
def test_mistakes_are_named(config, by, parts, part, problem):
    changes = {"data.partition": {"by": by, "parts": parts}, "data.part": part}
    assert problem in one_line_error(with_delta, config, changes)


def test_parts_of_the_command_line_are_numbers_or_names(config):
    named = {"data.partition": {"by": "city", "parts": [31, 35]}}
    assert with_delta(config, {"data.part": "1"}).data.part == 1
    data = with_delta(config, {**named, "data.part": "35"}).data
    assert data.partition.number(data.part) == data.partition.number("35") == 1
    assert with_delta(config, {"data.part": None}).data.part is None


@pytest.mark.parametrize(
    ("partition", "part"),
    [
        (column([31, 99]), "data.partition.parts: 99: no row has city=99; remove it"),
        (column([98, 99]), "no usable row with a city of data.partition.parts"),
        (column(2, "citty"), "no column of "),
        (column(2, "citty"), "did you mean 'city'? one of user, item, time, random, none, file"),
    ],
)
def test_impossible_columns_are_named(csv, tmp_path, partition, part):
    assert part in one_line_error(prepare, csv(partition)[0], tmp_path / "encoded")


def test_other_formats_have_no_files_as_parts(tmp_path):
    data = make_data(partition=column(2, "file"))
    message = one_line_error(prepare, data, tmp_path / "encoded")
    assert "data.partition.by=file: requires data.format=csv or parquet" in message


def test_suite_regions_has_a_source_per_part():
    words = ["suite=regions", "data.partition.by=city"]
    named = parse(compose_tree(*words, "data.partition.parts=[31,{name: b, values: [1, 2]}]"))
    assert named.suite.sources == [{"data.part": "31"}, {"data.part": "b"}]
    numbered = parse(compose_tree("suite=regions", "data.partition.parts=3"))
    assert numbered.suite.sources == [{"data.part": number} for number in range(3)]
    assert numbered.merge.sources == numbered.suite.sources


def test_parts_that_overlap_are_not_disjoint():
    def shard(part, parts):
        return {"hash": "h", "partition": {"by": "c", "parts": parts, "seed": 0}, "part": part}

    apart = ["a", "b"]
    shared = [{"name": "a", "values": [1, 2]}, {"name": "b", "values": [2]}]
    assert are_disjoint([shard("a", apart), shard("b", apart)])
    assert not are_disjoint([shard("a", shared), shard("b", shared)])
    assert not are_disjoint([shard("a", apart), shard("a", apart)])


def test_groups_are_parts_unless_they_overlap():
    counts = np.array([5, 3, 2])
    apart = groups_of(column(["y", "x", "z"]), ["x", "y", "z"], counts)
    assert (apart.parts, apart.of_value.tolist()) == ([[0], [1], [2]], [1, 0, 2])
    assert apart.names == ["y", "x", "z"]
    with pytest.raises(UserError, match=r"parts=\[x,y,z\]"):
        groups_of(column(2), ["x", "y", "z"], counts)


def test_stored_values_are_those_of_the_rows(csv, tmp_path):
    data, _ = csv(column(4))
    folder = prepare(data, tmp_path / "encoded").folder
    assert json.loads((folder / "domain.values.json").read_text()) == ["", "31", "35", "40"]
