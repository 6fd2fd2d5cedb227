"""The merge of one block of rows, and of the parameters that are held whole.

Shape legend: K sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cki_rec.merging.extras import Processes, Rule
from cki_rec.merging.params import Params
from cki_rec.merging.registry import MergeInputs, Method
from cki_rec.merging.rows import Block, Rows, pieces
from cki_rec.merging.steps import mix_models
from cki_rec.merging.symmetry import Symmetry, transform

ENTRIES = 1 << 18
"""Entries of a table that are merged at a time."""


@dataclass(frozen=True, slots=True)
class Mixer:
    """A method with its inputs and its facts about whole tables."""

    method: Method
    options: Mapping[str, Any]
    fixed: Mapping[str, Rule]
    inputs: MergeInputs
    """Inputs for the parameters that are held whole; ``statistics`` are those of all."""

    def mix(self, models: Sequence[Params]) -> tuple[Params, dict[str, list[float]]]:
        """Return the merged parameters that are held whole, and the shares of the sources."""
        fixed = {name: rule for name, rule in self.fixed.items() if name in models[0]}
        return self._mix(models, self.inputs, fixed)

    def mix_block(self, name: str, block: Block) -> tuple[Tensor, list[float] | None]:
        """Return merged rows of a table, and the mean share of each source in them.

        They are merged in pieces that fit the caches of a processor.
        """
        first = block.models[0]
        merged, means = torch.empty_like(first), list[Tensor]()
        for piece in pieces(block, max(1, ENTRIES // max(1, first[:1].numel()))):
            rows, shares = self._mix_piece(name, piece)
            start = piece.first - block.first
            merged[start : start + len(rows)] = rows
            if shares is not None:
                means.append(len(rows) * torch.tensor(shares, dtype=torch.float64))
        if not means:
            return merged, None
        return merged, (torch.stack(means).sum(0) / max(1, len(first))).tolist()

    def _mix_piece(self, name: str, block: Block) -> tuple[Tensor, list[float] | None]:
        inputs = replace(
            self.inputs,
            counts=[{name: counts} for counts in block.counts] or [{} for _ in block.models],
            base=None if block.base is None else {name: block.base},
            first_rows={name: block.first},
            symmetries=(),
        )
        fixed = {name: self.fixed[name]} if name in self.fixed else {}
        merged, shares = self._mix([{name: tensor} for tensor in block.models], inputs, fixed)
        return merged[name], shares.get(name)

    def _mix(
        self, models: Sequence[Params], inputs: MergeInputs, fixed: Mapping[str, Rule]
    ) -> tuple[Params, dict[str, list[float]]]:
        merged, weights, _ = mix_models(
            *(self.method, models, inputs, self.options, fixed, {}, None), Processes()
        )
        shares = {
            name: weight.reshape(len(models), -1).mean(1).tolist()
            for name, weight in (weights or {}).items()
        }
        return merged, shares


def in_shared_basis(
    rows: Rows, symmetries: Sequence[Symmetry], elements: Sequence[Sequence[Tensor]]
) -> Rows:
    """Return the rows of a table after the group elements of each source; blocks are changed.

    Args:
        rows: The table.
        symmetries: Of the network.
        elements: Per source and symmetry ``(S, S)``.
    """
    acting = only_on([rows.name], symmetries)

    def each(fact: Callable[[Block], Any]) -> Iterable[Any]:
        return rows.each(lambda block: fact(moved(block, rows.name, acting, elements)))

    return replace(rows, each=each)


def moved(
    block: Block,
    name: str,
    symmetries: Sequence[Symmetry],
    elements: Sequence[Sequence[Tensor]],
) -> Block:
    """Return a block of a table after the group elements of each source, in place."""
    change = partial(transform, symmetries=symmetries, in_place=True)
    pairs = zip(block.models, elements, strict=True)
    return replace(block, models=[change({name: x}, elements=each)[name] for x, each in pairs])


def only_on(names: Sequence[str], symmetries: Sequence[Symmetry]) -> list[Symmetry]:
    """Return the symmetries as they act on some parameters; others have no slices."""
    return [
        replace(s, slices=tuple(part for part in s.slices if part.parameter in names))
        for s in symmetries
    ]
