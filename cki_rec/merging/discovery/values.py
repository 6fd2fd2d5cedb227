"""Tensors inside arguments and results: tuples, lists, dicts, dataclasses and other containers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def is_float(value: object) -> bool:
    """Return whether a value is a tensor of real floating numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of a value with every tensor changed; other objects are shared.

    Args:
        change: Applied to every tensor.
        value: Any nest of containers that ``torch.utils._pytree`` supports, and of dataclasses.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return change(item)
        if not dataclasses.is_dataclass(item) or isinstance(item, type):
            return item
        new = copy.copy(item)
        for field in dataclasses.fields(item):  # also of a frozen one
            object.__setattr__(new, field.name, map_tensors(change, getattr(item, field.name)))
        return new

    return tree_map(leaf, value)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a value, in order."""
    tensors: list[Tensor] = []
    for item in tree_leaves(value):
        if isinstance(item, Tensor):
            tensors.append(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            for field in dataclasses.fields(item):
                tensors += tensors_in(getattr(item, field.name))
    return tensors


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operation, which nest no deeper than lists."""
    tensors: list[Tensor] = []
    for item in (*args, *kwargs.values()):
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, (list, tuple)):
            tensors += [entry for entry in item if isinstance(entry, Tensor)]
    return tensors


def relative_difference(a: Tensor | None, b: Tensor | None) -> float:
    """Return the largest difference of two tensors, relative to the largest entry of ``b``."""
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    if not is_float(b) or not b.numel():
        return 0.0 if torch.equal(a, b) else float("inf")
    gap = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities are equal
    scale = torch.where(b.isfinite(), b.abs(), 0.0).max().clamp(min=1e-12)
    return float((gap.max() / scale).nan_to_num(float("inf")))
