"""One table by raw key in all sources: its rows are divided on disk, matched, merged and yielded.

Shape legend: K sources, V rows of a source, U keys, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cki_rec.checkpoints import partitions
from cki_rec.checkpoints.formats.keyed import (
    COUNTS,
    KEYS,
    SCORES,
    STATE,
    VALUES,
    Array,
    Column,
    KeyedRows,
    KeyedTable,
)
from cki_rec.checkpoints.partitions import (
    Partitions,
    ids_of,
    number_of_parts,
    record_type,
    text_hashes,
)
from cki_rec.config import UserError
from cki_rec.data.prefetch import prefetch
from cki_rec.merging.keyed import (
    DuplicateKey,
    KeyedMixer,
    Match,
    everywhere,
    largest_of,
    match,
    shared_block,
    strongest,
)
from cki_rec.merging.params import is_finite
from cki_rec.merging.rows import Block

USES = (COUNTS, SCORES)
"""Measures of how often rows were trained, the best one first."""
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True, slots=True)
class Limit:
    """The rows that stay: those of the lowest (rank, tie)."""

    rank: int
    tie: int


@dataclass(slots=True)
class Part:
    """The rows of one part of the keys in all sources."""

    rows: list[KeyedRows]
    found: Match
    uses: list[Array]
    """Per source ``(V,)`` float64, how often rows were trained; empty: unknown."""

    def values(self) -> list[Tensor]:
        """Return ``(V, D)`` per source."""
        return [torch.from_numpy(rows[VALUES]) for rows in self.rows]

    def counts(self) -> list[Tensor]:
        """Return how often rows were trained, as tensors."""
        return [torch.from_numpy(use) for use in self.uses]


@dataclass(frozen=True, slots=True)
class Merged:
    """Merged rows of one part of the keys."""

    rows: KeyedRows
    shared: int
    """Keys that several sources have."""
    shares: list[float] | None
    """Mean share of each source in the rows; None: the method gives none."""


class JoinedTable:
    """A table by raw key, in all sources.

    Args:
        name: Its name in the first source.
        tables: One per source.
        use: The measure of how often rows were trained; "": none.

    Raises:
        UserError: Tables do not fit together.
    """

    def __init__(self, name: str, tables: Sequence[KeyedTable], use: str) -> None:
        self.name, self.tables, self._use = name, tables, use
        filled = [table for table in tables if table.num_rows]
        widths = [table.columns[VALUES].width for table in filled]
        if odd := next((k for k, width in enumerate(widths) if width != widths[0]), 0):
            raise UserError(
                f"{name}: columns differ, {widths[0]} in {filled[0].path}, {widths[odd]} in"
                f" {filled[odd].path}"
            )
        is_wide = any(t.columns[VALUES].dtype == np.float64 for t in filled)
        dtype = np.dtype(np.float64 if is_wide else np.float32)
        width = widths[0] if widths else tables[0].columns[VALUES].width
        self.columns = {VALUES: Column(dtype, width), **self._others(filled)}
        self.is_text = any(table.is_text for table in filled)
        self._folder = Path()
        self._parts: list[Partitions] = []
        self.num_parts = 1

    def divide(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Divide the rows of all sources among files of a folder."""
        self._folder = folder
        held = [{n: table.columns[n] for n in self._held(table)} for table in self.tables]
        sizes = [record_type(columns, self.is_text).itemsize for columns in held]
        pairs = list(zip(self.tables, sizes, strict=True))
        total = sum(table.num_rows * size for table, size in pairs)
        self.num_parts = number_of_parts(total, self.is_text)
        for k, (table, size) in enumerate(pairs):
            self._parts.append(Partitions(folder / f"{k}", held[k], self.num_parts, self.is_text))
            block_rows = max(1, partitions.BLOCK_BYTES // size)
            self._parts[-1].fill(map(self._texts, prefetch(table.blocks(block_rows))), advance)

    def parts(self) -> Iterator[Part]:
        """Yield the parts of all keys in order.

        Raises:
            UserError: A source has a key twice, or values or uses that are not finite.
        """
        yield from prefetch(self._part(number) for number in range(self.num_parts))

    def blocks(self) -> Iterator[Block]:
        """Yield the rows that all sources have; at least one block."""
        first = 0
        for part in self.parts():
            found = everywhere(part.found)
            if len(found.ids):
                yield shared_block(found, part.values(), part.counts(), first)
            first += len(found.ids)
        if not first:
            empty = torch.empty(0, self.columns[VALUES].width)
            uses = [torch.empty(0)] * len(self.tables) if self._use else []
            yield Block(0, [empty] * len(self.tables), counts=uses)

    def limit(self, max_rows: int) -> tuple[int, Limit | None]:
        """Return how many keys leave, and which of them stay; None: all.

        Raises:
            UserError: Some must leave, and the sources have no measure of use.
        """
        if sum(table.num_rows for table in self.tables) <= max_rows:
            return 0, None
        file, total = self._folder / "order", 0
        with file.open("wb") as written:
            for part in self.parts():
                total += len(part.found.ids)
                if part.uses:
                    uses = largest_of(part.found, part.uses)
                    pair = np.stack([~uses.view(np.uint64), self._ties(part)], 1)
                    written.write(pair.tobytes())
        if total <= max_rows:
            return 0, None
        if not self._use:
            raise UserError(
                f"{self.name}: {total:,} keys for {max_rows:,} rows, and not all sources have"
                " counts or scores that show which of them leave; use a larger merge.max_rows"
            )
        pairs = np.memmap(file, np.uint64, "r").reshape(-1, 2)
        size = 1 << 20

        def ranks() -> Iterator[Array]:
            for start in range(0, len(pairs), size):
                yield np.array(pairs[start : start + size, 0])

        rank = partitions.smallest(ranks, max_rows)
        below = sum(int((chunk < rank).sum()) for chunk in ranks())

        def ties() -> Iterator[Array]:
            for start in range(0, len(pairs), size):
                chunk = np.array(pairs[start : start + size])
                yield chunk[chunk[:, 0] == rank, 1]

        limit = Limit(rank, partitions.smallest(ties, max_rows - below))
        return total - max_rows, limit

    def merged(self, mixer: KeyedMixer, limit: Limit | None) -> Iterator[Merged]:
        """Yield merged rows.

        Args:
            mixer: Merges rows.
            limit: The rows that stay; None: all.
        """
        first = 0
        for part in self.parts():
            if limit is not None:
                ranks = ~largest_of(part.found, part.uses).view(np.uint64)
                is_tie = (ranks == limit.rank) & (self._ties(part) <= limit.tie)
                kept = np.flatnonzero((ranks < limit.rank) | is_tie)
                part = Part(part.rows, part.found[kept], part.uses)
            values, shares = mixer(part.found, part.values(), part.counts(), first)
            first += len(everywhere(part.found).ids)
            rows: KeyedRows = {KEYS: self._keys(part), VALUES: values.numpy()}
            for name, column in self.columns.items():
                if name != VALUES:
                    rows[name] = self._column(name, column, part)
            shared = int(((part.found.rows >= 0).sum(0) > 1).sum())
            yield Merged(rows, shared, shares)

    def _part(self, number: int) -> Part:
        rows = [parts.read(number) for parts in self._parts]
        dtype = self.columns[VALUES].dtype
        for table, each in zip(self.tables, rows, strict=True):
            if not table.num_rows:
                each[VALUES] = np.empty((0, self.columns[VALUES].width), dtype)
            each[VALUES] = each[VALUES].astype(dtype, copy=False)
            if not is_finite(torch.from_numpy(each[VALUES])):
                bad = np.flatnonzero(~np.isfinite(each[VALUES]).all(1))[0]
                raise UserError(
                    f"{table.path}: {table.name} has NaN or infinite entries in the row of key"
                    f" {each[KEYS][int(bad)]}; train or repair it before a merge"
                )
        try:
            found = match(ids_of(rows, self.is_text))
        except DuplicateKey as error:
            table = self.tables[error.source]
            key = rows[error.source][KEYS][error.rows[0]]
            raise UserError(
                f"{table.path}: {table.name} has the key {key} twice; keep one of its rows"
            ) from None
        return Part(rows, found, self._uses(rows) if self._use else [])

    def _uses(self, rows: Sequence[KeyedRows]) -> list[Array]:
        """Return per source how often its rows were trained.

        Of scores with several words the smallest counts: a frequency beside a time in nanoseconds.
        """
        uses = []
        for table, each in zip(self.tables, rows, strict=True):
            column = each.get(self._use, np.zeros((0, 1)))
            use = column.min(1) if len(column) else np.zeros(0)
            if len(use) and not (np.isfinite(use).all() and use.min() >= 0):
                raise UserError(f"{table.path}: {self._use} of {table.name} are negative or NaN")
            uses.append(use.astype(np.float64) + 0.0)  # no negative zero
        return uses

    def _keys(self, part: Part) -> Array | pl.Series:
        """Return the keys of a part, each from the first source that has it."""
        sizes = [len(rows[KEYS]) for rows in part.rows]
        starts = np.cumsum([0, *sizes[:-1]])
        owner = (part.found.rows >= 0).argmax(0)
        places = starts[owner] + part.found.rows[owner, np.arange(len(owner))]
        each = [rows[KEYS] for rows in part.rows]
        joined: Any = pl.concat(each) if self.is_text else np.concatenate(each)
        keys: Array | pl.Series = joined[places]
        return keys

    def _ties(self, part: Part) -> Array:
        """Return ``(U,)`` uint64 that order keys: integers by value, texts by hash."""
        keys = self._keys(part)
        if isinstance(keys, pl.Series):
            return text_hashes(keys)
        return keys.view(np.uint64) ^ _SIGN

    def _column(self, name: str, column: Column, part: Part) -> Array:
        """Return one column of merged rows: the largest use, the state of the most trained row."""
        empty = np.zeros((0, column.width), column.dtype)
        held = [rows[name] if name in rows else empty for rows in part.rows]
        sizes = [len(rows[KEYS]) for rows in part.rows]
        held = [
            x if len(x) == size and size else np.zeros((size, column.width), column.dtype)
            for x, size in zip(held, sizes, strict=True)
        ]
        if name != STATE:
            return largest_of(part.found, held)
        uses = part.uses or [np.zeros(size) for size in sizes]
        best = strongest(part.found, uses)
        result = np.empty((len(best), column.width), column.dtype)
        for k, (rows, state) in enumerate(zip(part.found.rows, held, strict=True)):
            chosen = np.flatnonzero(best == k)
            result[chosen] = state[rows[chosen]]
        return result

    def _others(self, filled: Sequence[KeyedTable]) -> dict[str, Column]:
        """Return the columns of the first source beside values."""
        held = {n: c for n, c in self.tables[0].columns.items() if n != VALUES}
        for table in filled:
            for name, column in held.items():
                other = table.columns.get(name)
                if other is not None and not held[name].width:
                    held[name] = other
                elif other is not None and other.width != column.width:
                    raise UserError(
                        f"{self.name}: {name} have {column.width} numbers per key in"
                        f" {self.tables[0].path}, {other.width} in {table.path}"
                    )
        return held

    def _held(self, table: KeyedTable) -> list[str]:
        """Return the columns of a source that are read."""
        return [n for n in table.columns if n in self.columns or n == self._use]

    def _texts(self, rows: KeyedRows) -> KeyedRows:
        if not self.is_text or isinstance(rows[KEYS], pl.Series):
            return rows
        return {**rows, KEYS: pl.Series(rows[KEYS]).cast(pl.String)}


def use_of(tables: Sequence[KeyedTable], evidence: str) -> str:
    """Return the measure of use that all sources of a table have; "": there is none.

    Args:
        tables: One per source.
        evidence: ``merge.evidence``.

    Raises:
        UserError: A measure is configured that a source lacks.
    """
    if evidence == "none":
        return ""
    filled = [table for table in tables if table.num_rows]
    wanted = USES if evidence == "auto" else (evidence,)
    for use in wanted:
        if all(use in table.columns for table in filled):
            return use
    if evidence == "auto":
        return ""
    lacking = next(table for table in filled if evidence not in table.columns)
    has = ", ".join(use for use in USES if use in lacking.columns) or "none"
    raise UserError(
        f"merge.evidence={evidence}: {lacking.path}: {lacking.name} has no {evidence} (it has"
        f" {has}); use merge.evidence=auto"
    )
