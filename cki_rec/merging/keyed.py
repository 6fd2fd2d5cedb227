"""Tables whose rows belong to raw keys: rows are matched by key, then merged.

A row of one source alone is taken whole. A row of several sources is merged by the method. Sources
that lack it get no share of it. The pipelines call the same functions for one part of the keys at
a time, so that tables may be larger than memory.

Shape legend: K sources, V rows of a source, U keys of all sources, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cki_rec.merging.extras import Processes
from cki_rec.merging.methods import METHODS
from cki_rec.merging.params import MergeError
from cki_rec.merging.registry import MergeInputs, Method
from cki_rec.merging.rows import Block, Rows
from cki_rec.merging.steps import mix_models
from cki_rec.merging.streaming import Mixer

Array = npt.NDArray[Any]
Keys = Sequence[int] | Sequence[str] | Array | Tensor
TableByKey = tuple[Keys, Tensor] | tuple[Keys, Tensor, Tensor]
"""Keys ``(V,)``, values ``(V, D)``, and perhaps counts ``(V,)``: training rows of every key."""
TABLE = "table"
"""Name of the table of ``merge_by_key``, for random draws."""


class DuplicateKey(MergeError):
    """One source has a key twice."""

    def __init__(self, source: int, first: int, second: int) -> None:
        super().__init__(f"source {source} has one key in rows {first:,} and {second:,}")
        self.source, self.rows = source, (first, second)


@dataclass(frozen=True, slots=True)
class Match:
    """The keys of all sources, and their rows."""

    ids: Array
    """``(U,)``, ascending."""
    rows: Array
    """``(K, U)`` int64: the row of each key in each source; -1: the source lacks it."""

    def __getitem__(self, keys: Any) -> Match:
        """Return some of the keys."""
        return Match(self.ids[keys], self.rows[:, keys])


@dataclass(frozen=True, slots=True)
class KeyedMerge:
    """A merged table."""

    keys: list[str] | Tensor
    """``(U,)``, ascending: int64, or texts."""
    values: Tensor
    """``(U, D)``, in the type of the first source."""
    counts: Tensor | None
    """``(U,)`` float64, the largest of the sources; None: not all sources have counts."""
    shares: list[float] | None
    """Mean share of each source; None: the method gives no shares."""


def match(ids: Sequence[Array]) -> Match:
    """Return which rows of several sources have the same id.

    Args:
        ids: Per source ``(V,)`` integers.

    Raises:
        DuplicateKey: A source has an id twice.
    """
    sizes = np.array([len(each) for each in ids])
    joined = np.concatenate(ids)
    order = np.argsort(joined)
    ordered = joined[order]
    is_new = np.ones(len(joined), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    place = np.cumsum(is_new) - 1
    source = np.repeat(np.arange(len(ids)), sizes)[order]
    rows = np.full((len(ids), int(is_new.sum())), -1, np.int64)
    rows[source, place] = order - (np.cumsum(sizes) - sizes)[source]
    if np.count_nonzero(rows >= 0) < len(joined):
        raise _duplicate(ids)
    return Match(ordered[is_new], rows)


def _duplicate(ids: Sequence[Array]) -> DuplicateKey:
    """Return the error about the first source that has an id twice."""
    for source, each in enumerate(ids):
        order = np.argsort(each, kind="stable")
        twice = np.flatnonzero(each[order][1:] == each[order][:-1])
        if len(twice):
            pair = order[twice[0] : twice[0] + 2].tolist()
            return DuplicateKey(source, *pair)
    raise AssertionError


@dataclass(frozen=True, slots=True)
class KeyedMixer:
    """A method, applied to rows that are matched by key."""

    name: str
    """Of the table."""
    mixer: Mixer

    def __call__(
        self, found: Match, values: Sequence[Tensor], counts: Sequence[Tensor], first: int
    ) -> tuple[Tensor, list[float] | None]:
        """Return the merged rows ``(U, D)``, and the mean share of each source in them.

        Args:
            found: Keys and their rows.
            values: Per source ``(V, D)``.
            counts: Per source ``(V,)``; empty: unknown.
            first: Number of the first key among all keys, for random draws.
        """
        has = found.rows >= 0
        owners = has.sum(0)
        merged = torch.empty(len(owners), values[0].shape[1], dtype=values[0].dtype)
        sums = torch.zeros(len(values), dtype=torch.float64)
        for k, table in enumerate(values):
            lone = np.flatnonzero(has[k] & (owners == 1))
            _put(merged, lone, table.index_select(0, torch.from_numpy(found.rows[k, lone])))
            sums[k] += len(lone)
        everywhere, some = owners == len(values), (owners > 1) & (owners < len(values))
        parts: list[list[float] | None] = []
        if len(values) > 1 and len(chosen := np.flatnonzero(everywhere)):
            block = shared_block(found[chosen], values, counts, first)
            rows, shares = self.mixer.mix_block(self.name, block)
            _put(merged, chosen, rows)
            parts.append(shares and [len(chosen) * share for share in shares])
        if len(chosen := np.flatnonzero(some)):
            rows, shares = self._partly(found[chosen], values, counts, first)
            _put(merged, chosen, rows)
            parts.append(shares and [len(chosen) * share for share in shares])
        if any(part is None for part in parts):
            return merged, None
        total = sums + torch.tensor([part for part in parts if part], dtype=torch.float64).sum(0)
        return merged, (total / max(1, len(owners))).tolist()

    def _partly(
        self, found: Match, values: Sequence[Tensor], counts: Sequence[Tensor], first: int
    ) -> tuple[Tensor, list[float] | None]:
        """Return merged rows that several sources have, but not all of them.

        A source that lacks a row has the mean of the others there, and no count.
        """
        has = torch.from_numpy(found.rows >= 0)
        taken = [_rows(table, rows) for table, rows in zip(values, found.rows, strict=True)]
        mean = (torch.stack(taken).sum(0) / has.sum(0)[:, None]).to(taken[0].dtype)
        models = [torch.where(h[:, None], t, mean) for t, h in zip(taken, has, strict=True)]
        pairs = zip(counts, found.rows, strict=False)
        seen = [{self.name: _rows(count, rows)} for count, rows in pairs]
        inputs = replace(
            self.mixer.inputs,
            counts=seen or [{} for _ in values],
            first_rows={self.name: first},
        )
        params, weights, _ = mix_models(
            self.mixer.method,
            [{self.name: model} for model in models],
            *(inputs, self.mixer.options, {}, {self.name: has}, None),
            Processes(),
        )
        if weights is None:
            return params[self.name], None
        weight = weights[self.name].double()
        return params[self.name], weight.reshape(len(values), -1).mean(1).tolist()


def _put(target: Tensor, places: Array, rows: Tensor) -> None:
    target.index_copy_(0, torch.from_numpy(places), rows)


def _rows(table: Tensor, rows: Array) -> Tensor:
    """Return rows of a table; zeros where there is none (-1)."""
    result = table.new_zeros(len(rows), *table.shape[1:])
    has = np.flatnonzero(rows >= 0)
    result[has] = table[rows[has]]
    return result


def shared_block(
    found: Match, values: Sequence[Tensor], counts: Sequence[Tensor], first: int
) -> Block:
    """Return the rows of keys that all sources have."""
    rows = [torch.from_numpy(each) for each in found.rows]
    return Block(
        first,
        [table.index_select(0, each) for table, each in zip(values, rows, strict=True)],
        counts=[seen[each] for seen, each in zip(counts, rows, strict=False)],
    )


def everywhere(found: Match) -> Match:
    """Return the keys that all sources have."""
    return found[(found.rows >= 0).all(0)]


def mixer_of(
    method: Method,
    options: Mapping[str, Any],
    seed: int,
    has_counts: bool,
    num: int,
    rows: Mapping[str, Callable[[], Iterable[Block]]],
) -> Mixer:
    """Return a method with its facts about whole tables.

    Args:
        method: The method.
        options: Its options.
        seed: Of random draws.
        has_counts: All sources have counts.
        num: K.
        rows: Per parameter the rows that all sources have, in blocks.

    Raises:
        MergeError: It is not row-wise, or needs more than counts.
    """
    options = method.filled(options)
    method.check(options, num)
    if not method.row_wise:
        raise MergeError(f"{method.name} needs whole tables, so it cannot merge rows by key")
    if others := sorted(method.needs(options) - {"counts"}):
        raise MergeError(
            f"{method.name} needs {', '.join(others)}, which tables by raw key do not have"
        )
    inputs = MergeInputs(seed=seed, counts=[{}] * num if has_counts else ())
    method.check_inputs(inputs, options, num)
    held = {name: Rows(name, partial(_each, read)) for name, read in rows.items()}
    statistics = method.collect(held, options) or {}
    return Mixer(method, options, {}, replace(inputs, statistics=statistics))


def _each(read: Callable[[], Iterable[Block]], fact: Callable[[Block], Any]) -> Iterable[Any]:
    return map(fact, read())


def merge_by_key(
    tables: Sequence[TableByKey],
    method: str = "average",
    *,
    max_rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> KeyedMerge:
    """Merge embedding tables whose rows belong to raw keys.

    Rows of one table alone are taken whole. Rows of several are merged by the method.

    Args:
        tables: Per source ``(keys, values)`` or ``(keys, values, counts)``. Keys are integers, or
            texts in all sources.
        method: Name of a row-wise method (``methods()``) that needs nothing but counts.
        max_rows: Most rows of the result: those with the largest counts, of equal ones the
            smallest keys. None: all rows.
        seed: Seed of random draws.
        **options: Options of the method.

    Returns:
        The merged table, ordered by key. Counts are the largest of all sources.

    Raises:
        MergeError: Tables do not fit together, a key is there twice, or the method needs more.
    """
    if not tables:
        raise MergeError("no tables to merge")
    if method not in METHODS:
        raise MergeError(f"{method}: no method; one of {', '.join(METHODS)}")
    names, ids = _ids([table[0] for table in tables])
    values = _values([table[1] for table in tables], ids)
    counts = [torch.as_tensor(table[2]).double() for table in tables if len(table) > 2]
    if any(len(c) != len(i) for c, i in zip(counts, ids, strict=False)):
        raise MergeError("counts must have one number per key")
    counts = counts if len(counts) == len(tables) else []
    found = match(ids)

    def blocks() -> list[Block]:
        return [shared_block(everywhere(found), values, counts, 0)]

    mixer = mixer_of(METHODS[method], options, seed, bool(counts), len(tables), {TABLE: blocks})
    merged, shares = KeyedMixer(TABLE, mixer)(found, values, counts, 0)
    largest = largest_of(found, [c.numpy() for c in counts]) if counts else None
    kept = np.arange(len(found.ids))
    if max_rows is not None and max_rows < len(kept):
        if largest is None:
            raise MergeError("max_rows: the rows with the largest counts stay; give counts")
        kept = np.sort(np.lexsort((found.ids, -largest))[:max_rows])
    keys = [names[i] for i in found.ids[kept]] if names else torch.from_numpy(found.ids[kept])
    return KeyedMerge(
        keys,
        merged[kept].to(tables[0][1].dtype),
        None if largest is None else torch.from_numpy(largest[kept]),
        shares,
    )


def largest_of(found: Match, columns: Sequence[Array]) -> Array:
    """Return per key the largest entry of a column over the sources that have the key.

    Args:
        found: Keys and their rows.
        columns: Per source ``(V, ...)``, not negative.
    """
    shape = (found.rows.shape[1], *columns[0].shape[1:])
    result = np.zeros(shape, columns[0].dtype)
    for rows, column in zip(found.rows, columns, strict=True):
        has = np.flatnonzero(rows >= 0)
        result[has] = np.maximum(result[has], column[rows[has]])
    return result


def strongest(found: Match, counts: Sequence[Array]) -> Array:
    """Return per key the source with the largest count that has it, the first of equals."""
    best = np.full(found.rows.shape[1], -1, np.int64)
    most = np.full(found.rows.shape[1], -1.0)
    for k, rows in enumerate(found.rows):
        count = np.where(rows >= 0, counts[k][rows.clip(0)] if len(counts[k]) else 0.0, -1.0)
        best[count > most] = k
        most = np.maximum(most, count)
    return best


def _ids(keys: Sequence[Keys]) -> tuple[list[str], list[Array]]:
    """Return all texts in order, if keys are texts, and per source ``(V,)`` int64."""
    arrays = [k.numpy() if isinstance(k, Tensor) else np.asarray(k) for k in keys]
    if any(a.ndim != 1 for a in arrays):
        raise MergeError("keys must be one-dimensional")
    filled = [a for a in arrays if len(a)]
    if all(np.issubdtype(a.dtype, np.integer) for a in filled):
        return [], [a.astype(np.int64) for a in arrays]
    if any(a.dtype.kind not in "UO" for a in filled):
        raise MergeError("keys must be integers, or texts in all sources")
    names = sorted({str(text) for a in arrays for text in a})
    place = {name: i for i, name in enumerate(names)}
    return names, [np.array([place[str(text)] for text in a], np.int64) for a in arrays]


def _values(tables: Sequence[Tensor], ids: Sequence[Array]) -> list[Tensor]:
    values = [torch.as_tensor(table) for table in tables]
    for k, (table, keys) in enumerate(zip(values, ids, strict=True)):
        if table.ndim != 2 or not table.is_floating_point() or len(table) != len(keys):
            raise MergeError(
                f"source {k}: values of shape {tuple(table.shape)} for {len(keys):,} keys; they"
                " must be floats, one row per key"
            )
        if table.shape[1] != values[0].shape[1]:
            columns = f"{values[0].shape[1]} in source 0, {table.shape[1]} in source {k}"
            raise MergeError(f"columns differ, {columns}")
    wide = torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
    return [value.to(wide) for value in values]
