"""Ablations of sources: permuted units or shuffled entries, with which a true gain disappears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cki_rec.merging.params import Params, generator
from cki_rec.merging.symmetry import Symmetry, random_element, transform


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


def shuffle(params: Params, seed: int) -> Params:
    """Return a random model of equal moments: every tensor's entries, in random order.

    Entries of a table stay in their column, so that unused columns stay zero. Everything that an
    assessment by distribution sees (moments, range, entropy) is as before, all knowledge is gone.

    Reference:
        Ours, for the released protocol of CKI (arXiv 2501.07596).
    """
    return {name: _shuffled(tensor, generator(seed, name)) for name, tensor in params.items()}


def _shuffled(tensor: Tensor, draw: torch.Generator) -> Tensor:
    matrix = tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)
    columns = [column[torch.randperm(len(column), generator=draw)] for column in matrix.unbind(1)]
    return torch.stack(columns, dim=1).reshape(tensor.shape)
