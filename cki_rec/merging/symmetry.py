"""What may change in a network's parameters without any change of its outputs, as data.

Two models that were trained apart agree, if at all, up to such changes, so they are undone before
parameters are merged. Models declare them, ``integration`` applies them: a ``Symmetry`` is names,
axes and numbers, nothing else. Names are those of ``state_dict()``, buffers included.

To act with a matrix ``Q`` on a parameter along an axis of a slice means

    x'[..., j, ...] = sum over i of x[..., i, ...] * Q[i, j]

where i and j run over the units of the slice; a unit is ``width`` entries in a row. One ``Q`` acts
on all slices of a symmetry; on a slice that is not ``signed``, the absolute values of its entries
act. Elements of different symmetries of a model may be applied one after the other, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """Whether units are negated where Q says so."""
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
