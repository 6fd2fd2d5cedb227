"""Mixing weights that assess nothing: what every method has to beat.

Shapes: weights are ``(K, *s)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import (
    MixingWeights,
    Params,
    check_same,
    compute_dtype,
    equal_weights,
    generator,
)


def average_weights(models: Sequence[Params]) -> MixingWeights:
    """Return 1/K for every source, as ``(K, 1, ..., 1)``.

    Raises:
        ValueError: Models differ.

    Reference:
        CKI (arXiv 2501.07596), baseline "averaging".

    Differs:
        The released baseline averages weights and keeps the biases of the first source.
    """
    check_same(models)
    return {name: equal_weights(tensor, len(models)) for name, tensor in models[0].items()}


def base_weights(models: Sequence[Params]) -> MixingWeights:
    """Return 1 for the first source and 0 for the others, as ``(K, 1, ..., 1)``.

    Raises:
        ValueError: Models differ.
    """
    check_same(models)
    weights = average_weights(models)
    for name, weight in weights.items():
        weights[name] = torch.zeros_like(weight)
        weights[name][0] = 1
    return weights


def random_weights(
    models: Sequence[Params], seed: int, low: float = 0.41, high: float = 0.59
) -> MixingWeights:
    """Return a random share per entry: the control of soft splicing, which has this range.

    For two sources the first gets a uniform number in ``[low, high]`` and the second the rest;
    for more, each gets such a number and all are divided by their sum. The draws depend on the
    seed, the parameter's name and K only, never on device or order of parameters.

    Returns:
        ``(K, *shape)`` per parameter.

    Raises:
        ValueError: Models differ, or not ``0 < low <= high < 1``.

    Reference:
        Ours: what remains of CKI's splicing without its assessment.
    """
    check_same(models)
    if not 0 < low <= high < 1:
        raise ValueError(f"random weights need 0 < low <= high < 1, not {low} and {high}")
    return {
        name: _draw(name, tensor, len(models), seed, low, high)
        for name, tensor in models[0].items()
    }


def _draw(
    name: str, tensor: Tensor, num_sources: int, seed: int, low: float, high: float
) -> Tensor:
    num_draws = 1 if num_sources == 2 else num_sources
    dtype = compute_dtype(tensor)
    uniform = torch.rand(num_draws, *tensor.shape, dtype=dtype, generator=generator(seed, name))
    share = (low + (high - low) * uniform).to(tensor.device)
    if num_sources == 2:
        return torch.cat([share, 1 - share])
    return share / share.sum(dim=0)
