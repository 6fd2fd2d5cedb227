"""Managed collision modules of TorchRec: raw ids of the rows of a table, in any checkpoint.

ZCH modules hold ``_mch_sorted_raw_ids`` and ``_mch_remapped_ids_mapping``, the row of each id. The
last slot of a module is never taken: its row is looked up for ids without a slot. MPZCH modules
hold ``_hash_zch_identities``, the id of each row; their rows are placed by a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cki_rec.checkpoints.formats.keyed import (
    COUNTS,
    EMPTY,
    KEYS,
    SCORES,
    VALUES,
    Array,
    Column,
    KeyedRows,
    values_dtype,
)
from cki_rec.checkpoints.formats.layout import Layout
from cki_rec.checkpoints.formats.stored import Stored, damaged
from cki_rec.config import UserError
from cki_rec.merging.params import Params

RAW_IDS, REMAPPED = "_mch_sorted_raw_ids", "_mch_remapped_ids_mapping"
MCH_COUNTS, LAST_ACCESS = "_mch_counts", "_mch_last_access_iter"
SEGMENTS, ITERATION = "_output_segments_tensor", "_current_iter_tensor"
IDENTITIES, METADATA, FREQUENCIES = (
    "_hash_zch_identities",
    "_hash_zch_metadata",
    "_hash_zch_runtime_meta",
)
COLLECTION = "_managed_collision_collection"
EVIDENCE = {
    RAW_IDS: {COUNTS: MCH_COUNTS, SCORES: LAST_ACCESS},
    IDENTITIES: {COUNTS: FREQUENCIES, SCORES: METADATA},
}
"""Kind of a module, by its ids -> measure of use -> buffer."""


@dataclass(frozen=True, slots=True)
class Module:
    """One managed collision module."""

    prefix: str
    """Of the names of its buffers."""
    ids: str
    """``RAW_IDS`` or ``IDENTITIES``."""
    weight: str
    """Name of its table."""


def modules_of(path: str, parts: Layout) -> list[Module]:
    """Return the managed collision modules of a checkpoint.

    Raises:
        UserError: One has no table.
    """
    found = []
    for name in parts.entries:
        prefix, _, last = name.rpartition(".")
        if last not in EVIDENCE:
            continue
        table = prefix.rpartition(".")[2]
        outer = prefix.partition(COLLECTION)[0]
        ends = (f".{table}.weight", f".{table}")
        weights = [
            weight
            for weight, entry in parts.entries.items()
            if f".{weight}".endswith(ends) and len(entry.shape) == 2 and weight != name
        ]
        near = [weight for weight in weights if weight.startswith(outer)] or weights
        if len(near) != 1:
            number = "no table" if not near else f"{len(near)} tables"
            raise UserError(
                f"{path}: {name} has {number} named {table}; save the whole collection, its"
                " embedding module too"
            )
        found.append(Module(f"{prefix}.", last, near[0]))
    return found


class ManagedTable:
    """A table with a managed collision module.

    Args:
        path: The checkpoint, as the user named it.
        stored: The checkpoint.
        parts: Its parts.
        module: The module.

    Raises:
        UserError: Its ids and its table do not fit together.
    """

    is_text = False

    def __init__(self, path: str, stored: Stored, parts: Layout, module: Module) -> None:
        self.path, self.name, self.module = path, module.weight, module
        self.title = "managed collision" if module.ids == RAW_IDS else "managed collision (MPZCH)"
        self._stored, self._parts = stored, parts
        entry = parts.entries[module.weight]
        self.size, self.dtype = entry.shape[0], entry.dtype
        self.columns = {VALUES: Column(values_dtype(entry.dtype), entry.shape[1])}
        for kind, buffer in EVIDENCE[module.ids].items():
            held = parts.entries.get(module.prefix + buffer)
            if held is not None and held.shape in ((self.size,), (self.size, 1)):
                self.columns[kind] = Column(np.dtype(np.int64), 1)
        self.ids_by_row = self._ids_by_row()
        self.num_rows = int((self.ids_by_row != EMPTY).sum())

    def blocks(self, size: int) -> Iterator[KeyedRows]:
        """Yield the rows that have an id."""
        uses = {kind: self._by_row(kind) for kind in self.columns if kind != VALUES}
        for first in range(0, self.size, size):
            ids = self.ids_by_row[first : first + size]
            has = np.flatnonzero(ids != EMPTY)
            values = self.values(first, first + len(ids)).numpy()[has]
            rows = {KEYS: ids[has], VALUES: values.astype(self.columns[VALUES].dtype, copy=False)}
            yield rows | {kind: use[first + has][:, None] for kind, use in uses.items()}

    def values(self, first: int, stop: int) -> Tensor:
        """Return rows of the table, as they are merged."""
        rows = self._stored.rows(self._parts.names[self.module.weight], first, stop)
        return rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)

    def files(self) -> list[Path]:
        """Return no files: the checkpoint holds all."""
        return []

    def buffer(self, name: str) -> Tensor:
        """Return a buffer of the module.

        Raises:
            UserError: There is none.
        """
        full = self.module.prefix + name
        if full not in self._parts.names:
            raise UserError(f"{self.path}: {full} is missing; save the whole module")
        return self._stored.rows(self._parts.names[full])

    def buffers(self) -> list[str]:
        """Return the names of all buffers of the module."""
        prefix = self.module.prefix
        return [n.removeprefix(prefix) for n in self._parts.names if n.startswith(prefix)]

    def segments(self) -> int:
        """Return the number of parts that ids are divided into, one for every process."""
        if self.module.prefix + SEGMENTS not in self._parts.names:
            return 1
        return max(1, int((self.buffer(SEGMENTS) >= 0).sum()) - 1)

    def _ids_by_row(self) -> Array:
        """Return ``(V,)`` the raw id of each row, ``EMPTY`` without one."""
        if self.module.ids == IDENTITIES:
            ids = self.buffer(IDENTITIES).reshape(-1).numpy().astype(np.int64)
            self._check(len(ids) == self.size, f"{len(ids):,} ids")
            return np.where(ids < 0, EMPTY, ids)
        raw, rows = (self.buffer(name).numpy() for name in (RAW_IDS, REMAPPED))
        self._check(len(raw) == len(rows) == self.size, f"{len(raw):,} ids, {len(rows):,} places")
        has = raw != EMPTY
        places = rows[has]
        inside = bool(((places >= 0) & (places < self.size)).all())
        self._check(inside, "a place outside of the table")
        ids = np.full(self.size, EMPTY, np.int64)
        ids[places] = raw[has]
        self._check(np.count_nonzero(ids != EMPTY) == len(places), "two ids in one row")
        return ids

    def _by_row(self, kind: str) -> Array:
        """Return ``(V,)`` a measure of use of each row."""
        held = self.buffer(EVIDENCE[self.module.ids][kind]).reshape(-1).numpy().astype(np.int64)
        if self.module.ids == IDENTITIES:
            return held
        use = np.zeros(self.size, np.int64)
        use[self.buffer(REMAPPED).numpy()] = held
        return use

    def _check(self, holds: bool, content: str) -> None:
        if not holds:
            raise damaged(
                Path(self.path),
                f"{self.module.prefix[:-1]} has {content} for {self.size:,} rows of"
                f" {self.module.weight}",
            )


def state_of(table: ManagedTable, keys: Array, uses: Mapping[str, Array]) -> Params:
    """Return the buffers of a ZCH module whose row i belongs to key i.

    Args:
        table: That of the first source, which the buffers fit.
        keys: ``(U,)`` raw ids, fewer than rows.
        uses: Merged measures of use ``(U,)``.
    """
    num, size = len(keys), table.size
    assert num < size
    order = np.argsort(keys)
    raw = np.full(size, EMPTY, np.int64)
    raw[:num] = keys[order]
    places = np.concatenate([order, np.arange(num, size)])
    state = {RAW_IDS: raw, REMAPPED: places}
    for kind, use in uses.items():
        buffer = EVIDENCE[RAW_IDS][kind]
        column = np.zeros(size, np.int64)
        column[:num] = use[order]
        column[-1] = int(table.buffer(buffer)[-1])  # of the slot that is never taken
        state[buffer] = column
    return {table.module.prefix + name: torch.from_numpy(x) for name, x in state.items()}


def other_buffers(tables: Sequence[ManagedTable]) -> Params:
    """Return the buffers of the first module that do not belong to rows.

    The number of the current iteration is the largest of all sources, so that none of their rows
    was last seen after it.
    """
    first = tables[0]
    owned = {RAW_IDS, REMAPPED, MCH_COUNTS, LAST_ACCESS}
    names = [name for name in first.buffers() if name not in owned]
    result = {first.module.prefix + name: first.buffer(name) for name in names}
    if (name := first.module.prefix + ITERATION) in result:
        numbers = [t.buffer(ITERATION) for t in tables if ITERATION in t.buffers()]
        result[name] = torch.stack(numbers).amax(0)
    return result
