"""Methods without assessment, as ablations of methods that assess.

Shapes: weights are ``(K, *s)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import (
    MergeError,
    MixingWeights,
    Params,
    check_same,
    compute_dtype,
)
from cki_rec.merging.registry import method
from cki_rec.merging.selection import constant_weights
from cki_rec.merging.sparsification import uniform


@method(row_wise=True, is_ordered=True, reference="ours")
def first(models: Sequence[Params]) -> MixingWeights:
    """Keep the first source as it is: the ablation of training beside a merged head.

    Returns:
        1 for the first source and 0 for the others, as ``(K, 1, ..., 1)``.

    Raises:
        MergeError: Models differ.
    """
    check_same(models)
    return constant_weights(models, [float(k == 0) for k in range(len(models))])


@method(row_wise=True, is_ordered=True, full_weights=True, reference="ours")
def random(
    models: Sequence[Params],
    seed: int,
    low: float = 0.41,
    high: float = 0.59,
    *,
    first_rows: Mapping[str, int] | None = None,
) -> MixingWeights:
    """Mix with a random share per entry, in the range of soft splicing: an ablation of CKI.

    For two sources the first has a uniform number in ``[low, high]`` and the second the rest. For
    more, each has such a number, divided by their sum. The draws depend on the seed, the name of
    the parameter, the row and K only, never on the device or the order of parameters.

    Args:
        models: One per source.
        seed: Of the draws.
        low: Smallest share.
        high: Largest share.
        first_rows: Number of the first row of parameters that are not whole.

    Returns:
        ``(K, *shape)`` per parameter.

    Raises:
        MergeError: Models differ, or not ``0 < low <= high < 1``.

    Reference:
        Ours: CKI's splicing without its assessment.
    """
    check_same(models)
    if not 0 < low <= high < 1:
        raise MergeError(f"random weights need 0 < low <= high < 1, not {low} and {high}")
    return {
        name: _draw(name, tensor, len(models), seed, low, high, (first_rows or {}).get(name, 0))
        for name, tensor in models[0].items()
    }


def _draw(
    name: str, tensor: Tensor, num_sources: int, seed: int, low: float, high: float, first: int
) -> Tensor:
    num_draws = 1 if num_sources == 2 else num_sources
    names = [f"{name}/{k}" for k in range(num_draws)]
    draws = torch.stack([uniform(tensor, seed, each, first) for each in names])
    share = low + (high - low) * draws.to(compute_dtype(tensor))
    if num_sources == 2:
        return torch.cat([share, 1 - share])
    return share / share.sum(dim=0)
