"""Delimited text -> typed frames. A bad row is reported with file, line and reason, or skipped.

Polars parses a whole block of lines at once. If polars or the number of separators indicates an
error, or if fields are quoted, the block is split row by row, to find bad rows and reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.raw.chunks import Check, Chunk, Step, frames
from cki_rec.data.raw.reading import BOM, LINE, LONGEST_LINE, Reading, Text
from cki_rec.data.raw.rows import SEPARATOR, Row, count_byte, form_fault, split_rows
from cki_rec.data.raw.values import (
    BLANKS,
    TYPES,
    Forms,
    converted,
    fault_of,
    is_valid,
    suggested_labels,
    time_in_seconds,
)

__all__ = ["Known", "Layout", "check_header", "read_rows", "row_chunks", "time_in_seconds"]
Fault = tuple[str, str, str]
"""Reason, expectation, and the fix beside the correction of the line; empty: skip such rows."""


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
    """The first row; None: the file has no header."""
    required: tuple[str, ...] = ()
    """Columns that may not be empty, besides clicks."""
    is_quoted: bool = False
    """Whether a field may be quoted as in csv."""
    wanted: tuple[str, ...] = ()
    """Columns to return; empty: all."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """Column -> its only valid values."""
    forms: Forms = field(default_factory=Forms)
    """The forms of values."""
    fixes: Mapping[str, str] = field(default_factory=dict)
    """Kind of a column, or a reason -> the option to name if a value is bad."""


def row_chunks(
    text: Text, layout: Layout, reading: Reading, *steps: Step
) -> Iterator[Chunk | Check]:
    """Yield the rows of a text, block by block, with an extra column ``LINE`` (Int64).

    Args:
        text: The text to read.
        layout: Columns and syntax of its lines.
        reading: State of the pass, with the treatment of bad rows.
        steps: Functions that turn the columns of a chunk into the common form. They are pickled,
            so they are functions of a module, or ``functools.partial`` of such.

    Raises:
        UserError: The header is not the expected one, or a quote does not close. Chunks raise the
            errors of rows, and the last check that of a text without a good row.
    """
    rest = b""
    header = [] if layout.header is None else layout.header.split("\n")
    for block in text.blocks(reading, keep_returns=layout.is_quoted):
        while reading.line <= len(header) and block:
            line, _, block = block.partition(b"\n")
            found = line.removesuffix(b"\r").decode("utf-8", errors="replace")
            check_header(text, found, header[reading.line - 1])
            reading.line += 1
        chunk, rest = _chunk_of(text, rest + block, layout, reading)
        yield Chunk(chunk, steps)
        if len(rest) > LONGEST_LINE:
            raise UserError(
                f"{text}, line {reading.line}: a quote opens and does not close within "
                f"{LONGEST_LINE:,} bytes, expected quotes that close; correct the line"
            )
    if rest:
        yield Chunk(_chunk_of(text, rest, layout, reading, is_end=True)[0], steps)
    yield Check(partial(require_rows, text, layout))


def read_rows(text: Text, layout: Layout, reading: Reading) -> Iterator[pl.DataFrame]:
    """Yield the good rows of ``row_chunks``, parsed one chunk after the other.

    Raises:
        UserError: A row is bad and ``reading.on_bad_row`` is ``error``, or no row is good.
    """
    yield from frames(row_chunks(text, layout, reading), reading)


def require_rows(text: Text | Path, layout: Layout, reading: Reading) -> None:
    """Check that a file had a good row, after its last chunk.

    Raises:
        UserError: It had none.
    """
    if not reading.num_usable:
        fix = "correct the rows" if reading.counts else "fetch the file again"
        raise UserError(f"{text}: no usable row, expected rows of {_fields(layout)}; {fix}")
    reading.num_usable = 0


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


def _chunk_of(
    text: Text, block: bytes, layout: Layout, reading: Reading, is_end: bool = False
) -> tuple[Callable[[Reading], pl.DataFrame], bytes]:
    """Return the parser of the rows of a block, and the lines of an incomplete row."""
    first, rest = reading.line, b""
    if layout.is_quoted and b'"' in block:
        rows, rest = split_rows(block, first, layout.separator, True, is_end)
        parse = partial(_good_rows, text, rows, layout)
    else:
        parse = partial(_rows_of, text, block, first, layout)
    reading.line += count_byte(block, b"\n") - rest.count(b"\n")
    return parse, rest


def _rows_of(
    text: Text, block: bytes, first: int, layout: Layout, reading: Reading
) -> pl.DataFrame:
    """Return the good rows of a block with their lines."""
    if layout.is_quoted and b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    frame = _parse(block, layout)
    if frame is not None:
        number = pl.int_range(first, first + frame.height, dtype=pl.Int64).alias(LINE)
        return frame.with_columns(number)
    rows, _ = split_rows(block, first, layout.separator, layout.is_quoted)
    return _good_rows(text, rows, layout, reading)


def _parse(block: bytes, layout: Layout) -> pl.DataFrame | None:
    """Return the rows of a block, one per line; None if a row may be bad or quoted."""
    schema = {name: TYPES[kind] for name, kind in layout.columns.items()}
    *_others, last = schema
    wanted = list(layout.wanted or layout.columns)
    if not block:
        return pl.DataFrame(schema=schema).select(wanted)
    separator = layout.separator
    unusual = [b"\0", b"\r", SEPARATOR.encode(), *([b'"'] if layout.is_quoted else [])]
    if any(word in block for word in unusual) or not (block.isascii() or BOM not in block):
        return None
    if layout.forms.number_form != "plain" and "number" in layout.columns.values():
        return None
    if len(separator) > 1:
        block, separator = block.replace(separator.encode(), SEPARATOR.encode()), SEPARATOR
    needed = {*_needed(layout), last}
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            quote_char=None,
            schema=schema,
            columns=[i for i, name in enumerate(schema) if name in needed]
            if len(needed) < len(schema)
            else None,
            null_values=list(layout.forms.missing) or None,
            raise_if_empty=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    if count_byte(block, separator.encode()) != frame.height * (len(schema) - 1):
        return None
    if frame[last].null_count() and count_byte(block, b"\n") != frame.height:  # is a line blank?
        return None
    return frame.select(wanted) if is_good(frame, layout) else None


def is_good(frame: pl.DataFrame, layout: Layout) -> bool:
    """Return whether all values of typed columns pass their tests."""
    tests = [good.all() for name in frame.columns for good in _tests(layout, name)]
    return bool(frame.select(pl.all_horizontal(pl.lit(True), *tests)).item())


def _needed(layout: Layout) -> list[str]:
    """Return the columns that are returned or checked."""
    checked = {n for n, kind in layout.columns.items() if kind in ("click", "label")}
    named = {*(layout.wanted or layout.columns), *checked, *layout.known, *layout.required}
    return [name for name in layout.columns if name in named]


def _tests(layout: Layout, name: str) -> list[pl.Expr]:
    """Return the tests of the values of a typed column; each gives true for a good value."""
    kind, column = layout.columns[name], pl.col(name)
    tests = [] if kind in ("text", "integer") else [is_valid(name, kind, layout.forms)]
    if name in layout.required:
        tests.append(column.is_not_null())
    if name in layout.known:
        known = layout.known[name].values.implode()
        tests.append(column.is_in(known).fill_null(True))
    return tests


def _good_rows(text: Text, rows: list[Row], layout: Layout, reading: Reading) -> pl.DataFrame:
    """Return the typed values of the good rows and report the bad ones, in their order."""
    faults: dict[int, Fault] = {}
    for position, row in enumerate(rows):
        if fault := _row_fault(row, layout):
            faults[position] = fault
    whole = [position for position in range(len(rows)) if position not in faults]
    columns = zip(*(rows[position].parts for position in whole), strict=True)
    values = list(columns) or [()] * len(layout.columns)
    schema = dict.fromkeys(layout.columns, pl.String)
    texts = pl.DataFrame(dict(zip(schema, values, strict=True)), schema=schema)
    texts = texts.select(_filled(name, layout) for name in _needed(layout))
    frame = texts.select(
        converted(name, layout.columns[name], layout.forms) for name in texts.columns
    )
    of_values, is_good_row = value_faults(texts, frame, layout)
    faults |= {whole[index]: fault for index, fault in of_values.items()}
    for position in sorted(faults):
        row, (reason, expected, fix) = rows[position], faults[position]
        num_lines = 1 if row.parts else row.num_lines
        reading.skip(reason, f"{text}, {row.place}", row.shown, expected, fix, num_lines)
    lines = pl.Series(LINE, [rows[position].line for position in whole], dtype=pl.Int64)
    frame = frame.select(list(layout.wanted or layout.columns)).with_columns(lines)
    return frame.filter(is_good_row)


def value_faults(
    texts: pl.DataFrame, frame: pl.DataFrame, layout: Layout
) -> tuple[dict[int, Fault], pl.Series]:
    """Return the first fault of each bad row, and whether each row is good.

    Args:
        texts: The columns to test, as text; null where a cell is empty.
        frame: The same columns, typed; null too where a text has not the form of its kind.
        layout: Kinds of the columns, and their tests.
    """
    faults: dict[int, Fault] = {}
    is_good_row = pl.Series([True] * len(frame), dtype=pl.Boolean)
    for name, good in _checked(texts, frame, layout):
        for index in (is_good_row & ~good).arg_true().to_list():
            fault = _value_fault(name, texts[name][index], frame[name][index], layout)
            faults[index] = fault
        is_good_row &= good
    return faults, is_good_row


def _filled(name: str, layout: Layout) -> pl.Expr:
    """Return a column of text; empty values and words for them are null."""
    column = pl.col(name)
    bare = column if layout.columns[name] == "text" else column.str.strip_chars(BLANKS)
    return pl.when(~bare.is_in(["", *layout.forms.missing])).then(column)


def _checked(
    texts: pl.DataFrame, frame: pl.DataFrame, layout: Layout
) -> Iterator[tuple[str, pl.Series]]:
    """Yield per column whether the values of each row are good."""
    for name in texts.columns:
        good = texts[name].is_null() | frame[name].is_not_null()
        for test in _tests(layout, name):
            good &= frame.select(test.alias(name))[name]
        yield name, good


def _row_fault(row: Row, layout: Layout) -> Fault | None:
    """Return the fault of the form of a row; None if there is none."""
    if fault := form_fault(row):
        return *fault, layout.fixes.get(fault[0], "")
    if layout.header is not None and row.shown == layout.header:
        return "repeated header", "a row", ""
    if len(row.parts) != len(layout.columns):
        reason = "missing field" if len(row.parts) < len(layout.columns) else "extra field"
        return reason, _fields(layout), ""
    return None


def _value_fault(name: str, value: str | None, typed: object, layout: Layout) -> Fault:
    """Return the fault of a value that a test of its column refuses."""
    kind = layout.columns[name]
    if value is None:
        return "missing field", f"{name} in {_fields(layout)}", ""
    if name in layout.known and typed is not None:
        return layout.known[name].reason, layout.known[name].expected, ""
    fix = layout.fixes.get(kind, "").replace("{labels}", suggested_labels(value))
    return *fault_of(name, kind, value, layout.forms), fix


def _fields(layout: Layout) -> str:
    names = list(layout.columns)
    listed = ", ".join(names if len(names) <= 6 else [*names[:3], "...", names[-1]])
    return f"{len(names)} fields ({listed})"
