"""Lookups in tables whose rows are divided among processes, outside of training.

Networks run as in one process: every lookup collects the rows that it reads from the processes
that hold them (``sharded``). So every step of a merge that runs a network works on any number of
processes, and gives the same bits on each of them.

Shape legend: N ids, V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cki_rec.config import Model
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine import distributed, sharded
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.params import Params
from cki_rec.merging.perturbation import shuffle
from cki_rec.models import build_model, model_schema
from cki_rec.models.embeddings import FieldEmbeddings


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows to read from tables with the same ids."""

    tables: Sequence[Tensor]
    """The rows of this process (``sharded.rows_of``) of each table."""
    size: int
    """Number of rows of each whole table."""
    ids_N: Tensor


def read_rows(readings: Sequence[Reading]) -> list[list[Tensor]]:
    """Return ``(N, ...)`` rows per reading and table, whichever processes hold them.

    All processes call this with the same tables, in one exchange. They may read different rows.
    Gradients reach the rows that this process holds. They are complete if all processes compute
    the same.

    Raises:
        ReportedElsewhere: Another process has failed.
        RankLost: Another process has ended.
    """
    divided = [reading for reading in readings if sharded.is_divided(reading.size)]
    collected = iter(_collect(divided) if divided else ())
    return [
        next(collected)
        if sharded.is_divided(reading.size)
        else [table[reading.ids_N] for table in reading.tables]
        for reading in readings
    ]


def _collect(readings: Sequence[Reading]) -> list[list[Tensor]]:
    places, parts = [], list[list[Tensor]]()
    with distributed.detect_lost_ranks():
        asked = distributed.exchange([reading.ids_N.unique() for reading in readings])
        for reading, ids in zip(readings, zip(*asked, strict=True), strict=True):
            held, wanted = sharded.rows_of(reading.size), torch.cat(ids).unique()
            is_held = (wanted >= held.start) & (wanted < held.stop)
            local = wanted[is_held] - held.start
            places.append((wanted, is_held.nonzero()[:, 0], local))
            parts.append([])
            for table in reading.tables:
                part = table.new_zeros(len(wanted), *table.shape[1:])
                part[is_held] = table.detach()[local]
                parts[-1].append(part)
        _add_bytes([part for each in parts for part in each])
    for reading, each, (wanted, held_N, local) in zip(readings, parts, places, strict=True):
        place = torch.searchsorted(wanted, reading.ids_N)
        for k, table in enumerate(reading.tables):
            if table.requires_grad:
                each[k] = each[k].index_copy(0, held_N, table[local])
            each[k] = each[k][place]
    return parts


def _add_bytes(parts: Sequence[Tensor]) -> None:
    """Add tensors of all processes, in place. Of every entry, all but one process have zero."""
    pieces = [part.reshape(-1).view(torch.uint8) for part in parts]
    total = torch.cat(pieces)
    whole = total.view(torch.int32) if len(total) % 4 == 0 else total
    distributed.total(whole)  # of integers, so that every bit survives
    for piece, added in zip(pieces, total.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(added)


@dataclass(frozen=True, slots=True)
class _Known:
    """Rows of a table that have been read."""

    weight: Tensor
    ids: Tensor
    """Ascending."""
    rows: Tensor


class DividedBag(nn.EmbeddingBag):
    """An embedding bag that looks up ids of the whole table; it holds this process's rows."""

    size: int
    known: _Known | None = None
    """The rows of the present batch, which are read for all tables together."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the pooled rows of every bag."""
        known = self.known
        if known is None or known.weight is not self.weight:
            ids = input.unique() if len(input) else input.new_zeros(1)  # a lookup needs a row
            ((rows,),) = read_rows([Reading([self.weight], self.size, ids)])
            known = _Known(self.weight, ids, rows)
        return functional.embedding_bag(
            torch.searchsorted(known.ids, input),
            known.rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )


def merging_module(schema: FeatureSchema, model: Model) -> nn.Module:
    """Return the network of sources whose tables are divided among processes.

    It runs with the parameters of this process (``sharded.load``) and ids of whole tables. Its own
    parameters are not used. A single process gets the network as it is.

    Args:
        schema: Features and sizes of whole tables.
        model: Options of the network.
    """
    if distributed.world_size() == 1:
        return build_model(schema, model, torch.device("cpu")).eval()
    network = build_model(sharded.local_schema(schema), model, torch.device("meta")).eval()
    bags: dict[str, list[DividedBag]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.EmbeddingBag):
            table = table_of(f"{name}.weight")
            assert table is not None
            module.__class__ = DividedBag
            assert isinstance(module, DividedBag)
            module.size = schema.table_sizes[table]
            bags.setdefault(table, []).append(module)
    read_features = model_schema(schema, model)

    def read(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        rows = rows_read(arguments[0], read_features)[1]
        readings = [
            Reading([bag.weight for bag in bags[table]], schema.table_sizes[table], ids)
            for table, ids in rows.items()
        ]
        for table, found in zip(rows, read_rows(readings), strict=True):
            for bag, part in zip(bags[table], found, strict=True):
                bag.known = _Known(bag.weight, rows[table], part)

    def forget(*_: Any) -> None:
        for bag in (bag for each in bags.values() for bag in each):
            bag.known = None

    for module in network.modules():
        if isinstance(module, FieldEmbeddings):
            module.register_forward_pre_hook(read)
            module.register_forward_hook(forget)
    return network


def rows_held(module: nn.Module, name: str) -> slice:
    """Return the rows of a table that this process holds, by the name of its parameter."""
    bag = module.get_submodule(name.removesuffix(".weight"))
    assert isinstance(bag, nn.EmbeddingBag)
    return sharded.rows_of(bag.size if isinstance(bag, DividedBag) else bag.num_embeddings)


def shuffle_divided(params: Params, schema: FeatureSchema, seed: int) -> Params:
    """Return ``perturbation.shuffle`` of a model whose tables are divided among processes.

    Args:
        params: The parameters of this process.
        schema: Sizes of whole tables.
        seed: Seed of the orders.
    """
    sizes = {n: schema.table_sizes[table] for n in params if (table := table_of(n))}

    def read(name: str, column: Tensor, order: Tensor) -> Tensor:
        if name not in sizes:
            return column[order]
        wanted = order[sharded.rows_of(sizes[name])]
        ((rows,),) = read_rows([Reading([column], sizes[name], wanted)])
        return rows

    return shuffle(params, seed, read, sizes)


class WithParams(nn.Module):
    """A network that runs with given parameters in place of its own.

    Args:
        network: Of ``merging_module``.
        params: Its parameters and buffers.
    """

    def __init__(self, network: nn.Module, params: Params) -> None:
        super().__init__()
        self.network, self.params = network, params

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits."""
        logit_B: Tensor = functional_call(self.network, self.params, (batch,))
        return logit_B


def at_rows(
    models: Sequence[Params], schema: FeatureSchema, rows: Mapping[str, Tensor]
) -> list[Params]:
    """Return models with only some rows of their tables; other tensors are unchanged.

    Args:
        models: Parameters, or counts under names of parameters. All processes pass the same names.
        schema: Sizes of whole tables.
        rows: Rows per table.
    """
    names: dict[str, list[tuple[int, str]]] = {}
    for k, model in enumerate(models):
        for name in model:
            if (table := table_of(name)) is not None:
                names.setdefault(table, []).append((k, name))
    parts = [dict(model) for model in models]
    readings = [
        Reading([models[k][name] for k, name in places], schema.table_sizes[table], rows[table])
        for table, places in names.items()
    ]
    for places, read in zip(names.values(), read_rows(readings), strict=True):
        for (k, name), part in zip(places, read, strict=True):
            parts[k][name] = part
    return parts


def rows_read(batch: Batch, schema: FeatureSchema) -> tuple[Batch, dict[str, Tensor]]:
    """Return the batch with renumbered ids, and the rows of each table that it reads.

    The first row stands for the rows of a table without ids, because a lookup needs a row.
    """
    features = schema.lookups
    if not features:
        return batch, {}
    sizes = [len(batch)] * len(features)
    if batch.lengths is not None:
        sizes = batch.lengths.view(len(features), -1).sum(1).tolist()
    pieces, rows = list(batch.values.split(sizes)), {}
    for table in dict.fromkeys(feature.table for feature in features):
        places = [place for place, feature in enumerate(features) if feature.table == table]
        ids = torch.cat([pieces[place] for place in places])
        unique, renumbered = ids.unique(return_inverse=True)
        rows[table] = unique if len(unique) else ids.new_zeros(1)
        for place, piece in zip(
            places, renumbered.split([sizes[place] for place in places]), strict=True
        ):
            pieces[place] = piece
    return replace(batch, values=torch.cat(pieces)), rows
