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
ROWS = "rows"
"""The column of numbers of rows."""
SUFFIXES = {".txt": "text", ".csv": "csv", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The keys of a table, in the order of its rows."""

    file: Path
    keys: pl.Series
    """Int64 or String."""
    reserved: int
    """Rows before the first key."""
    uses: dict[str, Array]
    """Measure of use -> ``(V,)`` float64."""
    has_rows: bool
    """The file numbers its rows."""
    columns: tuple[str, ...]
    """Names of its columns, of CSV and Parquet."""


def read(file: Path) -> Vocabulary:
    """Return a vocabulary.

    Raises:
        UserError: The file is not readable, or its keys or rows are none.
    """
    form = SUFFIXES.get(file.suffix)
    if form is None:
        raise UserError(f"{file}: a vocabulary is {', '.join(SUFFIXES)}")
    try:
        frame = _frame(file, form)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: unreadable vocabulary ({reason})") from None
    names = {name.lower(): name for name in frame.columns}
    key = next((names[n] for n in KEY_COLUMNS if n in names), frame.columns[0])
    row = next((names[n] for n in ROW_COLUMNS if n in names and names[n] != key), None)
    keys = _checked(file, frame[key])
    uses = {
        USES[name]: frame[column].cast(pl.Float64, strict=False)
        for name, column in names.items()
        if name in USES and column != key
    }
    for use in uses.values():
        if use.null_count() or not bool((use >= 0).all() if len(use) else True):
            raise UserError(f"{file}: column {use.name} must hold numbers from 0 on")
    reserved = 0
    if row is not None:
        numbers = frame[row].cast(pl.Int64, strict=False)
        if numbers.null_count():
            raise UserError(f"{file}: column {row} must hold whole numbers")
        order = numbers.arg_sort()
        places = numbers.gather(order).to_numpy()
        reserved = int(places[0]) if len(places) else 0
        expected = np.arange(reserved, reserved + len(places))
        if len(wrong := np.flatnonzero(places != expected)) or reserved < 0:
            odd = int(wrong[0]) if len(wrong) else 0
            raise UserError(
                f"{file}: rows must be {reserved}, {reserved + 1}, ... without gaps, each once;"
                f" there is {places[odd]} in place of {expected[odd]}"
            )
        keys = keys.gather(order)
        uses = {kind: use.gather(order) for kind, use in uses.items()}
    arrays = {kind: use.to_numpy() for kind, use in uses.items()}
    is_table = form in ("csv", "parquet")
    columns = tuple(frame.columns) if is_table else ()
    return Vocabulary(file, keys, reserved, arrays, row is not None, columns)


def _frame(file: Path, form: str) -> pl.DataFrame:
    if form == "parquet":
        return pl.read_parquet(file)
    if form == "json":
        content: Any = json.loads(file.read_text())
        if isinstance(content, dict):
            return pl.DataFrame({"key": list(content), "row": list(content.values())})
        if not isinstance(content, list):
            raise ValueError("must be a list of keys, or an object key -> row")
        return pl.DataFrame({"key": content}, strict=True)
    if form == "csv":
        frame = pl.read_csv(file, infer_schema=False)
    else:
        lines = file.read_text(encoding="utf-8").split("\n")
        frame = pl.DataFrame({"key": pl.Series(lines[:-1] if lines[-1] == "" else lines)})
    return frame.with_columns(_numbers(column) for column in frame.get_columns())


def _numbers(texts: pl.Series) -> pl.Series:
    """Return texts as integers if all of them are integers as they are usually written."""
    numbers = texts.cast(pl.Int64, strict=False)
    same = (numbers.cast(pl.String) == texts).all() if len(texts) else False
    return numbers if same and not numbers.null_count() else texts


def _checked(file: Path, keys: pl.Series) -> pl.Series:
    """Return keys as Int64 or String.

    Raises:
        UserError: Some are empty, or they are of another type.
    """
    if keys.null_count():
        row = keys.is_null().arg_true()[0]
        raise UserError(f"{file}: the key in row {row:,} is empty; every row needs one")
    if keys.dtype.is_integer():
        try:
            return keys.cast(pl.Int64)
        except pl.exceptions.PolarsError:
            raise UserError(f"{file}: a key is above 2^63; keys must fit 64 signed bits") from None
    if keys.dtype == pl.Categorical or keys.dtype == pl.String:
        return keys.cast(pl.String)
    if not len(keys):
        return keys.cast(pl.Int64)
    raise UserError(f"{file}: keys are {keys.dtype}; they must be whole numbers or texts")


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
        self.dtype, self.num_rows = entry.dtype, len(vocabulary.keys)
        self.is_text = vocabulary.keys.dtype == pl.String
        self.reserved = vocabulary.reserved
        if entry.shape[0] != self.reserved + self.num_rows:
            hint = "" if vocabulary.has_rows else " (rows without a key need a column row)"
            after = f" from row {self.reserved} on" if self.reserved else ""
            raise UserError(
                f"{file}: {self.num_rows:,} keys{after} for {entry.shape[0]:,} rows of {name} in"
                f" {path}{hint}; take the vocabulary of this checkpoint"
            )
        self.columns = {VALUES: Column(values_dtype(entry.dtype), entry.shape[1])}
        self._uses = {kind: use[:, None] for kind, use in vocabulary.uses.items()}
        self.counts_name = ""
        """The tensor of the model that holds the counts, if the vocabulary does not."""
        if name in parts.counts:
            holder, full = parts.counts[name]
            self.counts_name = next((n for n, long in parts.names.items() if long == full), "")
            counts = holder.rows(full).double().numpy()
            self._uses.setdefault(COUNTS, counts[self.reserved :, None])
            self.counts_dtype = holder.entries[full].dtype
            self.reserved_counts = counts[: self.reserved]
        self.columns |= {kind: Column(np.dtype(np.float64), 1) for kind in self._uses}

    def blocks(self, size: int) -> Iterator[KeyedRows]:
        """Yield the rows that have a key."""
        for first in range(0, self.num_rows, size):
            rows = slice(first, min(first + size, self.num_rows))
            keys = self.vocabulary.keys[rows]
            values = self.values(self.reserved + rows.start, self.reserved + rows.stop)
            block: KeyedRows = {KEYS: keys if self.is_text else keys.to_numpy()}
            block[VALUES] = values.numpy()
            yield block | {kind: use[rows] for kind, use in self._uses.items()}

    def values(self, first: int, stop: int) -> Tensor:
        """Return rows of the table, as they are merged."""
        rows = self._stored.rows(self._parts.names[self.name], first, stop)
        return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)

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
            frame.sink_parquet(self._target)
            self._path.unlink()
