"""Vocabulary files beside a table: texts, CSV, JSON or Parquet with a key per row.

A line, an entry of a list, or a column holds the key of each row in order. Or rows have numbers: a
column ``row``, or a JSON object key -> row. Then rows from 0 on may have no key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cki_rec.checkpoints.formats.keyed import (
    COUNTS,
    KEYS,
    SCORES,
    VALUES,
    Array,
    Column,
    KeyedRows,
    values_dtype,
)
from cki_rec.checkpoints.formats.layout import Layout
from cki_rec.checkpoints.formats.stored import Stored
from cki_rec.config import UserError

KEY_COLUMNS = ("key", "keys", "token", "id", "raw_id")
ROW_COLUMNS = ("row", "rows", "index", "row_id")
USES = {"count": COUNTS, "counts": COUNTS, "score": SCORES, "scores": SCORES}
BLOCK_ROWS = 1 << 17
"""Rows that are checked at a time, and of a row group of Parquet."""
ROWS = "rows"
"""The column of numbers of rows."""
SUFFIXES = {".txt": "text", ".csv": "csv", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The keys of a table, in the order of its rows; they are read in blocks."""

    file: Path
    frame: pl.LazyFrame
    """Columns ``KEYS`` (Int64 or String) and those of ``uses`` (Float64)."""
    num_rows: int
    is_text: bool
    reserved: int
    """Rows before the first key."""
    uses: tuple[str, ...]
    """Measures of use."""
    has_rows: bool
    """The file numbers its rows."""
    columns: tuple[str, ...]
    """Names of its columns, of CSV and Parquet."""

    def blocks(self, size: int) -> Iterator[pl.DataFrame]:
        """Yield all rows, ``size`` at a time."""
        yield from self.frame.collect_batches(chunk_size=size, maintain_order=True)


def read(file: Path) -> Vocabulary:
    """Return a vocabulary; its keys are checked, and none is kept.

    Raises:
        UserError: The file is not readable, or its keys or rows are none.
    """
    form = SUFFIXES.get(file.suffix)
    if form is None:
        raise UserError(f"{file}: a vocabulary is {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return _read(file, form)
    except (OSError, ValueError, RecursionError, pl.exceptions.PolarsError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: unreadable vocabulary ({reason})") from None


def _read(file: Path, form: str) -> Vocabulary:
    frame = _scan(file, form)
    schema = frame.collect_schema()
    names = {name.lower(): name for name in schema}
    key = next((names[n] for n in KEY_COLUMNS if n in names), schema.names()[0])
    row = next((names[n] for n in ROW_COLUMNS if n in names and names[n] != key), None)
    is_text = schema[key] in (pl.String, pl.Categorical)
    if not is_text and not schema[key].is_integer():
        raise UserError(f"{file}: keys are {schema[key]}; they must be whole numbers or texts")
    uses = {USES[n]: column for n, column in names.items() if n in USES and column != key}
    numbers = pl.col(key).cast(pl.Int64, strict=False)
    places = None if row is None else pl.col(row).cast(pl.Int64, strict=False)
    facts = _facts(frame, key, numbers, places, uses)
    if facts.first_empty is not None:
        raise UserError(f"{file}: the key in row {facts.first_empty:,} is empty; name it")
    if facts.wrong_use:
        raise UserError(f"{file}: column {facts.wrong_use} must hold numbers from 0 on")
    if not is_text and facts.no_number:
        raise UserError(f"{file}: a key is above 2^63; keys must fit 64 signed bits")
    if facts.no_place:
        raise UserError(f"{file}: column {row} must hold whole numbers")
    if form in ("text", "csv") and facts.num and facts.are_numbers:
        is_text = False
    if places is not None and not facts.in_order:
        frame = frame.sort(places)
        found = frame.select(places.alias(ROWS)).collect()[ROWS].to_numpy()
        _check_places(file, found, facts.lowest)
    columns = [(pl.col(key).cast(pl.String) if is_text else numbers).alias(KEYS)]
    columns += [pl.col(n).cast(pl.Float64, strict=False).alias(use) for use, n in uses.items()]
    known = tuple(schema) if form in ("csv", "parquet") else ()
    return Vocabulary(
        *(file, frame.select(columns), facts.num, is_text, facts.lowest),
        *(tuple(uses), row is not None, known),
    )


@dataclass(slots=True)
class _Facts:
    """Facts about all rows."""

    num: int = 0
    first_empty: int | None = None
    """The first row without a key."""
    are_numbers: bool = True
    """All keys are integers as they are usually written."""
    no_number: bool = False
    """A key is no integer of 64 signed bits."""
    no_place: bool = False
    """A number of a row is no whole number."""
    lowest: int = 0
    in_order: bool = True
    """Rows are numbered one by one, from ``lowest`` on."""
    wrong_use: str = ""
    """A column of uses with other entries than numbers from 0 on."""


def _facts(
    frame: pl.LazyFrame, key: str, numbers: pl.Expr, places: pl.Expr | None, uses: dict[str, str]
) -> _Facts:
    """Return facts about all rows, in one pass over blocks."""
    found = _Facts()
    columns = {
        "key": pl.col(key),
        "number": numbers,
        **({ROWS: places} if places is not None else {}),
        **{use: pl.col(column).cast(pl.Float64, strict=False) for use, column in uses.items()},
    }
    for block in frame.select(**columns).collect_batches(chunk_size=BLOCK_ROWS):
        empty = block["key"].is_null()
        if found.first_empty is None and empty.any():
            found.first_empty = found.num + (empty.arg_max() or 0)
        is_same = (block["number"].cast(pl.String) == block["key"].cast(pl.String)).all()
        found.are_numbers = found.are_numbers and is_same
        found.no_number = found.no_number or bool(block["number"].null_count())
        for use, column in uses.items():
            if block[use].null_count() or not (block[use] >= 0).all():
                found.wrong_use = column
        if places is not None and block[ROWS].null_count():
            found.no_place = True
        elif places is not None and len(block):
            rows = block[ROWS].to_numpy()
            start = int(rows[0]) if not found.num else found.lowest + found.num
            expected = np.arange(start, start + len(rows))
            found.in_order = found.in_order and start >= 0 and bool((rows == expected).all())
            found.lowest = min(int(rows.min()), found.lowest if found.num else int(rows[0]))
        found.num += len(block)
    found.are_numbers = found.are_numbers and not found.no_number
    return found


def _check_places(file: Path, places: Array, reserved: int) -> None:
    """Check that numbers of rows, in order, have no gaps and are not negative.

    Raises:
        UserError: They have.
    """
    expected = np.arange(max(0, reserved), max(0, reserved) + len(places))
    if len(wrong := np.flatnonzero(places != expected)):
        raise UserError(
            f"{file}: rows must be {expected[0]}, {expected[0] + 1}, ... without gaps, each once;"
            f" there is {places[wrong[0]]} in place of {expected[wrong[0]]}"
        )


def _scan(file: Path, form: str) -> pl.LazyFrame:
    """Return the columns of a file; those of texts and CSV are texts."""
    if form == "parquet":
        return pl.scan_parquet(file)
    if form == "csv":
        return pl.scan_csv(file, infer_schema=False)
    if form == "text":
        return pl.scan_lines(file, name="key")
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        return pl.LazyFrame({"key": list(content), "row": list(content.values())})
    if not isinstance(content, list):
        raise ValueError("must be a list of keys, or an object key -> row")
    return pl.LazyFrame({"key": content}, strict=True)


class VocabularyTable:
    """A table of a checkpoint with its vocabulary.

    Args:
        path: The checkpoint, as the user named it.
        stored: The checkpoint.
        parts: Its parts.
        name: The table.
        file: The vocabulary.

    Raises:
        UserError: There is no such table, or numbers of rows and keys differ.
    """

    def __init__(self, path: str, stored: Stored, parts: Layout, name: str, file: Path) -> None:
        self.path, self.name, self.title = path, name, f"vocabulary {file.name}"
        self._stored, self._parts = stored, parts
        vocabulary = self.vocabulary = read(file)
        entry = parts.entries[name]
        self.dtype, self.num_rows = entry.dtype, vocabulary.num_rows
        self.is_text, self.reserved = vocabulary.is_text, vocabulary.reserved
        if entry.shape[0] != self.reserved + self.num_rows:
            hint = "" if vocabulary.has_rows else " (rows without a key need a column row)"
            after = f" from row {self.reserved} on" if self.reserved else ""
            raise UserError(
                f"{file}: {self.num_rows:,} keys{after} for {entry.shape[0]:,} rows of {name} in"
                f" {path}{hint}; take the vocabulary of this checkpoint"
            )
        self._counts = parts.counts.get(name)
        self.counts_name = ""
        """The tensor of the model that holds counts."""
        if self._counts is not None:
            full = self._counts[1]
            self.counts_name = next((n for n, long in parts.names.items() if long == full), "")
            self.counts_dtype = self._counts[0].entries[full].dtype
        uses = {*vocabulary.uses, *([COUNTS] if self._counts else [])}
        self.columns = {VALUES: Column(values_dtype(entry.dtype), entry.shape[1])}
        self.columns |= {use: Column(np.dtype(np.float64), 1) for use in sorted(uses)}

    def blocks(self, size: int) -> Iterator[KeyedRows]:
        """Yield the rows that have a key."""
        first = self.reserved
        for frame in self.vocabulary.blocks(size):
            stop, keys = first + len(frame), frame[KEYS]
            block: KeyedRows = {KEYS: keys if self.is_text else keys.to_numpy()}
            block[VALUES] = self.values(first, stop).numpy()
            for use in (COUNTS, SCORES):
                if use in self.vocabulary.uses:
                    block[use] = frame[use].to_numpy()[:, None]
                elif use in self.columns:
                    block[use] = self.counts(first, stop)[:, None]
            yield block
            first = stop

    def values(self, first: int, stop: int) -> Tensor:
        """Return rows of the table, as they are merged."""
        rows = self._stored.rows(self._parts.names[self.name], first, stop)
        return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)

    def counts(self, first: int, stop: int) -> Array:
        """Return counts of rows that the checkpoint holds."""
        assert self._counts is not None
        holder, full = self._counts
        return holder.rows(full, first, stop).double().numpy()

    def files(self) -> list[Path]:
        """Return the vocabulary."""
        return [self.vocabulary.file]


class VocabularyWriter:
    """Writes the keys of a merged table in the form of a vocabulary, some at a time.

    Args:
        folder: Takes the file, under the name that the first source's has.
        like: The vocabulary of the first source.
        is_text: Keys of the merged table are texts.
    """

    def __init__(self, folder: Path, like: Vocabulary, is_text: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._like, self._form, self._is_text = like, SUFFIXES[like.file.suffix], is_text
        self._target = folder / like.file.name
        is_parquet = self._form == "parquet"
        self._path = self._target.with_suffix(".csv.part") if is_parquet else self._target
        self._file: TextIO = self._path.open("w", encoding="utf-8", newline="")
        self._row = like.reserved
        if self._form in ("csv", "parquet"):
            pl.DataFrame({name: [] for name in self.written_columns()}).write_csv(self._file)
        elif self._form == "json":
            self._file.write("{" if like.has_rows else "[")
        self._is_first = True

    def written_columns(self) -> dict[str, str]:
        """Return the columns that are written -> keys, rows or a measure of use."""
        names = self._like.columns
        key = next((n for n in names if n.lower() in KEY_COLUMNS), names[0])
        kinds = {name: USES.get(name.lower(), "") for name in names}
        kinds |= {name: ROWS for name in names if name.lower() in ROW_COLUMNS}
        return {name: kind for name, kind in (kinds | {key: KEYS}).items() if kind}

    def add(self, rows: KeyedRows) -> None:
        """Append the keys of rows.

        Raises:
            UserError: A key has a line break, and the form is a key per line.
        """
        keys = pl.Series(rows[KEYS])
        numbers = np.arange(self._row, self._row + len(keys))
        self._row += len(keys)
        if self._form in ("csv", "parquet"):
            held = {KEYS: keys, ROWS: numbers}
            columns = {
                name: held[kind] if kind in held else rows[kind][:, 0]
                for name, kind in self.written_columns().items()
            }
            pl.DataFrame(columns).write_csv(self._file, include_header=False)
        elif self._form == "json":
            words = [json.dumps(key, ensure_ascii=False) for key in keys.to_list()]
            if self._like.has_rows:
                quoted = [w if w.startswith('"') else f'"{w}"' for w in words]
                words = [f"{w}: {n}" for w, n in zip(quoted, numbers.tolist(), strict=True)]
            self._file.write(("" if self._is_first or not words else ", ") + ", ".join(words))
            self._is_first = self._is_first and not words
        else:
            if self._is_text and bool(keys.str.contains("\n", literal=True).any()):
                raise UserError(
                    f"{self._like.file}: holds a key per line, and a key of another source has a"
                    " line break; use csv, json or parquet"
                )
            self._file.writelines(f"{key}\n" for key in keys.to_list())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def finish(self) -> None:
        """Complete the file."""
        if self._form == "json":
            self._file.write("}" if self._like.has_rows else "]")
        self.close()
        if self._form == "parquet":
            types = {KEYS: pl.String if self._is_text else pl.Int64, ROWS: pl.Int64}
            schema = {
                name: types.get(kind, pl.Float64) for name, kind in self.written_columns().items()
            }
            frame = pl.scan_csv(self._path, schema=schema, empty_string_is_null=False)
            frame.sink_parquet(self._target, row_group_size=BLOCK_ROWS)
            self._path.unlink()
