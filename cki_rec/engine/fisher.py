"""The diagonal of the Fisher information of a model.

Shape legend: B rows, F fields, D embedding size, N ids of a feature in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from cki_rec.data.schema import Batch
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.lookups import rows_held
from cki_rec.merging.params import Params
from cki_rec.models.embeddings import FIRST_ORDER, NUMBERS, Embedded, FieldEmbeddings

LARGEST = 1 << 25
"""Largest number of entries of the per-row gradients in memory."""
Inputs = dict[str, Any]
"""The embeddings of a batch: ``fields``, ``first_order``, and ``histories`` by name."""


class _Interact(nn.Module):
    """The network without its lookups, on one row."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Inputs, masks: dict[str, Tensor]) -> Tensor:
        """Return the logit of one row."""
        one = {name: tensor[None] for name, tensor in inputs["histories"].items()}
        embedded = Embedded(
            inputs["fields"][None],
            inputs["first_order"][None],
            one,
            {name: mask[None] for name, mask in masks.items()},
        )
        logit_B: Tensor = self.network.interact(embedded)  # type: ignore[operator]
        return logit_B.squeeze()


def fisher_diagonal(
    network: nn.Module,
    params: Params,
    batches: Iterable[Batch],
    dtype: torch.dtype = torch.float32,
) -> Params:
    r"""Return the diagonal of the Fisher information of a binary classifier.

    .. math:: F = E_x\big[p (1 - p)\, (\partial z / \partial \theta)^2\big],
        \quad p = \sigma(z)

    The result is exact: gradients are squared row by row, and the expectation over labels is in
    closed form. The gradient of a table row is summed over all lookups of the same id in a row
    before it is squared. Batch norms use their running statistics.

    Args:
        network: The network (``lookups.merging_module``); its own parameters are not used.
        params: Parameters to run the network with; of several processes, the rows of this one.
        batches: Rows x, the same on all processes; their labels are not used.
        dtype: Type of the gradients. Sums are float64; sums of tables have the type of the
            table, at least float32.

    Returns:
        F of every parameter, without buffers.

    Reference:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, Eq. 3.

    Differs:
        Their code samples labels or sums over all classes; for two classes the sum is p (1 - p).
    """
    network.eval()
    names = [name for name, _ in network.named_parameters()]
    sparse: FieldEmbeddings = network.sparse  # type: ignore[assignment]
    wrapped = _Interact(network)
    looked_up = {n for n in names if table_of(n) or n.rpartition(".")[2] in NUMBERS}
    dense = {f"network.{n}": params[n].to(dtype) for n in names if n not in looked_up}
    fixed = {f"network.{n}": t.to(dtype) for n, t in params.items() if n not in names}
    total: Params = {n: torch.zeros_like(params[n], dtype=_wide(n, params[n])) for n in names}

    def logit(dense: Params, inputs: Inputs, masks: dict[str, Tensor]) -> Tensor:
        score: Tensor = functional_call(wrapped, {**dense, **fixed}, (inputs, masks))
        return score

    per_row = vmap(grad_and_value(logit, (0, 1)), (None, 0, 0), randomness="error")
    in_sparse = {n.removeprefix("sparse."): params[n] for n in params if n.startswith("sparse.")}
    size = sum(tensor.numel() for tensor in dense.values())
    step, rows = max(1, LARGEST // max(size, 1)), 0
    with torch.no_grad():
        for batch in batches:
            emb: Embedded = functional_call(sparse, in_sparse, (batch,))
            parts = []
            for start in range(0, len(batch), step):
                inputs, masks = _inputs(emb, slice(start, start + step), dtype)
                (by_weight, by_input), logit_B = per_row(dense, inputs, masks)
                probability_B = logit_B.sigmoid()
                variance_B = probability_B * (1 - probability_B)
                for name, gradient in by_weight.items():
                    squares = torch.einsum("b,b...->...", variance_B, gradient.square())
                    total[name.removeprefix("network.")] += squares
                parts.append((variance_B, by_input))
            _add_lookups(total, sparse, batch, *_joined(parts))
            rows += len(batch)
    return {name: value / max(rows, 1) for name, value in total.items()}


def _wide(name: str, tensor: Tensor) -> torch.dtype:
    least = torch.float32 if table_of(name) else torch.float64
    return torch.promote_types(tensor.dtype, least)


def _inputs(emb: Embedded, span: slice, dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor]]:
    inputs = {
        "fields": emb.fields_BFD[span].to(dtype),
        "first_order": emb.first_order_B[span].to(dtype),
        "histories": {name: history[span].to(dtype) for name, history in emb.histories.items()},
    }
    return inputs, {name: mask[span] for name, mask in emb.masks.items()}


def _joined(parts: list[tuple[Tensor, Inputs]]) -> tuple[Tensor, Inputs]:
    inputs = [part for _, part in parts]
    joined: Inputs = {
        key: torch.cat([part[key] for part in inputs]) for key in ("fields", "first_order")
    }
    joined["histories"] = {
        name: torch.cat([part["histories"][name] for part in inputs])
        for name in inputs[0]["histories"]
    }
    return torch.cat([variance for variance, _ in parts]), joined


def _add_lookups(
    total: Params, sparse: FieldEmbeddings, batch: Batch, variance_B: Tensor, gradient: Inputs
) -> None:
    """Add the squared gradients of the parameters of ``sparse``, from those of the embeddings."""
    read: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for name, row, ids, by_id in _reads(sparse, batch, gradient):
        read.setdefault(name, []).append((row, ids, by_id))
    for name, lookups in read.items():
        row, ids, by_id = (torch.cat(column) for column in zip(*lookups, strict=True))
        table, held = total[f"sparse.{name}"], rows_held(sparse, name)
        is_held = (ids >= held.start) & (ids < held.stop)
        row, ids, by_id = row[is_held], ids[is_held] - held.start, by_id[is_held]
        place, where = (row * len(table) + ids).unique(return_inverse=True)
        summed = by_id.new_zeros(len(place), by_id.shape[1]).index_add_(0, where, by_id)
        row, ids = place // len(table), place % len(table)
        squares = variance_B[row, None] * summed.square()
        table[:, : squares.shape[1]].index_add_(0, ids, squares.to(table.dtype))
    if sparse.numbers is not None:
        assert batch.numbers is not None
        number_BF = batch.numbers.to(variance_B.dtype)
        by_field = gradient["fields"][:, -number_BF.shape[1] :]
        squares = (number_BF.unsqueeze(2) * by_field).square()
        total["sparse.numbers"] += torch.einsum("b,bfd->fd", variance_B, squares)
        if sparse.numbers_first_order is not None:
            squares = (number_BF * gradient["first_order"][:, None]).square()
            total["sparse.numbers_first_order"] += (variance_B @ squares)[:, None]


def _reads(
    sparse: FieldEmbeddings, batch: Batch, gradient: Inputs
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield parameter, ``(N,)`` row, ``(N,)`` id and ``(N, D)`` gradient of every lookup."""
    if not sparse.names:
        return
    num_rows = len(batch)
    lengths_FB = torch.ones(len(sparse.names), num_rows, dtype=torch.int64)
    if batch.lengths is not None:
        lengths_FB = batch.lengths.view(len(sparse.names), -1).long()
    pieces = batch.values.split(lengths_FB.sum(1).tolist())
    for name, ids, lengths_B in zip(sparse.names, pieces, lengths_FB, strict=True):
        row = torch.arange(num_rows).repeat_interleave(lengths_B)
        place = torch.arange(len(ids)) - (lengths_B.cumsum(0) - lengths_B)[row]
        parameter, share = sparse.sources[name], 1 / lengths_B[row, None].to(gradient["fields"])
        if name in sparse.attended:
            place = place - (lengths_B[row] - sparse.length).clamp_min(0)  # only the latest ids
            is_read = place >= 0
            row, ids, place = row[is_read], ids[is_read], place[is_read]
            yield parameter, row, ids, gradient["histories"][name][row, place]
            continue
        field = sparse.fields.index(name)
        yield parameter, row, ids, gradient["fields"][row, field] * share
        if name in sparse.first_order:
            table = parameter.rpartition(".embedding_bags.")[2].removesuffix(".weight")
            first_order = f"collection.embedding_bags.{table}{FIRST_ORDER}.weight"
            yield first_order, row, ids, gradient["first_order"][row, None] * share
