"""The public ``align``: aligned copies of models, without a merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cki_rec.merging.activations import unit_moments
from cki_rec.merging.alignment import align as search_elements
from cki_rec.merging.alignment import table_products
from cki_rec.merging.calling import evaluating, outputs_of
from cki_rec.merging.inputs import (
    Sources,
    batches_of,
    check_module,
    check_search,
    counts_of,
    network_of,
    sources_of,
    symmetries_of,
    tables_of,
)
from cki_rec.merging.params import MergeError, Params, check_finite
from cki_rec.merging.states import Model, models_of, state_of
from cki_rec.merging.symmetry import Symmetry, check_scores, transform

By = Literal["weights", "activations"]
TALL = 1024
"""Rows from which on a matrix is compared by products of its columns, like a table."""


@dataclass(frozen=True, slots=True)
class AlignedModels:
    """Copies of models in one basis."""

    models: list[Params]
    """State dicts, in the order of the sources; each computes the same function as its source."""
    agreement: float
    """Mean cosine between a parameter of two models: 1 for equal ones."""
    agreement_before: float
    elements: list[list[Tensor]]
    """Per model and symmetry a matrix ``(S, S)``; ``transform`` applies them."""


def align(
    models: Sequence[Model],
    symmetries: Sequence[Symmetry],
    *,
    by: By = "weights",
    module: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    counts: Sequence[Mapping[str, Any]] = (),
    tables: Sequence[str] | None = None,
    anchor: int | None = None,
    starts: int = 1,
    seed: int = 0,
) -> AlignedModels:
    """Return copies of models that agree as much as their symmetries allow.

    Args:
        models: Modules or state dicts of one network. They are not changed.
        symmetries: Symmetries of the network, such as those of ``find_symmetries``.
        by: Match units by weights, or by activations where units are visible (``unit_moments``).
            Rows of tables are always matched by weights, because rows correspond.
        module: The network; its own parameters do not matter. With ``batches`` the outputs of the
            aligned models are checked.
        batches: Sample rows without labels. A tuple or list is called as ``module(*batch)``, a
            dictionary as ``module(**batch)``, all else as ``module(batch)``.
        counts: Per model and table ``(V,)``, the training rows that looked each row up. Rows that
            one of two models never saw do not count.
        tables: Names of the embedding tables. None: those of ``module`` and ``counts``.
        anchor: Index of the model that stays as it is; None: a basis shared by all.
        starts: Random starts of the search, beside one from the parameters whose entries
            correspond; the best end is taken.
        seed: Seed of the search.

    Raises:
        MergeError: Models, symmetries or options that do not fit; an aligned model whose outputs
            differ from those of its source.
    """
    if by not in get_args(By):
        raise MergeError(f"by={by!r}: one of {', '.join(get_args(By))}")
    check_search(starts, seed)
    models, module = models_of(models), None if module is None else network_of(module)
    sources, sample = sources_of(models, None, module), batches_of(batches)
    num_models = len(sources.models)
    if anchor is not None and anchor not in range(num_models):
        raise MergeError(
            f"anchor={anchor!r}: there are {num_models} models; use 0 to {num_models - 1}"
        )
    if module is not None:
        check_module(module, sources)
    symmetries = symmetries_of(symmetries, sources)
    check_finite(sources.models)
    known_counts = counts_of(counts, sources)
    named = tables_of(module, known_counts, sources) if tables is None else _known(tables, sources)
    products = _products(sources.models, symmetries, named, known_counts)
    outputs = None
    if by == "activations":
        if module is None or sample is None:
            raise MergeError("by='activations' needs a module and batches; or use by='weights'")
        outputs = unit_moments(module, sources.models, sample, symmetries)
    alignment = search_elements(
        sources.models,
        symmetries,
        products,
        outputs=outputs,
        anchor=anchor,
        anchored_start=True,
        starts=starts,
        seed=seed,
    )
    aligned = []
    for k, (params, elements) in enumerate(zip(sources.models, alignment.elements, strict=True)):
        with torch.no_grad():
            moved = transform(params, symmetries, elements)
        if module is not None and sample is not None:
            with torch.no_grad(), evaluating(module):
                before, after = (outputs_of(module, sample[0], p) for p in (params, moved))
            check_scores(after, before, f"source {k}")
        aligned.append(_restored(models[k], k, moved, sources))
    return AlignedModels(
        aligned, alignment.agreement, alignment.agreement_before, alignment.elements
    )


def _products(
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    tables: Sequence[str],
    counts: Sequence[Params],
) -> dict[str, Tensor]:
    """Return ``table_products`` of all matrices that enter by them.

    These are tables, and other tall matrices, that symmetries move as a whole on their columns.
    """
    first = models[0]
    slices = [part for symmetry in symmetries for part in symmetry.slices]
    mixed = {part.parameter for part in slices if part.axis != 1 or part.within}
    names = [
        name
        for name in dict.fromkeys(part.parameter for part in slices)
        if first[name].ndim == 2
        and name not in mixed
        and (name in tables or len(first[name]) >= max(TALL, 2 * first[name].shape[1]))
    ]
    weights = [
        {n: known[n] if n in known else torch.ones(len(first[n])) for n in names}
        for known in counts
    ]
    return table_products(models, names, weights)


def _known(tables: Sequence[str], sources: Sources) -> list[str]:
    """Return tables by the names under which they are merged."""
    if isinstance(tables, str):
        raise MergeError(f"tables={tables!r}: pass a list of names")
    names = [sources.merged_name(name) for name in tables]
    for name in names:
        if name not in sources.models[0]:
            raise MergeError(f"{name}: named in tables, but is no parameter")
    return names


def _restored(model: Model, k: int, moved: Params, sources: Sources) -> Params:
    """Return the state dict of an aligned model: its own types, integers and ties."""
    state = state_of(model, f"source {k}", sources.names)
    result: Params = {}
    for name, tensor in state.items():
        if name in sources.tied:
            continue
        like = moved.get(name, tensor)
        result[name] = like.to(tensor.device, tensor.dtype, copy=True)
    return {name: result[sources.tied.get(name, name)] for name in state}
