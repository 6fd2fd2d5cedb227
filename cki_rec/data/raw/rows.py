"""Lines -> rows of fields, as Python's csv module reads them; and the faults of a row's form."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cki_rec.data.raw.reading import BOM, LONGEST_LINE

SEPARATOR = "\x1f"
"""Internal separator, for files whose separator is longer than a byte."""


@dataclass(slots=True)
class Row:
    """The lines of one row."""

    line: int
    """Number of the first line."""
    num_lines: int
    content: bytes
    """The lines without the last newline."""
    parts: list[str]
    """The fields; empty if quotes do not close."""

    @property
    def shown(self) -> str:
        """Return the text for messages."""
        return self.content.decode("utf-8", errors="replace")

    @property
    def place(self) -> str:
        """Return the lines for messages."""
        if self.num_lines == 1:
            return f"line {self.line}"
        return f"lines {self.line} to {self.line + self.num_lines - 1}"


def count_byte(block: bytes, byte: bytes) -> int:
    """Return how often a byte occurs; ``bytes.count`` is slow for frequent ones."""
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == byte[0]))


def split_rows(
    block: bytes, first: int, separator: str, is_quoted: bool, is_end: bool = True
) -> tuple[list[Row], bytes]:
    """Return the rows of whole lines, and the lines of a last row that is not complete.

    Args:
        block: Lines, each with its newline.
        first: Number of the first line.
        separator: Text between fields.
        is_quoted: Whether a field may be quoted. Then it may hold separators and newlines.
        is_end: Whether the text ends here, so that an open quote is a fault.
    """
    lines = block.split(b"\n")[:-1]
    texts = [line.decode("utf-8", errors="replace") for line in lines]
    if not is_quoted or b'"' not in block:
        return [
            Row(first + n, 1, line, text.split(separator))
            for n, (line, text) in enumerate(zip(lines, texts, strict=True))
            if line.strip(b" \r")
        ], b""
    rows: list[Row] = []
    for start, stop, parts in quoted_rows(texts, separator):
        if parts is None and stop == len(lines) and not is_end:
            return rows, b"".join(line + b"\n" for line in lines[start:])
        content = b"\n".join(lines[start:stop]).removesuffix(b"\r")
        if content.strip(b" \r"):
            rows.append(Row(first + start, stop - start, content, parts or []))
    return rows, b""


def quoted_rows(lines: list[str], separator: str) -> Iterator[tuple[int, int, list[str] | None]]:
    """Yield start, stop and fields of every row; the fields are None if its quotes are wrong."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=separator, strict=True)
    stop = 0
    while True:
        start = stop
        try:
            parts: list[str] | None = next(reader)
        except StopIteration:
            return
        except csv.Error:
            parts = None
        stop = reader.line_num
        yield start, stop, parts


def form_fault(row: Row) -> tuple[str, str] | None:
    """Return the reason and the expectation for lines that are no plain text; None otherwise."""
    content = row.content
    if b"\0" in content:
        return "NUL byte", "text"
    if b"\r" in content and (b'"' not in content or not row.parts):
        return "carriage return", "one row per line"
    if not content.isascii():
        try:
            content.decode()
        except UnicodeDecodeError:
            return "not UTF-8", "text in UTF-8"
    if content.startswith(BOM):
        return "byte order mark", "one at the start of the file only"
    if SEPARATOR.encode() in content:
        return "control character", "text without the character 1F"
    if not row.parts:
        return "quotes", "quotes that close"
    return None
