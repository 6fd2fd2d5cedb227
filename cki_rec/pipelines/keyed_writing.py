"""The result of a merge by raw key, in the form of the first source.

Merged rows are appended to files. Tables of checkpoints are mapped from them when they are
complete, so that no table is held in memory.

Shape legend: V rows, D columns, U merged keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cki_rec.checkpoints.formats.dynamicemb import DynamicembTable, DynamicembWriter
from cki_rec.checkpoints.formats.keyed import (
    COUNTS,
    EMPTY,
    KEYS,
    SCORES,
    VALUES,
    Array,
    KeyedRows,
    KeyedTable,
)
from cki_rec.checkpoints.formats.managed_collision import (
    RAW_IDS,
    ManagedTable,
    other_buffers,
    state_of,
)
from cki_rec.checkpoints.formats.stored import bytes_of
from cki_rec.checkpoints.formats.vocabulary_files import VocabularyTable, VocabularyWriter
from cki_rec.config import UserError
from cki_rec.merging.keyed import KeyedMixer, Match
from cki_rec.merging.params import Params
from cki_rec.pipelines.keyed_sources import FORMAT
from cki_rec.pipelines.keyed_tables import JoinedTable

DUMP, VOCABULARIES = "dynamicemb", "vocabularies"
"""Folders of the result."""
BLOCK_ROWS = 1 << 16


class Writer(Protocol):
    """Takes the merged rows of one table in order."""

    def add(self, rows: KeyedRows) -> None:
        """Append rows."""

    def finish(self) -> Params:
        """Complete all files; return the tensors that a checkpoint takes, by their names."""

    def close(self) -> None:
        """Close all files, complete or not."""


def check_form(tables: Sequence[KeyedTable], form: str | None) -> None:
    """Check that a result can be written in the form of the first table.

    Raises:
        UserError: It cannot.
    """
    first = tables[0]
    if form == FORMAT:
        if text := next((t for t in tables if t.is_text), None):
            raise UserError(f"merge.format={FORMAT}: takes integer keys; {text.path} has texts")
        return
    fix = f"name a source of another form first, or set merge.format={FORMAT}"
    if isinstance(first, ManagedTable) and first.module.ids != RAW_IDS:
        raise UserError(
            f"{first.path}: rows of {first.name} are placed by a kernel (MPZCH); {fix}"
        )
    if isinstance(first, ManagedTable) and (segments := first.segments()) > 1:
        raise UserError(
            f"{first.path}: ids of {first.name} are divided into {segments} parts, by a rule that"
            f" the checkpoint does not hold; {fix}"
        )
    if isinstance(first, DynamicembTable):
        first.rule()


def capacity(first: KeyedTable, form: str | None, max_rows: int | None) -> int | None:
    """Return the most rows of a result; None: any number."""
    if isinstance(first, ManagedTable) and form != FORMAT:
        return min(max_rows or first.size, first.size - 1)
    return max_rows


def writer_of(
    joined: JoinedTable, mixer: KeyedMixer, folder: Path, scratch: Path, form: str | None
) -> Writer:
    """Return the writer of a merged table.

    Args:
        joined: The table.
        mixer: Merges rows without a key.
        folder: Takes the result.
        scratch: Takes values that a checkpoint takes later.
        form: ``merge.format``.
    """
    first = joined.tables[0]
    if form == FORMAT:
        return _Dump(joined, folder / DUMP)
    if isinstance(first, DynamicembTable):
        return _Dump(joined, folder / first.root)
    if isinstance(first, ManagedTable):
        return _Managed(joined, mixer, scratch, first)
    assert isinstance(first, VocabularyTable)
    return _WithVocabulary(joined, mixer, folder, scratch, first)


class _Dump:
    def __init__(self, joined: JoinedTable, folder: Path) -> None:
        first = joined.tables[0]
        like = first if isinstance(first, DynamicembTable) else None
        columns, self._uses = dict(joined.columns), SCORES
        if COUNTS in columns:  # a dump has scores alone, and counts are better
            columns[SCORES], self._uses = columns[COUNTS], COUNTS
        self._writer = DynamicembWriter(folder, _dump_name(joined.name), columns, like)

    def add(self, rows: KeyedRows) -> None:
        self._writer.add({**rows, SCORES: rows[self._uses]} if self._uses in rows else rows)

    def finish(self) -> Params:
        self.close()
        return {}

    def close(self) -> None:
        self._writer.close()


class _Managed:
    def __init__(
        self, joined: JoinedTable, mixer: KeyedMixer, scratch: Path, first: ManagedTable
    ) -> None:
        self._joined, self._mixer, self._first = joined, mixer, first
        self._values = _Values(scratch, first.dtype, joined.columns[VALUES].width)
        self._keys: list[Array] = []
        self._uses: dict[str, list[Array]] = {n: [] for n in joined.columns if n != VALUES}

    def add(self, rows: KeyedRows) -> None:
        self._values.add(torch.from_numpy(rows[VALUES]))
        self._keys.append(rows[KEYS])
        for name, columns in self._uses.items():
            columns.append(rows[name][:, 0])

    def close(self) -> None:
        self._values.close()

    def finish(self) -> Params:
        keys = np.concatenate([np.empty(0, np.int64), *self._keys])
        self._add_free(self._first.size - 1 - len(keys))
        self._values.add(_merged([_last(t) for t in self._joined.tables], self._mixer))
        uses = {
            name: np.concatenate([np.empty(0, np.int64), *x]) for name, x in self._uses.items()
        }
        modules = [t for t in self._joined.tables if isinstance(t, ManagedTable)]
        state = {**state_of(self._first, keys, uses), **other_buffers(modules)}
        return {self._first.name: self._values.finish(), **state}

    def _add_free(self, number: int) -> None:
        """Add rows without an id, as the first source has them; zeros if it has none."""
        first = self._first
        free = np.flatnonzero(first.ids_by_row[:-1] == EMPTY)
        if not len(free):
            self._values.add(torch.zeros(number, self._values.width))
            return
        while number:
            for start in range(0, first.size - 1, BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, first.size - 1)
                inside = free[(free >= start) & (free < stop)][:number]
                self._values.add(first.values(start, stop)[inside - start])
                number -= len(inside)


def _last(table: KeyedTable) -> Tensor | None:
    """Return the row for ids without a slot, the last one of a table; None: it has none."""
    if not isinstance(table, ManagedTable) or table.module.ids != RAW_IDS:
        return None
    has_id = bool(table.ids_by_row[-1] != EMPTY)
    return None if has_id else table.values(table.size - 1, table.size)


class _WithVocabulary:
    def __init__(
        self,
        joined: JoinedTable,
        mixer: KeyedMixer,
        folder: Path,
        scratch: Path,
        first: VocabularyTable,
    ) -> None:
        self._first = first
        self._values = _Values(scratch, first.dtype, joined.columns[VALUES].width)
        self._counts: list[Array] = []
        if first.counts_name:
            self._counts.append(first.counts(0, first.reserved))
        place = folder / VOCABULARIES
        self._keys = VocabularyWriter(place, first.vocabulary, joined.is_text)
        others = [t for t in joined.tables if isinstance(t, VocabularyTable)]
        if odd := next((t for t in others if t.reserved != first.reserved), None):
            raise UserError(
                f"{odd.path}: {odd.reserved} rows of {odd.name} come before the first key,"
                f" {first.reserved} in {first.path}; number rows alike"
            )
        if first.reserved:
            before = [
                t.values(0, first.reserved) if isinstance(t, VocabularyTable) else None
                for t in joined.tables
            ]
            self._values.add(_merged(before, mixer))

    def add(self, rows: KeyedRows) -> None:
        self._values.add(torch.from_numpy(rows[VALUES]))
        self._keys.add(rows)
        if self._counts:
            self._counts.append(rows[COUNTS][:, 0])

    def close(self) -> None:
        self._values.close()
        self._keys.close()

    def finish(self) -> Params:
        self._keys.finish()
        params = {self._first.name: self._values.finish()}
        if self._counts:
            counts = torch.from_numpy(np.concatenate(self._counts))
            params[self._first.counts_name] = counts.to(self._first.counts_dtype)
        return params


class _Values:
    """Rows of a table, appended to a file."""

    def __init__(self, path: Path, dtype: torch.dtype, width: int) -> None:
        self._path, self._dtype, self.width, self._rows = path, dtype, width, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def add(self, values: Tensor) -> None:
        """Append rows, in the type of the table."""
        self._file.write(bytes_of(values.to(self._dtype)))
        self._rows += len(values)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def finish(self) -> Tensor:
        """Return all rows, mapped from the file."""
        self.close()
        shape = (self._rows, self.width)
        if not self._rows * self.width:
            return torch.empty(shape, dtype=self._dtype)
        size = self._rows * self.width
        return torch.from_file(str(self._path), True, size, dtype=self._dtype).reshape(shape)


def _merged(rows: Sequence[Tensor | None], mixer: KeyedMixer) -> Tensor:
    """Return merged rows without a key, of the sources that have them."""
    some = next(x for x in rows if x is not None)
    num = len(some)
    places = [np.full(num, -1) if x is None else np.arange(num) for x in rows]
    values = [some[:0] if x is None else x.to(some.dtype) for x in rows]
    found = Match(np.arange(num), np.stack(places))
    has_counts = bool(mixer.mixer.inputs.counts)
    counts = [torch.zeros(len(x)) for x in values] if has_counts else []
    return mixer(found, values, counts, 0)[0]


def _dump_name(name: str) -> str:
    """Return the name of a table in a dump: collection, a slash, table."""
    if not name.endswith(".weight"):
        return name
    collection, _, table = name.removesuffix(".weight").rpartition(".")
    return f"{collection}/{table}" if collection else table
