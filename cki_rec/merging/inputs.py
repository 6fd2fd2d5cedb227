"""The inputs of a merge as users pass them, checked and brought to one form.

Modules become state dicts, wrappers are taken off, and each tied tensor is held once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from cki_rec.merging.extras import Extras
from cki_rec.merging.params import MergeError, Params, check_names, compute_dtype, is_finite
from cki_rec.merging.registry import Score
from cki_rec.merging.states import (
    Model,
    check_plain,
    matched,
    models_of,
    renamed,
    state_of,
    unwrapped,
)
from cki_rec.merging.symmetry import Symmetry, check_list, check_symmetry


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

    def merged_name(self, name: str) -> str:
        """Return the name under which a tensor is merged; wrappers make no difference."""
        is_known = name in self.models[0] or name in self.tied
        name = name if is_known else matched(name, self.names)
        return self.tied.get(name, name)

    def restored(self, params: Params, is_new: bool = True) -> Params:
        """Return the state dict of a merged model.

        Args:
            params: The merged tensors.
            is_new: Share no memory with the sources.

        Raises:
            MergeError: A result is too large for its type.
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
            is_short = tensor.itemsize < params[name].itemsize
            if is_short and not is_finite(tensor.float()) and is_finite(params[name]):
                raise MergeError(
                    f"{name}: entries of the result do not fit {tensor.dtype}; use"
                    " dtype=torch.float32"
                )
            state[name] = tensor.clone() if _storage(tensor) in shared else tensor
        return {name: state[self.tied.get(name, name)] for name in self.names}


def sources_of(
    models: Iterable[Model], dtype: torch.dtype | None = None, module: nn.Module | None = None
) -> Sources:
    """Return the sources of a merge in one form; their tensors are shared where possible.

    Args:
        models: Modules or state dicts.
        dtype: Floating type of the result; None: that of the first source.
        module: The network of the sources; its names are used.

    Raises:
        MergeError: No model, no tensors, or tensors that differ; names the first.
    """
    models = models_of(models)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise MergeError(f"dtype={dtype}: must be a floating type, such as torch.float32")
    first = state_of(models[0], "source 0", () if module is None else tuple(module.state_dict()))
    rest = [state_of(other, f"source {k}", tuple(first)) for k, other in enumerate(models[1:], 1)]
    states = [first, *rest]
    merged = [name for name, tensor in first.items() if tensor.is_floating_point()]
    for k, state in enumerate(states[1:], start=1):
        _check_alike(first, state, k)
    tied = _ties(states, merged)
    names = [name for name in merged if name not in tied]
    wide = {n: _widest([state[n] for state in states]) for n in names}
    return Sources(
        models=[{n: s[n].to(first[n].device, wide[n]) for n in names} for s in states],
        names=tuple(first),
        types={n: dtype or first[n].dtype for n in names},
        copied={n: tensor for n, tensor in first.items() if not tensor.is_floating_point()},
        tied=tied,
    )


def base_of(base: Model, sources: Sources, title: str = "the base") -> Params:
    """Return the base of all sources, or another model of their network, in their form.

    Raises:
        MergeError: It has other tensors than the sources.
    """
    state = state_of(base, title, sources.names)
    first = sources.models[0]
    missing = [n for n in sources.names if n not in state]
    if missing or len(state) > len(sources.names):
        check_names(sources.names, state, "source 0", title)
    for name, tensor in first.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the sources, {tuple(state[name].shape)} in {title}"
            raise MergeError(f"{name}: shapes differ, {shapes}")
        if not state[name].is_floating_point():
            raise MergeError(f"{name}: {state[name].dtype} in {title}, floating in the sources")
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
        for name, values in renamed(source, sources.names).items():
            table = sources.tied.get(name, name)
            if table not in first:
                raise MergeError(f"{name}: has counts but is no parameter")
            count = _count(name, values, k)
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
    shapes = {name: tensor.shape for name, tensor in sources.models[0].items()}
    result, is_renamed = list[Symmetry](), False
    check_list(symmetries)
    for symmetry in symmetries:
        parts = [replace(p, parameter=sources.merged_name(p.parameter)) for p in symmetry.slices]
        once = tuple(dict.fromkeys(parts))
        is_renamed |= once != symmetry.slices
        result.append(replace(symmetry, slices=once))
        check_symmetry(result[-1], shapes)
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


def checked_score(score: Score, sources: Sources, is_safe: bool = True) -> Score:
    """Return a score of merged tensors, which passes state dicts to the user's.

    Args:
        score: The user's.
        sources: The sources, for their names.
        is_safe: Pass copies, which the score may change.

    Raises:
        MergeError: The score is no function.
    """
    if not callable(score):
        raise MergeError(
            f"score is a {type(score).__name__}; pass a function (state dict) -> float"
        )

    def value_of(params: Params) -> float:
        copies = {name: tensor.clone() for name, tensor in params.items()} if is_safe else params
        value: Any = score(sources.restored(copies, is_safe))
        if isinstance(value, Tensor) and value.numel() != 1:
            raise MergeError(
                f"score returned {tuple(value.shape)} values; it must return one number"
            )
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
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
        names += [
            f"{n}.weight".removeprefix(".")
            for n, m in module.named_modules()
            if isinstance(m, lookups)
        ]
    names = [sources.tied.get(name, name) for name in names]
    return [name for name in dict.fromkeys(names) if name in sources.models[0]]


def check_call(method: Any, starts: Any, seed: Any, progress: Any, extras: Any) -> None:
    """Check the types of arguments of ``merge``.

    Raises:
        MergeError: One has a wrong type; names it.
    """
    if not isinstance(method, str):
        kind = type(method).__name__
        raise MergeError(f"method is a {kind}; pass the name of a method, and models as one list")
    check_search(starts, seed)
    if progress is not None and not callable(progress):
        kind = type(progress).__name__
        raise MergeError(f"progress is a {kind}; pass a function (stage, done, all)")
    if extras is not None and not isinstance(extras, Extras):
        raise MergeError(f"extras is a {type(extras).__name__}; pass cki_rec.Extras")


def check_search(starts: Any, seed: Any) -> None:
    """Check the options of a search.

    Raises:
        MergeError: One is no whole number, or too small.
    """
    for name, value, least in (("starts", starts, 1), ("seed", seed, -math.inf)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise MergeError(f"{name}={value!r}: must be a whole number")
        if value < least:
            raise MergeError(f"{name}={value}: must be at least {least}")


def _count(name: str, values: Any, k: int) -> Tensor:
    title = f"counts of source {k}"
    try:
        count = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        kind = type(values).__name__
        raise MergeError(f"{name}: {title} are a {kind}; pass one number per row") from None
    check_plain(name, count, title)
    return count


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


def _ties(states: Sequence[Params], names: Collection[str]) -> dict[str, str]:
    """Return the names whose tensor has an earlier name in the first source.

    Raises:
        MergeError: It is one tensor in the first source and two in another.
    """
    held: dict[Any, str] = {}
    tied = {}
    for name in names:
        tensor = states[0][name]
        if not tensor.numel():
            continue
        earlier = held.setdefault(_place(tensor), name)
        if earlier == name:
            continue
        tied[name] = earlier
        for k, state in enumerate(states[1:], start=1):
            one, two = state[earlier], state[name]
            if _place(one) != _place(two) and not torch.equal(one, two):
                raise MergeError(
                    f"{name}: one tensor with {earlier} in source 0, another one in source {k};"
                    " pass state dicts with copies to merge both"
                )
    return tied


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
