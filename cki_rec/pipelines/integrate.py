"""Make one model out of several."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.analysis.metrics import auc
from cki_rec.config import Config, Integrate, UserError, nearest, run_id, section, with_delta
from cki_rec.data import store
from cki_rec.data.store import EncodedDataset
from cki_rec.engine import checkpoint, distributed
from cki_rec.engine.checkpoint import Checkpoint
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.gating import Gates, train_gates
from cki_rec.engine.record import Run, open_run
from cki_rec.integration.assessment import compute_global_terms
from cki_rec.integration.baselines import base_weights
from cki_rec.integration.evidence import evidence_weights
from cki_rec.integration.gate import initialize_gate
from cki_rec.integration.methods import METHODS, Given, Method
from cki_rec.integration.params import Params, Weights
from cki_rec.integration.splicing import override_weights, source_shares, splice
from cki_rec.models import build_model, model_schema
from cki_rec.pipelines import rules, train
from cki_rec.pipelines.scores import EXTERNAL, check_data, predictions

SEVERAL = "several"
"""Stands for the data hash of a model whose sources were trained on different data sets: it fits
none of them, since what is a test row of one may have been a training row of another."""

STATISTICS = ("running_mean", "running_var")
"""Last words of buffers that batch norms keep."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One parent at rest."""

    name: str
    """As the configuration names it."""
    identity: str
    """Run id, or a digest of an external checkpoint."""
    folder: Path
    """Of its checkpoint."""


def run(config: Config) -> None:
    """Integrate as configured; say where the model is and what was taken from whom."""
    done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    result = done.record["result"]
    for name, shares in (result["shares"] or {}).items():
        log.info("  %-52s %s", name, "  ".join(f"{share:6.1%}" for share in shares))
    if result["kept"] is None:
        log.info("model: %s", done.checkpoint)
    else:
        log.info("kept as they are: %s", ", ".join(result["kept"]))


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished integration of ``config``; train its sources if they are not there.

    Raises:
        UserError: Unknown method; sources that do not fit together; no data where it is needed.
    """
    options = config.integrate
    method_of(config)
    sources = resolve(config, options.sources)
    needs_rows = options.method == "best_parent" or options.gate.train != "none"
    dataset = (
        store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
        if needs_rows
        else None
    )
    rule = section(options)
    del rule["sources"], rule["label"]
    reads = {
        "sources": [source.identity for source in sources],
        "integrate": rule,
        "data": dataset.hash if dataset else None,
        "model": section(config.model) if needs_rows else None,
        "batch_size": config.train.batch_size if needs_rows else None,
        "seed": config.seed,
    }
    with open_run(Path(config.runtime.out), run_id("integrate", reads), force) as run:
        if run.record is None:
            _integrate(config, sources, dataset, run, reads)
    return run


def method_of(config: Config) -> Method:
    """Return the configured method.

    Raises:
        UserError: There is none of that name.
    """
    name = config.integrate.method
    if name not in METHODS:
        raise UserError(
            f"integrate.method={name}: {nearest(name, METHODS)}one of {', '.join(METHODS)}"
        )
    return METHODS[name]


def resolve(config: Config, deltas: Sequence[dict[str, Any]]) -> list[Source]:
    """Return the models that config deltas and paths name; missing runs are trained."""
    sources = []
    for delta in deltas:
        if "path" in delta:
            folder = Path(delta["path"])
            nested = folder / "checkpoint"
            folder = nested if nested.is_dir() else folder
            sources.append(Source(str(delta["path"]), _identity(folder), folder))
        else:
            done = train.ensure(with_delta(config, delta))
            sources.append(Source(str(delta), done.path.name, done.checkpoint))
    return sources


def _integrate(
    config: Config,
    sources: list[Source],
    dataset: EncodedDataset | None,
    run: Run,
    reads: dict[str, Any],
) -> None:
    options = config.integrate
    checkpoints = [checkpoint.load(source.folder) for source in sources]
    checkpoint.check_compatible(checkpoints, [source.name for source in sources])
    first = checkpoints[0]
    if dataset is not None:
        check_data(first, dataset, sources[0].name)
    checkpoints = [first, *(rules.control(options, c, config.seed) for c in checkpoints[1:])]
    data = train.data_facts(dataset) if dataset else {"hash": first.data_hash}
    result: dict[str, Any] = {"shares": None, "kept": None, "gate": None, "global": None}

    if options.control != "none" and not METHODS[options.method].is_rule:
        raise UserError(
            f"integrate.control={options.control}: integrate.method={options.method} keeps its"
            " sources as they are"
        )
    with run.phase("integrate"):
        if not METHODS[options.method].is_rule:
            kept = sources
            if options.method == "best_parent":
                assert dataset is not None
                kept = [best_source(config, dataset, sources)]
            result["kept"] = [source.identity for source in kept]
        else:
            try:
                params, weights, result["gate"] = _splice(config, checkpoints, dataset)
            except ValueError as error:
                raise UserError(f"integrate.method={options.method}: {error}") from None
            models = [c.params for c in checkpoints]
            shares = source_shares(weights, models)
            result["global"] = rules.entropy_report(options, models, config.seed)
            trained = trunk_parameters(options, params)
            result["shares"] = {name: of for name, of in shares.items() if name not in trained}
            tensors = {
                "model": params,
                "accumulator": _largest([c.accumulators for c in checkpoints]),
                "counts": _largest([c.counts for c in checkpoints]),
            }
            hashes = {c.data_hash for c in checkpoints}
            data_hash = first.data_hash if len(hashes) == 1 else SEVERAL
            checkpoint.save(run.checkpoint, tensors, first.model, first.schema, data_hash)
    run.finish(reads, data, result)


def _splice(
    config: Config, checkpoints: list[Checkpoint], dataset: EncodedDataset | None
) -> tuple[Params, Weights, dict[str, Any] | None]:
    """Return the merged parameters, the weights that made them, and how gate training went."""
    options, models = config.integrate, [c.params for c in checkpoints]
    counts = _counts_by_parameter(checkpoints) if uses_counts(options) else []
    gates = initial_gates(options, models[0], config.seed)
    outside = set(rules.outside_scope(options, models[0]))
    global_terms = (
        compute_global_terms(models, options.a, options.c, options.bins, options.range)
        if rules.uses_entropy(options)
        else None
    )

    def weigh(
        models: Sequence[Params],
        counts: Sequence[Params],
        gates: Mapping[str, Tensor | None],
        splicing: str = "soft",  # hard weights pass no gradient
    ) -> Weights:
        rule = replace(options, splice=splicing)
        terms = None if global_terms is None else {n: global_terms[n] for n in models[0]}
        return weights_of(rule, models, counts, gates, terms, config.seed, outside)

    if options.gate.train == "none" or (options.gate.train == "frozen" and len(models) == 1):
        weights = weigh(models, counts, gates, options.splice)
        return splice(models, weights), weights, None

    assert dataset is not None
    distributed.start(config.runtime)
    trunk = trunk_parameters(options, models[0])
    trained = train_gates(
        build_model(dataset.schema, config.model, torch.device("cpu")),
        models,
        gates,
        weigh,
        trunk,
        dataset,
        model_schema(dataset.schema, config.model),
        dataset.rows("train"),
        dataset.rows("valid"),
        options.gate,
        config.train.batch_size,
        config.seed,
        auc,
        f"gates of {options.label}, {config.suite.name}, seed {config.seed}",
        counts,
    )
    with torch.no_grad():
        weights = weigh(models, counts, trained.gates, options.splice)
        params = {**splice(models, weights), **trained.trunk}
    return params, weights, {"best_epoch": trained.epoch, "valid_auc": trained.valid_metric}


def weights_of(
    options: Integrate,
    models: Sequence[Params],
    counts: Sequence[Params],
    gates: Mapping[str, Tensor | None],
    global_terms: Mapping[str, Tensor] | None,
    seed: int,
    outside: Collection[str] = (),
) -> Weights:
    """Return splicing weights as ``conf/integrate`` describes them; of some parameters, too."""
    arguments: dict[str, Any] = {}
    if options.method == "filter_grafting":
        arguments = {"global_terms": global_terms}
    if options.method == "cki":
        arguments = {
            "perspective": options.perspective,
            "splice": options.splice,
            "gates": gates,
            "global_terms": global_terms,
            "counts": counts if options.local == "evidence" else None,
            "dual": options.dual,
            "scale": options.gate.scale,
        }
    weigh = METHODS[options.method].weigh
    assert weigh is not None
    weights = weigh(models, Given(seed=seed, counts=counts), **arguments)
    tables = [name for name in models[0] if table_of(name)]
    vectors = [name for name, tensor in models[0].items() if tensor.ndim == 1]
    if options.tables == "evidence":
        weights = override_weights(weights, tables, evidence_weights(models, counts))
    if options.tables == "base":
        weights = override_weights(weights, tables, base_weights(models))
    if options.bias == "base":
        weights = override_weights(weights, vectors, base_weights(models))
    kept = [name for name in models[0] if name in outside]
    return override_weights(weights, kept, base_weights(models))


def uses_counts(options: Integrate) -> bool:
    """Return whether the rule asks how often each table row was seen."""
    return (
        options.method == "evidence" or options.tables == "evidence" or options.local == "evidence"
    )


def initial_gates(options: Integrate, params: Params, seed: int) -> Gates:
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


def trunk_parameters(options: Integrate, params: Params) -> list[str]:
    """Return what trains along with the gates: all that is out of scope, as released."""
    return rules.outside_scope(options, params) if options.gate.train == "trunk" else []


def best_source(config: Config, dataset: EncodedDataset, sources: Sequence[Source]) -> Source:
    """Return the source with the best AUC on all validation rows; the first of equals."""
    label = dataset.labels(dataset.rows("valid"))

    def valid_auc(source: Source) -> float:
        logits = predictions(config, dataset, source.identity, source.folder)["valid"]
        return auc(label, logits) or 0.0

    return max(sources, key=valid_auc)


def _counts_by_parameter(checkpoints: Sequence[Checkpoint]) -> list[Params]:
    """Return the row counts of every table parameter, per source."""
    result = []
    for k, source in enumerate(checkpoints):
        if not source.counts:
            raise UserError(
                f"integrate.sources[{k}]: its checkpoint holds no row counts (evidence)"
            )
        result.append(
            {name: source.counts[table] for name in source.params if (table := table_of(name))}
        )
    return result


def _largest(groups: Sequence[Params]) -> Params:
    """Return the entrywise maximum: what one source has seen is not counted twice."""
    names = [name for name in groups[0] if all(name in group for group in groups)]
    return {name: torch.stack([group[name] for group in groups]).amax(0) for name in names}


def _identity(folder: Path) -> str:
    """Return the identity of an external checkpoint: its description names file digests."""
    description = folder / checkpoint.DESCRIPTION
    if not description.is_file():
        raise UserError(f"{folder}: no checkpoint here ({description.name} is missing)")
    return f"{EXTERNAL}{hashlib.sha256(description.read_bytes()).hexdigest()[:16]}"
