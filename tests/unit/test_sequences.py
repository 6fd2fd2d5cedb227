"""Lines ``user item item ...`` -> clicked rows and drawn ones; attributes of items."""

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from samples import make_data, one_line_error, read_rows, shared_data

from cki_rec.config import Data, Split, UserError
from cki_rec.data.encoding.store import EncodedDataset, prepare
from cki_rec.data.raw.reading import LABEL, LINE, TIME
from cki_rec.data.schema import FIRST_ID
from cki_rec.data.test_labels import all_labels

SEQUENCES = {
    "u1": ["5", "3", "9", "1"],
    "u2": ["3"],
    "u3": ["7", "8", "7", "2", "6"],
    "u4": ["1", "2"],
    "u5": ["9", "8", "4", "5", "3", "1", "2"],
}
LINES = [" ".join([user, *items]) for user, items in SEQUENCES.items()]
LEAVE_LAST_OUT = Split(by="leave_last_out", fractions=[0.8, 0.1, 0.1], seed=0)
ITEMS = {item for items in SEQUENCES.values() for item in items}


def write(path: Path, lines: list[str] = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def options(raw, fields=("user", "item", "history"), **changes) -> Data:
    return make_data("amazon_beauty", raw=str(raw), fields=list(fields), **changes)


def read(raw, block_bytes: int = 1 << 24, **changes) -> pl.DataFrame:
    return read_rows(options(raw, **changes), block_bytes)[0]


def error_of(raw, **changes) -> str:
    return one_line_error(read, raw, **changes)


def tokens_of(dataset: EncodedDataset, name: str, row: int) -> list[str]:
    table = {"history": "item"}.get(name, name)
    known, column = dataset.vocabulary(table), dataset.column(name)
    ids = column.ids(np.array([row]))[0] if name in ("history", "attributes") else [column[row]]
    return [known[i - FIRST_ID] if i >= FIRST_ID else None for i in ids]


@pytest.mark.parametrize("negatives", [1, 4])
def test_every_item_is_a_clicked_row_and_drawn_ones_follow(tmp_path, negatives):
    frame = read(write(tmp_path / "Beauty.txt"), negatives=negatives)
    clicked = frame.filter(pl.col(LABEL) == 1)
    result = {user: clicked.filter(pl.col("user") == user)["item"].to_list() for user in SEQUENCES}
    assert result == SEQUENCES
    assert frame[LABEL].to_list() == ([1] + [0] * negatives) * len(clicked)
    steps = [step for items in SEQUENCES.values() for step in range(len(items))]
    assert frame[TIME].to_list() == np.repeat(steps, 1 + negatives).tolist()
    users = [user for user, items in SEQUENCES.items() for _ in items]
    assert frame["user"].to_list() == np.repeat(users, 1 + negatives).tolist()


def test_drawn_items_are_never_items_of_the_user(tmp_path):
    frame = read(write(tmp_path / "Beauty.txt"), negatives=200)
    for user, items in SEQUENCES.items():
        drawn = frame.filter((pl.col("user") == user) & (pl.col(LABEL) == 0))["item"]
        assert set(drawn) == ITEMS - set(items)  # and each of the others is drawn at times


def test_drawn_items_are_uniform(tmp_path):
    frame = read(write(tmp_path / "Beauty.txt"), negatives=2000)
    drawn = frame.filter((pl.col("user") == "u2") & (pl.col(LABEL) == 0))["item"]
    share = drawn.value_counts()["count"] / len(drawn)
    assert share.to_numpy() == pytest.approx(1 / 8, abs=0.03)


def test_draw_depends_on_its_seed_alone(tmp_path):
    path = write(tmp_path / "Beauty.txt")
    frame = read(path, negatives=5)
    assert read(path, negatives=5).equals(frame)
    assert read(write(tmp_path / "other.txt"), negatives=5).equals(frame)
    assert not read(path, negatives=5, negatives_seed=1).equals(frame)


@pytest.mark.parametrize("block_bytes", [1, 5, 12, 50])
def test_no_row_depends_on_the_block_size(tmp_path, block_bytes):
    long = [" ".join([f"u{n}", *map(str, range(n, n + 300))]) for n in (100, 200)]
    lines = [*LINES[:2], "", "alone", "u1 4 5", *LINES[2:], *long]
    path = write(tmp_path / "Beauty.txt", lines)
    want, result = read_rows(options(path, on_bad_row="skip"))
    frame, reading = read_rows(options(path, on_bad_row="skip"), block_bytes)
    assert frame.equals(want)
    assert reading.counts == result.counts == {"missing field": 1, "repeated user": 1}


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder", "gz"])
def test_every_form_equals_plain(tmp_path, form):
    want = read(write(tmp_path / "plain.txt"))
    path = write(tmp_path / "raw" / ("Beauty.txt.gz" if form == "gz" else "Beauty.txt"))
    if form == "folder":
        path = path.parent
    elif form.startswith("zip"):
        with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
            archive.write(path, "s3rec/Beauty.txt" if form.endswith("folder") else "Beauty.txt")
        path = tmp_path / "raw.zip"
    assert read(path).equals(want)


def test_words_may_be_apart_by_any_blanks_and_lines_end_with_crlf(tmp_path):
    lines = [line.replace(" ", " \t ") + " \r" for line in LINES]
    assert read(write(tmp_path / "a.txt", lines)).equals(read(write(tmp_path / "b.txt")))


@pytest.mark.parametrize("negatives", [1, 3])
def test_leave_last_out_holds_out_whole_steps(tmp_path, negatives):
    data = options(write(tmp_path / "Beauty.txt"), negatives=negatives)
    dataset = prepare(data, tmp_path / "encoded")
    want = []
    for items in SEQUENCES.values():
        steps = [0] * len(items)
        if len(items) >= 3:
            steps[-2:] = [1, 2]
        want += np.repeat(steps, 1 + negatives).tolist()
    assert dataset.split.tolist() == want
    assert all_labels(dataset)[dataset.split == 2].mean() == 1 / (1 + negatives)


def test_history_has_the_clicks_of_earlier_training_steps(tmp_path):
    data = options(write(tmp_path / "Beauty.txt"), negatives=2, history_length=3)
    dataset = prepare(data, tmp_path / "encoded")
    row = 0
    for items in SEQUENCES.values():
        train = items[:-2] if len(items) >= 3 else items
        for step in range(len(items)):
            for _ in range(3):
                assert tokens_of(dataset, "history", row) == train[:step][-3:]
                row += 1
    assert row == len(dataset)


def test_repeated_user_is_a_bad_row(tmp_path):
    path = write(tmp_path / "Beauty.txt", [*LINES, "u2 1 5"])
    message = error_of(path)
    assert message.startswith(f"{path}, line 6: repeated user: found 'u2 1 5', expected one line")
    assert "data.on_bad_row=skip" in message
    frame, reading = read_rows(options(path, on_bad_row="skip"))
    assert frame.equals(read(write(tmp_path / "good.txt")))
    assert reading.counts == {"repeated user": 1}


def test_items_of_skipped_lines_are_never_drawn(tmp_path):
    path = write(tmp_path / "Beauty.txt", [*LINES, "u2 only-here"])
    assert set(read(path, on_bad_row="skip", negatives=200)["item"]) == ITEMS


@pytest.mark.parametrize("line", ["u6", "u6 "])
def test_user_without_items_is_a_bad_row(tmp_path, line):
    path = write(tmp_path / "Beauty.txt", [*LINES[:2], line, *LINES[2:]])
    message = error_of(path)
    assert message.startswith(f"{path}, line 3: missing field: found '{line}'")
    assert "expected a user and at least one item; " in message
    frame, reading = read_rows(options(path, on_bad_row="skip"))
    assert set(frame["user"]) == set(SEQUENCES)
    assert reading.counts == {"missing field": 1}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_user_with_every_item_is_named(tmp_path, on_bad_row):
    path = write(tmp_path / "Beauty.txt", [*LINES, " ".join(["all", *sorted(ITEMS)])])
    message = error_of(path, on_bad_row=on_bad_row)
    assert f"{path}, line 6: user all has all 9 items, so there are none to draw" in message
    assert message.endswith("remove the line")


@pytest.mark.parametrize("number", [0, 2])
def test_folder_with_another_number_of_texts_is_refused(tmp_path, number):
    (tmp_path / "raw").mkdir()
    for name in ("a.txt", "b.txt")[:number]:
        write(tmp_path / "raw" / name)
    message = error_of(tmp_path / "raw")
    assert f"{tmp_path}/raw: contains {number} .txt files (" in message
    assert "expected one with a line per user; set data.raw to it" in message


def test_several_paths_are_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name)
    assert "2 paths, expected a file, zip or folder" in error_of(tmp_path / "*.txt")


ATTRIBUTES = {item: [f"a{item}", f"b{int(item) % 2}"] for item in sorted(ITEMS - {"4"})}


def attributes_beside(path: Path, content: str, name: str) -> Path:
    (path.parent / name).write_text(content)
    return path


@pytest.mark.parametrize("name", ["Beauty.txt", "Beauty.txt.gz"])
def test_attributes_are_a_field(tmp_path, name):
    path = write(tmp_path / name)
    attributes_beside(path, json.dumps(ATTRIBUTES), "Beauty_item2attributes.json")
    data = options(path, fields=["item", "attributes"])
    dataset = prepare(data, tmp_path / "encoded")
    known = set(dataset.vocabulary("attributes"))
    for row in range(len(dataset)):
        (item,) = tokens_of(dataset, "item", row)
        result = tokens_of(dataset, "attributes", row)
        assert [a for a in result if a] == [a for a in ATTRIBUTES.get(item, []) if a in known]
    names = [entry["name"] for entry in dataset.manifest["source"]]
    assert names == [name, "Beauty_item2attributes.json"]


def test_attributes_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("x/Beauty.txt", "".join(line + "\n" for line in LINES))
        archive.writestr("x/Beauty_item2attributes.json", json.dumps(ATTRIBUTES))
    frame = read(tmp_path / "raw.zip", fields=["attributes"])
    want = ["|".join(ATTRIBUTES.get(item, [])) or None for item in frame["item"]]
    assert frame["attributes"].to_list() == want


def test_without_attributes_there_is_no_such_field(tmp_path):
    message = error_of(write(tmp_path / "Beauty.txt"), fields=["user", "attributes"])
    assert "has no attributes; " in message
    assert message.endswith("it has user, item, history")


def test_attributes_of_another_set_are_not_taken(tmp_path):
    path = write(tmp_path / "Beauty.txt")
    attributes_beside(path, json.dumps(ATTRIBUTES), "Sports_item2attributes.json")
    assert "has no attributes" in error_of(path, fields=["user", "attributes"])


BROKEN = ['{"1": ["a"', "[1, 2]", '{"1": 5}', "not json", '{"1": "word"}']


@pytest.mark.parametrize("content", BROKEN)
def test_broken_attributes_are_refused(tmp_path, content):
    path = write(tmp_path / "Beauty.txt")
    attributes_beside(path, content, "Beauty_item2attributes.json")
    message = error_of(path)
    assert f"{tmp_path}/Beauty_item2attributes.json: not a JSON object of lists" in message
    assert "expected item -> attributes; fetch the file again" in message


def test_empty_attributes_are_refused(tmp_path):
    path = attributes_beside(write(tmp_path / "Beauty.txt"), "", "Beauty_attributes.json")
    assert f"{tmp_path}/Beauty_attributes.json: empty" in error_of(path)


def test_amazon_beauty_has_its_published_size():
    frame = read(shared_data("amazon-beauty-seq.zip"), fields=["user", "item", "attributes"])
    clicked = frame.filter(pl.col(LABEL) == 1)
    assert len(clicked) == 198_502
    assert len(frame) == 2 * 198_502
    assert frame["user"].n_unique() == 22_363
    assert frame["item"].n_unique() == clicked["item"].n_unique() == 12_101
    met = clicked.select("user", "item").unique()
    assert frame.filter(pl.col(LABEL) == 0).join(met, on=["user", "item"]).is_empty()


def test_leave_last_out_requires_three_steps(tmp_path):
    lines = ["a 1 2", "b 2 3", "c 4 1"]
    data = options(write(tmp_path / "Beauty.txt", lines), split=LEAVE_LAST_OUT)
    with pytest.raises(UserError, match="it requires users with 3 rows or more"):
        prepare(data, tmp_path / "encoded")


def test_lines_are_not_columns_of_the_rows(tmp_path):
    assert LINE not in read(write(tmp_path / "Beauty.txt")).columns
