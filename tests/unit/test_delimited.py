"""Delimited text, read by both paths: rows come back exactly, bad lines are named and skipped."""

import string
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cki_rec.config import UserError
from cki_rec.data.raw.delimited import Known, Layout, read_rows
from cki_rec.data.raw.reading import LINE, Reading, Text

SEPARATORS = [",", "\t", "|", ";", "::"]
LETTERS = string.ascii_letters + string.digits + " .-+_#'\\éß漢\u2028\ufffd\x0b\x85"
TEXTS = st.text(LETTERS, max_size=6)
INTEGERS = st.integers(-(10**17), 10**17).map(str)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False).map(repr)
VALUES = {"text": TEXTS, "integer": st.just("") | INTEGERS, "number": st.just("") | NUMBERS}
FAULTS = {
    "fewer": "missing field",
    "more": "extra field",
    "NUL": "NUL byte",
    "return": "carriage return",
    "bytes": "not UTF-8",
    "two": "not a label",
    "word": "not a number",
}
SLOW = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def layout_of(kinds: list[str], separator: str = ",", **changes) -> Layout:
    columns = {"click": "click"} | {f"x{i}": kind for i, kind in enumerate(kinds)}
    return Layout(columns=columns, separator=separator, **changes)


def corrupted(line: bytes, fault: str, separator: bytes) -> bytes:
    """Return a line with a fault; it begins with the click, and a text follows."""
    click, text, *others = line.split(separator)
    if fault == "fewer":
        return separator.join([click, *others])
    return separator.join(
        {
            "more": [click, text, b"more", *others],
            "NUL": [click, b"a\0b", *others],
            "return": [click, b"a\rb", *others],
            "bytes": [click, b"\xff", *others],
            "two": [b"2", text, *others],
            "word": [b"yes", text, *others],
        }[fault]
    )


@st.composite
def files(draw):
    """Draw separator, kinds, lines (None: blank), line end, block size and faults by line."""
    separator = draw(st.sampled_from(SEPARATORS))
    kinds = ["text", *draw(st.lists(st.sampled_from(list(VALUES)), max_size=4))]
    row = st.tuples(st.sampled_from(["0", "1"]), *(VALUES[kind] for kind in kinds))
    lines = draw(st.lists(st.one_of(row, row, row, st.none()), min_size=1, max_size=25))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    block_bytes = draw(st.sampled_from([1, 2, 5, 17, 64, 300, 1 << 20]))
    numbers = [number for number, line in enumerate(lines) if line is not None]
    faulty = st.dictionaries(st.sampled_from(numbers or [0]), st.sampled_from(list(FAULTS)))
    faults = draw(faulty) if numbers and draw(st.booleans()) else {}
    return separator, kinds, lines, end, block_bytes, faults


def value_of(kind: str, text: str):
    if not text:
        return None
    return {"text": str, "integer": int, "number": float}[kind](text)


@SLOW
@given(drawn=files())
def test_rows_come_back_without_corrupted_lines(tmp_path, drawn):
    separator, kinds, lines, end, block_bytes, faults = drawn
    content, want, reasons = b"", [], {}
    for position, row in enumerate(lines):
        line = separator.join(row or []).encode()
        if position in faults:
            line = corrupted(line, faults[position], separator.encode())
            reason = FAULTS[faults[position]]
            reasons[reason] = reasons.get(reason, 0) + 1
        elif row is not None:
            values = [value_of(kind, text) for kind, text in zip(kinds, row[1:], strict=True)]
            want.append((float(row[0]), *values, position + 1))
        content += line + end.encode()
    if "return" in faults.values():
        block_bytes = max(block_bytes, 300)  # see test_return_in_a_line_is_a_bad_row
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    reading = Reading("skip", block_bytes)
    frames = read_rows(Text(path), layout_of(kinds, separator), reading)
    if not want:
        # a lone line with a return in it looks like a file of lines that end so
        is_lone_return = len(lines) == 1 and "return" in faults.values()
        message = "carriage return alone" if is_lone_return else "empty|no usable row"
        with pytest.raises(UserError, match=message):
            list(frames)
        return
    frame = pl.concat(list(frames))
    assert frame.rows() == want
    assert reading.counts == reasons


@SLOW
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("01"), TEXTS, VALUES["integer"], VALUES["number"], TEXTS),
        min_size=1,
        max_size=20,
    ),
    place=st.integers(0, 20),
    separator=st.sampled_from(SEPARATORS),
)
def test_both_paths_give_equal_rows(tmp_path, rows, place, separator):
    layout = layout_of(["text", "integer", "number", "text"], separator)
    lines = [separator.join(row) for row in rows]
    fast = read(tmp_path / "fast.txt", lines, layout)[0]
    lines.insert(place, separator.join(["0", "one field", "is missing", "1"]))
    slow, reading = read(tmp_path / "slow.txt", lines, layout)
    assert slow.drop(LINE).equals(fast.drop(LINE))
    assert reading.counts == {"missing field": 1}


def read(
    path: Path, lines: list[str], layout: Layout, on_bad_row: str = "skip"
) -> tuple[pl.DataFrame, Reading]:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    reading = Reading(on_bad_row)
    return pl.concat(list(read_rows(Text(path), layout, reading))), reading


INTEGER_WORDS = ["5", "+5", "-5", " 5", "  7", "-0", "007", "+007", "5.0", "1e3", "1_000", "٣"]
INTEGER_WORDS += ["9223372036854775807", "-9223372036854775808", "9223372036854775808"]
INTEGER_WORDS += ["0000000000000000000005", "5 ", " ", "\t5", "+", "--5", "0x1", "\u00a05"]
NUMBER_WORDS = ["5", "+5", " 5", "5 ", ".5", "5.", "-.5", "1e3", "1E+3", "1e-3", "1e400", "nan"]
NUMBER_WORDS += ["-inf", "Infinity", "1_0", "0x1", "1,5", ".", "-", "1e", "e5", "1.5.5", " ", "1f"]
CLICK_WORDS = ["0", "1", "0.0", "1.0", "1.", "+1", "-0", "1e0", " 1", "1 ", "2", "0.5", "", "true"]
CASES = [("integer", word) for word in INTEGER_WORDS]
CASES += [("number", word) for word in NUMBER_WORDS] + [("click", word) for word in CLICK_WORDS]


@pytest.mark.parametrize(("kind", "word"), CASES)
def test_word_means_the_same_next_to_bad_lines(tmp_path, kind, word):
    layout = Layout(columns={"a": "click", "b": kind, "c": "text"}, separator="|")
    lines = ["1|1|first", f"0|{word}|second"]
    alone, result = read(tmp_path / "alone.txt", lines, layout)
    beside, reading = read(tmp_path / "beside.txt", [*lines, "0|1"], layout)
    assert beside.equals(alone)
    assert reading.counts.pop("missing field", 0) - result.counts.pop("missing field", 0) == 1
    assert reading.counts == result.counts


@pytest.mark.parametrize("is_alone", [True, False])
def test_control_character_is_bad_next_to_bad_lines(tmp_path, is_alone):
    lines = ["1,a", "0,b\x1fc", *([] if is_alone else ["0"])]
    _, reading = read(tmp_path / "rows.txt", lines, layout_of(["text"]))
    assert reading.counts.get("control character") == 1


@pytest.mark.parametrize("is_alone", [True, False])
def test_known_numbers_are_compared_as_numbers(tmp_path, is_alone):
    known = {"x0": Known(pl.Series([7, 8]), "unknown user", "a user")}
    layout = layout_of(["integer"], known=known)
    frame, reading = read(tmp_path / "r", ["1,7", "1,08", *([] if is_alone else ["0"])], layout)
    assert frame["x0"].to_list() == [7, 8]
    assert "unknown user" not in reading.counts


def test_known_values(tmp_path):
    known = {"x0": Known(pl.Series(["a", "b"]), "unknown item", "an item of the file")}
    layout = layout_of(["text"], known=known)
    with pytest.raises(UserError, match=r"line 2: unknown item: .* expected an item of the file"):
        read(tmp_path / "rows.txt", ["1,a", "0,c"], layout, on_bad_row="error")
    frame, reading = read(tmp_path / "rows.txt", ["1,a", "0,c", "0,b"], layout)
    assert frame.rows() == [(1.0, "a", 1), (0.0, "b", 3)]
    assert reading.counts == {"unknown item": 1}


def test_faults_that_even_out_are_detected(tmp_path):
    """A block with as many separators as it should have, but not in each line."""
    layout = layout_of(["text", "text"])
    lines = ["1,a,b", "1,a", "1,a,b,c", "", "1,a,b,c,d", "0,x,y"]
    frame, reading = read(tmp_path / "rows.txt", lines, layout)
    assert frame[LINE].to_list() == [1, 6]
    assert reading.counts == {"missing field": 1, "extra field": 2}


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("block_bytes", [4, 1 << 20])
def test_return_in_a_line_is_a_bad_row(tmp_path, block_bytes, end):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"1,a\n0,b\n1,long\rlonger" + end)
    reading = Reading("skip", block_bytes)
    frame = pl.concat(list(read_rows(Text(path), layout_of(["text"]), reading)))
    assert frame.rows() == [(1.0, "a", 1), (0.0, "b", 2)]
    assert reading.counts == {"carriage return": 1}


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_mark_in_the_middle_of_a_file_is_a_bad_row_at_every_block_size(tmp_path, block_bytes):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a,1,bcde\n\xef\xbb\xbfa,1,b\n")
    layout = Layout(columns={"x": "text", "click": "click", "y": "text"}, separator=",")
    with pytest.raises(UserError, match=r"rows.txt, line 2: byte order mark: found"):
        list(read_rows(Text(path), layout, Reading("error", block_bytes)))
    reading = Reading("skip", block_bytes)
    frame = pl.concat(list(read_rows(Text(path), layout, reading)))
    assert frame["x"].to_list() == ["a"]
    assert reading.counts == {"byte order mark": 1}


def test_wanted_columns_alone_come_back(tmp_path):
    layout = layout_of(["text", "integer", "text"], wanted=("x1", "click"))
    for lines in (["1,a,5,b", "0,c,6,d"], ["1,a,5,b", "0,c,6,d", "0"]):
        frame, _ = read(tmp_path / "rows.txt", lines, layout)
        assert frame.select("x1", "click").rows() == [(5, 1.0), (6, 0.0)]
        assert set(frame.columns) == {"x1", "click", LINE}
