"""Labels: integer arrays, broadcastable to a tensor, that name the unit an element belongs to.

A *node* is one coordinate of one axis of one parameter. A label of a tensor holds a node per
position. Its axes of size above one are the axes that it numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]

UNFIT = (RuntimeError, IndexError, KeyError, TypeError, ValueError, AssertionError)
"""Errors of a rule, or of a decomposition, that does not fit the operands of an operation."""


def axes_of(label: Tensor) -> frozenset[int]:
    """Return the axes of size above one."""
    return frozenset(d for d in range(label.ndim) if label.shape[d] > 1)


def varying(tensor: Tensor) -> frozenset[int]:
    """Return the axes along which values change; all of them if that cannot be seen."""
    if tensor.layout is not torch.strided:
        return axes_of(tensor)
    return frozenset(
        d for d in axes_of(tensor) if not bool((tensor == tensor.narrow(d, 0, 1)).all())
    )


def first(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """Return the first place along some axes, which stay with size one."""
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


def compact(label: Tensor) -> Tensor:
    """Return a label without the axes along which it does not change."""
    return first(label, axes_of(label) - varying(label))


def inner_axis(label: Tensor) -> int:
    """Return the axis along which nodes are neighbors; the other axes count blocks."""

    def step(axis: int) -> int:
        gaps = label.diff(dim=axis).abs()
        return int(gaps[gaps > 0].min()) if bool((gaps > 0).any()) else label.numel() * 2**32

    return min(axes_of(label), key=step)


def lifted(rank: int) -> View:
    """Return a view with leading axes of size one, up to ``rank``."""
    return lambda tensor: tensor[(None,) * (rank - tensor.ndim)]


def channels(rank: int) -> View:
    """Return a view of a vector along axis 1 of a tensor of ``rank``."""
    return lambda tensor: tensor.reshape(1, -1, *(1,) * (rank - 2))
