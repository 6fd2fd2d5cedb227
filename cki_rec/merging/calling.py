"""One convention to run a module on a batch, whatever the module takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from cki_rec.merging.params import MergeError, NotPossible, Params


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a batch stands for.

    A tuple or a list holds positional arguments, a mapping holds keyword arguments. All else, a
    named tuple too, is one argument.
    """
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return tuple(batch), {}
    return (batch,), {}


def call(module: nn.Module, batch: Any, params: Params | None = None) -> Any:
    """Return the output of a module on a batch.

    With ``params``, neither these nor the module change: buffers that a forward writes are copies.
    Every call draws the same random numbers, and the global random state stays.

    Args:
        module: The module.
        batch: See ``arguments_of``. With ``params``, numbers of a shorter type are widened to that
            of all parameters.
        params: Parameters and buffers to run it with; None: its own. Tied ones may be named once.

    Raises:
        MergeError: The module fails; only with ``params``.
    """
    positional, named = arguments_of(batch)
    if params is None:
        with uncompiled():
            return module(*positional, **named)
    types = {tensor.dtype for tensor in params.values()}
    if len(types) == 1:
        positional, named = tree_map(lambda x: _widened(x, *types), (positional, named))
    buffers = {n: params.get(n, buffer).clone() for n, buffer in module.named_buffers()}
    try:
        with uncompiled(), torch.random.fork_rng(cuda_devices()):
            torch.manual_seed(0)
            return functional_call(module, {**params, **buffers}, positional, named)
    except MergeError:
        raise
    except Exception as error:
        raise MergeError(f"module fails on a batch ({reason_of(error)})") from error


def cuda_devices() -> list[int]:
    """Return the CUDA devices whose random state a run may change."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def reason_of(error: Exception) -> str:
    """Return one line about an exception."""
    name, lines = type(error).__name__, str(error).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """Return a floating tensor of a shorter type in ``dtype``; all else stays as it is."""
    is_short = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_short and value.itemsize < dtype.itemsize else value


def is_logits(output: Any) -> bool:
    """Return whether an output is one number per row, ``(B,)`` or ``(B, 1)``."""
    is_tensor = isinstance(output, Tensor) and output.is_floating_point()
    return is_tensor and (output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled parts of modules as they are written: compiled code calls no hooks.

    torch 2.4 and 2.5 cannot do so. The compiler is not imported for it, which takes seconds.
    """
    is_possible = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    with torch.compiler.set_stance("force_eager") if is_possible else nullcontext():
        yield


def logits_of(module: nn.Module, batch: Any, params: Params | None = None) -> Tensor:
    """Return ``(B,)`` outputs of a module that gives one number per row, ``(B,)`` or ``(B, 1)``.

    Raises:
        NotPossible: Its output has another form.
    """
    output = call(module, batch, params)
    if is_logits(output):
        logits: Tensor = output.flatten()
        return logits
    form = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise NotPossible(
        f"the module returns {form}; select_units and project need one number per row: use"
        " repair=least_squares, rescale or none"
    )


def check_moments(moments: Mapping[str, Tensor]) -> None:
    """Check that moments of activations are finite.

    Args:
        moments: By the name of the parameter beside the activations.

    Raises:
        MergeError: They are not; names the parameter.
    """
    for name, tensor in moments.items():
        if not bool(tensor.isfinite().all()):
            raise MergeError(f"{name}: activations are NaN or infinite on batches")


def num_rows(output: Any, batch: Any) -> int:
    """Return the number of rows of an output: of its first tensor with rows, else of the batch."""
    sizes = (len(tensor) for tensor in tensors_of(output) if tensor.ndim)
    return next(sizes, None) or rows_of(batch)


def outputs_of(module: nn.Module, batch: Any, params: Params | None = None) -> Tensor:
    """Return all floating outputs of a module on a batch, one after the other.

    Raises:
        MergeError: It has none.
    """
    outputs = list(tensors_of(call(module, batch, params)))
    if not any(output.numel() for output in outputs):
        raise MergeError(
            "the module returns no floating number on a batch; pass batches with rows"
        )
    return torch.cat([output.flatten() for output in outputs])


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for entry in fields(output):
            yield from tensors_of(getattr(output, entry.name))


def rows_of(batch: Any) -> int:
    """Return the number of rows of a batch: of its first tensor, or its length."""
    positional, named = arguments_of(batch)
    for value in (*positional, *named.values()):
        if isinstance(value, Mapping | list | tuple):
            return rows_of(value)
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
        if not isinstance(value, Tensor) and hasattr(value, "__len__"):
            return len(value)
    return 1


@contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the modes of all its parts afterwards."""
    modes = {} if module is None else {part: part.training for part in module.modules()}
    try:
        if module is not None:
            module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
