"""Tables on a joined vocabulary, whichever processes hold their rows.

Shape legend: V rows of a source's table, U rows of the joined table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed, sharded
from cki_rec.engine.lookups import Reading, read_rows
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.vocabulary import to_union

BLOCK = 1 << 16
"""Joined rows that a process collects at a time."""


def on_union(
    tensors: Params,
    tables: Mapping[str, str],
    maps: Mapping[str, Tensor],
    old_sizes: Mapping[str, int],
    sizes: Mapping[str, int],
    lacking: int | None,
) -> Params:
    """Return tables, counts or accumulators with rows where the joined vocabulary has them.

    All processes call this. Each gets its rows of the joined tables.

    Args:
        tensors: Of one source, as ``sharded.load`` returns them.
        tables: Table of every tensor that has one.
        maps: Per table ``(V,)`` the joined row of each row; other tables stay.
        old_sizes: V per table.
        sizes: U per table.
        lacking: The row that stands for tokens without one; None: zero.

    Raises:
        MergeError: A tensor has another number of rows than its vocabulary.
    """
    moved = {name: table for name, table in tables.items() if name in tensors and table in maps}
    if distributed.world_size() == 1:
        own_maps = {name: maps[table] for name, table in moved.items()}
        own_sizes = {name: sizes[table] for name, table in moved.items()}
        return to_union(tensors, own_maps, own_sizes, lacking)
    result = dict(tensors)
    for table in dict.fromkeys(moved.values()):
        if old_sizes[table] != len(maps[table]):
            raise MergeError(
                f"{table}: {old_sizes[table]} rows do not fit a vocabulary of"
                f" {len(maps[table])} rows"
            )
        names = [name for name, of in moved.items() if of == table]
        parts = [tensors[name] for name in names]
        joined = _joined(parts, maps[table], old_sizes[table], sizes[table], lacking)
        result |= dict(zip(names, joined, strict=True))
    return result


def mean_rows(
    tensors: Params, tables: Mapping[str, str], schema: FeatureSchema, reserved: int
) -> Params:
    """Return per table the mean of its rows of tokens, in float64, over all processes.

    Without tokens it is zero.

    Args:
        tensors: Of one source, as ``sharded.load`` returns them.
        tables: Tables to average -> their names in ``schema``.
        schema: Sizes of whole tables.
        reserved: Number of rows before the first token.
    """
    sums = {}
    for name, table in tables.items():
        rows = tensors[name].double()
        first = sharded.rows_of(schema.table_sizes[table]).start
        sums[name] = rows[max(0, reserved - first) :].sum(0)
    totals = sharded.total(sums, schema)
    means = {}
    for name, table in tables.items():
        number = schema.table_sizes[table] - reserved
        means[name] = totals[name] / max(1, number)
    return means


def with_new_rows(
    tensors: Params,
    tables: Mapping[str, str],
    maps: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    rows: Params,
) -> Params:
    """Return joined tables whose rows without a row of the source are replaced.

    Args:
        tensors: As ``on_union`` returned them.
        tables: Tables to change -> their names.
        maps: Per table ``(V,)`` the joined row of each row of the source.
        sizes: U per table.
        rows: Per table the row that takes their place.
    """
    result = dict(tensors)
    for name, table in tables.items():
        is_new = torch.ones(sizes[table], dtype=torch.bool)
        is_new[maps[table]] = False
        is_new = is_new[sharded.rows_of(sizes[table])]
        result[name] = tensors[name].clone()
        result[name][is_new] = rows[name].to(tensors[name].dtype)
    return result


def _joined(
    tables: list[Tensor], rows_V: Tensor, old_size: int, size: int, lacking: int | None
) -> list[Tensor]:
    """Return this process's rows of joined tables."""
    source_U = torch.full((size,), -1)
    source_U[rows_V] = torch.arange(old_size)
    wanted = source_U[sharded.rows_of(size)]
    largest = max(distributed.exchange(len(wanted)))
    joined = [table.new_empty(len(wanted), *table.shape[1:]) for table in tables]
    for start in range(0, largest, BLOCK):
        block = wanted[start : start + BLOCK]
        is_known = block >= 0
        ids = torch.where(is_known, block, 0 if lacking is None else lacking)
        (found,) = read_rows([Reading(tables, old_size, ids)])
        for target, rows in zip(joined, found, strict=True):
            if lacking is None:
                rows[~is_known] = 0
            target[start : start + BLOCK] = rows
    return joined
