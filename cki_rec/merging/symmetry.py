"""Symmetries: changes of a network's parameters that do not change its outputs, as data.

Two models that were trained apart agree, if at all, up to such changes. So they are undone before
parameters are merged. Models declare symmetries and ``alignment`` applies them. A ``Symmetry`` is
names, axes and numbers, nothing else. Names are those of ``state_dict()``, buffers included.

To act with a matrix ``Q`` on a parameter along an axis of a slice means

    x'[..., j, ...] = sum over i of x[..., i, ...] * Q[i, j]

where i and j run over the units of the slice; a unit is ``width`` entries in a row. One ``Q`` acts
on all slices of a symmetry; on a slice that is not ``signed``, the absolute values of its entries
act. Units may be apart (``step``) or anywhere (``starts``).

Most symmetries of a model act on different units, and then their order does not matter. Two may
also act on the same ones: signs on the units of a permutation, or rotations inside heads that are
permuted as a whole. Elements are therefore applied in the order of the list of symmetries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cki_rec.merging.params import BLOCK, MergeError, Params

TOLERANCE = 1e-5
"""Largest change of a logit, relative to the largest logit or to 1, that is rounding."""
PIECE = 1 << 12
"""Rows of units that are moved at a time, in float64: they fit the caches of a processor."""
Kind = Literal["rotation", "signed_permutation", "permutation", "signs"]
"""The matrices Q that may act: orthogonal ones (reflections too), permutations of which some rows
are negated, permutations, diagonal ones of 1 and -1."""


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
    step: int = 0
    """Distance of the starts of two units; 0: ``width``."""
    starts: tuple[int, ...] = ()
    """Start of every unit, for units that are not evenly spaced; ``start`` and ``step`` are unused
    then."""


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


def check_list(symmetries: Any) -> None:
    """Check that an argument is a list of symmetries.

    Raises:
        MergeError: It is not.
    """
    if isinstance(symmetries, str) or not isinstance(symmetries, Sequence):
        kind = type(symmetries).__name__
        raise MergeError(f"symmetries is a {kind}; pass those of find_symmetries")
    for symmetry in symmetries:
        if not isinstance(symmetry, Symmetry):
            kind = type(symmetry).__name__
            raise MergeError(f"symmetries holds a {kind}; pass those of find_symmetries")


def check_symmetry(symmetry: Symmetry, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that a symmetry fits the parameters of a network.

    Args:
        symmetry: The symmetry.
        shapes: Shapes of the parameters by name.

    Raises:
        MergeError: It does not; names the parameter.
    """
    if symmetry.kind not in get_args(Kind):
        raise MergeError(f"symmetry of kind {symmetry.kind!r}: one of {', '.join(get_args(Kind))}")
    size = symmetry.size
    if size < 1:
        raise MergeError(f"symmetry of size {size}: must be at least 1")
    for part in symmetry.slices:
        name = part.parameter
        if name not in shapes:
            raise MergeError(f"{name}: named by a symmetry, but is no parameter")
        shape = tuple(shapes[name])
        if not 0 <= part.axis < len(shape):
            raise MergeError(f"{name}: a symmetry names axis {part.axis}, the shape is {shape}")
        if not fits(part, size, shape):
            raise MergeError(f"{name}: a symmetry of {size} units does not fit the shape {shape}")


def fits(part: Slice, size: int, shape: Sequence[int]) -> bool:
    """Return whether a slice of ``size`` units lies inside a shape."""
    steps = (part.start, part.start + (size - 1) * (part.step or part.width))
    first, last = (min(part.starts), max(part.starts)) if part.starts else steps
    is_inside = 0 <= part.axis < len(shape) and 0 <= first <= last
    return (
        is_inside
        and len(part.starts) in (0, size)
        and last + part.width <= shape[part.axis]
        and all(a < len(shape) and 0 <= b < c <= shape[a] for a, b, c in part.within)
    )


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
            move_units(tensor, part, matrix, symmetry.kind)
    return moved


def random_element(symmetry: Symmetry, draw: torch.Generator) -> Tensor:
    """Return a random element of the group."""
    size = symmetry.size
    if symmetry.kind == "rotation":
        q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
        rotation: Tensor = q * r.diagonal().sign()
        return rotation
    element = torch.eye(size, dtype=torch.float64)
    if symmetry.kind != "signs":
        element = element[torch.randperm(size, generator=draw)]
    if symmetry.kind in ("signed_permutation", "signs"):
        element = element * (torch.randint(0, 2, (size,), generator=draw) * 2 - 1)
    return element


def units_of(tensor: Tensor, part: Slice, size: int) -> Tensor:
    """Return the units ``(..., width, S)`` of a slice of a parameter.

    They are a view, but a copy if the slice has ``starts`` (``set_units`` writes to either).
    """
    tensor = _inside(tensor, part)
    if part.starts:
        units = tensor.index_select(part.axis, _entries(part, size).to(tensor.device))
        units = units.unflatten(part.axis, (size, part.width))
    elif part.step in (0, part.width):
        tensor = tensor.narrow(part.axis, part.start, size * part.width)
        units = tensor.unflatten(part.axis, (size, part.width))
    else:
        span = (size - 1) * part.step + part.width
        units = tensor.narrow(part.axis, part.start, span).unfold(part.axis, part.width, part.step)
        return units.movedim((-1, part.axis), (-2, -1))
    moved: Tensor = units.movedim((part.axis + 1, part.axis), (-2, -1))
    return moved


def set_units(tensor: Tensor, part: Slice, units: Tensor) -> None:
    """Set the units of a slice of a parameter to ``units`` ``(..., width, S)``, in place."""
    size = units.shape[-1]
    if not part.starts:
        units_of(tensor, part, size).copy_(units)
        return
    entries = units.movedim((-2, -1), (part.axis + 1, part.axis)).flatten(part.axis, part.axis + 1)
    index = _entries(part, size).to(tensor.device)
    _inside(tensor, part).index_copy_(part.axis, index, entries.to(tensor.dtype))


def move_units(tensor: Tensor, part: Slice, element: Tensor, kind: str) -> None:
    """Replace the units of a slice of a parameter by units @ ``element``, in place."""
    size = len(element)
    if not part.starts:
        apply_element(units_of(tensor, part, size), element, kind)
        return
    inner = _inside(tensor, part)
    rest = replace(part, within=())
    for block in inner.split(BLOCK) if part.axis else (inner,):
        units = units_of(block, rest, size)
        apply_element(units, element, kind)
        set_units(block, rest, units)


def _inside(tensor: Tensor, part: Slice) -> Tensor:
    """Return the view of a parameter inside which a slice lies."""
    for axis, start, stop in part.within:
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor


def _entries(part: Slice, size: int) -> Tensor:
    """Return the places of all entries of a slice with ``starts``, unit by unit."""
    if len(part.starts) != size:
        raise MergeError(
            f"{part.parameter}: a slice has {len(part.starts)} starts, its symmetry {size} units;"
            " give one start per unit"
        )
    return (torch.tensor(part.starts)[:, None] + torch.arange(part.width)).flatten()


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
    if not bool(before.isfinite().any()):
        raise MergeError(f"{name}: the network returns no finite number on this batch")
    gap = torch.where(after == before, 0.0, (after - before).abs())  # equal infinities are equal
    largest = float(before[before.isfinite()].abs().max())
    if not float(gap.max()) <= TOLERANCE * max(1.0, largest):
        raise MergeError(
            f"{name}: alignment changed its scores by {float(gap.max()):.1e}; its network does"
            " not have these symmetries; merge without alignment"
        )


def apply_element(units: Tensor, element: Tensor, kind: str) -> None:
    """Replace ``units`` ``(..., S)`` by ``units @ element``, in place, a block at a time."""
    element = element.to(units.device)
    order, signs = element.abs().argmax(0), element.sum(0)  # of a permutation
    is_signed = kind != "rotation" and bool((signs < 0).any())
    views = units if units.ndim > 1 else units[None]
    for block in views.split(PIECE):
        if kind == "rotation":
            block.copy_((block.double() @ element).to(block.dtype))
        elif kind == "signs":
            if is_signed:
                block.copy_(torch.where(signs < 0, -block, block))
        else:
            moved = block[..., order]
            block.copy_(torch.where(signs < 0, -moved, moved) if is_signed else moved)
