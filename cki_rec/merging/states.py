"""State dicts as users pass them: their names without wrappers, their tensors checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from cki_rec.merging.params import MergeError, Params

Model: TypeAlias = nn.Module | Mapping[str, Tensor]
"""A model as users pass it."""

WRAPPERS = ("module", "_orig_mod")
"""Parts of names in the state dicts of wrapped modules: parallel ones, compiled ones."""


def models_of(models: Any) -> list[Any]:
    """Return models as a list.

    Raises:
        MergeError: It is one model, or there is none.
    """
    if isinstance(models, nn.Module | Mapping | Tensor | str) or not isinstance(models, Iterable):
        raise MergeError(
            f"models is one {type(models).__name__}; pass a list of models, merge([a, b])"
        )
    held = list(models)
    if not held:
        raise MergeError("no models to merge: pass a list of at least one")
    return held


def state_of(model: Model, title: str, names: Collection[str] = ()) -> Params:
    """Return the state dict of a model, without wrappers and gradients.

    Args:
        model: A module or a state dict.
        title: Its name in messages.
        names: Names that it should have; wrappers make no difference.

    Raises:
        MergeError: It is no model, or holds values that cannot be merged, by name.
    """
    if isinstance(model, nn.Module):
        state: Mapping[str, Any] = unwrapped(model).state_dict()
        state = renamed(state, names or tuple(state))
    elif isinstance(model, Mapping):
        state = renamed(model, names)
    else:
        raise MergeError(f"{title} is a {type(model).__name__}; pass a module or a state dict")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise MergeError(f"{name}: {title} holds a {kind}; pass state dicts without it")
        if is_lazy(tensor):
            raise MergeError(f"{name}: {title} is not initialized yet; run it on a batch first")
        check_plain(name, tensor, title)
    if not state:
        raise MergeError(f"{title} has no tensors")
    return {name: tensor.detach() for name, tensor in state.items()}


def check_plain(name: str, tensor: Tensor, title: str) -> None:
    """Check that a tensor is dense, real, and has values.

    Raises:
        MergeError: It is not; names it.
    """
    if tensor.is_meta:
        raise MergeError(f"{name}: {title} is on the meta device, without values")
    is_odd = tensor.is_complex() or tensor.is_quantized or tensor.is_nested
    if is_odd or tensor.layout != torch.strided:
        form = f"{tensor.dtype}, {'nested' if tensor.is_nested else tensor.layout}"
        raise MergeError(f"{name}: {title} has a tensor ({form}) that cannot be merged")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers: data-parallel and compiled modules."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def plain(name: str) -> str:
    """Return a name without the parts that wrappers add, wherever they are."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matched(name: str, names: Collection[str]) -> str:
    """Return the one of several names that differs at most by wrappers, or the name itself."""
    if name in names:
        return name
    alike = [known for known in names if plain(known) == plain(name)]
    return alike[0] if len(alike) == 1 else name


def renamed(state: Mapping[str, Any], names: Collection[str] = ()) -> Mapping[str, Any]:
    """Return a dictionary under the names of another one; wrappers make no difference.

    Args:
        state: A state dict, or another dictionary with its names.
        names: The names to match. Empty: prefixes of wrappers are taken off if all names carry
            them, and so are the marks of compiled submodules.

    Raises:
        MergeError: A key is no name.
    """
    if wrong := [name for name in state if not isinstance(name, str)]:
        raise MergeError(f"{wrong[0]!r} is no name of a tensor; pass state dicts")
    if not names:
        new = _without_prefixes(state)
    elif set(state) <= set(names):
        return state
    else:
        known = [plain(name) for name in names]
        places = dict(zip(known, names, strict=True)) if len(set(known)) == len(known) else {}
        new = {places.get(plain(name), name): value for name, value in state.items()}
    return new if len(new) == len(state) else state


def _without_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    new = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    while prefix := next((w for w in WRAPPERS if all(n.startswith(f"{w}.") for n in new)), None):
        if not new:
            break
        new = {name.removeprefix(f"{prefix}."): value for name, value in new.items()}
    return new
