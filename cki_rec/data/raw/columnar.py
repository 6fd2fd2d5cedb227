"""Parquet and Arrow files -> typed frames, a slice of rows at a time.

Columns have types, so nothing is parsed but text: whole numbers, floats, dates, truth values and
lists keep their meaning, and a null is an empty cell. A bad row is reported with its file, number
and column.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.raw.chunks import Check, Chunk, Step
from cki_rec.data.raw.delimited import Layout, is_good, require_rows, value_faults
from cki_rec.data.raw.reading import LINE, Reading
from cki_rec.data.raw.values import TIMES, TYPES, converted

ROW_BYTES = 256
"""Bytes of text that a row stands for where ``runtime.chunk_mb`` is turned into rows."""
TEMPORAL = (pl.Date, pl.Datetime)
NO_VALUES = (pl.Struct, pl.Binary, pl.Object, pl.Array, pl.Duration, pl.Time)
"""Types that no field can have."""
SCANS = {b"PAR1": pl.scan_parquet, b"ARRO": pl.scan_ipc}
"""First bytes of a file -> the reader of polars."""


def is_columnar(path: Path) -> bool:
    """Return whether a file is Parquet or Arrow, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) in SCANS
    except OSError:
        return False  # the error is reported when the file is read


def schema_of(path: Path) -> dict[str, pl.DataType]:
    """Return the columns of a file and their types.

    Raises:
        UserError: The file is not readable.
    """
    try:
        return dict(_scan(path).collect_schema())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from None


def row_chunks(
    path: Path, layout: Layout, reading: Reading, *steps: Step
) -> Iterator[Chunk | Check]:
    """Yield the rows of a file, slice by slice, with an extra column ``LINE`` (Int64).

    Args:
        path: The file.
        layout: Kinds of the columns. A column of kind ``text`` may be a list.
        reading: State of the pass, with the treatment of bad rows.
        steps: Functions that turn the columns of a chunk into the common form.

    Raises:
        UserError: The file is not readable. Chunks raise the errors of rows, and the last check
            that of a file without a good row.
    """
    try:
        num_rows = int(_scan(path).select(pl.len()).collect().item())
        size = path.stat().st_size
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from None
    step = max(1, reading.block_bytes // ROW_BYTES)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield Chunk(partial(_rows_of, path, start, stop, layout), steps)
        reading.advance(size * stop // num_rows - size * start // num_rows)
    yield Check(partial(require_rows, path, layout))


def _rows_of(
    path: Path, start: int, stop: int, layout: Layout, reading: Reading
) -> pl.DataFrame:
    """Return the good rows of a slice, numbered from 1."""
    try:
        frame = _scan(path).select(layout.columns).slice(start, stop - start).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from None
    typed = frame.select(_typed(name, frame.schema[name], layout) for name in frame.columns)
    number = pl.int_range(start + 1, start + 1 + len(frame), dtype=pl.Int64).alias(LINE)
    wanted = typed.select(list(layout.wanted or layout.columns)).with_columns(number)
    if is_good(typed, layout) and typed.null_count().equals(_known(frame, layout).null_count()):
        return wanted
    texts = _known(frame, layout).select(
        pl.col(name).cast(pl.String) for name, kind in layout.columns.items() if kind != "text"
    )
    faults, good = value_faults(texts, typed, layout)
    for position in sorted(faults):
        reason, expected, fix = faults[position]
        shown = ", ".join(f"{name}={value}" for name, value in texts.row(position, named=True).items())
        where = f"{path}, row {start + position + 1}"
        reading.skip(reason, where, shown, expected, fix, thing="row")
    return wanted.filter(good)


def _known(frame: pl.DataFrame, layout: Layout) -> pl.DataFrame:
    """Return the cells as they are; words for empty cells are null."""
    words = list(layout.forms.missing)
    return frame.with_columns(
        pl.when(~pl.col(name).is_in(words)).then(pl.col(name)).alias(name)
        if dtype == pl.String
        else pl.col(name).fill_nan(None)
        for name, dtype in frame.schema.items()
        if words and (dtype == pl.String or (dtype.is_float() and _has_nan(words)))
    )


def _has_nan(words: list[str]) -> bool:
    return any(word.lower() == "nan" for word in words)


def _typed(name: str, dtype: pl.DataType, layout: Layout) -> pl.Expr:
    """Return a column in the type of its kind; null where a cell is empty or has no such form."""
    kind, column = layout.columns[name], pl.col(name)
    words = list(layout.forms.missing)
    if dtype == pl.String and words:
        column = pl.when(~column.is_in(words)).then(column)
    elif dtype.is_float() and _has_nan(words):
        column = column.fill_nan(None)
    if kind == "text":
        inner = pl.List(pl.String) if isinstance(dtype, pl.List) else pl.String
        return column.cast(inner).alias(name)
    if kind == "label":
        return column.cast(pl.String).alias(name)
    if kind in TIMES and isinstance(dtype, TEMPORAL):
        return column.dt.epoch("s").alias(name)
    if dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum):
        return column.cast(pl.String).pipe(_converted, name, kind, layout)
    return column.cast(TYPES[kind], strict=False).alias(name)


def _converted(text: pl.Expr, name: str, kind: str, layout: Layout) -> pl.Expr:
    return converted(name, kind, layout.forms, text.replace("", None)).alias(name)


def _scan(path: Path) -> pl.LazyFrame:
    with path.open("rb") as file:
        start = file.read(4)
    if start not in SCANS:
        raise UserError(
            f"{path}: neither a Parquet nor an Arrow file; set data.format=csv for text, or "
            "data.raw"
        )
    return SCANS[start](path)


def _damaged(path: Path, error: Exception) -> UserError:
    problem = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        problem = error.strerror or problem
        return UserError(f"{path}: cannot be read: {problem}; set data.raw")
    return UserError(f"{path}: damaged or not complete ({problem}); write it again or set data.raw")
