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

    Args:
        module: The module.
        batch: See ``arguments_of``.
        params: Parameters and buffers to run it with; None: its own. Tied ones may be named once.
    """
    positional, named = arguments_of(batch)
    with uncompiled():
        if params is None:
            return module(*positional, **named)
        return functional_call(module, params, positional, named)


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
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise NotPossible(f"the module returns a {kind}; layers are fitted to one logit per row")
    if output.ndim == 2 and output.shape[1] == 1:
        return output[:, 0]
    if output.ndim != 1:
        shape = tuple(output.shape)
        raise NotPossible(f"the module returns {shape}; layers are fitted to one logit per row")
    return output


def outputs_of(module: nn.Module, batch: Any, params: Params | None = None) -> Tensor:
    """Return all floating outputs of a module on a batch, one after the other.

    Raises:
        MergeError: It has none.
    """
    outputs = list(tensors_of(call(module, batch, params)))
    if not outputs:
        raise MergeError("the module returns no floating tensor")
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
