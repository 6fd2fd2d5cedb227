"""Delimited text -> typed frames. A bad row is reported with file, line and reason, or skipped.

Polars parses a whole block of lines at once. If polars or the number of separators indicates an
error, the block is parsed line by line, to find the bad lines and the reasons.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.raw.reading import BOM, LINE, TIME, Reading, Text

SEPARATOR = "\x1f"
"""Internal separator, for files whose separator is longer than a byte or whose text is quoted."""
TYPES: dict[str, type[pl.DataType]] = {
    "text": pl.String,
    "integer": pl.Int64,
    "number": pl.Float64,
    "click": pl.Float64,
    "yymmddhh": pl.Int64,
    "seconds": pl.Int64,
}
LATEST = 4_102_444_800
"""Latest valid time: the year 2100, in seconds. Larger numbers are milliseconds or no times."""
_INTEGER = re.compile(r"[ \t]*[+-]?[0-9]+")
_NUMBER = re.compile(r"[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MEANING = {"integer": "a whole number", "number": "a number", "click": "0 or 1",
            "yymmddhh": "a time as YYMMDDHH", "seconds": "seconds since 1970"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """The values that a column may contain."""

    values: pl.Series
    reason: str
    """Reason to report for other values, e.g. ``unknown movie``."""
    expected: str
    """Description of the values, for messages."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns and the syntax of a line."""

    columns: Mapping[str, str]
    """Name -> key of ``TYPES``, in order; a ``click`` is 0 or 1."""
    separator: str
    """Text between fields."""
    header: str | None = None
    """The first line; None: the file has no header."""
    required: tuple[str, ...] = ()
    """Columns that may not be empty, besides clicks."""
    is_quoted: bool = False
    """Whether a field may be quoted as in csv."""
    wanted: tuple[str, ...] = ()
    """Columns to return; empty: all."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """Column -> its only valid values."""


def read_rows(text: Text, layout: Layout, reading: Reading) -> Iterator[pl.DataFrame]:
    """Yield the good rows of a text, block by block, with an extra column ``LINE`` (Int64).

    Args:
        text: The text to read.
        layout: Columns and syntax of its lines.
        reading: State of the pass, with the treatment of bad rows.

    Raises:
        UserError: A row is bad and ``reading.on_bad_row`` is ``error``, or no row is good.
    """
    num_rows = 0
    for block in text.blocks(reading):
        if reading.line == 1 and layout.header is not None:
            header, _, block = block.partition(b"\n")
            check_header(text, header.decode("utf-8", errors="replace"), layout.header)
            reading.line = 2
        first, frame = reading.line, _parse(block, layout, layout.separator)
        if frame is not None:
            reading.line += frame.height
            number = pl.int_range(first, reading.line, dtype=pl.Int64).alias(LINE)
        else:
            numbers, good = _good_lines(text, first, block, layout, reading)
            reading.line += block.count(b"\n")
            frame = _parse(good, layout, SEPARATOR)
            number = pl.lit(pl.Series(LINE, numbers, dtype=pl.Int64))
        if frame is None:
            raise UserError(
                f"{text}, lines {first} to {reading.line - 1}: not readable as {_fields(layout)}; "
                "correct the lines or fetch the file again"
            )
        num_rows += frame.height
        if frame.height:
            yield frame.with_columns(number)
    if not num_rows:
        raise UserError(
            f"{text}: no usable row, expected rows of {_fields(layout)}; fetch the file again"
        )


def check_header(text: Text, header: str, expected: str) -> None:
    """Check the first line.

    Raises:
        UserError: The line differs from the expected header.
    """
    if header != expected:
        raise UserError(
            f"{text}, line 1: found {header[:80]!r}, expected the header {expected[:300]!r}; "
            "restore the header line or fetch the file again"
        )


def _parse(block: bytes, layout: Layout, separator: str) -> pl.DataFrame | None:
    """Return the rows of a block, one per line; None if a row may be bad."""
    schema = {name: TYPES[kind] for name, kind in layout.columns.items()}
    *_others, last = schema
    wanted = list(layout.wanted or layout.columns)
    if not block:
        return pl.DataFrame(schema=schema).select(wanted)
    if separator != SEPARATOR:  # the lines are not checked yet
        unusual = [b"\0", b"\r", SEPARATOR.encode(), *([b'"'] if layout.is_quoted else [])]
        if any(word in block for word in unusual) or not (block.isascii() or BOM not in block):
            return None
    if len(separator) > 1:
        block, separator = block.replace(separator.encode(), SEPARATOR.encode()), SEPARATOR
    checked = {n for n, kind in layout.columns.items() if kind == "click"}
    needed = {*wanted, *checked, *layout.known, *layout.required, last}
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            quote_char=None,
            schema=schema,
            columns=[i for i, name in enumerate(schema) if name in needed],
            raise_if_empty=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    if block.count(separator.encode()) != frame.height * (len(schema) - 1):
        return None
    if frame[last].null_count() and block.count(b"\n") != frame.height:  # is a line blank?
        return None
    return frame.select(wanted) if frame.select(_is_good(layout, frame)).item() else None


def _is_good(layout: Layout, frame: pl.DataFrame) -> pl.Expr:
    """Return whether all values are valid."""
    tests = [pl.lit(True)]
    for name, kind in layout.columns.items():
        column = pl.col(name)
        if name not in frame.columns:
            continue
        if kind == "click":
            tests.append(column.is_in([0.0, 1.0]).fill_null(False).all())
        elif kind == "yymmddhh":
            tests.append((hours(name).is_not_null() | column.is_null()).all())
        elif kind == "seconds":
            tests.append(column.is_between(0, LATEST).fill_null(True).all())
        elif kind == "number":
            tests.append(column.is_finite().fill_null(True).all())
        if name in layout.required:
            tests.append(column.is_not_null().all())
        if name in layout.known:
            tests.append(column.is_in(layout.known[name].values.implode()).all())
    return pl.all_horizontal(tests)


def _good_lines(
    text: Text, first: int, block: bytes, layout: Layout, reading: Reading
) -> tuple[list[int], bytes]:
    """Return the numbers of the good lines, and the lines with ``SEPARATOR`` between fields."""
    numbers, good = [], []
    known = {name: {str(v) for v in entry.values} for name, entry in layout.known.items()}
    for number, line in enumerate(block.split(b"\n")[:-1], start=first):
        if not line.strip(b" \r"):
            continue
        shown = line.decode("utf-8", errors="replace")
        parts = _split(shown, layout)
        fault = _fault(line, shown, parts, layout, known)
        if fault is None:
            numbers.append(number)
            good.append(SEPARATOR.join(parts))
        else:
            reading.skip(fault[0], f"{text}, line {number}", shown, fault[1])
    return numbers, "".join(f"{line}\n" for line in good).encode()


def _split(line: str, layout: Layout) -> list[str]:
    if not layout.is_quoted or '"' not in line:
        return line.split(layout.separator)
    try:
        return next(csv.reader(io.StringIO(line), delimiter=layout.separator, strict=True))
    except csv.Error:
        return []


def _fault(
    line: bytes, shown: str, parts: list[str], layout: Layout, known: Mapping[str, set[str]]
) -> tuple[str, str] | None:
    """Return the reason and the expectation for a bad line; None for a good line."""
    if b"\0" in line:
        return "NUL byte", "text"
    if b"\r" in line:
        return "carriage return", "one row per line"
    if "�" in shown and shown.encode() != line:
        return "not UTF-8", "text in UTF-8"
    if line.startswith(BOM):
        return "byte order mark", "one at the start of the file only"
    if SEPARATOR in shown:
        return "control character", "text without the character 1F"
    if not parts:
        return "quotes", "quotes that close"
    if layout.header is not None and shown == layout.header:
        return "repeated header", "a row"
    if len(parts) != len(layout.columns):
        return "missing field" if len(parts) < len(layout.columns) else "extra field", _fields(
            layout
        )
    for (name, kind), value in zip(layout.columns.items(), parts, strict=True):
        is_read = name in (layout.wanted or layout.columns) or kind == "click"
        if not (value if kind == "text" else value.strip(" \t")):
            if name in layout.required or kind == "click":
                return "missing field", f"{name} in {_fields(layout)}"
            continue
        if is_read and kind != "text" and (fault := _number_fault(name, kind, value)):
            return fault
        if name in known and (str(int(value)) if kind == "integer" else value) not in known[name]:
            return layout.known[name].reason, layout.known[name].expected
    return None


def _number_fault(name: str, kind: str, value: str) -> tuple[str, str] | None:
    shown = repr(value if len(value) <= 40 else value[:37] + "...")
    expected = f"{_MEANING[kind]} in {name}, not {shown}"
    if kind in ("integer", "yymmddhh", "seconds"):
        if not _INTEGER.fullmatch(value) or not -(2**63) <= int(value) < 2**63:
            return "not a number", expected
        if kind == "seconds":
            return None if 0 <= int(value) <= LATEST else ("not a time", expected)
        is_good = kind == "integer" or _is_hour(int(value))
        return None if is_good else ("not a time", expected)
    if not _NUMBER.fullmatch(value):
        is_special = value.lower().lstrip(" +-") in ("nan", "inf", "infinity")
        return "not finite" if is_special else "not a number", expected
    if not math.isfinite(float(value)):
        return "not finite", expected
    if kind == "click" and float(value) not in (0.0, 1.0):
        return "not a label", expected
    return None


def hours(column: str) -> pl.Expr:
    """Return the times of whole numbers YYMMDDHH, years 2000 to 2099; null if invalid."""
    digits = pl.col(column).cast(pl.String).str.zfill(8)
    return (pl.lit("20") + digits + "00").str.strptime(pl.Datetime, "%Y%m%d%H%M", strict=False)


def time_in_seconds(column: str, form: str) -> pl.Expr:
    """Return the column ``TIME`` in seconds, from a column of valid times in ``form``."""
    if form == "seconds":
        return pl.col(column).alias(TIME)
    return hours(column).dt.epoch("s").alias(TIME)


def _is_hour(value: int) -> bool:
    """Return whether one number is a time, by the rule of ``hours``."""
    return not pl.DataFrame({"value": [value]}).select(hours("value").is_null()).item()


def _fields(layout: Layout) -> str:
    names = list(layout.columns)
    listed = ", ".join(names if len(names) <= 6 else [*names[:3], "...", names[-1]])
    return f"{len(names)} fields ({listed})"
