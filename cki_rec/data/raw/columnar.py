"""Parquet and Arrow files -> typed frames, a slice of rows at a time.

Columns have types, so text alone is parsed: whole numbers, floats, dates, truth values and lists
keep their meaning, and a null is an empty cell. A bad row is reported with file, number and
column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.raw.chunks import Check, Chunk, Step
from cki_rec.data.raw.delimited import Layout, is_good, require_rows, value_faults
from cki_rec.data.raw.reading import LINE, Reading
from cki_rec.data.raw.values import TIMES, TYPES, Forms, converted

ROW_BYTES = 256
"""Bytes that a row stands for, to turn the size of a chunk into rows."""
SCANS: dict[bytes, Callable[[Path], pl.LazyFrame]] = {
    b"PAR1": pl.scan_parquet,
    b"ARRO": pl.scan_ipc,
}
"""First bytes of a file -> the reader of polars."""
TEMPORAL = (pl.Date, pl.Datetime)
Query = Callable[[pl.LazyFrame], pl.LazyFrame]


def is_columnar(path: Path) -> bool:
    """Return whether a file is Parquet or Arrow, by its first bytes.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(4) in SCANS
    except OSError as error:
        raise _unreadable(path, error) from None


def schema_of(path: Path) -> dict[str, pl.DataType]:
    """Return the columns of a file and their types.

    Raises:
        UserError: The file is damaged, or neither Parquet nor Arrow.
    """
    return dict(_collected(path, lambda scan: scan.limit(0)).schema)


def first_values(path: Path, name: str, num_rows: int) -> list[str]:
    """Return the first values of a column as text, without nulls."""
    column = _collected(
        path, lambda scan: scan.select(pl.col(name).cast(pl.String)).head(num_rows)
    )
    values: list[str] = column[name].drop_nulls().to_list()
    return values


def first_rows(path: Path, num_rows: int) -> pl.DataFrame:
    """Return the first rows of a file.

    Raises:
        UserError: The file is damaged, or neither Parquet nor Arrow.
    """
    return _collected(path, lambda scan: scan.head(num_rows))


def row_chunks(
    path: Path, layout: Layout, reading: Reading, *steps: Step
) -> Iterator[Chunk | Check]:
    """Yield the rows of a file, slice by slice, with an extra column ``LINE`` (Int64).

    Args:
        path: The file.
        layout: Kinds of the columns to read. A column of kind ``text`` may be a list.
        reading: State of the pass, with the treatment of bad rows.
        steps: Functions that turn the columns of a chunk into the common form.

    Raises:
        UserError: The file is damaged. Chunks raise the errors of rows, and the last check that of
            a file without a good row.
    """
    num_rows = int(_collected(path, lambda scan: scan.select(pl.len())).item())
    size, step = path.stat().st_size, max(1, reading.block_bytes // ROW_BYTES)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield Chunk(partial(_rows_of, path, start, stop, layout), steps)
        reading.advance(size * stop // num_rows - size * start // num_rows)
    yield Check(partial(require_rows, path, layout))


def _rows_of(path: Path, start: int, stop: int, layout: Layout, reading: Reading) -> pl.DataFrame:
    """Return the good rows of a slice; rows are numbered from 1."""
    names = list(layout.columns)
    cells = _collected(path, lambda scan: scan.select(names).slice(start, stop - start))
    cells = cells.with_columns(_filled(name, cells.schema[name], layout.forms) for name in names)
    typed = cells.select(_typed(name, cells.schema[name], layout) for name in names)
    number = pl.int_range(start + 1, stop + 1, dtype=pl.Int64).alias(LINE)
    rows = typed.with_columns(number)
    if is_good(typed, layout) and typed.null_count().equals(cells.null_count()):
        return rows
    tested = [name for name, kind in layout.columns.items() if kind != "text"]
    texts = cells.select(pl.col(name).cast(pl.String) for name in tested)
    faults, is_good_row = value_faults(texts, typed, layout)
    for position in sorted(faults):
        reason, expected, fix = faults[position]
        shown = ", ".join(f"{name}={texts[name][position]}" for name in tested)
        where = f"{path}, row {start + position + 1}"
        reading.skip(reason, where, shown, expected, fix, thing="row")
    return rows.filter(is_good_row)


def _filled(name: str, dtype: pl.DataType, forms: Forms) -> pl.Expr:
    """Return a column in which words for empty cells are null; dictionaries become text."""
    column = pl.col(name)
    if isinstance(dtype, pl.Categorical | pl.Enum):
        column, dtype = column.cast(pl.String), pl.String()
    if dtype == pl.String:
        return pl.when(~column.is_in(["", *forms.missing])).then(column).alias(name)
    has_nan = any(word.lower() == "nan" for word in forms.missing)
    return column.fill_nan(None) if dtype.is_float() and has_nan else column


def _typed(name: str, dtype: pl.DataType, layout: Layout) -> pl.Expr:
    """Return a column in the type of its kind; null where a cell has no such form."""
    kind, column = layout.columns[name], pl.col(name)
    if kind == "text" and isinstance(dtype, pl.List):
        return column.cast(pl.List(pl.String))
    if kind in TIMES and isinstance(dtype, TEMPORAL):
        return column.dt.epoch("s")
    if dtype == pl.String:
        return converted(name, kind, layout.forms)
    return column.cast(TYPES[kind], strict=False)


def _collected(path: Path, query: Query) -> pl.DataFrame:
    """Return the result of a query of a file."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start not in SCANS:
            raise UserError(
                f"{path}: neither a Parquet nor an Arrow file; for text set data.format=csv"
            )
        return query(SCANS[start](path)).collect()
    except OSError as error:
        raise _unreadable(path, error) from None
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path}: damaged or truncated ({str(error).splitlines()[0]}); write it again or set "
            "data.raw"
        ) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror or error}; set data.raw")
