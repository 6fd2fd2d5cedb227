"""Batches without labels, and the teacher's outputs on them.

Shape legend: K sources, B rows of a batch, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cki_rec.merging.calling import call
from cki_rec.merging.inputs import Sources
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.teachers import Lookups, Teacher, mean_teacher, routed, routing_table


class Targets:
    """Batches and the teacher's outputs on them, computed once if the batches are a list.

    Args:
        teacher: The teacher, as of ``refine``.
        share: Share of the sources in the teacher; the rest is the output of ``start``.
        route: The table whose ids route; None: that whose counts differ most.
        module: The network, in evaluation mode.
        sources: The sources.
        counts: Row counts in the form of the sources.
        start: The first parameters.
        batches: Rows without labels.
    """

    def __init__(
        self,
        teacher: Literal["mean", "router"] | Teacher,
        share: float,
        route: str | None,
        module: nn.Module,
        sources: Sources,
        counts: Sequence[Params],
        start: Params,
        batches: Iterable[Any],
    ) -> None:
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise MergeError(
                f"batches is one {type(batches).__name__}; pass a list of batches, [x]"
            )
        self._teacher, self._share = teacher, share
        self._module, self._sources = module, sources
        self._start, self._batches = start, batches
        self._known: dict[int, Tensor] | None = {} if isinstance(batches, list | tuple) else None
        self._lookups, self._counts_KV = None, torch.empty(0)
        if teacher == "router":
            table = _router_table(route, counts, sources)
            names = {table, *(name for name, first in sources.tied.items() if first == table)}
            self._lookups = Lookups(module, table, names)
            self._counts_KV = torch.stack([source[table].cpu() for source in counts])
        self._number, self._all = 0, self._endless()

    def __iter__(self) -> Targets:
        """Return the targets themselves: they have no end."""
        return self

    def __next__(self) -> tuple[Any, Tensor]:
        """Return the next batch and its target outputs.

        Raises:
            MergeError: There are no more batches, or the teacher gives NaN.
        """
        place, batch = next(self._all)
        self._number += 1
        if self._known is None:
            return batch, self._target(batch)
        if place not in self._known:
            self._known[place] = self._target(batch)
        return batch, self._known[place]

    def _endless(self) -> Iterator[tuple[int, Any]]:
        while True:
            before = self._number
            yield from enumerate(self._batches)
            if self._number == before:
                if not before:
                    raise MergeError("batches is empty; pass at least one batch")
                raise MergeError(
                    f"batches ended after {before} of them; pass a list, a DataLoader, or an"
                    " iterator without an end"
                )

    @torch.no_grad()
    def _target(self, batch: Any) -> Tensor:
        outputs = []
        for k, model in enumerate(self._sources.models):
            with self._lookups.recorded() if self._lookups and k == 0 else nullcontext():
                outputs.append(output_of(self._module, batch, {**self._sources.copied, **model}))
        if not outputs[0].numel():
            raise MergeError(f"refine: batch {self._number - 1} has no rows; leave it out")
        stacked = torch.stack(outputs)
        if self._lookups is not None:
            shares = self._lookups.shares(self._counts_KV, len(outputs[0])).to(stacked.device)
            target = routed(stacked, shares)
        elif callable(self._teacher):
            target = self._teacher(batch, stacked)
            if not isinstance(target, Tensor) or target.shape != outputs[0].shape:
                kind = type(target).__name__
                shape = tuple(target.shape) if isinstance(target, Tensor) else f"a {kind}"
                raise MergeError(
                    f"teacher returned {shape}; the outputs are {tuple(outputs[0].shape)}"
                )
        else:
            target = mean_teacher(batch, stacked)
        if self._share != 1:
            own = output_of(self._module, batch, {**self._sources.copied, **self._start})
            target = self._share * target + (1 - self._share) * own
        if not bool(target.isfinite().all()):
            raise MergeError(
                f"refine: the teacher gives NaN or infinite outputs on batch {self._number - 1}"
            )
        return target


def output_of(module: nn.Module, batch: Any, params: Params) -> Tensor:
    """Return the output of a module that gives one tensor, a row per row of the batch.

    Raises:
        MergeError: Its output has another form.
    """
    output = call(module, batch, params)
    if not isinstance(output, Tensor) or not output.ndim or not output.is_floating_point():
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MergeError(
            f"refine: the module returns {kind}; it must return one floating tensor, a row per row"
            " of the batch"
        )
    return output


def _router_table(route: str | None, counts: Sequence[Params], sources: Sources) -> str:
    if not counts:
        raise MergeError(
            "the teacher 'router' needs row counts of every source (counts); without them use"
            " 'mean'"
        )
    table = sources.tied.get(route, route) if route else routing_table(counts)
    if table is None:
        raise MergeError(
            "the teacher 'router' needs sources that have seen different ids, and these have seen"
            " the same ones equally often; use 'mean', or name a table (route, of refine)"
        )
    if table not in counts[0]:
        known = ", ".join(counts[0])
        raise MergeError(f"route={route}: no counts of this table; counts are of {known}")
    return table
