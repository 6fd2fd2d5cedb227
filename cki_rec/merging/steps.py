"""The steps of a merge: align, mix, repair, recalibrate. ``api.merge`` orders them.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cki_rec.merging.activations import unit_moments
from cki_rec.merging.alignment import Alignment, align, table_products
from cki_rec.merging.calling import evaluating, outputs_of, rows_of
from cki_rec.merging.extras import Calibration, Gates, Learn, Learned, Processes, Rule
from cki_rec.merging.methods.evidence import evidence_shares
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import (
    MergeError,
    MixingWeights,
    NotPossible,
    Params,
    check_same,
    check_shares,
    check_weights,
)
from cki_rec.merging.projection import anchor_weights, project_tables
from cki_rec.merging.registry import MergeInputs, Method, Score
from cki_rec.merging.repair import fit_layers, recalibrate, rescale
from cki_rec.merging.rows import in_blocks
from cki_rec.merging.selection import constant_weights
from cki_rec.merging.statistics import ActivationStatistics, untied_linears
from cki_rec.merging.symmetry import LogitScale, Symmetry, check_scores, transform
from cki_rec.merging.traits import elementwise_parameters
from cki_rec.merging.vocabulary import from_owners, restrict_weights, shared_rows

ENOUGH = 10
"""Rows per input of a layer. Least squares of I inputs on n rows have a mean square error larger
by the share I / (n - I - 1) than the best linear map has: here about a ninth."""


class ScarceSample(NotPossible):
    """A sample has too few rows to fit a layer."""


@dataclass(frozen=True, slots=True)
class Network:
    """Facts about the sources' network that merging reads."""

    symmetries: Sequence[Symmetry] = ()
    tables: Collection[str] = ()
    """Names of the parameters that are embedding tables."""
    module: nn.Module | None = None
    """The network itself, its tables unsharded; its parameters are not used."""
    probe: Any = None
    """One batch, on which aligned sources must score as before."""
    logit_scale: LogitScale | None = None

    def moved_tables(self, *kinds: str) -> list[str]:
        """Return the tables that symmetries (of some kinds; none: of all) move."""
        chosen = [s for s in self.symmetries if not kinds or s.kind in kinds]
        names = [part.parameter for symmetry in chosen for part in symmetry.slices]
        return [name for name in dict.fromkeys(names) if name in self.tables]


def align_models(
    models: Sequence[Params],
    network: Network,
    row_weights: Sequence[Params],
    activations: ActivationStatistics | None,
    starts: int,
    seed: int,
    processes: Processes,
    in_place: bool,
    is_recorded: bool = False,
) -> tuple[list[Params], dict[str, Any]]:
    """Return the sources in a shared basis, and how well they agree there and did before.

    Args:
        models: One per source.
        network: Their network.
        row_weights: Per source and table ``(V,)``, the weight of a row in the comparison.
        activations: Match hidden units by their activations on these rows; None: by weights.
        starts: Starts of the search.
        seed: Seed of the search.
        processes: The processes that hold the models.
        in_place: Transform the tensors of ``models`` themselves.
        is_recorded: See ``Extras.recorded_alignment``.

    Raises:
        MergeError: An aligned source does not score the probe as before.
    """
    symmetries, moments, outputs = network.symmetries, None, None
    if activations is not None and is_recorded:
        moments = activations(models).second
    elif activations is not None:
        outputs = unit_moments(activations.network, models, activations.batches, symmetries)
    products = table_products(models, network.moved_tables(), row_weights)
    products = processes.total(products)
    alignment: Alignment = processes.agree(  # other machines may round otherwise
        align(
            models,
            *(symmetries, products, moments),
            outputs=outputs,
            anchored_start=not is_recorded,
            starts=starts,
            seed=seed,
        )
    )
    aligned = []
    for k, (model, elements) in enumerate(zip(models, alignment.elements, strict=True)):
        before = None
        with torch.no_grad(), evaluating(network.module):
            if network.module is not None and network.probe is not None:
                before = outputs_of(network.module, network.probe, model)
            aligned.append(transform(model, symmetries, elements, in_place=in_place))
            if network.module is not None and before is not None:
                after = outputs_of(network.module, network.probe, aligned[k])
                check_scores(after, before, f"source {k}")
    facts = {
        "agreement": alignment.agreement,
        "agreement_before": alignment.agreement_before,
        "sweeps": alignment.sweeps,
    }
    return aligned, facts


def mix_models(
    method: Method,
    models: Sequence[Params],
    inputs: MergeInputs,
    options: Mapping[str, Any],
    fixed: Mapping[str, Rule],
    row_mask: Mapping[str, Tensor],
    learn: Learn | None,
    processes: Processes,
) -> tuple[Params, MixingWeights | None, Learned | None]:
    """Return the mixed parameters, their mixing weights, and the result of learning.

    There are no mixing weights if the method returns parameters.

    Args:
        method: The merge method.
        models: Aligned sources.
        inputs: Inputs of the method.
        options: Options of the method.
        fixed: Parameters whose mixing weights the method does not decide.
        row_mask: Per table of joined vocabularies ``(K, V)`` bool, the rows that a source has.
        learn: Training of gates; None: closed form.
        processes: The processes that hold the models.
    """
    method.check_inputs(inputs, options, len(models))
    if inputs.statistics is None:
        compared = shared_rows(models, row_mask) if method.returns_weights else models
        rows = in_blocks(compared, inputs.base, inputs.fisher, reduction=processes)
        firsts = {name: processes.first_row(name) for name in models[0]}
        statistics = method.collect(rows, options)
        inputs = replace(inputs, statistics=statistics, first_rows=firsts)
    if not method.returns_weights:
        params = method(models, inputs, **options)
        try:
            check_same([models[0], params])
        except MergeError as error:
            title = f"the result of method {method.name} (here source 1)"
            raise MergeError(f"{title} does not fit: {error}") from None
        weights = fixed_weights(models, fixed, inputs.counts)
        parts = [{name: model[name] for name in weights} for model in models]
        params = {**params, **mix(parts, weights)}
        return from_owners(params, models, row_mask), None, None
    gates = initial_gates(method, models[0], inputs.seed, options, fixed)

    def weigh(
        parts: Sequence[Params], counts: Sequence[Params], gates: Gates, **changes: Any
    ) -> MixingWeights:
        seen = replace(inputs, counts=counts, gates=gates)
        weights = method(parts, seen, **{**options, **changes})
        rules = {name: rule for name, rule in fixed.items() if name in parts[0]}
        return {**weights, **fixed_weights(parts, rules, counts)}

    if learn is None:
        weights = restrict_weights(weigh(models, inputs.counts, gates), row_mask)
        check_weights(weights, models)
        check_shares(weights)
        return mix(models, weights), weights, None

    def weigh_softly(
        models: Sequence[Params], counts: Sequence[Params], gates: Gates
    ) -> MixingWeights:
        return weigh(models, counts, gates, **method.while_learning)

    learned = learn(models, gates, weigh_softly)
    with torch.no_grad():
        weights = restrict_weights(weigh(models, inputs.counts, learned.gates), row_mask)
        params = {**mix(models, weights), **learned.trunk}
    return params, weights, learned


def initial_gates(
    method: Method,
    params: Params,
    seed: int,
    options: Mapping[str, Any],
    fixed: Collection[str] = (),
) -> dict[str, Tensor | None]:
    """Return the first gate of every parameter; None where there is no gate to learn."""
    make = method.initial_gates
    return {
        name: None if make is None or name in fixed else make(name, tensor.shape, seed, **options)
        for name, tensor in params.items()
    }


def fixed_weights(
    models: Sequence[Params], fixed: Mapping[str, Rule], counts: Sequence[Params]
) -> MixingWeights:
    """Return the mixing weights of the parameters whose rule is fixed."""
    by_rows = [name for name, rule in fixed.items() if rule == "evidence"]
    weights: MixingWeights = {}
    if by_rows:
        shares = evidence_shares(models, counts)
        weights = {name: shares[name] for name in by_rows}
    from_first = {name: models[0][name] for name, rule in fixed.items() if rule == "first"}
    only_first = [float(k == 0) for k in range(len(models))]
    return weights | constant_weights([from_first] * len(models), only_first)


def repair_model(
    how: str,
    merged: Params,
    models: Sequence[Params],
    weights: MixingWeights,
    network: Network,
    row_weights: Sequence[Params],
    activations: ActivationStatistics,
    score: Score | None,
    processes: Processes,
) -> tuple[Params, MixingWeights, dict[str, Any] | None]:
    """Return the merged model after a repair, its mixing weights, and the choice of an anchor.

    Layers are fitted to the plain mean of all sources. If a module is copied from one source
    (``project``), each source is tried as the anchor, and the model with the best score is
    returned, the first of equals. At most two models are held beside the sources and the merge.

    Args:
        how: ``rescale``, ``least_squares``, ``select_units`` or ``project``.
        merged: The merged model.
        models: Aligned sources.
        weights: Their mixing weights.
        network: Their network.
        row_weights: Per source and table ``(V,)``, the weight of a row in products of tables.
        activations: Activations on a sample of rows.
        score: Validation AUC of a model; read if an anchor must be chosen.
        processes: The processes that hold the models.

    Raises:
        MergeError: An anchor must be chosen, and there is no score.
    """
    symmetries, shares = network.symmetries, [1 / len(models)] * len(models)
    if how == "rescale":
        return rescale(merged, models, shares, activations, symmetries), weights, None
    if how != "project":
        tables = {name: merged[name] for name in network.tables}
        on_merged_tables = [{**model, **tables} for model in models]
        fitted = fit_layers(
            merged, on_merged_tables, shares, activations, symmetries, how == "select_units"
        )
        return fitted, weights, None
    products = table_products(models, network.moved_tables("rotation"), row_weights)
    products = processes.total(products)
    copied = elementwise_parameters(activations.network)
    readers = set(untied_linears(activations.network)) - copied
    projected = project_tables(merged, models, symmetries, products, weights, readers)
    if not copied:
        fitted = fit_layers(projected, models, shares, activations, symmetries, True)
        return fitted, weights, None
    if score is None:
        raise MergeError("repair=project: an anchor is chosen on validation rows, without a score")
    best, scores = projected, list[float]()
    for anchor in range(len(models)):
        chosen = anchor_weights(weights, symmetries, readers, copied, anchor)
        parts = mix([{name: model[name] for name in chosen} for model in models], chosen)
        fitted = fit_layers(
            projected | parts, models, shares, activations, symmetries, True, copied
        )
        scores.append(score(fitted))
        if scores[-1] > max(scores[:-1], default=-math.inf):
            best = fitted
    anchor = scores.index(max(scores))
    chosen = anchor_weights(weights, symmetries, readers, copied, anchor)
    return best, {**weights, **chosen}, {"source": anchor, "valid_auc": scores}


def calibrate_model(
    params: Params, network: Network, calibration: Calibration
) -> tuple[Params, Calibration]:
    """Return the parameters with scaled and shifted logits.

    They are returned unchanged, with the reason, if there is no best scale or a negative one.

    Raises:
        MergeError: The network declares no logit scale.
    """
    if calibration.scale is None or calibration.shift is None or calibration.scale <= 0:
        reason = calibration.reason or "the model ranks rows the wrong way round"
        return params, replace(calibration, reason=reason)
    if network.logit_scale is None:
        raise MergeError("recalibrate=true: the network declares no logit_scale()")
    scaled = recalibrate(params, network.logit_scale, calibration.scale, calibration.shift)
    return scaled, calibration


def row_weights_of(
    models: Sequence[Params],
    counts: Sequence[Params],
    row_mask: Mapping[str, Tensor],
    tables: Collection[str],
) -> Sequence[Params]:
    """Return the weights of table rows in comparisons of sources: their counts.

    Without counts every row has the same weight. But rows of joined vocabularies that a source
    lacks (``row_mask``) have none: they hold its row for unseen tokens.
    """
    if counts:
        rest = {name: torch.ones(len(models[0][name])) for name in tables if name not in counts[0]}
        return [{**rest, **source} for source in counts] if rest else counts
    if not row_mask:
        return counts
    return [
        {
            name: row_mask[name][k].float() if name in row_mask else torch.ones(len(model[name]))
            for name in model
            if name in tables
        }
        for k, model in enumerate(models)
    ]


def check_sample(how: str, params: Params, activations: ActivationStatistics) -> list[str]:
    """Check that a sample has enough rows to fit layers; return a warning if barely.

    Args:
        how: The repair.
        params: A model.
        activations: Activations on the sample.

    Raises:
        ScarceSample: A layer sees no more rows than it has inputs, so that any fit is perfect.
    """
    copied = elementwise_parameters(activations.network) if how == "project" else set()
    rows = {n: seen for n, seen in activations([params]).rows.items() if n not in copied}
    inputs = {name: params[name].shape[1] + 1 for name in rows}
    scarce = min(rows, key=lambda name: rows[name] / inputs[name], default=None)
    if scarce is None or rows[scarce] >= ENOUGH * inputs[scarce]:
        return []
    sample = sum(rows_of(batch) for batch in activations.batches)
    needed = -(-ENOUGH * inputs[scarce] * sample // rows[scarce])
    message = (
        f"sample: repair={how} fits the {inputs[scarce]:,} inputs of {scarce} on"
        f" {rows[scarce]:,} rows, noise included; take {needed:,} or more, or repair=rescale"
    )
    if rows[scarce] <= inputs[scarce]:
        raise ScarceSample(message)
    return [message]
