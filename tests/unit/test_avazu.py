"""Avazu's raw file -> rows in the common form: header, times, files without clicks."""

import gzip
from datetime import datetime, timezone
from pathlib import Path

import polars as pl
import pytest
from samples import make_data, one_line_error, read_rows, shared_data

from cki_rec.config import Data, Split, UserError
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.formats import avazu
from cki_rec.data.raw.reading import LABEL, LINE, TIME
from cki_rec.data.schema import FIRST_ID

HOURS = ["14102100", "14102123", "14102212", "14102505", "14102600", "14103023", "14022823"]
HOURS += ["16022900", "00010100", "14123123"]


def line_of(number: int, **changes: str) -> str:
    values = {name: f"{name}-{number % 4}" for name in avazu.HEADER.split(",")}
    values |= {"id": str(10**18 + number), "click": str(number % 3 % 2)}
    values |= {"hour": HOURS[number % len(HOURS)], "C20": "-1"}
    return ",".join((values | changes).values())


LINES = [line_of(number) for number in range(30)]


def write(path: Path, lines: list[str], header: str | None = avazu.HEADER) -> Path:
    whole = lines if header is None else [header, *lines]
    content = "".join(line + "\n" for line in whole).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def options(raw, **changes) -> Data:
    raw = [str(path) for path in raw] if isinstance(raw, list) else str(raw)
    return make_data("avazu", raw=raw, **changes)


def read(raw, block_bytes: int = 1 << 24, **changes) -> pl.DataFrame:
    return read_rows(options(raw, **changes), block_bytes)[0]


def error_of(raw, **changes) -> str:
    return one_line_error(read, raw, **changes)


def time_of(hour: str) -> datetime:
    return datetime.strptime("20" + hour, "%Y%m%d%H").replace(tzinfo=timezone.utc)


def test_row_has_every_column_but_the_id(tmp_path):
    row = read(write(tmp_path / "train", LINES)).row(7, named=True)
    assert row.pop(LINE) == 9
    assert row.pop(LABEL) == 1
    assert row.pop("click") == 1.0
    assert row.pop(TIME) == time_of("16022900").timestamp()
    assert row.pop("hour") == 16022900
    assert row == {name: f"{name}-3" for name in avazu.CATEGORIES} | {"C20": "-1"}


def test_compressed_equals_plain(tmp_path):
    plain = read(write(tmp_path / "train", LINES))
    assert read(write(tmp_path / "train.gz", LINES)).equals(plain)


def test_every_file_of_a_list_has_a_header(tmp_path):
    first, second = write(tmp_path / "a", LINES[:10]), write(tmp_path / "b.gz", LINES[10:])
    whole = read(write(tmp_path / "whole", LINES))
    assert read([first, second]).drop(LINE).equals(whole.drop(LINE))


@pytest.mark.parametrize("block_bytes", [1, 50, 200, 5000])
def test_no_row_depends_on_the_block_size(tmp_path, block_bytes):
    lines = [*LINES[:9], line_of(1, hour="14139999"), "", line_of(2, C1="x,y"), *LINES[9:]]
    path = write(tmp_path / "train", lines)
    want, result = read_rows(options(path, on_bad_row="skip"))
    frame, reading = read_rows(options(path, on_bad_row="skip"), block_bytes)
    assert frame.equals(want)
    assert reading.counts == result.counts == {"not a time": 1, "extra field": 1}
    assert frame[LINE].to_list() == [*range(2, 11), *range(14, 35)]


def test_hour_gives_the_time(tmp_path):
    frame = read(write(tmp_path / "train", LINES))
    want = [time_of(HOURS[number % len(HOURS)]).timestamp() for number in range(30)]
    assert frame[TIME].to_list() == want


def test_hour_weekday_and_weekend_equal_the_calendar(tmp_path):
    lines = [line_of(number) for number in range(300)]
    data = options(
        write(tmp_path / "train", lines),
        fields=["hour", "weekday", "weekend"],
        min_count=1,
        split=Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0),
    )
    dataset = prepare(data, tmp_path / "encoded")
    times = [time_of(HOURS[number % len(HOURS)]) for number in range(300)]
    want = {
        "hour": [str(t.hour) for t in times],
        "weekday": [str(t.isoweekday() % 7) for t in times],  # Sunday is 0
        "weekend": [str(int(t.isoweekday() >= 6)) for t in times],
    }
    for name, tokens in want.items():
        known = dataset.vocabulary(name)
        assert [known[i - FIRST_ID] for i in dataset.column(name)] == tokens
    assert dataset.timestamp.tolist() == [t.timestamp() for t in times]


BAD_HOURS = ["14139999", "14130100", "14102124", "14103200", "14022900", "141021000", "-4102100"]


@pytest.mark.parametrize("hour", [*BAD_HOURS, "1410210000"])
def test_bad_hour_is_a_bad_row(tmp_path, hour):
    path = write(tmp_path / "train", [*LINES, line_of(1, hour=hour)])
    message = error_of(path)
    assert message.startswith(f"{path}, line 32: not a time: found ")
    assert f"expected a time as YYMMDDHH in hour, not '{hour}'; " in message
    assert "data.on_bad_row=skip" in message
    frame, reading = read_rows(options(path, on_bad_row="skip"))
    assert len(frame) == 30
    assert reading.counts == {"not a time": 1}


@pytest.mark.parametrize(
    ("hour", "reason"), [("", "missing field"), ("noon", "not a number"), ("1.5", "not a number")]
)
def test_hour_that_is_no_number_is_a_bad_row(tmp_path, hour, reason):
    path = write(tmp_path / "train", [*LINES, line_of(1, hour=hour)])
    assert error_of(path).startswith(f"{path}, line 32: {reason}: found ")


def test_first_bad_row_is_reported_for_every_fault(tmp_path):
    path = write(tmp_path / "train", [line_of(1, hour="14139999"), *LINES, "1,2"])
    assert error_of(path).startswith(f"{path}, line 2: not a time")


def test_only_bad_hours_is_no_usable_row(tmp_path):
    data = options(
        write(tmp_path / "train", [line_of(n, hour="14139999") for n in range(5)]),
        on_bad_row="skip",
    )
    with pytest.raises(UserError, match="no usable row"):
        prepare(data, tmp_path / "encoded")
    assert [p.name for p in (tmp_path / "encoded").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_test_file_without_clicks_is_refused(tmp_path, on_bad_row):
    lines = [line.replace(f",{line.split(',')[1]},", ",", 1) for line in LINES]
    path = write(tmp_path / "test", lines, header=avazu.HEADER.replace("click,", ""))
    message = error_of(path, on_bad_row=on_bad_row)
    assert f"{path}, line 1: this is Avazu's test file, which has no clicks" in message
    assert "use the train file (data.split splits it)" in message


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("header", [None, avazu.HEADER.replace("hour", "time"), "id,click"])
def test_other_header_is_refused(tmp_path, header, on_bad_row):
    path = write(tmp_path / "train", LINES, header=header)
    message = error_of(path, on_bad_row=on_bad_row)
    assert message.startswith(f"{path}, line 1: found ")
    assert "expected the header 'id,click,hour,C1," in message
    assert "restore the header line" in message


def test_repeated_header_is_a_bad_row(tmp_path):
    path = write(tmp_path / "train", [*LINES[:9], avazu.HEADER, *LINES[9:]])
    message = error_of(path)
    assert message.startswith(f"{path}, line 11: repeated header: found 'id,click,hour,")
    assert "expected a row; " in message
    frame, reading = read_rows(options(path, on_bad_row="skip"))
    assert frame.drop(LINE).equals(read(write(tmp_path / "once", LINES)).drop(LINE))
    assert reading.counts == {"repeated header": 1}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_header_alone_has_no_usable_row(tmp_path, on_bad_row):
    message = error_of(write(tmp_path / "train", []), on_bad_row=on_bad_row)
    assert "no usable row, expected rows of 24 fields (id, click, hour, ..., C21)" in message


def test_bytes_of_a_dropped_column_are_checked_like_others(tmp_path):
    path = write(tmp_path / "train", LINES)
    path.write_bytes(path.read_bytes().replace(b"1000000000000000005", b"\xff", 1))
    assert f"{path}, line 7: not UTF-8" in error_of(path)


def test_real_rows(tmp_path):
    frame = read(shared_data("avazu/train_14077.csv.gz"))
    assert len(frame) == 14_077
    assert frame[LINE].to_list() == list(range(2, 14_079))
    first = frame.row(0, named=True)
    assert first[TIME] == time_of("14102100").timestamp()
    assert (first["site_id"], first["C20"], first["C21"]) == ("1fbe01fe", "-1", "79")
