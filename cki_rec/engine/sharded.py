"""Checkpoints whose table rows are divided among processes.

Every process holds a contiguous range of the rows of each table, with their counts and
accumulators. Ranges are of equal size. Other tensors are replicated on every process, and so are
tables with fewer rows than processes. A single process holds everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import (
    Shard,
    ShardedTensor,
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed._shard.sharding_spec import ShardMetadata

from cki_rec import checkpoints
from cki_rec.checkpoints import TENSORS, Checkpoint
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import checkpoint_io, distributed
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.extras import Processes
from cki_rec.merging.params import Params
from cki_rec.merging.rows import COMBINE, How

T = TypeVar("T")
Groups = dict[str, dict[str, Any]]
"""Tensors by group (``model``, ``accumulator``, ``counts``) and name."""


def rows_of(size: int, number: int | None = None) -> slice:
    """Return the rows of a table of ``size`` rows that a process holds (None: this process)."""
    num = distributed.world_size()
    number = distributed.rank() if number is None else number
    first, last = (size * place // num for place in (number, number + 1))
    return slice(first, last) if is_divided(size) else slice(0, size)


def is_divided(size: int) -> bool:
    """Return whether a table of ``size`` rows is divided among processes."""
    return size >= distributed.world_size() > 1


def local_schema(schema: FeatureSchema) -> FeatureSchema:
    """Return the schema with the table sizes of this process."""
    rows = {table: rows_of(size) for table, size in schema.table_sizes.items()}
    return replace(schema, table_sizes={table: r.stop - r.start for table, r in rows.items()})


def load(folders: Sequence[Path]) -> list[Checkpoint]:
    """Return the part of every checkpoint that this process holds.

    Each of several processes reads only its rows.

    Raises:
        UserError: As ``checkpoints.load``.
    """
    if distributed.world_size() == 1:
        return [checkpoints.load(folder) for folder in folders]
    outlines = [checkpoints.outline(folder, distributed.share()) for folder in folders]
    distributed.barrier()  # all files are undamaged: each process has checked its share
    return [_filled(*pair) for pair in zip(outlines, folders, strict=True)]


def save(folder: Path, tensors: Groups, saved: Checkpoint, origin: Provenance) -> None:
    """Write the parts of all processes as one checkpoint of the network of ``saved``."""
    sizes = saved.schema.table_sizes
    whole = {
        group: {n: _whole(t, _rows(_table(group, n), sizes)) for n, t in entries.items()}
        for group, entries in tensors.items()
    }
    checkpoint_io.save(folder, whole, saved.model, saved.schema, origin)


class ShardProcesses(Processes):
    """The processes that hold shards of the tables of one schema.

    Args:
        schema: Features and sizes of whole tables.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        self.schema = schema

    def total(self, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return per table the sum of ``products`` over all processes."""
        return total(products, self.schema)

    def reduce(self, name: str, value: Tensor, how: How) -> Tensor:
        """Return the sum, minimum or maximum of a fact over the rows of all processes."""
        if not is_divided(_rows(table_of(name), self.schema.table_sizes)):
            return value
        combined: Tensor = functools.reduce(COMBINE[how], distributed.exchange(value))
        return combined

    def first_row(self, name: str) -> int:
        """Return the number of the first row of a parameter that this process holds."""
        first: int = rows_of(_rows(table_of(name), self.schema.table_sizes)).start
        return first

    def agree(self, value: T) -> T:
        """Return the value of the first process."""
        return distributed.from_first(value)

    def mean_shares(self, shares: dict[str, list[float]]) -> dict[str, list[float]]:
        """Return per parameter the mean share of each source over all processes' rows."""
        return mean_shares(shares, self.schema)


def total(
    products: Mapping[str, Tensor],
    schema: FeatureSchema,
    table: Callable[[str], str | None] = table_of,
) -> dict[str, Tensor]:
    """Return the sum over the rows of all processes per table, bit-identical on all of them.

    Args:
        products: Tensor per name; other parameters than tables stay as they are.
        schema: Sizes of whole tables.
        table: Function (name) -> table.
    """
    gathered = distributed.exchange(dict(products))
    return {
        name: torch.stack([part[name] for part in gathered]).sum(0)
        if is_divided(_rows(table(name), schema.table_sizes))
        else tensor
        for name, tensor in products.items()
    }


def mean_shares(
    shares: Mapping[str, list[float]], schema: FeatureSchema
) -> dict[str, list[float]]:
    """Return the mean weight of each source per parameter, over the rows of all processes."""
    gathered, means = distributed.exchange(dict(shares)), dict(shares)
    for name in shares:
        size = _rows(table_of(name), schema.table_sizes)
        if is_divided(size):
            rows = [rows_of(size, number) for number in range(len(gathered))]
            means[name] = [
                sum(value * (r.stop - r.start) for value, r in zip(values, rows, strict=True))
                / size
                for values in zip(*(part[name] for part in gathered), strict=True)
            ]
    return means


def _rows(table: str | None, sizes: Mapping[str, int]) -> int:
    """Return the number of rows of a table; 0 for other tensors."""
    return 0 if table is None else sizes[table]


def _table(group: str, name: str) -> str | None:
    return name if group == "counts" else table_of(name)


def _filled(outline: Checkpoint, folder: Path) -> Checkpoint:
    groups: dict[str, Params] = {
        "model": outline.params,
        "accumulator": outline.accumulators,
        "counts": outline.counts,
    }
    sizes, state, local = outline.schema.table_sizes, {}, {}
    for group, entries in groups.items():
        for name, tensor in entries.items():
            size = _rows(_table(group, name), sizes)
            part = torch.empty_like(tensor[rows_of(size)] if size else tensor, device="cpu")
            local[group, name] = part
            state[f"{group}.{name}"] = _whole(part, size)
    checkpoints.fill(state, folder / TENSORS)
    filled = [{name: local[group, name] for name in entries} for group, entries in groups.items()]
    params, accumulators, counts = filled
    return replace(outline, params=params, accumulators=accumulators, counts=counts)


def _whole(part: Tensor, size: int) -> Tensor | ShardedTensor:
    """Return the tensor of ``size`` rows of which this process holds ``part``."""
    if not is_divided(size):
        return part
    shards = []
    for number in range(distributed.world_size()):
        rows = rows_of(size, number)
        shape = [rows.stop - rows.start, *part.shape[1:]]
        offsets = [rows.start, *[0] * (part.ndim - 1)]
        shards.append(ShardMetadata(offsets, shape, f"rank:{number}/cpu"))
    properties = TensorProperties(dtype=part.dtype)
    metadata = ShardedTensorMetadata(shards, torch.Size([size, *part.shape[1:]]), properties)
    mine = [Shard(part, shards[distributed.rank()])]
    return ShardedTensor._init_from_local_shards_and_global_metadata(mine, metadata)
