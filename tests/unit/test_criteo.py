"""Criteo's raw files -> rows in the common form: archives, missing values, missing labels."""

import gzip
import random
import zipfile
from pathlib import Path

import polars as pl
import pytest
from samples import make_data, one_line_error, read_rows, shared_data

from cki_rec.config import Data, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.formats import FORMATS, criteo
from cki_rec.data.raw.reading import LABEL, LINE
from cki_rec.data.schema import FIRST_ID

NAMES = [*criteo.INTEGERS, *criteo.CATEGORIES]


def line_of(number: int, **changes: str) -> str:
    """Return one raw line; every third integer and every fifth category is missing."""
    values = {"label": str(number % 2)}
    for position, name in enumerate(criteo.INTEGERS):
        values[name] = "" if (number + position) % 3 == 0 else str(number * position - 2)
    for position, name in enumerate(criteo.CATEGORIES):
        values[name] = "" if (number + position) % 5 == 0 else f"{(number * 7 + position) % 9:08x}"
    return "\t".join((values | changes).values())


LINES = [line_of(number) for number in range(1, 25)]


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    content = "".join(line + end for line in lines).encode()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.txt", content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def options(raw, **changes) -> Data:
    raw = [str(path) for path in raw] if isinstance(raw, list) else str(raw)
    return make_data("criteo", raw=raw, **changes)


def read(raw, block_bytes: int = 1 << 24, **changes) -> pl.DataFrame:
    return read_rows(options(raw, **changes), block_bytes)[0]


def error_of(raw, **changes) -> str:
    return one_line_error(read, raw, **changes)


def by_hand(lines: list[str]) -> list[dict]:
    rows = []
    for number, line in enumerate(lines, start=1):
        label, *values = [value or None for value in line.split("\t")]
        integers = [value and int(value) for value in values[:13]]
        row = dict(zip(NAMES, [*integers, *values[13:]], strict=True))
        rows.append(row | {LINE: number, LABEL: int(label)})
    return rows


def test_rows_equal_those_split_by_hand(tmp_path):
    frame = read(write(tmp_path / "train.txt", LINES))
    assert frame.select(*NAMES, LINE, LABEL).to_dicts() == by_hand(LINES)


def test_types_are_those_of_the_common_form(tmp_path):
    schema = read(write(tmp_path / "train.txt", LINES)).schema
    assert schema[LABEL] == pl.UInt8
    assert {schema[name] for name in criteo.INTEGERS} == {pl.Int64}
    assert {schema[name] for name in criteo.CATEGORIES} == {pl.String}


@pytest.mark.parametrize("name", ["train.txt.gz", "train.gz", "train.zip"])
def test_compressed_equals_plain(tmp_path, name):
    plain = read(write(tmp_path / "train.txt", LINES))
    assert read(write(tmp_path / name, LINES)).equals(plain)


def test_gz_in_two_parts_is_one_text(tmp_path):
    path = write(tmp_path / "a.gz", LINES[:7])
    path.write_bytes(path.read_bytes() + write(tmp_path / "b.gz", LINES[7:]).read_bytes())
    assert read(path).equals(read(write(tmp_path / "train.txt", LINES)))


def test_zip_of_two_files_is_refused(tmp_path):
    path = write(tmp_path / "train.zip", LINES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test.txt", "x\n")
    message = error_of(path)
    assert f"{path}: contains 2 files (train.txt, test.txt), expected one" in message
    assert "data.raw" in message


def test_zip_ignores_files_of_macos(tmp_path):
    path = write(tmp_path / "train.zip", LINES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._train.txt", "x\n")
    assert len(read(path)) == len(LINES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_pattern_reads_days_in_the_order_of_numbers(tmp_path, suffix):
    for day in (10, 2, 1, 20):
        write(tmp_path / f"day_{day}{suffix}", [line_of(day, I2=str(day))])
    assert read(tmp_path / "day_*")["I2"].to_list() == [1, 2, 10, 20]


def test_list_is_read_in_its_order(tmp_path):
    first = write(tmp_path / "b.txt", LINES[:5])
    second = write(tmp_path / "a.txt.gz", LINES[5:])
    frame = read([first, second])
    assert frame[LINE].to_list() == [*range(1, 6), *range(1, 20)]
    both = read(write(tmp_path / "both.txt", LINES))
    assert frame.drop(LINE).equals(both.drop(LINE))


def test_list_may_hold_patterns(tmp_path):
    for day in (1, 2):
        write(tmp_path / f"day_{day}", [LINES[day]])
    last = write(tmp_path / "last", LINES[3:])
    assert len(read([tmp_path / "day_*", last])) == 2 + len(LINES) - 3


def test_file_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "day_1", LINES)
    assert "names a file twice; name each file once" in error_of([path, tmp_path / "day_*"])


def test_file_whose_name_holds_a_bracket_is_read(tmp_path):
    assert len(read(write(tmp_path / "day_[1]", LINES))) == len(LINES)


def test_pattern_without_a_match_names_path_and_remedy(tmp_path):
    message = error_of(tmp_path / "day_*.gz")
    assert message.startswith(f"{tmp_path}/day_*.gz: no such file or folder; ")
    assert "data.raw" in message


def test_pattern_that_also_finds_a_folder_is_refused(tmp_path):
    write(tmp_path / "day_1", LINES)
    (tmp_path / "day_2").mkdir()
    message = error_of(tmp_path / "day_*")
    assert f"{tmp_path}/day_2: is a folder (contains nothing), expected files" in message


def test_blank_lines_are_passed_over_and_numbered(tmp_path):
    lines = ["", LINES[0], "", "  ", *LINES[1:], "", ""]
    frame = read(write(tmp_path / "train.txt", lines))
    assert frame[LINE].to_list() == [2, *range(5, 28)]
    plain = read(write(tmp_path / "plain.txt", LINES))
    assert frame.drop(LINE).equals(plain.drop(LINE))


def test_last_line_needs_no_newline(tmp_path):
    path = write(tmp_path / "train.txt", LINES)
    want = read(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read(path).equals(want)


def test_row_of_missing_values_is_a_row(tmp_path):
    empty = "1" + "\t" * 39
    frame = read(write(tmp_path / "train.txt", [empty, *LINES]))
    row = frame.row(0, named=True)
    assert row[LABEL] == 1
    assert {row[name] for name in NAMES} == {None}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_row_without_any_value_is_a_bad_row(tmp_path, on_bad_row):
    path = write(tmp_path / "train.txt", [*LINES, "\t" * 39])
    if on_bad_row == "error":
        assert f"{path}, line 25: missing field" in error_of(path)
    else:
        _, reading = read_rows(options(path, on_bad_row="skip"))
        assert reading.counts == {"missing field": 1}


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 300, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("name", ["train.txt", "train.gz", "train.zip"])
def test_no_row_depends_on_the_block_size(tmp_path, name, block_bytes):
    lines = list(LINES)
    lines[11] = line_of(12, C3="long" * 1000)
    lines[12:12] = ["", "not a row", line_of(1, I1="1.5")]
    path = write(tmp_path / name, lines, end="\r\n")
    want, result = read_rows(options(path, on_bad_row="skip"))
    frame, reading = read_rows(options(path, on_bad_row="skip"), block_bytes)
    assert frame.equals(want)
    assert len(frame) == len(LINES)
    assert (reading.counts, reading.examples) == (result.counts, result.examples)
    assert reading.counts == {"missing field": 1, "not a number": 1}
    assert reading.md5 == result.md5


@pytest.mark.parametrize("block_bytes", [1, 3, 4, 1000])
def test_byte_order_mark_is_dropped_at_every_block_size(tmp_path, block_bytes):
    path = write(tmp_path / "train.txt", LINES)
    want = read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path, block_bytes).equals(want)


def test_progress_sums_to_the_size_on_disk(tmp_path):
    path = write(tmp_path / "train.gz", LINES)
    data, read_bytes = options(path), []
    reading = criteo.Reading("error", 100, read_bytes.append)
    list(FORMATS["criteo"].read(data, reading))
    assert sum(read_bytes) == path.stat().st_size


BAD_VALUES = [
    ("label", "2", "not a label", "0 or 1 in label"),
    ("label", "", "missing field", "label in 40 fields (label, I1, I2, ..., C26)"),
    ("label", "yes", "not a number", "0 or 1 in label"),
    ("I4", "1.5", "not a number", "a whole number in I4"),
    ("I4", "many", "not a number", "a whole number in I4"),
]


@pytest.mark.parametrize(("column", "value", "reason", "expected"), BAD_VALUES)
def test_bad_value_names_line_and_expectation(tmp_path, column, value, reason, expected):
    path = write(tmp_path / "train.txt", [*LINES, line_of(2, **{column: value})])
    message = error_of(path)
    assert message.startswith(f"{path}, line 25: {reason}: found ")
    assert f", expected {expected}{f', not {value!r}' if value else ''}; " in message
    assert "data.on_bad_row=skip" in message


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name", ["test.txt", "test.txt.gz", "test.zip"])
def test_file_without_labels_is_refused(tmp_path, name, on_bad_row):
    path = write(tmp_path / name, [line.split("\t", 1)[1] for line in LINES])
    message = error_of(path, on_bad_row=on_bad_row)
    assert f"{path}" in message
    assert "line 1: 39 columns, expected 40" in message
    assert "Criteo's test file, which has no labels; use train.txt" in message


def test_file_without_labels_among_others_is_refused(tmp_path):
    good = write(tmp_path / "a.txt", LINES)
    bad = write(tmp_path / "b.txt", [line.split("\t", 1)[1] for line in LINES])
    assert f"{bad}, line 1: 39 columns" in error_of([good, bad], on_bad_row="skip")


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_file_without_labels_after_a_blank_line_is_refused(tmp_path, on_bad_row):
    lines = ["", *(line.split("\t", 1)[1] for line in LINES)]
    path = write(tmp_path / "test.txt", lines)
    assert str(path) in error_of(path, on_bad_row=on_bad_row)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_real_test_file_is_refused(on_bad_row):
    path = shared_data("criteo/test_head10k_unlabeled.txt.gz")
    message = error_of(path, on_bad_row=on_bad_row)
    assert message.startswith(f"{path}, line 1: 39 columns, expected 40")


def test_real_train_file_has_its_rows():
    frame = read(shared_data("criteo/train_head10k.txt.gz"))
    assert len(frame) == 10_000
    assert frame[LINE].to_list() == list(range(1, 10_001))


@pytest.mark.parametrize("missing", [None, 0.0])
def test_missing_numbers_are_a_category_or_a_number(tmp_path, missing):
    lines = [line_of(n, I1=("", "0", "1", "2", "3", "100")[n % 6]) for n in range(600)]
    random.Random(0).shuffle(lines)
    data = options(
        write(tmp_path / "train.txt", lines),
        fields=["I1"],
        numeric_missing=missing,
        min_count=1,
        split=Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0),
    )
    dataset = prepare(data, tmp_path / "encoded")
    tokens = dataset.vocabulary("I1")
    result = [tokens[i - FIRST_ID] for i in dataset.column("I1")]
    of_value = {"": "" if missing is None else "0", "0": "0", "1": "1", "2": "2"}
    of_value |= {"3": "1", "100": "21"}  # floor(ln(3)^2), floor(ln(100)^2)
    assert result == [of_value[line.split("\t")[1]] for line in lines]


def test_time_split_goes_by_the_order_of_rows(tmp_path):
    data = options(
        write(tmp_path / "train.txt", LINES),
        fields=["C1"],
        split=Split(by="time", fractions=[0.5, 0.25, 0.25], seed=0),
    )
    dataset = prepare(data, tmp_path / "encoded")
    assert dataset.split.tolist() == [0] * 12 + [1] * 6 + [2] * 6
    assert dataset.timestamp is None


def test_files_of_equal_names_are_distinguished(tmp_path):
    files = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        files.append(write(tmp_path / part / "train.txt", LINES[len(files) :]))
    _, reading = read_rows(options(files))
    assert len(reading.md5) == 2
