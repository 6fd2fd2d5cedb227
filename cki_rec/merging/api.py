"""The merge, from several models to one: check, align, mix, repair, recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from cki_rec.merging.methods import METHODS
from cki_rec.merging.mixing import source_shares
from cki_rec.merging.params import MergeError, Params, check_finite, check_same, widened
from cki_rec.merging.registry import MergeInputs, Method, Score
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.merging.steps import (
    Calibration,
    Learn,
    Learned,
    Network,
    Processes,
    Rule,
    align_models,
    calibrate_model,
    check_sample,
    mix_models,
    repair_model,
    row_weights_of,
)

Align = Literal["none", "weights", "activations"]
Repair = Literal["none", "rescale", "least_squares", "select_units", "project"]
FITTED = ("least_squares", "select_units", "project")
"""Repairs that fit layers on a sample of rows."""
UNALIGNED = (
    "repair={} without alignment: sources without a common base have tables in different bases"
)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """One model, and the facts about its making."""

    params: Params
    shares: dict[str, list[float]] | None
    """Per parameter the mean mixing weight of each source; None if the method has no weights."""
    alignment: dict[str, Any] | None = None
    """Agreement of the sources before and after alignment."""
    anchor: dict[str, Any] | None = None
    """The source that element-wise modules are copied from, and the scores of all."""
    learned: Learned | None = None
    calibration: Calibration | None = None
    warnings: list[str] = field(default_factory=list)


def merge(
    models: Sequence[Params],
    method: str = "average",
    *,
    base: Params | None = None,
    counts: Sequence[Params] = (),
    network: Network | None = None,
    align: Align = "none",
    starts: int = 1,
    repair: Repair = "none",
    activations: ActivationStatistics | None = None,
    fisher: Callable[[Sequence[Params]], Sequence[Params]] | None = None,
    imitate: Callable[[Sequence[Params], Params, int, float], Params] | None = None,
    score: Score | None = None,
    learn: Learn | None = None,
    calibrate: Callable[[Params], Calibration] | None = None,
    fixed: Mapping[str, Rule] | None = None,
    row_mask: Mapping[str, Tensor] | None = None,
    processes: Processes | None = None,
    in_place: bool = False,
    seed: int = 0,
    **options: Any,
) -> MergeResult:
    """Merge several models into one of the same size.

    Args:
        models: Parameters of the sources, one dictionary each.
        method: Name of a registered merge method.
        base: The model that all sources started from, for methods on task vectors.
        counts: Per source and table ``(V,)``, the training rows that looked each row up.
        network: Facts about the sources' network, for alignment and repair.
        align: Bring the sources into a shared basis: by their weights or by their activations.
        starts: Starts of the search for an alignment; the best end is taken.
        repair: Make the merged layers compute the mean of the sources' layers.
        activations: Activations of models on a sample of rows.
        fisher: (aligned models) -> the diagonal of the Fisher information of each.
        imitate: (teachers, first parameters, epochs, learning rate) -> a trained model.
        score: Validation AUC of a model.
        learn: Training of the method's gates; None: closed form.
        calibrate: (parameters) -> the scale and shift of the logit that fit validation rows.
        fixed: Parameters whose mixing weights the method does not decide.
        row_mask: Per table of joined vocabularies ``(K, V)`` bool, the rows that a source has.
        processes: The processes that hold the models; here one.
        in_place: Alignment may transform the tensors of ``models`` themselves.
        seed: Seed of all random draws.
        **options: Options of the method.

    Returns:
        The new model in the types of the first source, with mixing weights and facts.

    Raises:
        MergeError: Models that differ or have NaN, an unknown method or option, a missing input.
    """
    rule = check_models(models, method, options)
    check_steps(rule, models, align, repair, network, fixed or {})
    network, processes = network or Network(), processes or Processes()
    types = {name: tensor.dtype for name, tensor in models[0].items()}
    models = [widened(model) for model in models]
    row_mask, is_several = row_mask or {}, len(models) > 1
    row_weights = row_weights_of(models, counts, row_mask, network.tables)
    alignment, anchor, calibration, warnings = None, None, None, list[str]()

    if repair in FITTED and is_several:
        warnings += check_sample(repair, models[0], required(activations, repair))
        if align == "none" and base is None:
            warnings.append(UNALIGNED.format(repair))
    if align != "none" and is_several:
        seen = required(activations, align) if align == "activations" else None
        models, facts = align_models(
            models, network, row_weights, seen, starts, seed, processes, in_place
        )
        alignment = {"by": align, **facts}
    sources = list(models)
    inputs = MergeInputs(
        seed=seed,
        counts=counts,
        base=None if base is None else widened(base),
        score=score,
        symmetries=network.symmetries,
        fisher=fisher(sources) if fisher and "fisher" in rule.inputs else (),
        moments=activations(sources).second if activations and "moments" in rule.inputs else {},
        imitate=None if imitate is None else lambda *first: imitate(sources, *first),
    )
    params, weights, learned = mix_models(
        rule, sources, inputs, options, fixed or {}, row_mask, learn
    )
    if repair != "none" and is_several and weights is not None:
        seen = required(activations, repair)
        params, weights, anchor = repair_model(
            repair, params, sources, weights, network, row_weights, seen, score
        )
    check_finite([params], "the result")
    if calibrate is not None:
        params, calibration = calibrate_model(params, network, calibrate(params))
        if calibration.reason:
            warnings.append(f"recalibrate=true: not done, {calibration.reason} (validation rows)")
    shares = None
    if weights is not None:
        shares = processes.mean_shares(source_shares(weights, sources))
        shares = {n: share for n, share in shares.items() if not learned or n not in learned.trunk}
    params = {name: tensor.to(types[name]) for name, tensor in params.items()}
    return MergeResult(params, shares, alignment, anchor, learned, calibration, warnings)


def check_models(models: Sequence[Params], method: str, options: Mapping[str, Any]) -> Method:
    """Return the method, after a check of models, method and options.

    Raises:
        MergeError: Models that differ, an unknown method or option.
    """
    check_same(models)
    if method not in METHODS:
        raise MergeError(f"no method '{method}': one of {', '.join(METHODS)}")
    METHODS[method].check(options, len(models))
    return METHODS[method]


def check_steps(
    rule: Method,
    models: Sequence[Params],
    align: str,
    repair: str,
    network: Network | None,
    fixed: Mapping[str, Rule],
) -> None:
    """Check the steps around a method.

    Raises:
        MergeError: An unknown step, one that lacks its input, or one that the method excludes.
    """
    for name, value, known in (
        ("align", align, get_args(Align)),
        ("repair", repair, get_args(Repair)),
        *((f"fixed[{parameter!r}]", each, get_args(Rule)) for parameter, each in fixed.items()),
    ):
        if value not in known:
            raise MergeError(f"{name}={value!r}: one of {', '.join(known)}")
    if unknown := [parameter for parameter in fixed if parameter not in models[0]]:
        raise MergeError(f"fixed names {unknown[0]}, which no model has")
    if network is None and (align != "none" or repair != "none"):
        raise MergeError(f"align={align}, repair={repair}: network is missing")
    if repair != "none" and not rule.averages_dense:
        raise MergeError(f"repair={repair}: {rule.name} does not average layers; use repair=none")


def required(activations: ActivationStatistics | None, purpose: str) -> ActivationStatistics:
    """Return the activations.

    Raises:
        MergeError: There are none.
    """
    if activations is None:
        raise MergeError(f"{purpose} needs activations on a sample of rows (activations)")
    return activations
