"""The inputs of a merge as users pass them, checked and brought to one form.

Modules become state dicts, wrappers are taken off, and each tied tensor is held once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from cki_rec.merging.params import MergeError, Params, check_names, compute_dtype
from cki_rec.merging.registry import Score
from cki_rec.merging.symmetry import Symmetry

Model: TypeAlias = nn.Module | Mapping[str, Tensor]
"""A model as users pass it."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of the names in the state dicts of wrapped modules: parallel ones, compiled ones."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of a merge in one form, and the way back to a state dict."""

    models: list[Params]
    """Per source the tensors that are merged: floating, on one device, in the type to compute in,
    tied ones once."""
    names: tuple[str, ...]
    """All names of a state dict, in its order."""
    types: dict[str, torch.dtype]
    """Types of the merged tensors in the result."""
    copied: Params
    """Integer and boolean tensors of the first source."""
    tied: dict[str, str]
    """Name -> the name under which its tensor is merged."""

    def restored(self, params: Params, is_new: bool = True) -> Params:
        """Return the state dict of a merged model.

        Args:
            params: The merged tensors.
            is_new: Share no memory with the sources.
        """
        shared = set()
        if is_new:
            shared = {_storage(tensor) for model in self.models for tensor in model.values()}
        state: Params = {}
        for name in self.names:
            if name in self.tied:
                continue
            if name in self.copied:
                state[name] = self.copied[name].clone() if is_new else self.copied[name]
                continue
            tensor = params[name].to(self.types[name])
            state[name] = tensor.clone() if _storage(tensor) in shared else tensor
        return {name: state[self.tied.get(name, name)] for name in self.names}


def sources_of(
    models: Iterable[Model], dtype: torch.dtype | None = None, module: nn.Module | None = None
) -> Sources:
    """Return the sources of a merge in one form; their tensors are shared where possible.

    Args:
        models: Modules or state dicts.
        dtype: Floating type of the result; None: that of the first source.
        module: A module that state dicts belong to; its names are no prefixes of wrappers.

    Raises:
        MergeError: No model, no tensors, or tensors that differ; names the first.
    """
    if isinstance(models, nn.Module | Mapping | Tensor | str) or not isinstance(models, Iterable):
        raise MergeError(
            f"models is one {type(models).__name__}; pass a list of models, merge([a, b])"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise MergeError(f"dtype={dtype}: must be a floating type, such as torch.float32")
    states = [state_of(model, f"source {k}", module) for k, model in enumerate(models)]
    if not states:
        raise MergeError("no models to merge: pass a list of at least one")
    first = states[0]
    merged = [name for name, tensor in first.items() if tensor.is_floating_point()]
    for k, state in enumerate(states[1:], start=1):
        _check_alike(first, state, k)
    tied = _ties(states, merged, module)
    names = [name for name in merged if name not in tied]
    wide = {n: _widest([state[n] for state in states]) for n in names}
    return Sources(
        models=[{n: s[n].to(first[n].device, wide[n]) for n in names} for s in states],
        names=tuple(first),
        types={n: dtype or first[n].dtype for n in names},
        copied={n: tensor for n, tensor in first.items() if not tensor.is_floating_point()},
        tied=tied,
    )


def state_of(model: Model, title: str, module: nn.Module | None = None) -> Params:
    """Return the state dict of a model, without wrappers and gradients.

    Raises:
        MergeError: It is no model, or holds values that cannot be merged, by name.
    """
    if isinstance(model, nn.Module):
        state: Mapping[str, Any] = unwrapped(model).state_dict()
    elif isinstance(model, Mapping):
        state = without_prefixes(model, module)
    else:
        raise MergeError(f"{title} is a {type(model).__name__}; pass a module or a state dict")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise MergeError(f"{name}: {title} holds a {kind}; pass tensors only")
        if is_lazy(tensor):
            raise MergeError(f"{name}: {title} is not initialized yet; run it on a batch first")
        if tensor.is_meta:
            raise MergeError(f"{name}: {title} is on the meta device, without values")
        if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            form = f"{tensor.dtype}, {tensor.layout}"
            raise MergeError(f"{name}: {title} has a tensor ({form}) that cannot be merged")
    if not state:
        raise MergeError(f"{title} has no tensors")
    return {name: tensor.detach() for name, tensor in state.items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers: data-parallel and compiled modules."""
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def without_prefixes(
    state: Mapping[str, Any], module: nn.Module | None = None
) -> Mapping[str, Any]:
    """Return a dictionary without the prefixes of wrappers that all of its names carry.

    Args:
        state: A state dict, or another dictionary with its names.
        module: The module it belongs to; a prefix of all its names stays.
    """
    if wrong := [name for name in state if not isinstance(name, str)]:
        raise MergeError(f"{wrong[0]!r} is no name of a tensor; pass state dicts")
    known = set() if module is None else {*unwrapped(module).state_dict()}
    while True:
        prefix = next((p for p in PREFIXES if state and all(n.startswith(p) for n in state)), None)
        if prefix is None or (known and all(name.startswith(prefix) for name in known)):
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}


def base_of(base: Model, sources: Sources, title: str = "the base") -> Params:
    """Return the base of all sources, or another model of their network, in their form.

    Raises:
        MergeError: It has other tensors than the sources.
    """
    state = state_of(base, title)
    first = sources.models[0]
    missing = [n for n in sources.names if n not in state]
    if missing or len(state) > len(sources.names):
        check_names(sources.names, state, "source 0", title)
    for name, tensor in first.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the sources, {tuple(state[name].shape)} in {title}"
            raise MergeError(f"{name}: shapes differ, {shapes}")
    return {name: state[name].to(like.device, like.dtype) for name, like in first.items()}


def counts_of(counts: Any, sources: Sources) -> list[Params]:
    """Return row counts under the names of the merged tensors, as tensors.

    Raises:
        MergeError: Counts that do not fit the sources, or are negative, by name.
    """
    if not isinstance(counts, list | tuple):
        raise MergeError("counts: pass one dictionary per source, table -> (rows,) counts")
    if not counts:
        return []
    first = sources.models[0]
    if len(counts) != len(sources.models):
        raise MergeError(f"counts of {len(counts)} sources for {len(sources.models)} models")
    result: list[Params] = []
    source: Any
    for k, source in enumerate(counts):
        if not isinstance(source, Mapping):
            raise MergeError(
                f"counts of source {k} are a {type(source).__name__}; pass a dictionary,"
                " table -> (rows,) counts"
            )
        known = {}
        for name, values in without_prefixes(source).items():
            table = sources.tied.get(name, name)
            if table not in first:
                raise MergeError(f"{name}: has counts but is no parameter")
            count = torch.as_tensor(values).detach()
            if first[table].ndim == 0 or count.shape != first[table].shape[:1]:
                shape, rows = tuple(count.shape), tuple(first[table].shape)
                raise MergeError(f"{name}: counts {shape} of source {k} do not fit {rows}")
            if not bool((torch.isfinite(count) & (count >= 0)).all()):
                raise MergeError(f"{name}: counts of source {k} must be finite and not negative")
            known[table] = count
        result.append(known)
    for name in dict.fromkeys(name for source in result for name in source):
        for k, source in enumerate(result):
            if name not in source:
                raise MergeError(f"{name}: source {k} has no counts")
    return result


def symmetries_of(symmetries: Sequence[Any], sources: Sources) -> Sequence[Symmetry]:
    """Return symmetries under the names of the merged tensors.

    Raises:
        MergeError: A symmetry names a parameter or an axis that the sources do not have.
    """
    first, result, is_renamed = sources.models[0], list[Symmetry](), False
    for symmetry in symmetries:
        if not isinstance(symmetry, Symmetry):
            kind = type(symmetry).__name__
            raise MergeError(f"symmetries holds a {kind}; pass those of find_symmetries")
        for part in symmetry.slices:
            name = sources.tied.get(part.parameter, part.parameter)
            if name not in first:
                raise MergeError(f"{part.parameter}: named by a symmetry, but is no parameter")
            if part.axis >= first[name].ndim:
                raise MergeError(
                    f"{part.parameter}: a symmetry names axis {part.axis}, the shape is"
                    f" {tuple(first[name].shape)}"
                )
        parts = [replace(p, parameter=sources.tied.get(p.parameter, p.parameter))
                 for p in symmetry.slices]  # fmt: skip
        once = tuple(dict.fromkeys(parts))
        is_renamed |= once != symmetry.slices
        result.append(replace(symmetry, slices=once))
    return result if is_renamed else symmetries


def batches_of(batches: Iterable[Any] | None) -> list[Any] | None:
    """Return all batches as a list; None: there are none.

    Raises:
        MergeError: It is one batch, or empty.
    """
    if batches is None:
        return None
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise MergeError(f"batches is one {type(batches).__name__}; pass a list of batches, [x]")
    held = list(batches)
    if not held:
        raise MergeError("batches is empty; pass at least one batch (an iterator is read once)")
    return held


def network_of(module: Any) -> nn.Module:
    """Return the network of the sources, without wrappers.

    Raises:
        MergeError: It is no module.
    """
    if not isinstance(module, nn.Module):
        raise MergeError(f"module is a {type(module).__name__}; pass the network of the sources")
    return unwrapped(module)


def check_module(module: nn.Module, sources: Sources) -> None:
    """Check that a module has the parameters of the sources.

    Raises:
        MergeError: Its tensors differ; names the first.
    """
    state = module.state_dict()
    check_names(sources.names, state, "the sources", "module")
    for name, tensor in sources.models[0].items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the sources, {tuple(state[name].shape)} in module"
            raise MergeError(f"{name}: shapes differ, {shapes}")


def checked_score(score: Score, sources: Sources) -> Score:
    """Return a score of merged tensors, which passes state dicts to the user's.

    Raises:
        MergeError: The score is no function.
    """
    if not callable(score):
        raise MergeError(
            f"score is a {type(score).__name__}; pass a function (state dict) -> float"
        )

    def value_of(params: Params) -> float:
        value: Any = score(sources.restored(params, is_new=False))
        if isinstance(value, Tensor) and value.numel() != 1:
            raise MergeError(
                f"score returned {tuple(value.shape)} values; it must return one number"
            )
        try:
            number = float(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise MergeError(f"score returned a {kind}; it must return a number") from None
        if math.isnan(number):
            raise MergeError(
                "score returned NaN; it must return a number, larger for better models"
            )
        return number

    return value_of


def tables_of(module: nn.Module | None, counts: Sequence[Params], sources: Sources) -> list[str]:
    """Return the names of embedding tables: those of lookups in a module, those with counts."""
    names = [name for source in counts for name in source]
    if module is not None:
        lookups = (nn.Embedding, nn.EmbeddingBag)
        names += [f"{n}.weight" for n, m in module.named_modules() if isinstance(m, lookups)]
    names = [sources.tied.get(name, name) for name in names]
    return [name for name in dict.fromkeys(names) if name in sources.models[0]]


def _check_alike(first: Params, other: Params, k: int) -> None:
    check_names(first, other, "source 0", f"source {k}")
    for name, tensor in first.items():
        shapes = tuple(tensor.shape), tuple(other[name].shape)
        if shapes[0] != shapes[1] and tensor.is_floating_point():
            raise MergeError(
                f"{name}: shapes differ, {shapes[0]} in source 0, {shapes[1]} in source {k}"
            )
        if tensor.is_floating_point() != other[name].is_floating_point():
            types = f"{tensor.dtype} in source 0, {other[name].dtype} in source {k}"
            raise MergeError(f"{name}: {types}; both must be floating, or neither")


def _ties(
    states: Sequence[Params], names: Collection[str], module: nn.Module | None
) -> dict[str, str]:
    """Return the names whose tensor has an earlier name in the first source, or in the module.

    Raises:
        MergeError: It is one tensor in the first source or the module, and two in another source.
    """
    held: dict[Any, str] = {}
    tied = {}
    shared = _shared_names(module)
    for name in names:
        tensor = states[0][name]
        if not tensor.numel():
            continue
        earlier = held.setdefault(shared.get(name, _place(tensor)), name)
        if earlier == name:
            continue
        tied[name] = earlier
        for k, state in enumerate(states):
            one, two = state[earlier], state[name]
            if _place(one) == _place(two) or torch.equal(one, two):
                continue
            if name in shared:
                raise MergeError(
                    f"{name}: one tensor with {earlier} in module, another one in source {k};"
                    " pass a module that holds both"
                )
            raise MergeError(
                f"{name}: one tensor with {earlier} in source 0, another one in source {k};"
                " pass state dicts with copies to merge both"
            )
    return tied


def _shared_names(module: nn.Module | None) -> dict[str, str]:
    """Return the names of parameters with several names: name -> the first of them."""
    if module is None:
        return {}
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in unwrapped(module).named_parameters(remove_duplicate=False)
    }
    several = {one for name, one in names.items() if name != one}
    return {name: one for name, one in names.items() if one in several}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        *(_storage(tensor), tensor.storage_offset()),
        *(tensor.shape, tensor.stride(), tensor.dtype),
    )


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    types = {compute_dtype(tensor) for tensor in tensors}
    return torch.float64 if torch.float64 in types else torch.float32
