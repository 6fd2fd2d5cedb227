"""Histories that a csv column lists; validation rows drawn from training rows."""

import numpy as np
import pytest
from samples import make_data, one_line_error, read_rows

from cki_rec.config import Split, UserError
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding.fields import fields_to_json, resolve_fields
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.schema import FIRST_ID, OOV_ID

HEADER = "label,user,item,past"
FILES = Split(by="files", fractions=[0.9, 0.1, 0.0], seed=0)
PAST = {"name": "past", "kind": "history", "table": "item", "separator": "^"}


@pytest.fixture
def encode(tmp_path):
    """Function (histories of training rows, of test rows, field, **options) -> encoded set.

    Row n has item ``i<n % 4>`` and label ``n % 2``; validation rows repeat the training rows.
    """

    def make(train: list[str], test: list[str], field: dict, **changes):
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        for name, pasts in (("train", train), ("valid", train), ("test", test)):
            rows = [f"{n % 2},u{n % 3},i{n % 4},{past}" for n, past in enumerate(pasts)]
            (raw / f"{name}.csv").write_text("\n".join([HEADER, *rows]) + "\n")
        split = Split(by="files", fractions=[0.8, 0.1, 0.1], seed=0)
        options = {"raw": str(raw), "published": None, "split": split, "min_count": 1}
        data = make_data("frappe_x1", **(options | {"fields": ["item", field]} | changes))
        return prepare(data, tmp_path / "encoded")

    return make


def tokens(dataset, name: str = "past", split: int = 0) -> list[list[str | None]]:
    column, known = dataset.column(name), dataset.vocabulary("item")
    assert isinstance(column, Ragged)
    return [
        [None if i == OOV_ID else known[i - FIRST_ID] for i in column.ids(np.array([row]))[0]]
        for row in np.flatnonzero(dataset.split == split)
    ]


def test_history_keeps_order_and_repetitions(encode):
    pasts = ["i1^i0^i1^i1", "", "i3", "^i2^^i0^"]
    dataset = encode(pasts, ["i0"], PAST)
    assert tokens(dataset) == [["i1", "i0", "i1", "i1"], [], ["i3"], ["i2", "i0"]]
    past = dataset.schema.features[1]
    assert (past.name, past.table, past.kind) == ("past", "item", "history")
    assert set(dataset.schema.table_sizes) == {"item"}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, ["i0", "i1", "i2", "i3"]),
        ({"max_length": 3}, ["i1", "i2", "i3"]),
        ({"max_length": 3, "keep": "latest"}, ["i1", "i2", "i3"]),
        ({"max_length": 3, "keep": "first"}, ["i0", "i1", "i2"]),
        ({"max_length": 9, "keep": "first"}, ["i0", "i1", "i2", "i3"]),
    ],
)
def test_long_history_is_cut_at_the_chosen_end(encode, options, want):
    dataset = encode(["i3", "i0^i1^i2^i3", "", "i0^i1^i2^i3"], ["i0^i1^i2^i3"], PAST | options)
    assert tokens(dataset) == [["i3"], want, [], want]
    assert tokens(dataset, split=2) == [want]


def test_unseen_ids_stay_in_their_places(encode):
    dataset = encode(["i1", "i0^new", "i2", "i3"], ["i1^x^y^i1^x", "x", "new"], PAST)
    assert tokens(dataset, split=2) == [["i1", None, None, "i1", None], [None], ["new"]]
    assert dataset.manifest["unseen_share"]["past"] == {"train": 0.0, "valid": 0.0, "test": 4 / 7}


def test_token_stays_if_one_field_holds_it_often_enough(encode):
    # items: i0 to i3 in 3 training rows each; histories: a 3 times in 1 row, b 2 times, i0 once
    pasts = ["a^a^a", "b^b", "i0", *[""] * 9]
    dataset = encode(pasts, ["a"], PAST, min_count=3)
    assert set(dataset.vocabulary("item")) == {"i0", "i1", "i2", "i3", "a"}
    assert tokens(dataset)[:3] == [["a", "a", "a"], [None, None], ["i0"]]
    assert dataset.vocabulary("item")[0] == "i0"  # 3 + 1: most frequent of both together


def test_two_fields_do_not_make_up_one_count(encode):
    # i3: 2 rows, and twice in histories; the others: 3 rows each
    dataset = encode(["i3", "i3", *[""] * 9], ["i0"], PAST, min_count=3)
    assert set(dataset.vocabulary("item")) == {"i0", "i1", "i2"}


def test_tokens_are_counted_before_the_history_is_cut(encode):
    dataset = encode(["a^a^i0", "", "", ""], ["i0"], PAST | {"max_length": 1}, min_count=1)
    assert "a" in dataset.vocabulary("item")
    assert tokens(dataset)[0] == ["i0"]


def test_only_training_rows_are_counted(encode):
    dataset = encode(["i0", "", "", ""], ["later^later"], PAST)
    assert "later" not in dataset.vocabulary("item")


def test_two_histories_share_the_table(encode):
    field = PAST | {"name": "again", "column": "past", "max_length": 1}
    dataset = encode(["i1^i2", "", "i3", ""], ["i0"], PAST, fields=["item", PAST, field])
    assert tokens(dataset, "again") == [["i2"], [], ["i3"], []]
    assert [f.table for f in dataset.schema.features] == ["item"] * 3


def test_history_without_the_field_of_its_ids(encode):
    field = {"name": "past", "kind": "history", "separator": "^"}
    dataset = encode(["i1^i2", "", "i3", ""], ["i0"], field, fields=[field, "user"])
    assert set(dataset.schema.table_sizes) == {"past", "user"}


def test_hashed_history(encode):
    fields = [{"name": "item", "hash_size": 50}, PAST | {"hash_size": 50, "max_length": 2}]
    dataset = encode(["i0^i1^i0", "", "i1", ""], ["i0"], PAST, fields=fields)
    ids = dataset.column("item")
    assert dataset.column("past").ids(np.array([0]))[0].tolist() == [ids[1], ids[0]]


@pytest.mark.parametrize("chunk_mb", [1, 16])
def test_parts_count_ids_of_histories(encode, chunk_mb):
    dataset = encode(["i1^i1", "", "i3", ""], ["i0"], PAST)
    known = dataset.vocabulary("item")
    counts = dataset.row_counts(dataset.schema)["item"]
    assert counts[FIRST_ID + known.index("i1")] == 3  # a row with the item, two in a history


def data_of(field: dict | str, choice: str = "default", **changes):
    return make_data(choice, fields=["item", field], **changes)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (PAST | {"keep": "last"}, "keep=last: did you mean 'latest'? one of latest, first"),
        (PAST | {"hash_size": 9}, "item and past share table item"),
        (PAST | {"min_count": 7}, "item and past share table item"),
        (PAST | {"prefix": 2}, "prefix requires kind categorical (got history)"),
        ({"name": "past", "keep": "first"}, "keep requires kind history (got categorical)"),
        (PAST | {"column": "pas"}, "has no past; did you mean 'past'?"),
    ],
)
def test_impossible_history_is_named(tmp_path, field, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\n1,u,i,a\n")
    data = data_of(field, format="csv", raw=str(path))
    assert message in one_line_error(resolve_fields, data, FORMATS["csv"].kinds(data))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            {"name": "history", "max_length": 3},
            "max_length requires a history that a column lists",
        ),
        ({"name": "history", "separator": "|"}, "this is a history of liked items"),
        ({"name": "history", "rows": "earlier"}, "labels of test rows would be inputs"),
        ({"name": "history", "rows": "late"}, "rows=late: one of train, earlier"),
        ({"name": "genres", "rows": "earlier"}, "rows requires kind history (got multi)"),
        ({"name": "genres", "kind": "history", "table": "x"}, ""),
    ],
)
def test_histories_of_liked_items_have_other_options(field, message):
    data = data_of(field, "movielens_small")
    if message:
        assert message in one_line_error(resolve_fields, data, FORMATS["movielens"].kinds(data))
    else:
        assert resolve_fields(data, FORMATS["movielens"].kinds(data))[1].column == "item"


def test_fields_without_keep_are_written_as_before():
    data = make_data("kkbox_x1", raw="absent")
    result = resolve_fields(data, dict.fromkeys(entry_names(data), "categorical"))
    assert not [entry for entry in fields_to_json(result) if "keep" in entry]


def entry_names(data) -> list[str]:
    return [entry if isinstance(entry, str) else entry["name"] for entry in data.fields]


def test_bad_line_is_named(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(f"{HEADER}\n1,u,i,a^b\n0,u,i,a,b\n")
    data = data_of(PAST, "frappe_x1", raw=str(tmp_path), split=FILES, published=None)
    message = one_line_error(read_rows, data)
    assert f"{tmp_path}/train.csv, line 3: extra field: found '0,u,i,a,b'" in message


def write_split(folder, names: tuple[str, ...] = ("train", "test"), rows: int = 50):
    folder.mkdir(exist_ok=True)
    for name in names:
        lines = [f"{n % 2},{name}{n},i{n % 4},i1" for n in range(rows)]
        (folder / f"{name}.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return folder


def split_of(raw, folder, split=FILES):
    options = {"published": None, "split": split, "fields": ["item", PAST]}
    raw = [str(path) for path in raw] if isinstance(raw, list) else str(raw)
    return prepare(make_data("frappe_x1", raw=raw, **options), folder).split


def test_validation_rows_are_drawn_from_training_rows(tmp_path):
    raw = write_split(tmp_path / "raw")
    split = split_of(raw, tmp_path / "encoded")
    assert np.bincount(split[:50]).tolist() == [45, 5]
    assert set(split[50:]) == {2}
    other = split_of(raw, tmp_path / "other", Split(by="files", fractions=[0.9, 0.1, 0], seed=1))
    assert np.bincount(other[:50]).tolist() == [45, 5]
    assert (other != split).any()
    both = [raw / "train.csv", raw / "test.csv"]
    assert (split_of(both, tmp_path / "listed") == split).all()


def test_published_validation_rows_are_used_where_there_are_any(tmp_path):
    raw = write_split(tmp_path / "raw", ("train", "valid", "test"))
    assert np.bincount(split_of(raw, tmp_path / "encoded")).tolist() == [50, 50, 50]


def test_missing_validation_rows_are_no_default(tmp_path):
    raw = write_split(tmp_path / "raw")
    split = Split(by="files", fractions=[0.8, 0.1, 0.1], seed=0)
    with pytest.raises(UserError, match=r"no valid\.csv.*data\.split\.fractions=\[0\.9,0\.1,0\]"):
        split_of(raw, tmp_path / "encoded", split)


@pytest.mark.parametrize("fractions", [[0.9, 0.2, 0.0], [1.1, -0.1, 0.0]])
def test_impossible_shares_are_refused(tmp_path, fractions):
    split = Split(by="files", fractions=fractions, seed=0)
    with pytest.raises(UserError, match="each 0 or more, with sum 1"):
        split_of(write_split(tmp_path / "raw"), tmp_path / "encoded", split)


def test_share_that_holds_no_row_is_refused(tmp_path):
    split = Split(by="files", fractions=[0.999, 0.001, 0.0], seed=0)
    with pytest.raises(UserError, match="no valid row"):
        split_of(write_split(tmp_path / "raw"), tmp_path / "encoded", split)
