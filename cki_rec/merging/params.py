"""Parameter dictionaries, and mixing weights of their entries.

Shapes: K sources; ``*shape`` is the shape of one parameter; ``*s`` is broadcastable to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""One model: a floating tensor per name. Counts and scores have this form too."""
MixingWeights: TypeAlias = Annotated[dict[str, Tensor], "mixing weights"]
"""Per name ``(K, *s)``: the share of each source, non-negative, sum 1 over K."""
STATISTICS = ("running_mean", "running_var")
"""Last words of buffers that batch norms keep: averaged, whatever a method does with weights."""


class MergeError(ValueError):
    """Models, options or inputs that cannot be merged: an error of the caller."""


BLOCK = 1 << 16
"""Rows of a table that are worked on at a time: bounds temporaries."""


def check_same(models: Sequence[Params]) -> None:
    """Check that all models have the same names, shapes and floating dtypes.

    Raises:
        MergeError: There is no model, or models differ; names the first offending tensor.
    """
    if not models:
        raise MergeError("no models to merge")
    first = models[0]
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            raise MergeError(f"{name}: {tensor.dtype} is not a floating dtype")
    for k, model in enumerate(models[1:], start=1):
        for name in [*first, *model]:
            if name not in model or name not in first:
                raise MergeError(f"{name}: only one of sources 0 and {k} has this tensor")
        for name, tensor in first.items():
            other = model[name]
            if other.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} in source 0, {tuple(other.shape)} in source {k}"
                raise MergeError(f"{name}: shapes differ, {shapes}")
            if other.dtype != tensor.dtype:
                dtypes = f"{tensor.dtype} in source 0, {other.dtype} in source {k}"
                raise MergeError(f"{name}: dtypes differ, {dtypes}")


def check_base(models: Sequence[Params], base: Params) -> None:
    """Check that models, and the one they started from, have the same names, shapes and dtypes.

    Raises:
        MergeError: There is no model, or something differs; names the first offending tensor.
    """
    check_same(models)
    try:
        check_same([models[0], base])
    except MergeError as error:
        raise MergeError(f"the base (here source 1) does not fit: {error}") from None


def check_finite(models: Sequence[Params], title: str = "source") -> None:
    """Check that no entry is NaN or infinite.

    Raises:
        MergeError: One is; names tensor and model.
    """
    for k, model in enumerate(models):
        for name, tensor in model.items():
            blocks = tensor.split(BLOCK) if tensor.ndim else [tensor]
            if not all(bool(block.isfinite().all()) for block in blocks):
                which = f"{title} {k}" if title == "source" else title
                raise MergeError(f"{name}: {which} has NaN or infinite entries")


def check_weights(weights: MixingWeights, models: Sequence[Params]) -> None:
    """Check that there is a ``(K, *s)`` weight for every parameter, ``*s`` broadcastable.

    Raises:
        MergeError: A weight is missing, superfluous or of the wrong shape, by name.
    """
    for name in [*models[0], *weights]:
        if name not in weights:
            raise MergeError(f"{name}: has no weights")
        if name not in models[0]:
            raise MergeError(f"{name}: has weights but is no parameter")
    for name, tensor in models[0].items():
        num_sources, *shape = weights[name].shape
        fits = len(shape) == tensor.ndim and all(
            weight_size in (1, size) for weight_size, size in zip(shape, tensor.shape, strict=True)
        )
        if num_sources != len(models) or not fits:
            actual, expected = tuple(weights[name].shape), (len(models), *tensor.shape)
            raise MergeError(f"{name}: weights of shape {actual} do not fit {expected}")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64 tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(params: Params) -> Params:
    """Return a model to compute with: half precision becomes float32, the rest is shared."""
    return {name: tensor.to(compute_dtype(tensor)) for name, tensor in params.items()}


def equal_weights(tensor: Tensor, num_sources: int) -> Tensor:
    """Return ``(K, 1, ..., 1)`` of 1/K, for one parameter."""
    shape = (num_sources, *[1] * tensor.ndim)
    return torch.full(shape, 1 / num_sources, dtype=compute_dtype(tensor), device=tensor.device)


def generator(seed: int, name: str) -> torch.Generator:
    """Return the CPU generator of one tensor.

    It depends on nothing but the arguments: not on the order of tensors, the device or the
    process.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
