"""Lookups in tables whose rows are divided among processes, outside of training.

Networks run as in one process: every lookup collects the rows that it reads from the processes
that hold them (``sharded``). So every step of a merge that runs a network works on any number of
processes, and gives the same bits on each of them.

Shape legend: N ids, V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from cki_rec.models import build_model


def read_rows(tables: Sequence[Tensor], size: int, ids_N: Tensor) -> list[Tensor]:
    """Return ``(N, ...)`` rows of tables, whichever processes hold them; all processes call this.

    Processes may read different rows. Gradients reach the rows that this process holds. They are
    complete if all processes compute the same.

    Args:
        tables: The rows of this process (``sharded.rows_of``) of tables with the same ids.
        size: Number of rows of each whole table.
        ids_N: Rows to read.

    Raises:
        ReportedElsewhere: Another process has failed.
        RankLost: Another process has ended.
    """
    if not sharded.is_divided(size):
        return [table[ids_N] for table in tables]
    held = sharded.rows_of(size)
    with distributed.detect_lost_ranks():
        wanted = torch.cat(distributed.exchange(ids_N.unique())).unique()
        is_held = (wanted >= held.start) & (wanted < held.stop)
        local = wanted[is_held] - held.start
        parts = []
        for table in tables:
            part = table.new_zeros(len(wanted), *table.shape[1:])
            part[is_held] = table.detach()[local]
            parts.append(part)
        _add_bytes(parts)
    place = torch.searchsorted(wanted, ids_N)
    rows = []
    for table, part in zip(tables, parts, strict=True):
        if table.requires_grad:
            part = part.index_copy(0, is_held.nonzero()[:, 0], table[local])
        rows.append(part[place])
    return rows


def _add_bytes(parts: Sequence[Tensor]) -> None:
    """Add tensors of all processes, in place. Of every entry, all but one process have zero."""
    pieces = [part.reshape(-1).view(torch.uint8) for part in parts]
    total = torch.cat(pieces)
    whole = total.view(torch.int32) if len(total) % 4 == 0 else total
    distributed.total(whole)  # of integers, so that every bit survives
    for piece, added in zip(pieces, total.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(added)


class DividedBag(nn.EmbeddingBag):
    """An embedding bag that looks up ids of the whole table; it holds this process's rows."""

    size: int

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the pooled rows of every bag."""
        ids, place = input.unique(return_inverse=True)
        (rows,) = read_rows([self.weight], self.size, ids)
        if not len(ids):  # every bag is empty, but a lookup needs a row
            rows = self.weight.new_zeros(1, self.embedding_dim)
        return functional.embedding_bag(
            place,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )


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
        (rows,) = read_rows([column], sizes[name], order[sharded.rows_of(sizes[name])])
        return rows

    return shuffle(params, seed, read, sizes)


def rows_held(module: nn.Module, name: str) -> slice:
    """Return the rows of a table that this process holds, by the name of its parameter."""
    bag = module.get_submodule(name.removesuffix(".weight"))
    assert isinstance(bag, nn.EmbeddingBag)
    size = bag.size if isinstance(bag, DividedBag) else bag.num_embeddings
    return sharded.rows_of(size)


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
    for name, module in network.named_modules():
        if isinstance(module, nn.EmbeddingBag):
            table = table_of(f"{name}.weight")
            assert table is not None
            module.__class__ = DividedBag
            assert isinstance(module, DividedBag)
            module.size = schema.table_sizes[table]
    return network


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
    for table, places in names.items():
        tables = [models[k][name] for k, name in places]
        read = read_rows(tables, schema.table_sizes[table], rows[table])
        for (k, name), part in zip(places, read, strict=True):
            parts[k][name] = part
    return parts
