"""Teachers: target outputs for a model, made of the outputs of its sources.

Shape legend: K sources, B rows of a batch, V rows of a table, N looked-up ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cki_rec.merging.params import MergeError, Params

Teacher: TypeAlias = Callable[[Any, Tensor], Tensor]
"""(batch, outputs of the sources ``(K, B, ...)``) -> target outputs ``(B, ...)``."""
SEPARATED = 0.2
"""Least separation of a table that routes by default. Rows split at random have less."""


def mean_teacher(_: Any, outputs: Tensor) -> Tensor:
    """Return the mean output of the sources."""
    return outputs.mean(0)


def routed(outputs: Tensor, shares_KB: Tensor) -> Tensor:
    """Return the outputs ``(K, B, ...)`` of the sources, weighted per row."""
    shares = shares_KB.to(outputs.dtype).reshape(*shares_KB.shape, *[1] * (outputs.ndim - 2))
    return (shares * outputs).sum(0)


def router_shares(counts_KV: Tensor, ids_N: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Return ``(K, B)``: the share of each source in the observations of a row's ids.

    A row whose ids no source has seen has equal shares.

    Args:
        counts_KV: Training rows of each source that looked a row of the table up.
        ids_N: Ids of all rows of the batch.
        rows_N: The row of each id.
        num_rows: B.
    """
    num = len(counts_KV)
    seen_KB = counts_KV.new_zeros(num, num_rows, dtype=torch.float64)
    seen_KB.index_add_(1, rows_N, counts_KV[:, ids_N].double())
    total_B = seen_KB.sum(0)
    return torch.where(total_B > 0, seen_KB / total_B, 1 / num)


def separation(counts: Sequence[Params]) -> dict[str, float]:
    """Return how far the sources were trained on different ids: 0 (the same) to 1 (disjoint).

    Each id has shares: how often each source has seen it. Their total variation distance to the
    sources' shares of all rows is averaged over training rows. It is then scaled: 0 for rows
    that are dealt to the sources at random, or for equal ones, and 1 for disjoint sources.

    Args:
        counts: Per source and table ``(V,)``, the training rows that looked each row up.
    """
    result = {}
    for table in counts[0]:
        counts_KV = torch.stack([source[table].double() for source in counts])
        total_V, total_K = counts_KV.sum(0), counts_KV.sum(1)
        if not bool((total_K > 0).sum() > 1):
            continue
        prior_K = total_K / total_K.sum()
        largest = 1 - float(prior_K.square().sum())
        shares_KV = torch.where(total_V > 0, counts_KV / total_V, 0)
        distance_V = (shares_KV - prior_K[:, None]).abs().sum(0) / 2
        distance = float((total_V * distance_V).sum() / total_V.sum())
        chance = float(_deviations(total_V, prior_K).sum() / total_V.sum()) / 2
        is_known = largest > chance * (1 + 1e-9)  # some id was seen twice
        result[table] = max(0.0, (distance - chance) / (largest - chance)) if is_known else 0.0
    return result


def _deviations(total_V: Tensor, prior_K: Tensor) -> Tensor:
    """Return ``(V,)``: the sum of E|X_k - n p_k| for X multinomial of n = total, by De Moivre."""
    result_V = torch.zeros_like(total_V)
    for p in prior_K[prior_K > 0]:
        above = (total_V * p).floor() + 1
        binomial = (total_V + 1).lgamma() - (above + 1).lgamma() - (total_V - above + 1).lgamma()
        powers = above * p.log() + (total_V - above + 1) * (1 - p).log()
        result_V += 2 * above * (binomial + powers).exp()
    return result_V


def routing_table(counts: Sequence[Params]) -> str | None:
    """Return the table whose ids separate the sources best; None: none does."""
    found = separation(counts) if counts else {}
    best = max(found, key=lambda table: found[table], default=None)
    return best if best is not None and found[best] >= SEPARATED else None


class Lookups:
    """The ids that a module looks up in one table, recorded while it runs.

    Args:
        module: A module that reads the table through ``nn.Embedding`` or ``nn.EmbeddingBag``.
        table: Name of the table's parameter, for messages.
        names: All names of this parameter.

    Raises:
        MergeError: No such submodule holds the table.
    """

    def __init__(self, module: nn.Module, table: str, names: Collection[str]) -> None:
        owners = [owner for name, owner in lookup_modules(module).items() if name in names]
        if not owners:
            raise MergeError(
                f"route={table}: no nn.Embedding or nn.EmbeddingBag of the module holds it; pass a"
                " teacher of your own, (batch, outputs) -> targets"
            )
        self._owners, self._table = owners, table
        self._ids: list[Tensor] = []
        self._rows: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the lookups of one run of the module within the block."""
        self._ids, self._rows = [], []
        with ExitStack() as stack:
            for owner in self._owners:
                hook = owner.register_forward_hook(self._record, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def shares(self, counts_KV: Tensor, num_rows: int) -> Tensor:
        """Return ``router_shares`` of the recorded rows.

        Raises:
            MergeError: The batch has no ids of the table, or not those of ``num_rows`` rows.
        """
        if not self._ids:
            raise MergeError(
                f"route={self._table}: the batches look nothing up in it; route by another table"
            )
        rows = torch.cat(self._rows)
        if len(rows) and int(rows.max()) >= num_rows:
            raise MergeError(
                f"route={self._table}: lookups of {int(rows.max()) + 1} rows for {num_rows}"
                " outputs; pass a teacher of your own"
            )
        return router_shares(counts_KV, torch.cat(self._ids), rows, num_rows)

    def _record(
        self, owner: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], __: Any
    ) -> None:
        ids = named["input"] if "input" in named else arguments[0]
        offsets = named.get("offsets", arguments[1] if len(arguments) > 1 else None)
        if isinstance(owner, nn.EmbeddingBag) and offsets is not None:
            places = torch.arange(len(ids), device=ids.device)
            rows = torch.searchsorted(offsets.to(ids.device).long(), places, right=True) - 1
        else:
            width = ids[0].numel() if len(ids) else 1
            rows = torch.arange(len(ids), device=ids.device).repeat_interleave(width)
        self._ids.append(ids.reshape(-1).long().cpu())
        self._rows.append(rows.cpu())


def lookup_modules(module: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """Return the submodules that look rows of a table up, by the name of the table's parameter."""
    return {
        f"{name}.weight".removeprefix("."): part
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag)
    }
