"""Files of raw rows to be scored -> frames: delimited text, or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from cki_rec.config import UserError, nearest
from cki_rec.data.raw.delimited import Layout, read_rows
from cki_rec.data.raw.forms import GUESSED, SEPARATORS, first_row
from cki_rec.data.raw.reading import Reading, Text

PARQUET = ".parquet"
PARQUET_ROWS = 100_000
"""Rows of a Parquet file to read at a time."""
Missing = Callable[[Sequence[str]], list[str]]
"""The columns of a file -> the needed columns that it lacks."""


def served_rows(
    path: Path,
    missing: Missing,
    is_read: Callable[[str], bool],
    block_bytes: int,
    *,
    separator: str = "comma",
    encoding: str = "utf-8",
    columns: Sequence[str] = (),
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a file, block by block; those of text have a column ``LINE``.

    Args:
        path: A Parquet file, or delimited text, plain or compressed by gzip.
        missing: Function that returns the needed columns that a file lacks.
        is_read: Function that returns whether a column is to be read.
        block_bytes: Bytes of text to read at a time.
        separator: The separator to try first, a key of ``SEPARATORS``.
        encoding: Encoding of the text.
        columns: Columns of files without a header, the label first; empty: files have a header.

    Raises:
        UserError: The file is not readable, lacks a column, or a line is bad.
    """
    if not path.is_file():
        problem = "a folder, expected a file" if path.is_dir() else "no such file"
        raise UserError(f"input={path}: {problem}")
    if path.suffix == PARQUET:
        yield from _parquet_rows(path, missing, is_read)
        return
    text = Text(path, encoding=encoding)
    mark, header, names = _head(text, missing, separator, columns)
    layout = Layout(
        columns=dict.fromkeys(names, "text"),
        separator=mark,
        header=header,
        is_quoted=header is not None,
        wanted=tuple(name for name in names if is_read(name)),
    )
    reading = Reading("error", block_bytes, has_published=False, fix="remove it")
    yield from read_rows(text, layout, reading)


def _head(
    text: Text, missing: Missing, separator: str, columns: Sequence[str]
) -> tuple[str, str | None, list[str]]:
    """Return the separator, the header (None: there is none), and the names of columns."""
    for choice in dict.fromkeys((separator, *GUESSED)):
        header, names = first_row(text, SEPARATORS[choice])
        if not missing(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(
                    f"{text}, line 1: names {', '.join(twice)} twice, expected every column once;"
                    " correct the header"
                )
            return SEPARATORS[choice], header, names
    width = len(text.first_line().split("\t"))
    if columns and len(columns) - 1 <= width <= len(columns):
        return "\t", None, list(columns[len(columns) - width :])
    names = first_row(text, SEPARATORS[separator])[1]
    raise _lacks(f"{text}, line 1", missing(names), names)


def _parquet_rows(
    path: Path, missing: Missing, is_read: Callable[[str], bool]
) -> Iterator[pl.DataFrame]:
    try:
        scan = pl.scan_parquet(path, glob=False)
        names = scan.collect_schema().names()
        if lacking := missing(names):
            raise _lacks(str(path), lacking, names)
        num_rows = scan.select(pl.len()).collect().item()
        scan = scan.select(name for name in names if is_read(name))
        for start in range(0, num_rows, PARQUET_ROWS):
            yield scan.slice(start, PARQUET_ROWS).collect()
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason})") from None
    if not num_rows:
        raise UserError(f"{path}: has no row")


def _lacks(where: str, lacking: Sequence[str], names: Sequence[str]) -> UserError:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return UserError(
        f"{where}: no column {', '.join(lacking)}, which the model reads;"
        f" {nearest(lacking[0], names)}it has {shown}"
    )
