"""Ablations of sources: permuted units or shuffled entries, with which a true gain disappears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from cki_rec.merging.params import Params, generator
from cki_rec.merging.symmetry import Symmetry, random_element, transform

Read: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]
"""(parameter, the rows of a column that are held, the new order of all its rows) -> those rows in
the new order."""


def permute(params: Params, symmetries: Sequence[Symmetry], seed: int) -> Params:
    """Return the same function with its units in other places: a permutation of every symmetry.

    Hidden units and coordinates of embeddings are placed as in an unrelated model. If an
    entry-by-entry merge gains as much with it, the gain is not from the source's knowledge. Values
    do not change, so entropies do not change either. Rotations and signed permutations are
    therefore drawn as plain permutations, and signs stay.

    Reference:
        Ours, for the released protocol of CKI (arXiv 2501.07596).
    """
    draw = generator(seed, "permute")
    moved = [s for s in symmetries if s.kind != "signs"]
    elements = [random_element(replace(s, kind="permutation"), draw) for s in moved]
    return transform(params, moved, elements)


def shuffle(
    params: Params,
    seed: int,
    read: Read = lambda _, column, order: column[order],
    sizes: Mapping[str, int] = {},
) -> Params:
    """Return a random model of equal moments: every tensor's entries, in random order.

    Entries of a table stay in their column, so that unused columns stay zero. Everything that an
    assessment by distribution sees (moments, range, entropy) is as before, all knowledge is gone.

    Args:
        params: A model, or the rows of its tables that this process holds.
        seed: Seed of the orders.
        read: Function that reads a column in another order.
        sizes: Rows of tables of which ``params`` hold some.

    Reference:
        Ours, for the released protocol of CKI (arXiv 2501.07596).
    """
    return {
        name: _shuffled(tensor, generator(seed, name), partial(read, name), sizes.get(name))
        for name, tensor in params.items()
    }


def _shuffled(
    tensor: Tensor,
    draw: torch.Generator,
    read: Callable[[Tensor, Tensor], Tensor],
    size: int | None,
) -> Tensor:
    matrix = tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)
    size = len(matrix) if size is None else size
    columns = [read(col, torch.randperm(size, generator=draw)) for col in matrix.unbind(1)]
    return torch.stack(columns, dim=1).reshape(tensor.shape)
