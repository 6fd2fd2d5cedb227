"""The configured rule at work: from sources to the parameters of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Config, Merge, UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.gating import Gates, train_gates
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.methods.ablations import first
from cki_rec.merging.methods.cki.assessment import compute_global_terms
from cki_rec.merging.methods.cki.gate import initialize_gate
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix, override_weights
from cki_rec.merging.params import STATISTICS, MixingWeights, Params
from cki_rec.merging.registry import METHODS, MergeInputs
from cki_rec.merging.vocabulary import from_owners, restrict_weights, shared_rows
from cki_rec.models import build_model
from cki_rec.pipelines import rules


def merge(
    config: Config,
    models: Sequence[Params],
    given: MergeInputs,
    dataset: EncodedDataset | None,
    saved: Checkpoint,
) -> tuple[Params, MixingWeights | None, dict[str, Any] | None]:
    """Return the merged parameters, the weights that made them, and how gate training went.

    There are no weights where the method makes parameters itself.
    """
    options = config.merge
    make = METHODS[options.method].merge
    if make is not None:
        params = make(models, given, **options.options)
        decided = overrides(options, models, given.counts)
        parts = [{name: model[name] for name in decided} for model in models]
        params = {**params, **mix(parts, decided)}
        return from_owners(params, models, given.owners), None, None
    gates = initial_gates(options, models[0], config.seed)
    global_terms = (
        compute_global_terms(
            shared_rows(models, given.owners), options.a, options.c, options.bins, options.range
        )
        if rules.uses_entropy(options)
        else None
    )

    def weigh(
        models: Sequence[Params],
        counts: Sequence[Params],
        gates: Mapping[str, Tensor | None],
        splicing: str = "soft",  # hard weights pass no gradient
    ) -> MixingWeights:
        rule = replace(options, splice=splicing)
        terms = None if global_terms is None else {n: global_terms[n] for n in models[0]}
        return weights_of(rule, models, replace(given, counts=counts), gates, terms)

    if options.gate.train == "none" or (options.gate.train == "frozen" and len(models) == 1):
        weights = weigh(models, given.counts, gates, options.splice)
        weights = restrict_weights(weights, given.owners)
        return mix(models, weights), weights, None

    assert dataset is not None
    distributed.start(config.runtime)
    trained = train_gates(
        build_model(saved.schema, saved.model, torch.device("cpu")),
        models,
        gates,
        weigh,
        trunk_parameters(options, models[0]),
        dataset,
        saved.schema,
        dataset.rows("train"),
        dataset.rows("valid"),
        options.gate.epochs,
        options.gate.learning_rate,
        config.train.batch_size,
        config.seed,
        auc,
        f"gates of {options.label}, {config.suite.name}, seed {config.seed}",
        given.counts,
        given.owners,
    )
    with torch.no_grad():
        weights = weigh(models, given.counts, trained.gates, options.splice)
        weights = restrict_weights(weights, given.owners)
        params = {**mix(models, weights), **trained.trunk}
    return params, weights, {"best_epoch": trained.epoch, "valid_auc": trained.valid_metric}


def weights_of(
    options: Merge,
    models: Sequence[Params],
    given: MergeInputs,
    gates: Mapping[str, Tensor | None],
    global_terms: Mapping[str, Tensor] | None,
) -> MixingWeights:
    """Return mixing weights as ``conf/merge`` describes them; of some parameters, too."""
    arguments: dict[str, Any] = dict(options.options)
    if options.method == "filter_grafting":
        arguments = {"global_terms": global_terms}
    if options.method == "cki":
        arguments = {
            "perspective": options.perspective,
            "splice": options.splice,
            "gates": gates,
            "global_terms": global_terms,
            "counts": given.counts if options.local == "evidence" else None,
            "dual": options.dual,
            "scale": options.gate.scale,
        }
    weigh = METHODS[options.method].weigh
    assert weigh is not None
    weights = weigh(models, given, **arguments)
    decided = overrides(options, models, given.counts)
    return override_weights(weights, decided, decided)


def overrides(options: Merge, models: Sequence[Params], counts: Sequence[Params]) -> MixingWeights:
    """Return the weights of parameters that ``scope``, ``tables`` and ``bias`` decide."""
    decided: MixingWeights = {}
    tables = [name for name in models[0] if table_of(name)]
    vectors = [name for name, tensor in models[0].items() if tensor.ndim == 1]
    if options.tables == "evidence":
        weights = evidence(models, counts)
        decided |= {name: weights[name] for name in tables}
    kept = [name for name in rules.outside_scope(options, models[0])]
    kept += tables if options.tables == "base" else []
    kept += vectors if options.bias == "base" else []
    if kept:
        weights = first(models)
        decided |= {name: weights[name] for name in kept}
    return decided


def uses_counts(options: Merge) -> bool:
    """Return whether the rule asks how often each table row was seen."""
    return (
        "counts" in METHODS[options.method].needs
        or options.tables == "evidence"
        or options.local == "evidence"
    )


def counts_of(checkpoints: Sequence[Checkpoint], is_needed: bool) -> list[Params]:
    """Return the row counts of every table parameter, per source; of all sources or of none.

    Raises:
        UserError: They are needed, and a source has none.
    """
    for k, source in enumerate(checkpoints):
        if not source.counts:
            if not is_needed:
                return []
            raise UserError(f"merge.sources[{k}]: its checkpoint holds no row counts (evidence)")
    return [
        {name: source.counts[table] for name in source.params if (table := table_of(name))}
        for source in checkpoints
    ]


def votes_of(
    models: Sequence[Params], counts: Sequence[Params], owners: Mapping[str, Tensor]
) -> Sequence[Params]:
    """Return what table rows weigh where sources are compared: their counts.

    Without counts every row weighs the same, but on joined vocabularies those that a source lacks
    (``owners``) weigh nothing: what stands there is its row for unseen tokens.
    """
    if counts or not owners:
        return counts
    return [
        {
            name: owners[name][k].float() if name in owners else torch.ones(len(tensor))
            for name, tensor in model.items()
            if table_of(name)
        }
        for k, model in enumerate(models)
    ]


def initial_gates(options: Merge, params: Params, seed: int) -> Gates:
    """Return an initial gate for every parameter whose weights the gate decides."""
    gates: Gates = {}
    outside = set(rules.outside_scope(options, params))
    for name, tensor in params.items():
        is_decided_elsewhere = (
            name in outside
            or rules.is_decided_elsewhere(options, name, params)
            or name.endswith(STATISTICS)  # of batch norms: no gradient reaches them
        )
        kind = "none" if is_decided_elsewhere or options.method != "cki" else options.gate.kind
        gates[name] = initialize_gate(tensor.shape, kind, seed, name, options.gate.rank)
    return gates


def trunk_parameters(options: Merge, params: Params) -> list[str]:
    """Return what trains along with the gates: all that is out of scope, as released."""
    return rules.outside_scope(options, params) if options.gate.train == "trunk" else []


def evidence_of_all(groups: Sequence[Params], is_disjoint: bool) -> Params:
    """Return the entrywise sum of disjoint sources' counts or accumulators, else the maximum.

    What several sources may have seen is not counted twice.
    """
    found = {}
    for name in [name for name in groups[0] if all(name in group for group in groups)]:
        found[name] = groups[0][name].clone()
        for group in groups[1:]:
            join = torch.add if is_disjoint else torch.maximum
            join(found[name], group[name], out=found[name])
    return found
