"""Csv files with a header -> rows in the common form; published splits and their digests."""

import gzip
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from omegaconf import OmegaConf
from samples import ROOT, make_data, one_line_error, read_rows

from cki_rec.config import Data, Split, UserError
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset, prepare
from cki_rec.data.raw import source
from cki_rec.data.raw.reading import LABEL, LINE, SPLIT, TIME
from cki_rec.data.schema import FIRST_ID, OOV_ID
from cki_rec.data.test_labels import all_labels

HEADER = "label,user,item,city"
ROWS = [f"{n % 2},u{n % 5},i{n % 7},c{n % 3}" for n in range(30)]
FILES = {"train": ROWS[:18], "valid": ROWS[18:24], "test": ROWS[24:]}
BY_FILES = Split(by="files", fractions=[0.8, 0.1, 0.1], seed=0)
BY_RANDOM = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)


def write(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{row}\n" for row in [header, *rows]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def folder_of(path: Path, suffix: str = ".csv", header: str = HEADER) -> Path:
    for name, rows in FILES.items():
        write(path / f"{name}{suffix}", rows, header)
    return path


def zip_of(folder: Path, top: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, top + file.name)
    return path


def options(raw, choice: str = "frappe_x1", **changes) -> Data:
    defaults = {"fields": ["user", "item", "city"], "published": None, "split": BY_FILES}
    raw = [str(path) for path in raw] if isinstance(raw, list) else str(raw)
    return make_data(choice, **(defaults | {"raw": raw} | changes))


def one_file(path: Path, rows: list[str], header: str = HEADER, **changes) -> Data:
    return options(write(path, rows, header), **({"split": BY_RANDOM} | changes))


def error_of(data: Data) -> str:
    return one_line_error(read_rows, data)


def tokens_of(dataset: EncodedDataset, name: str) -> list:
    column, known = dataset.column(name), dataset.vocabulary(name)
    if isinstance(column, Ragged):
        result = [column.ids(np.array([row]))[0].tolist() for row in range(len(dataset))]
        return [[known[i - FIRST_ID] for i in ids] for ids in result]
    return [None if i == OOV_ID else known[i - FIRST_ID] for i in column]


def test_rows_of_three_files(tmp_path):
    frame, reading = read_rows(options(folder_of(tmp_path / "raw")))
    assert frame[SPLIT].to_list() == [0] * 18 + [1] * 6 + [2] * 6
    assert frame[LABEL].to_list() == [n % 2 for n in range(30)]
    assert frame["city"].to_list() == [f"c{n % 3}" for n in range(30)]
    assert frame[LINE].to_list() == [*range(2, 20), *range(2, 8), *range(2, 8)]
    assert set(reading.md5) == {"train.csv", "valid.csv", "test.csv"}


@pytest.mark.parametrize("top", ["", "Frappe_x1/"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_zip_and_gz_equal_a_plain_folder(tmp_path, top, suffix):
    want = read_rows(options(folder_of(tmp_path / "plain")))[0]
    folder = folder_of(tmp_path / "raw", suffix)
    assert read_rows(options(folder))[0].equals(want)
    assert read_rows(options(zip_of(folder, top)))[0].equals(want)


def test_three_files_are_named_in_order(tmp_path):
    folder = folder_of(tmp_path / "raw")
    files = [write(tmp_path / f"{n}.csv", rows) for n, rows in enumerate(FILES.values())]
    assert read_rows(options(files))[0].equals(read_rows(options(folder))[0])


def test_pattern_puts_each_file_in_the_split_of_its_name(tmp_path):
    folder = folder_of(tmp_path / "raw")
    frame, _ = read_rows(options(folder / "*.csv"))
    assert frame.filter(pl.col(SPLIT) == 0)["user"].to_list() == [f"u{n % 5}" for n in range(18)]


def test_missing_valid_is_named(tmp_path):
    folder = folder_of(tmp_path / "raw")
    (folder / "valid.csv").unlink()
    for path in (folder, zip_of(folder)):
        message = error_of(options(path))
        assert f"{path}: no valid.csv, expected train.csv, valid.csv and test.csv; " in message
        assert "data.split.by=random" in message


def test_file_with_other_columns_is_refused(tmp_path):
    folder = folder_of(tmp_path / "raw")
    write(folder / "test.csv", FILES["test"], "label,user,item,town")
    message = error_of(options(folder))
    assert message.startswith(
        f"{folder}/test.csv, line 1: the header lacks city and has also town"
    )
    assert f"expected the columns of {folder}/train.csv (label, user, item, city)" in message


@pytest.mark.parametrize("block_bytes", [1, 10, 100])
def test_no_row_depends_on_the_block_size(tmp_path, block_bytes):
    rows = [*ROWS[:9], '1,"u, 1",i1,"say, c"', "", "1,u", *ROWS[9:], '1,"u,i,c']
    data = one_file(tmp_path / "a.csv", rows, on_bad_row="skip")
    want, result = read_rows(data)
    frame, reading = read_rows(data, block_bytes)
    assert frame.equals(want)
    assert reading.counts == result.counts == {"missing field": 1, "quotes": 1}


def test_quoted_fields_hold_commas(tmp_path):
    frame, _ = read_rows(one_file(tmp_path / "a.csv", [*ROWS, '1,"u, 1","",",,"']))
    assert frame.select("user", "item", "city", LINE).row(-1) == ("u, 1", None, ",,", 32)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_quoted_fields_hold_quotes(tmp_path, block_bytes):
    data = one_file(tmp_path / "a.csv", [*ROWS, '1,u1,i1,"c ""1"""'], on_bad_row="skip")
    frame, reading = read_rows(data, block_bytes)
    assert frame["city"].to_list()[-1] == 'c "1"'
    assert reading.counts == {}


def test_header_may_be_quoted(tmp_path):
    header = '"label",user,"item",city'
    want = read_rows(one_file(tmp_path / "a.csv", ROWS))[0]
    assert read_rows(one_file(tmp_path / "b.csv", ROWS, header))[0].equals(want)


def test_quoted_and_plain_files_are_equal(tmp_path):
    quoted = [",".join(f'"{word}"' for word in row.split(",")) for row in ROWS]
    want = read_rows(one_file(tmp_path / "a.csv", ROWS))[0]
    assert read_rows(one_file(tmp_path / "b.csv", quoted))[0].equals(want)


@pytest.mark.parametrize("transform", ["as_is", "log1p"])
def test_numeric_fields_become_floats(tmp_path, transform):
    values = ["0", "1.5", "-2", "", "1e2", ".5"]
    rows = [f"{row},{values[n % 6]}" for n, row in enumerate(ROWS)]
    data = one_file(
        tmp_path / "a.csv",
        rows,
        HEADER + ",price",
        fields=["user", {"name": "price", "kind": "numeric", "transform": transform}],
    )
    dataset = prepare(data, tmp_path / "encoded")
    raw = np.array([float(values[n % 6] or "nan") for n in range(30)])
    want = raw if transform == "as_is" else np.sign(raw) * np.log1p(np.abs(raw))
    train = want[dataset.split == 0]
    want = np.where(np.isnan(want), np.nanmean(train), want)
    if transform == "log1p":
        want = (want - np.nanmean(train)) / np.nanstd(train)
    assert dataset.column("price").dtype == np.float32
    assert dataset.column("price") == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_multi_fields_hold_the_first_distinct_tokens(tmp_path):
    texts = ["rock pop", "pop  rock  pop jazz folk", "", " ", "folk"]
    rows = [f"{row},{texts[n % 5]}" for n, row in enumerate(ROWS)]
    field = {"name": "tags", "kind": "multi", "separator": " ", "max_length": 3}
    data = one_file(tmp_path / "a.csv", rows, HEADER + ",tags", fields=["user", field])
    result = tokens_of(prepare(data, tmp_path / "encoded"), "tags")
    want = [["rock", "pop"], ["pop", "rock", "jazz"], [], [], ["folk"]]
    assert result == [want[n % 5] for n in range(30)]


AGES = {
    "": "", "-3": "", "0": "", "0.5": "0", "1": "0", "10": "0", "10.5": "1", "11": "1", "20": "1",
    "30": "2", "40": "3", "50": "4", "60": "5", "61": "6", "95": "6", "95.5": "", "96": "",
    "1000": "",
}  # fmt: skip
"""Age -> bucket as KKBox_x1 publishes it: missing, below 1 or above 95 is missing."""


@pytest.mark.parametrize("numeric_missing", [None, 0.0])
def test_kkbox_fields_follow_the_published_rules(tmp_path, numeric_missing):
    fields = make_data("kkbox_x1").fields[-2:]
    assert [field["name"] for field in fields] == ["isrc", "bd"]
    codes = ["USRC17607839", "US", "U", "", "GBAYE"]
    rows = [f"{n % 2},{codes[n % 5]},{age}" for n, age in enumerate(10 * list(AGES))]
    write(tmp_path / "a.csv", rows, "label,isrc,bd")
    data = options(
        tmp_path / "a.csv", "kkbox_x1", fields=fields, user=None, item=None, min_count=1,
        split=BY_RANDOM, numeric_missing=numeric_missing,
    )  # fmt: skip
    dataset = prepare(data, tmp_path / "encoded")
    prefixes = ["US", "US", "U", "", "GB"]
    assert tokens_of(dataset, "isrc") == [prefixes[n % 5] for n in range(len(rows))]
    assert tokens_of(dataset, "bd") == 10 * list(AGES.values())


def test_users_items_times_and_history(tmp_path):
    rows = [f"{row},{1_000_000 + 3600 * n}" for n, row in enumerate(ROWS)]
    fields = ["user", "item", "hour", "weekend", "history"]
    data = one_file(tmp_path / "a.csv", rows, HEADER + ",at", time="at", fields=fields)
    dataset = prepare(data, tmp_path / "encoded")
    assert dataset.timestamp.tolist() == [1_000_000 + 3600 * n for n in range(30)]
    assert dataset.group.tolist() == [n % 5 for n in range(30)]
    assert dataset.item_index.tolist() == [n % 7 for n in range(30)]
    want = [str((1_000_000 + 3600 * n) // 3600 % 24) for n in range(30)]
    known = set(dataset.vocabulary("hour"))
    assert tokens_of(dataset, "hour") == [hour if hour in known else None for hour in want]
    assert isinstance(dataset.column("history"), Ragged)


def test_time_as_yymmddhh(tmp_path):
    rows = [f"{row},141021{n % 24:02}" for n, row in enumerate(ROWS)]
    changes = {"time": "at", "time_form": "yymmddhh", "header": HEADER + ",at"}
    frame, _ = read_rows(one_file(tmp_path / "a.csv", rows, **changes))
    assert frame[TIME].to_list() == [1413849600 + 3600 * (n % 24) for n in range(30)]
    data = one_file(tmp_path / "b.csv", [*rows, f"{ROWS[0]},14102199"], **changes)
    assert "expected a time as YYMMDDHH in at, not '14102199'" in error_of(data)


def test_history_needs_users_items_and_times(tmp_path):
    message = error_of(one_file(tmp_path / "a.csv", ROWS, fields=["user", "history"]))
    assert "has no history; " in message
    assert message.endswith("it has user, item, city")


@pytest.mark.parametrize(
    "names",
    [("split", "label", "timestamp"), ("line", "hour", "group"), ("x y", "ids", "history")],
)
def test_columns_may_be_named_like_ours(tmp_path, names):
    rows = [f"{n % 2},a{n % 3},b{n % 4},c{n % 5}" for n in range(30)]
    data = one_file(
        tmp_path / "a.csv", rows, ",".join(["click", *names]), label="click", user=None, item=None,
        fields=list(names), split=Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0),
    )  # fmt: skip
    dataset = prepare(data, tmp_path / "encoded")
    for letter, size, name in zip("abc", (3, 4, 5), names, strict=True):
        assert tokens_of(dataset, name) == [f"{letter}{n % size}" for n in range(30)]
    assert all_labels(dataset).tolist() == [n % 2 for n in range(30)]


def test_column_named_twice_is_refused(tmp_path):
    message = error_of(one_file(tmp_path / "a.csv", ROWS, "label,user,item,user"))
    assert message.startswith(f"{tmp_path}/a.csv, line 1: names user twice, expected every")
    assert message.endswith("; correct the header")


@pytest.mark.parametrize("option", ["label", "user", "item", "time"])
def test_column_that_the_header_lacks_is_named(tmp_path, option):
    header = "labels,users,items,times"
    names = {name: f"{name}s" for name in ("label", "user", "item", "time")} | {option: option}
    message = error_of(one_file(tmp_path / "a.csv", ROWS, header, fields=["users"], **names))
    assert f"{tmp_path}/a.csv, line 1: no column '{option}' in the header (labels, " in message
    assert f"expected data.{option}; did you mean '{option}s'? set data.{option}" in message


def test_field_that_the_header_lacks_is_named(tmp_path):
    message = error_of(one_file(tmp_path / "a.csv", ROWS, fields=["user", "citys"]))
    assert "has no citys; did you mean 'city'? it has user, item, city" in message


def test_registry_has_the_published_md5():
    """The digest covers the md5 that the READMEs of github.com/reczoo/Datasets publish."""
    registry = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "published.yaml"))
    digest = hashlib.sha256(json.dumps(registry, sort_keys=True).encode()).hexdigest()
    assert (len(registry), digest[:16]) == (14, "ba76f778a8e4aed0")


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """Root of a project whose registry knows the three files of ``folder_of``."""
    folder = folder_of(tmp_path / "raw")
    lines = [
        f"  {name}: {hashlib.md5((folder / f'{name}.csv').read_bytes()).hexdigest()}\n"
        for name in FILES
    ]
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "published.yaml").write_text("Sample_x1:\n" + "".join(lines))
    monkeypatch.setattr(source, "project_root", lambda: tmp_path)
    return folder


@pytest.mark.parametrize("form", ["folder", "zip", "gz"])
def test_published_files_are_recorded(tmp_path, registry, caplog, form):
    raw = {"folder": registry, "zip": zip_of(registry, "x/"), "gz": tmp_path / "gz"}[form]
    folder_of(tmp_path / "gz", ".csv.gz")
    dataset = prepare(options(raw, published="Sample_x1"), tmp_path / "encoded")
    assert dataset.manifest["published"] == {f"{n}.csv": f"Sample_x1/{n}" for n in FILES}
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []


def test_published_file_of_another_name_is_recognised(tmp_path, registry):
    shutil.copy(registry / "train.csv", tmp_path / "mine.csv")
    dataset = prepare(options(tmp_path / "mine.csv", split=BY_RANDOM), tmp_path / "encoded")
    assert dataset.manifest["published"] == {"mine.csv": "Sample_x1/train"}


def test_file_that_differs_from_the_published_one_is_warned_of(tmp_path, registry, caplog):
    write(registry / "valid.csv", FILES["valid"][1:])
    dataset = prepare(options(registry, published="Sample_x1"), tmp_path / "encoded")
    assert dataset.manifest["published"]["valid.csv"] is None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("valid.csv is not the file published as Sample_x1 (md5 ")
    assert "results are not comparable" in warning


def test_unknown_published_set_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "encode", lambda *args, **kwargs: pytest.fail("it was encoded"))
    with pytest.raises(UserError, match=r"data\.published=Nope: expected one of Criteo_x1"):
        prepare(options(folder_of(tmp_path / "raw"), published="Nope"), tmp_path / "encoded")


CHOICES = sorted(p.stem for p in (ROOT / "conf" / "data").glob("*_x[14]*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_published_choice_prepares_a_small_sample(tmp_path, choice, caplog):
    data = make_data(choice, raw=str(tmp_path / "raw"))
    entries = [field if isinstance(field, dict) else {"name": field} for field in data.fields]
    derived = {"weekday", "weekend"} if data.time else set()
    names = [entry["name"] for entry in entries if entry["name"] not in derived]
    kinds = {entry["name"]: entry.get("kind") for entry in entries}
    numbers = [name for name in names if kinds[name] == "numeric"]

    def value(name: str, row: int) -> str:
        if name == data.time:
            return f"141021{row % 24:02}"
        if name in numbers:
            return "" if row % 5 == 0 else str(row % 40)
        if kinds[name] == "history":
            return "^".join(["a", f"{name}{row % 3}"])
        return f"{name}{row % 3} x" if kinds[name] == "multi" else f"{name}{row % 3}"

    names += [name for name in (data.user, data.item) if name and name not in names]
    kinds.update(dict.fromkeys(set(names) - set(kinds)))
    has_valid = data.split.fractions[2] > 0
    files = ["train.csv", *(["valid.csv"] if has_valid else []), "test.csv"]
    for split, count in (("train", 60), ("valid", 9), ("test", 9)):
        if f"{split}.csv" not in files:
            continue
        rows = [",".join([str(n % 2), *(value(name, n) for name in names)]) for n in range(count)]
        write(tmp_path / "raw" / f"{split}.csv", rows, ",".join([data.label, *names]))
    dataset = prepare(data, tmp_path / "encoded")
    assert [feature.name for feature in dataset.schema.features] == [e["name"] for e in entries]
    sizes = [split["rows"] for split in dataset.manifest["splits"].values()]
    assert sizes == ([60, 9, 9] if has_valid else [54, 6, 9])
    assert dataset.manifest["published"] == dict.fromkeys(files)
    assert caplog.text.count(f"is not the file published as {data.published}") == len(files)
    assert (dataset.group is not None) == (data.user is not None)
    plain = next(e["name"] for e in reversed(entries) if set(e) == {"name"} and e["name"] in names)
    assert tokens_of(dataset, plain)[:3] == [f"{plain}{n}" for n in range(3)]


def test_sets_of_release_01e8936_keep_their_name_and_hash(tmp_path):
    """The format was called ``bars`` then."""
    split = Split(by="hash", fractions=[0.6, 0.2, 0.2], seed=0)
    data = one_file(tmp_path / "rows.csv", ROWS, split=split, user="user", item="item")
    dataset = prepare(data, tmp_path / "encoded")
    assert dataset.folder.name == "frappe_x1-366e7c94f3d4"
    assert dataset.hash == "b0fd72c7048936ff15409b84f11739e14749d8c4e54676b6327d9b620a1855b7"
    assert '"format": "bars"' in (dataset.source_rows.rule or "")
