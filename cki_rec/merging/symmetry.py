"""Symmetries: changes of a network's parameters that do not change its outputs, as data.

Two models that were trained apart agree, if at all, up to such changes. So they are undone before
parameters are merged. Models declare symmetries and ``alignment`` applies them. A ``Symmetry`` is
names, axes and numbers, nothing else. Names are those of ``state_dict()``, buffers included.

To act with a matrix ``Q`` on a parameter along an axis of a slice means

    x'[..., j, ...] = sum over i of x[..., i, ...] * Q[i, j]

where i and j run over the units of the slice; a unit is ``width`` entries in a row. One ``Q`` acts
on all slices of a symmetry; on a slice that is not ``signed``, the absolute values of its entries
act. Elements of different symmetries of a model may be applied one after the other, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cki_rec.merging.params import BLOCK, MergeError, Params

TOLERANCE = 1e-5
"""Largest change of a logit, relative to the largest logit or to 1, that is rounding."""
Kind = Literal["rotation", "signed_permutation", "permutation"]
"""The matrices Q that may act: orthogonal ones (reflections too), permutations of which some rows
are negated, permutations."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of one parameter that a symmetry moves along one axis."""

    parameter: str
    axis: int
    start: int = 0
    """Where the units begin on the axis."""
    width: int = 1
    """Entries of a unit. Other entries of the axis stay."""
    signed: bool = True
    """Whether the signs of Q apply to the units."""
    within: tuple[tuple[int, int, int], ...] = ()
    """``(axis, start, stop)``: the rest of the parameter, on another axis, stays."""


@dataclass(frozen=True, slots=True)
class Symmetry:
    """A group of matrices, ``size`` by ``size``, and all that they act on together."""

    kind: Kind
    size: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class LogitScale:
    """How parameters alone scale and shift a logit.

    With every named parameter multiplied by ``s ** degree`` (s > 0), the logit is by s.
    """

    degrees: dict[str, float]
    shift: str
    """A parameter of one entry, added to the logit; its degree is 1."""


def transform(
    params: Params,
    symmetries: Sequence[Symmetry],
    elements: Sequence[Tensor],
    in_place: bool = False,
) -> Params:
    """Return a model with a group element of every symmetry applied; its outputs do not change.

    Parameters that nothing moves are shared with ``params``. Permutations move numbers bit for
    bit; rotations are computed in float64, ``BLOCK`` rows at a time.

    Args:
        params: One model.
        symmetries: Of its network.
        elements: Per symmetry ``(S, S)``.
        in_place: Move the tensors of ``params`` themselves: no memory for a second model.
    """
    moved = dict(params)
    for symmetry, element in zip(symmetries, elements, strict=True):
        if bool((element.diagonal() == 1).all()):  # of an orthogonal matrix: the identity
            continue
        for part in symmetry.slices:
            tensor = moved[part.parameter]
            if tensor is params[part.parameter] and not in_place:
                tensor = moved[part.parameter] = tensor.clone()
            matrix = element if part.signed else element.abs()
            apply_element(units_of(tensor, part, symmetry.size), matrix, symmetry.kind)
    return moved


def random_element(symmetry: Symmetry, draw: torch.Generator) -> Tensor:
    """Return a random element of the group."""
    size = symmetry.size
    if symmetry.kind == "rotation":
        q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
        rotation: Tensor = q * r.diagonal().sign()
        return rotation
    element = torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=draw)]
    if symmetry.kind == "signed_permutation":
        element = element * (torch.randint(0, 2, (size,), generator=draw) * 2 - 1)
    return element


def units_of(tensor: Tensor, part: Slice, size: int) -> Tensor:
    """Return a view ``(..., width, S)`` of a slice of a parameter."""
    for axis, start, stop in part.within:
        tensor = tensor.narrow(axis, start, stop - start)
    tensor = tensor.narrow(part.axis, part.start, size * part.width)
    units = tensor.unflatten(part.axis, (size, part.width))
    moved: Tensor = units.movedim((part.axis + 1, part.axis), (-2, -1))
    return moved


@torch.no_grad()
def scores_of(module: nn.Module, params: Params, inputs: Any) -> Tensor:
    """Return the outputs of a network with these parameters on one batch."""
    scores: Tensor = functional_call(module, params, (inputs,))
    return scores


def check_scores(after: Tensor, before: Tensor, name: str) -> None:
    """Check that scores are equal up to rounding.

    Raises:
        MergeError: They are not.
    """
    error = float((after - before).abs().max())
    if not error <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise MergeError(
            f"{name}: alignment changed its scores by {error:.1e}; its network does not have the"
            " symmetries that its model declares; use align.by=none"
        )


def apply_element(units: Tensor, element: Tensor, kind: str) -> None:
    """Replace ``units`` ``(..., S)`` by ``units @ element``, in place, a block at a time."""
    is_permuted = kind != "rotation"
    order, signs = element.abs().argmax(0), element.sum(0)  # of a permutation
    is_signed = is_permuted and bool((signs < 0).any())
    views = units if units.ndim > 1 else units[None]
    for start in range(0, len(views), BLOCK):
        block = views[start : start + BLOCK]
        if is_permuted:
            moved = block[..., order]
            block.copy_(torch.where(signs < 0, -moved, moved) if is_signed else moved)
        else:
            block.copy_((block.double() @ element).to(block.dtype))
