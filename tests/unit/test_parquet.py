"""Parquet and Arrow files give the rows of the same csv; types, nulls and lists are respected."""

import datetime
from pathlib import Path

import polars as pl
import pytest
from samples import make_data, one_line_error, read_rows

from cki_rec.config import Data, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.reading import TIME

NUM_ROWS = 400
FIELDS = [
    "user",
    "item",
    {"name": "price", "kind": "numeric", "transform": "log1p"},
    {"name": "count", "kind": "numeric", "transform": "ln_squared"},
    {"name": "tags", "kind": "multi"},
    "hour",
    "history",
]
OPTIONS = {"label": "click", "user": "user", "item": "item", "time": "at"}


def rows(num_rows: int = NUM_ROWS) -> pl.DataFrame:
    """Return typed rows with nulls."""
    number = pl.int_range(num_rows)
    return pl.select(
        click=(number % 3 == 0).cast(pl.Int8),
        user=number % 17,
        item=pl.concat_str(pl.lit("i"), (number * 7) % 31),
        price=pl.when(number % 5 > 0).then(number * 0.25 - 3),
        count=pl.when(number % 7 > 0).then(number % 13),
        tags=pl.concat_list(number % 4, number % 3).cast(pl.List(pl.Int32)),
        at=pl.lit(datetime.datetime(2024, 3, 1)) + pl.duration(minutes=number * 11),
        unused=pl.struct(number),
    )


def write(frame: pl.DataFrame, path: Path, **options) -> Path:
    if path.suffix == ".arrow":
        frame.write_ipc(path)
    elif path.suffix == ".csv":
        joined = pl.col("tags").cast(pl.List(pl.String)).list.join("|")
        seconds = pl.col("at").dt.epoch("s")
        frame.drop("unused").with_columns(joined, seconds).write_csv(path)
    else:
        frame.write_parquet(path, **options)
    return path


def data_of(raw, **changes) -> Data:
    is_csv = str(raw).endswith(".csv")
    split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
    defaults = {
        "split": split,
        "format": "csv" if is_csv else "parquet",
        "fields": FIELDS,
        **OPTIONS,
    }
    return make_data("csv", raw=raw, **{**defaults, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix != ".json"}


@pytest.mark.parametrize("file", ["a.parquet", "a.arrow"])
def test_columns_are_those_of_the_same_csv(tmp_path, file):
    want = prepare(data_of(str(write(rows(), tmp_path / "a.csv"))), tmp_path / "csv")
    path = write(rows(), tmp_path / file)
    result = prepare(data_of(str(path)), tmp_path / "typed")
    assert len(result) == NUM_ROWS
    assert contents(result.folder) == contents(want.folder)
    assert result.manifest["options"]["format"] == "parquet"


def test_row_groups_files_and_chunks_change_nothing(tmp_path):
    want = read_rows(data_of(str(write(rows(), tmp_path / "a.parquet"))))[0]
    small = write(rows(), tmp_path / "small.parquet", row_group_size=7)
    assert read_rows(data_of(str(small)), block_bytes=256 * 31)[0].equals(want)
    folder = tmp_path / "spark"
    folder.mkdir()
    (folder / "_SUCCESS").write_bytes(b"")
    for part in range(2):
        write(rows().slice(200 * part, 200), folder / f"part-{part}.parquet")
    parts = read_rows(data_of(str(folder)))[0]
    assert parts.drop("@line").equals(want.drop("@line"))
    assert parts["@line"].to_list() == [*range(1, 201)] * 2


def test_dates_numbers_and_words_for_times(tmp_path):
    frame = rows(20)
    want = frame["at"].dt.epoch("s").to_list()
    for number, (form, at) in enumerate({
        "zone": pl.col("at").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        "milliseconds": pl.col("at").dt.epoch("ms"),
        "iso": pl.col("at").cast(pl.String),
        "categories": pl.col("at").cast(pl.String).cast(pl.Categorical),
    }.items()):  # fmt: skip
        path = write(frame.with_columns(at), tmp_path / f"{number}.parquet")
        assert read_rows(data_of(str(path)))[0][TIME].to_list() == want, form


def test_labels_may_be_truth_values_or_words(tmp_path):
    frame = rows(20)
    truth = write(frame.with_columns(pl.col("click").cast(pl.Boolean)), tmp_path / "a.parquet")
    words = frame.with_columns(
        pl.when(pl.col("click") == 1).then(pl.lit("Yes")).otherwise(pl.lit("no")).alias("click")
    )
    path = write(frame.with_columns(words), tmp_path / "b.parquet")
    want = frame["click"].to_list()
    assert read_rows(data_of(str(truth)))[0]["@label"].to_list() == want
    labels = {"yes": 1, "no": 0}
    assert read_rows(data_of(str(path), labels=labels))[0]["@label"].to_list() == want


BAD = {
    "click": (pl.lit(2), "not a label", "0 or 1 in click, not '2'"),
    "at": (pl.lit(None, pl.Datetime), "missing field", "at in "),
    "price": (pl.lit(float("nan")), "not finite", "a number in price, not 'NaN'"),
    "count": (pl.lit("many"), "not a number", "a number in count, not 'many'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named_with_file_number_and_column(tmp_path, name):
    value, reason, expected = BAD[name]
    column = pl.col(name).cast(pl.String) if name == "count" else pl.col(name)
    is_bad = pl.int_range(pl.len()) == 12
    frame = rows(50).with_columns(pl.when(is_bad).then(value).otherwise(column).alias(name))
    path = write(frame, tmp_path / "a.parquet")
    message = one_line_error(read_rows, data_of(str(path)), 256 * 5)
    assert f"{path}, row 13: {reason}: found " in message
    assert expected in message
    assert "correct the row, or " in message
    result, reading = read_rows(data_of(str(path), on_bad_row="skip"), 256 * 5)
    assert (len(result), reading.counts) == (49, {reason: 1})


def test_nan_is_an_empty_cell_if_named(tmp_path):
    frame = rows(20).with_columns(pl.col("price").fill_null(float("nan")))
    path = write(frame, tmp_path / "a.parquet")
    result, _ = read_rows(data_of(str(path), missing=["nan"]))
    assert result["price"].null_count() == 4


def test_unusable_files_and_columns_are_named(tmp_path):
    path = write(rows(50), tmp_path / "a.parquet")
    assert "a.parquet: column 'unused' is of type Struct" in one_line_error(
        read_rows, data_of(str(path), fields=[*FIELDS, "unused"])
    )
    entry = {"name": "tags", "kind": "numeric"}
    assert "give the field kind: multi" in one_line_error(
        read_rows, data_of(str(path), fields=["user", entry])
    )
    message = one_line_error(read_rows, data_of(str(path), label="clik"))
    assert "a.parquet: no column 'clik'" in message
    assert "did you mean 'click'" in message
    assert "read it with data=parquet" in one_line_error(
        read_rows, data_of(str(path), format="csv")
    )
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:2000])
    assert "cut.parquet: damaged or truncated (" in one_line_error(
        read_rows, data_of(str(tmp_path / "cut.parquet"))
    )
    text = tmp_path / "a.csv"
    text.write_text("click\n1\n")
    assert "a.csv: neither a Parquet nor an Arrow file" in one_line_error(
        read_rows, data_of(str(text), format="parquet")
    )
    other = write(rows(50).drop("price"), tmp_path / "b.parquet")
    assert f"{other}: no column price" in one_line_error(
        read_rows, data_of([str(path), str(other)])
    )


def test_files_may_define_the_split(tmp_path):
    folder = tmp_path / "split"
    folder.mkdir()
    for name in ("train", "valid", "test"):
        write(rows(60), folder / f"{name}.parquet")
    split = Split(by="files", fractions=[], seed=0)
    dataset = prepare(data_of(str(folder), split=split), tmp_path / "encoded")
    assert [len(dataset.rows(name)) for name in ("train", "valid", "test")] == [60] * 3
    (folder / "valid.parquet").unlink()
    assert "files test, train, expected train, valid and test" in one_line_error(
        prepare, data_of(str(folder), split=split), tmp_path / "encoded"
    )
