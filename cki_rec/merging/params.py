"""Parameter dictionaries, and mixing weights of their entries.

Shapes: K sources; ``*shape`` is the shape of one parameter; ``*s`` is broadcastable to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
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


class NotPossible(MergeError):
    """A step that these models do not allow; a search over recipes goes on without it."""


BLOCK = 1 << 16
"""Rows of a table that are worked on at a time: bounds temporaries."""
ENTRIES = 1 << 20
"""Entries that are checked at a time."""
SHOWN = 3
"""Names that a message lists."""


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
        check_names(first, model, "source 0", f"source {k}")
        for name, tensor in first.items():
            other = model[name]
            if other.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} in source 0, {tuple(other.shape)} in source {k}"
                raise MergeError(f"{name}: shapes differ, {shapes}")
            if other.dtype != tensor.dtype:
                dtypes = f"{tensor.dtype} in source 0, {other.dtype} in source {k}"
                raise MergeError(f"{name}: dtypes differ, {dtypes}")


def check_names(
    first: Collection[str], other: Collection[str], title: str, other_title: str
) -> None:
    """Check that two models have tensors of the same names.

    Raises:
        MergeError: They do not; lists the first few names of each side.
    """
    sides = {
        title: [name for name in first if name not in other],
        other_title: [name for name in other if name not in first],
    }
    if any(sides.values()):
        only = "; ".join(f"only in {side}: {listed(n)}" for side, n in sides.items() if n)
        raise MergeError(f"{title} and {other_title} have different tensors; {only}")


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
            if not is_finite(tensor):
                which = f"{title} {k}" if title == "source" else title
                raise MergeError(f"{name}: {which} has NaN or infinite entries")


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite.

    A finite sum proves it, which is several times faster than a look at every entry. Sums of huge
    entries overflow; then the entries decide.
    """
    for block in _blocks(tensor):
        total = block.sum(dtype=compute_dtype(block))
        if not bool(total.isfinite()) and not bool(block.isfinite().all()):
            return False
    return True


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.ndim == 0:
        yield tensor
    elif tensor.numel():
        rows = max(1, ENTRIES * len(tensor) // tensor.numel())
        yield from tensor.split(rows)


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


def check_shares(weights: MixingWeights) -> None:
    """Check that the weights of every entry are finite, not negative, and of sum 1.

    Raises:
        MergeError: They are not, by name.
    """
    for name, weight in weights.items():
        low = float(weight.min()) if weight.numel() else 0.0
        error = 0.0
        if weight.numel():
            ends = torch.stack(weight.sum(0, dtype=compute_dtype(weight)).aminmax())
            error = float((ends - 1).abs().max())
        if not (low >= -1e-6 and error <= 1e-3):
            raise MergeError(
                f"{name}: mixing weights must be finite, not negative, and sum to 1 over the"
                f" sources (smallest {low:.3g}, largest error of a sum {error:.3g})"
            )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 for float64 tensors."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
