"""The merge, from several models to one: check, align, mix, repair, refine, recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from cki_rec.merging.calling import evaluating
from cki_rec.merging.checks import (
    check_fixed,
    check_hidden,
    check_recipe,
    check_search,
    required,
)
from cki_rec.merging.discovery import find_symmetries
from cki_rec.merging.extras import Extras
from cki_rec.merging.inputs import (
    Sources,
    base_of,
    batches_of,
    check_call,
    check_module,
    checked_score,
    counts_of,
    network_of,
    sources_of,
    symmetries_of,
    tables_of,
)
from cki_rec.merging.methods import METHODS
from cki_rec.merging.mixing import source_shares
from cki_rec.merging.params import MergeError, Params, check_finite, is_finite
from cki_rec.merging.refinement import SHARE, Fitted, Plan, fit
from cki_rec.merging.registry import MergeInputs, Method, MethodInfo, Score
from cki_rec.merging.result import Align, Effort, MergeResult, Recipe, Refine, Repair
from cki_rec.merging.search import AUTO, possible, search
from cki_rec.merging.states import Model
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.merging.steps import (
    Network,
    align_models,
    calibrate_model,
    check_sample,
    mix_models,
    repair_model,
    row_weights_of,
)
from cki_rec.merging.symmetry import Symmetry
from cki_rec.merging.targets import Targets
from cki_rec.merging.teachers import routing_table
from cki_rec.merging.traits import symmetries_of as declared_symmetries

FITTED = ("least_squares", "select_units", "project")
"""Repairs that fit layers on a sample of rows."""
UNALIGNED = (
    "repair={} without alignment: sources without a common base have tables in different bases"
)
Progress = Callable[[str, int, int], None]
"""(stage, number of stages done, number of all stages)."""


def merge(
    models: Sequence[Model],
    method: str = "average",
    *,
    base: Model | None = None,
    counts: Sequence[Mapping[str, Any]] = (),
    symmetries: Sequence[Symmetry] | None = None,
    module: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    align: Align = "none",
    repair: Repair = "none",
    refine: Refine = "none",
    effort: Effort = "refine",
    starts: int = 1,
    score: Score | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    extras: Extras | None = None,
    **options: Any,
) -> MergeResult:
    """Merge several models into one of the same size.

    Models are never changed. Integer and boolean tensors come from the first one. Tied tensors are
    merged once and stay tied. Models on several devices, or in several floating types, are merged
    in float32 or wider, on the device of the first.

    Args:
        models: Modules or state dicts of one network. Wrappers for parallel training and of
            ``torch.compile`` are taken off.
        method: Name of a merge method (``methods()``), or ``auto``: several recipes are tried,
            every source is one of them, and the one with the best score is returned.
        base: The model that all sources started from, for methods on task vectors.
        counts: Per source and table ``(V,)``, the training rows that looked each row up.
        symmetries: Symmetries of the network, for alignment and repair. None: those that the
            module declares, or ``find_symmetries(module, batches[0])``.
        module: The network. It is run with the parameters of the sources; its own do not matter.
        batches: Sample rows without labels, for activations and repairs. A tuple or list is called
            as ``module(*batch)``, a dictionary as ``module(**batch)``, all else as
            ``module(batch)``.
        align: Bring the sources into a shared basis: by their weights or by their activations.
        repair: Fit the merged layers to the sources' layers.
        refine: Fit all PARAMETERS to the sources' outputs on ``batches``, without labels: to their
            ``mean``, or by a ``router`` (see ``cki_rec.refine``, whose defaults hold here).
        effort: Of ``auto``: ``closed_form``, or ``refine``: the best model too, given batches.
        starts: Starts of the search for an alignment; the best end is taken.
        score: Quality of a state dict on validation rows; larger is better.
        dtype: Floating type of the result; None: that of the first source.
        seed: Seed of all random draws.
        progress: Called with the name of a stage, the number of stages done, and that of all.
        extras: Inputs that few users need.
        **options: Options of the method.

    Returns:
        The new model as a state dict, with mixing weights and facts.

    Raises:
        MergeError: Models that differ or have NaN, an unknown method or option, a missing input.
    """
    check_call(method, starts, seed, progress, extras)
    extras, batches = extras or Extras(), batches_of(batches)
    module = None if module is None else network_of(module)
    sources = sources_of(models, dtype, module)
    recipe = Recipe(method, align, repair, refine, options)
    is_search = method == AUTO
    rule = None
    if is_search:
        check_search(recipe, score, effort)
    else:
        rule = check_recipe(recipe, len(sources.models))
    notes = list[str]()
    if rule is not None and score is None and rule.filled(options) != options:
        recipe = replace(recipe, options=rule.filled(options))
        chosen = ", ".join(f"{n}={recipe.options[n]}" for n in rule.without_score)
        notes.append(f"without a score: {chosen} ({rule.reference})")
    check_fixed(extras.fixed, sources.models[0])
    if module is not None:
        check_module(module, sources)
    known_counts = counts_of(counts, sources)
    if counts and extras.tables is None and not any(known_counts):
        raise MergeError("counts name no table; pass table -> (rows,) counts, or leave them out")
    given_base = None if base is None else base_of(base, sources)
    purpose = _reader_of_symmetries(recipe, rule)
    network = Network(
        network_symmetries(symmetries, sources, module, batches, purpose, is_search, seed),
        tables_of(module, known_counts, sources) if extras.tables is None else extras.tables,
        module,
        extras.probe if extras.probe is not None or not batches else batches[0],
        extras.logit_scale,
    )
    task = _Task(
        sources,
        given_base,
        known_counts,
        network,
        ActivationStatistics(module, batches) if module is not None and batches else None,
        None if score is None else checked_score(score, sources, not extras.in_place),
        starts,
        seed,
        extras,
        progress or (lambda *_: None),
    )
    with evaluating(module):
        if is_search:
            result = _search(task, effort)
        else:
            result = run(recipe, task)
    return replace(
        result,
        params=sources.restored(result.params, not extras.in_place),
        warnings=[*notes, *result.warnings],
    )


def methods() -> dict[str, MethodInfo]:
    """Return the merge methods by name: summary, inputs, options and reference of each."""
    return {name: known.info() for name, known in METHODS.items()}


@dataclass(frozen=True, slots=True)
class _Task:
    """The inputs of a merge in one form; recipes differ in the rest."""

    sources: Sources
    base: Params | None
    counts: Sequence[Params]
    network: Network
    activations: ActivationStatistics | None
    score: Score | None
    starts: int
    seed: int
    extras: Extras
    progress: Progress


def run(recipe: Recipe, task: _Task) -> MergeResult:
    """Return the merge by one recipe, its parameters in the form of ``task.sources``.

    Raises:
        MergeError: An input of the recipe is missing.
    """
    rule, extras, network = METHODS[recipe.method], task.extras, task.network
    models, counts, activations = task.sources.models, task.counts, task.activations
    align, repair = recipe.align, recipe.repair
    is_several, fixed = len(models) > 1, extras.fixed
    row_weights = row_weights_of(models, counts, extras.row_mask, network.tables)
    alignment, anchor, calibration, warnings = None, None, None, list[str]()

    task.progress("align", 0, 3)
    is_plain = align == "none" and repair == "none" and extras.learn is None
    is_checked = rule.reads_values or not is_plain or not rule.returns_weights
    if is_checked:
        check_finite(models)
    if repair in FITTED and is_several:
        warnings += check_sample(repair, models[0], required(activations, repair))
        if align == "none" and task.base is None:
            warnings.append(UNALIGNED.format(repair))
    if align != "none" and is_several:
        seen = required(activations, align) if align == "activations" else None
        models, facts = align_models(
            models,
            *(network, row_weights, seen, task.starts, task.seed),
            *(extras.processes, extras.in_place, extras.recorded_alignment),
        )
        alignment = {"by": align, **facts}
    task.progress("mix", 1, 3)
    sources, fisher = list(models), extras.fisher
    inputs = MergeInputs(
        seed=task.seed,
        counts=counts,
        base=task.base,
        score=task.score,
        symmetries=network.symmetries,
        fisher=fisher(sources) if fisher and "fisher" in rule.inputs else (),
        moments=activations(sources).second if activations and "moments" in rule.inputs else {},
    )
    params, weights, learned = mix_models(
        rule,
        sources,
        inputs,
        recipe.options,
        fixed,
        extras.row_mask,
        extras.learn,
        extras.processes,
    )
    task.progress("repair", 2, 3)
    if repair != "none" and is_several and weights is not None:
        seen, mixed = required(activations, repair), params
        params, weights, anchor = repair_model(
            *(repair, params, sources, weights, network, row_weights, seen, task.score),
            extras.processes,
        )
        if all(params[name] is tensor for name, tensor in mixed.items()):
            warnings.append(f"repair={repair} changed nothing: no layer reads one input per row")
    if not is_checked and weights is not None:
        check_hidden(models, weights)
    if not all(is_finite(tensor) for tensor in params.values()):
        check_finite(task.sources.models)
        check_finite([params], "the result")
    scores = dict[str, float]()
    if recipe.refine != "none" and is_several:
        fitted = fit_to_teacher(recipe.refine, params, task)
        params, scores = fitted.params, fitted.scores
        warnings += fitted.warnings
    if extras.calibrate is not None:
        params, calibration = calibrate_model(params, network, extras.calibrate(params))
        if calibration.reason:
            warnings.append(f"recalibrate=true: not done, {calibration.reason} (validation rows)")
    shares = None
    if weights is not None:
        shares = extras.processes.mean_shares(source_shares(weights, sources))
        shares = {n: share for n, share in shares.items() if not learned or n not in learned.trunk}
    task.progress("done", 3, 3)
    return MergeResult(
        params,
        shares,
        alignment,
        str(recipe),
        scores,
        anchor=anchor,
        learned=learned,
        calibration=calibration,
        warnings=warnings,
    )


def fit_to_teacher(refine: Refine, params: Params, task: _Task) -> Fitted:
    """Return a merged model after a refinement with the default options.

    Raises:
        MergeError: There are no batches.
    """
    seen = required(task.activations, f"refine={refine}")
    teacher: Literal["mean", "router"] = "router" if refine == "router" else "mean"
    plan = Plan(teacher, SHARE if teacher == "router" else 1.0)
    targets = Targets(
        *(plan.teacher, plan.share, plan.route, seen.network, task.sources),
        *(task.counts, params, seen.batches),
    )
    return fit(
        *(plan, seen.network, task.sources, targets, params, None),
        *(task.score, task.progress),
    )


def _search(task: _Task, effort: Effort) -> MergeResult:
    """Return the best result of the recipes that the inputs allow, and of all sources.

    With ``effort="refine"`` the best one is refined too, if there are batches.
    """
    assert task.score is not None
    refinements: list[Refine] = []
    if effort == "refine" and task.activations is not None and len(task.sources.models) > 1:
        refinements = ["mean"]
        if routing_table(task.counts) is not None:
            refinements = ["router"]
    recipes = possible(
        bool(task.counts),
        bool(task.network.symmetries),
        task.activations is not None,
        len(task.sources.models),
    )
    quiet = replace(task, progress=lambda *_: None)
    return search(
        recipes,
        lambda recipe: run(recipe, quiet),
        task.sources.models,
        task.score,
        task.progress,
        refinements,
        lambda refine, params: fit_to_teacher(refine, params, quiet).params,
    )


def _reader_of_symmetries(recipe: Recipe, rule: Method | None) -> str | None:
    """Return the name of the step that reads symmetries; None: no step does."""
    if recipe.align != "none":
        return f"align={recipe.align}"
    if recipe.repair != "none":
        return f"repair={recipe.repair}"
    return f"method {rule.name}" if rule is not None and "symmetries" in rule.inputs else None


def network_symmetries(
    symmetries: Sequence[Symmetry] | None,
    sources: Sources,
    module: nn.Module | None,
    batches: Sequence[Any] | None,
    purpose: str | None,
    is_search: bool,
    seed: int,
) -> Sequence[Symmetry]:
    """Return the symmetries of the sources' network: passed, declared by the module, or found."""
    if symmetries is not None:
        return symmetries_of(symmetries, sources)
    if len(sources.models) == 1 or (purpose is None and not is_search):
        return ()
    if module is not None and (declared := declared_symmetries(module)):
        return symmetries_of(declared, sources)
    if module is None or not batches:
        if is_search:
            return ()
        raise MergeError(
            f"{purpose} needs the symmetries of the network: pass symmetries, or module and"
            " batches to find them"
        )
    example = tuple(batches[0]) if type(batches[0]) is list else batches[0]
    return symmetries_of(find_symmetries(module, example, seed=seed), sources)
