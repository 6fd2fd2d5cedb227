"""Checks of a merge's recipe and inputs, before any tensor is mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from cki_rec.merging.extras import Rule
from cki_rec.merging.methods import METHODS
from cki_rec.merging.options import nearest
from cki_rec.merging.params import MergeError, MixingWeights, Params, check_finite
from cki_rec.merging.registry import Method, Score
from cki_rec.merging.result import Align, Effort, Recipe, Refine, Repair
from cki_rec.merging.search import AUTO
from cki_rec.merging.statistics import ActivationStatistics


def check_recipe(recipe: Recipe, num_models: int) -> Method:
    """Return the method of a recipe, after a check of method, options and steps.

    Raises:
        MergeError: An unknown method, option or step, or a step that the method excludes.
    """
    if recipe.method not in METHODS:
        hint = nearest(recipe.method, [AUTO, *METHODS])
        known = ", ".join([AUTO, *METHODS])
        raise MergeError(f"no method {recipe.method!r}: {hint}one of {known}")
    rule = METHODS[recipe.method]
    rule.check(recipe.options, num_models)
    for name, value, known_steps in (
        ("align", recipe.align, get_args(Align)),
        ("repair", recipe.repair, get_args(Repair)),
        ("refine", recipe.refine, get_args(Refine)),
    ):
        if value not in known_steps:
            raise MergeError(f"{name}={value!r}: one of {', '.join(known_steps)}")
    if recipe.repair != "none" and not rule.averages_dense:
        raise MergeError(
            f"repair={recipe.repair}: {rule.name} does not average layers; use repair=none"
        )
    return rule


def check_fixed(fixed: Mapping[str, Rule], params: Params) -> None:
    """Check the parameters whose mixing weights the method does not decide.

    Raises:
        MergeError: An unknown rule or parameter.
    """
    for name, rule in fixed.items():
        if rule not in get_args(Rule):
            raise MergeError(f"fixed[{name!r}]={rule!r}: one of {', '.join(get_args(Rule))}")
        if name not in params:
            raise MergeError(f"fixed names {name}, which no model has")


def check_hidden(models: Sequence[Params], weights: MixingWeights) -> None:
    """Check the sources' tensors that have a weight of 0 or 1, where a mix would hide a NaN.

    Raises:
        MergeError: One has NaN or infinite entries; names tensor and model.
    """
    hidden = [n for n, w in weights.items() if bool(((w <= 0) | (w >= 1)).any())]
    check_finite([{name: model[name] for name in hidden} for model in models])


def required(activations: ActivationStatistics | None, purpose: str) -> ActivationStatistics:
    """Return the activations.

    Raises:
        MergeError: There are none.
    """
    if activations is None:
        raise MergeError(f"{purpose} needs activations on a sample of rows (module and batches)")
    return activations


def check_search(recipe: Recipe, score: Score | None, effort: Effort) -> None:
    """Check the arguments of a merge by ``auto``.

    Raises:
        MergeError: There is no score, an unknown effort, or an argument that the search decides.
    """
    if effort not in get_args(Effort):
        raise MergeError(f"effort={effort!r}: one of {', '.join(get_args(Effort))}")
    if score is None:
        raise MergeError("method='auto' needs a score of models on validation rows (score)")
    steps = [name for name in ("align", "repair", "refine") if getattr(recipe, name) != "none"]
    if wrong := [*steps, *recipe.options]:
        raise MergeError(f"method='auto' chooses method and steps; leave out {wrong[0]}")
