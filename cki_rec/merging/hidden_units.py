"""Hidden units of a network, from its symmetries: the slices that make and read them.

Shape legend: S units of a hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cki_rec.merging.params import Params
from cki_rec.merging.symmetry import Slice, Symmetry, set_units, units_of


@dataclass(frozen=True, slots=True)
class Layer:
    """Units that may be exchanged."""

    size: int
    made: tuple[Slice, ...]
    """Slices on axis 0; first the matrix whose rows the units are."""
    read: tuple[Slice, ...]


def hidden_layers(params: Params, symmetries: Sequence[Symmetry]) -> list[Layer]:
    """Return the hidden layers, in the order in which they are declared: inputs first.

    They are the permutations, signs apart, that begin with rows of a matrix. Coordinates of
    embeddings, experts and heads are not among them.
    """
    layers = []
    for symmetry in symmetries:
        first = symmetry.slices[0]
        is_unit = first.axis == 0 and first.width == 1 and not first.within
        is_permuted = symmetry.kind in ("permutation", "signed_permutation")
        if is_permuted and is_unit and params[first.parameter].ndim == 2:
            made = tuple(part for part in symmetry.slices if part.axis == 0)
            read = tuple(part for part in symmetry.slices if part.axis != 0)
            layers.append(Layer(symmetry.size, made, read))
    return layers


def unit_covariance(second: Tensor, start: int, size: int) -> Tensor:
    """Return ``(K, size, K, size)``: of inputs of a layer in every two models, from ``start`` on.

    Args:
        second: ``MergeInputs.moments`` of the layer, ``(K, I, K, I)``; the last input is 1.
        start: The first of the inputs.
        size: How many.
    """
    span = slice(start, start + size)
    mean = second[:, span, 0, -1]
    return second[:, span, :, span] - torch.einsum("ki,jm->kijm", mean, mean)


def map_units(params: Params, parts: Sequence[Slice], matrix: Tensor) -> None:
    """Replace the units x of slices by x @ ``matrix``, ``(S, S)``; tensors must be copies."""
    size = len(matrix)
    for part in parts:
        tensor = params[part.parameter]
        units = units_of(tensor, part, size)
        moved = torch.einsum("...i,ij->...j", units, matrix.to(units.dtype))
        set_units(tensor, part, moved)


def copied(models: Sequence[Params], layers: Sequence[Layer]) -> list[Params]:
    """Return models whose slices of hidden units are float64 copies; the rest is shared."""
    names = {part.parameter for layer in layers for part in (*layer.made, *layer.read)}
    return [
        {n: t.detach().to(torch.float64, copy=True) if n in names else t for n, t in m.items()}
        for m in models
    ]
