"""Valid and invalid entries of ``data.fields``; all errors come before the encoding."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from samples import ROOT, make_data, one_line_error

from cki_rec.config import Data, Partition, Split, UserError
from cki_rec.data.encoding.fields import resolve_fields
from cki_rec.data.encoding.store import prepare
from cki_rec.data.encoding.vocabulary import Dictionary
from cki_rec.data.raw.formats import FORMATS

HEADER = "label,c,n,at,weekday,user,item,a.b,type,@label"
ROWS = [
    f"{n % 2},c{n % 3},{n % 5},{1_600_000_000 + n * 86_400},w,u{n % 4},i{n % 6},x,y,{n % 7}"
    for n in range(60)
]


@pytest.fixture
def csv(tmp_path):
    """Function (fields, **options) -> options of a small csv."""
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")

    def make(fields: list, **changes) -> Data:
        split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
        options = {"format": "csv", "raw": str(path), "fields": fields, "split": split}
        return make_data("default", **(options | changes))

    return make


def error_of(data: Data) -> str:
    return one_line_error(resolve_fields, data, FORMATS[data.format].kinds(data))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("a.b", "a.b: expected letters, digits"),
        ("type", "type: expected letters, digits"),
        ({"name": "c", "table": "x/y"}, "table=x/y: expected letters, digits"),
        ({"name": "c", "table": "c_first_order"}, "table=c_first_order: expected letters"),
        ({"name": "c", "column": "@label"}, "column=@label: names with @ in front are reserved"),
        ({"name": "c", "hash_size": True}, "hash_size=True: expected a whole number"),
        ({"name": "c", "hash_size": 2**31}, "hash_size=2147483648: expected at most"),
        ({"name": "c", "kind": "time"}, "kind=time: the column is categorical"),
        ({"name": "c", "knid": "multi"}, "knid: did you mean 'kind'? one of"),
        ({"name": "c", "kind": "words"}, "kind=words: one of categorical"),
        ({"name": "n", "kind": "numeric", "edges": [3, 1]}, "expected two ascending numbers"),
        ({"name": "n", "kind": "numeric", "transform": "edges"}, "go together"),
        ({"name": "c", "separator": ";"}, "separator requires kind multi or history (got"),
    ],
)
def test_impossible_field_is_named(csv, field, message):
    assert message in error_of(csv([field, "user"]))


def test_reserved_name_can_be_replaced(csv, tmp_path):
    data = csv([{"name": "kind_of", "column": "type"}, {"name": "a_b", "column": "a.b"}])
    dataset = prepare(data, tmp_path / "encoded")
    assert dataset.vocabulary("kind_of") == ["y"]
    assert dataset.vocabulary("a_b") == ["x"]


def test_numbers_alone_are_refused(csv):
    assert "all fields are numbers; add at least one field with ids" in error_of(
        csv([{"name": "n", "kind": "numeric", "transform": "log1p"}])
    )


@pytest.mark.parametrize(
    ("choice", "field", "message"),
    [
        ("criteo", {"name": "I1", "kind": "multi"}, "I1: kind=multi: the column is numeric"),
        ("criteo", {"name": "C1", "kind": "numeric"}, "C1: kind=numeric: the column is categ"),
        ("avazu", {"name": "C1", "kind": "time"}, "C1: kind=time: the column is categorical"),
        ("avazu", {"name": "hour", "kind": "multi"}, "hour: kind=multi: the column is time"),
    ],
)
def test_kind_that_a_column_cannot_have_is_refused(choice, field, message):
    assert message in error_of(
        make_data(choice, fields=[field, "C14" if choice == "avazu" else "C2"])
    )


def test_user_may_be_a_number_too(csv, tmp_path):
    fields = [{"name": "n", "kind": "numeric", "transform": "as_is"}, "c"]
    dataset = prepare(csv(fields, user="n"), tmp_path / "encoded")
    assert sorted(set(dataset.group.tolist())) == list(range(5))


def test_column_weekday_of_a_csv_is_used_and_other_time_fields_are_derived(csv, tmp_path):
    dataset = prepare(csv(["weekday", "weekend"], time="at"), tmp_path / "encoded")
    assert dataset.vocabulary("weekday") == ["w"]
    assert sorted(dataset.vocabulary("weekend")) == ["0", "1"]


def test_milliseconds_are_no_seconds(csv, tmp_path):
    data = csv(["c"], time="at")
    path = Path(data.raw)
    path.write_text(path.read_text().replace("1600000000", "1600000000000"))
    with pytest.raises(UserError, match=r"line 2: not a time: .*expected seconds since 1970"):
        prepare(data, tmp_path / "encoded")


@pytest.mark.parametrize("by", ["user", "item"])
def test_partition_by_an_absent_column_is_refused_before_encoding(csv, tmp_path, by):
    with pytest.raises(UserError, match=f"data.partition.by={by}: these rows have no {by}s"):
        prepare(csv(["c"], partition=Partition(by=by, parts=2, seed=0)), tmp_path / "encoded")
    assert not (tmp_path / "encoded").exists() or not list((tmp_path / "encoded").glob("*-*"))


def test_impossible_partition_does_not_cost_the_encoding(csv, tmp_path):
    too_many = Partition(by="user", parts=99, seed=0)
    with pytest.raises(UserError, match="more parts than users"):
        prepare(csv(["c"], user="user", partition=too_many), tmp_path / "encoded")
    (folder,) = (p for p in (tmp_path / "encoded").iterdir() if p.is_dir())
    written = (folder / "ids.npy").stat().st_mtime_ns
    dataset = prepare(csv(["c"], user="user"), tmp_path / "encoded")
    assert dataset.folder == folder
    assert (folder / "ids.npy").stat().st_mtime_ns == written


def test_scale_and_edges_enter_the_hashes_of_a_schema(csv, tmp_path):
    fields = [
        {"name": "log", "column": "n", "kind": "numeric", "transform": "log1p"},
        {"name": "bucket", "column": "n", "kind": "numeric", "transform": "quantile"},
        "c",
    ]
    data = csv(fields, buckets=3)
    first = prepare(data, tmp_path / "encoded")
    path = Path(data.raw)
    path.write_text(re.sub(r",4,(16\d+)", r",40,\1", path.read_text()))
    other = prepare(data, tmp_path / "encoded")
    assert first.manifest["quantile_edges"]["bucket"] == [1.0, 3.0]
    assert first.vocabulary("bucket") == other.vocabulary("bucket")
    assert first.schema.vocabulary_hashes["c"] == other.schema.vocabulary_hashes["c"]
    assert first.schema.vocabulary_hashes["log"] != other.schema.vocabulary_hashes["log"]


def test_more_tokens_than_ids_are_refused(monkeypatch):
    monkeypatch.setattr("cki_rec.data.encoding.vocabulary.LARGEST_TABLE", 5)
    dictionary = Dictionary()
    dictionary.grow(4)
    with pytest.raises(UserError, match="more than 5 different tokens; hash it"):
        dictionary.grow(5)


def test_example_of_the_documentation_prepares(tmp_path, compose):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.S)
    example = OmegaConf.to_container(OmegaConf.create(block))
    example.pop("defaults")
    header = "clicked,user_id,product,price,tags,zip,viewed,at"
    rows = [
        f"{n % 2},u{n % 5},p{n % 9},{n},a|b,{10000 + n},p1|p2,{1_600_000_000 + 9999 * n}"
        for n in range(80)
    ]
    (tmp_path / "clicks_1.csv").write_text("\n".join([header, *rows]) + "\n")
    example["raw"] = str(tmp_path / "clicks_*.csv")
    tree = compose("data=default")
    OmegaConf.set_struct(tree, False)
    tree.data = OmegaConf.merge(tree.data, example)
    from cki_rec.config import parse

    dataset = prepare(parse(tree).data, tmp_path / "encoded")
    assert [f.name for f in dataset.schema.features] == [
        entry if isinstance(entry, str) else entry["name"] for entry in example["fields"]
    ]
