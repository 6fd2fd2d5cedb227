"""Make one model out of several."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
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
from cki_rec.integration.methods import METHODS, Given, Method, check_options, needs_of
from cki_rec.integration.params import STATISTICS, Params, Weights, check_finite
from cki_rec.integration.splicing import override_weights, source_shares, splice
from cki_rec.models import build_model, model_schema
from cki_rec.pipelines import train
from cki_rec.pipelines.scores import EXTERNAL, check_data, predictions, scorer

SEVERAL = "several"
"""Stands for the data hash of a model whose sources were trained on different data sets: it fits
none of them, since what is a test row of one may have been a training row of another."""

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
    start = start_of(config)
    needs_rows = needs_labels(options)
    dataset = (
        store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
        if needs_rows
        else None
    )
    rule = section(options)
    del rule["sources"], rule["label"]
    rule["start"] = None if start is None else start.identity
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
            _integrate(config, sources, start, dataset, run, reads)
    return run


def method_of(config: Config) -> Method:
    """Return the configured method, of which all is known to fit that needs no model.

    Raises:
        UserError: There is none of that name; it does not have these options, does not take so
            many sources, or needs a start that is not given.
    """
    name = config.integrate.method
    if name not in METHODS:
        raise UserError(
            f"integrate.method={name}: {nearest(name, METHODS)}one of {', '.join(METHODS)}"
        )
    method, options = METHODS[name], config.integrate
    try:
        check_options(name, options.options)
    except ValueError as error:
        raise UserError(f"integrate.options: {error}") from None
    if method.models == "2" and len(options.sources) > 2:
        raise UserError(f"integrate.method={name}: takes 2 models, not {len(options.sources)}")
    if "start" in method.needs and options.start is None:
        raise UserError(
            f"integrate.method={name}: needs the model that all sources started from; name it:"
            " integrate.start={path: ...}, or {train.epochs: 0} for their initial weights, as"
            " suite=shards does"
        )
    return method


def start_of(config: Config) -> Source | None:
    """Return the common start if the method needs it; None where it does not."""
    start = config.integrate.start
    if start is None or "start" not in METHODS[config.integrate.method].needs:
        return None
    return resolve(config, [start])[0]


def needs_labels(options: Integrate) -> bool:
    """Return whether the integration looks at validation rows."""
    if options.method == "cki" or options.gate.train != "none":
        return options.gate.train != "none"
    return "labels" in needs_of(options.method, options.options)


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
    start: Source | None,
    dataset: EncodedDataset | None,
    run: Run,
    reads: dict[str, Any],
) -> None:
    options = config.integrate
    checkpoints = [checkpoint.load(source.folder) for source in sources]
    begun = None if start is None else checkpoint.load(start.folder)
    checkpoint.check_compatible(
        checkpoints if begun is None else [*checkpoints, begun],
        [*(source.name for source in sources), *([f"start {start.name}"] if start else [])],
    )
    first = checkpoints[0]
    if dataset is not None:
        check_data(first, dataset, sources[0].name)
    data = train.data_facts(dataset) if dataset else {"hash": first.data_hash}
    result: dict[str, Any] = {"shares": None, "kept": None, "gate": None}

    with run.phase("integrate"):
        if not METHODS[options.method].is_rule:
            kept = sources
            if options.method == "best_parent":
                assert dataset is not None
                kept = [best_source(config, dataset, sources)]
            result["kept"] = [source.identity for source in kept]
        else:
            try:
                params, weights, result["gate"] = _splice(config, checkpoints, begun, dataset)
                check_finite([params], "the result")
            except ValueError as error:
                raise UserError(f"integrate.method={options.method}: {error}") from None
            if weights is not None:
                shares = source_shares(weights, [c.params for c in checkpoints])
                trained = trunk_parameters(options, params)
                result["shares"] = {n: of for n, of in shares.items() if n not in trained}
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
    config: Config,
    checkpoints: list[Checkpoint],
    start: Checkpoint | None,
    dataset: EncodedDataset | None,
) -> tuple[Params, Weights | None, dict[str, Any] | None]:
    """Return the merged parameters, the weights that made them, and how gate training went.

    There are no weights where the method makes parameters itself.
    """
    options, models = config.integrate, [c.params for c in checkpoints]
    counts = _counts_by_parameter(checkpoints) if uses_counts(options) else []
    given = Given(
        seed=config.seed,
        counts=counts,
        start=None if start is None else start.params,
        score=None if dataset is None else scorer(config, dataset, checkpoints[0]),
    )
    merge = METHODS[options.method].merge
    if merge is not None:
        params = merge(models, given, **options.options)
        decided = overrides(options, models, counts)
        parts = [{name: model[name] for name in decided} for model in models]
        return {**params, **splice(parts, decided)}, None, None
    gates = initial_gates(options, models[0], config.seed)
    global_terms = (
        compute_global_terms(models, options.a, options.c, options.bins)
        if options.method == "cki" and options.perspective != "local"
        else None
    )

    def weigh(gates: Mapping[str, Tensor | None], splicing: str) -> Weights:
        rule = replace(options, splice=splicing)
        return weights_of(rule, models, given, gates, global_terms)

    if options.gate.train == "none" or options.method != "cki" or len(models) == 1:
        weights = weigh(gates, options.splice)
        return splice(models, weights), weights, None

    assert dataset is not None
    distributed.start(config.runtime)
    trunk = trunk_parameters(options, models[0])
    trained = train_gates(
        build_model(dataset.schema, config.model, torch.device("cpu")),
        models,
        gates,
        lambda gates: weigh(gates, "soft"),  # hard weights pass no gradient
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
    )
    with torch.no_grad():
        weights = weigh(trained.gates, options.splice)
        params = {**splice(models, weights), **trained.trunk}
    return params, weights, {"best_epoch": trained.epoch, "valid_auc": trained.valid_metric}


def weights_of(
    options: Integrate,
    models: Sequence[Params],
    given: Given,
    gates: Mapping[str, Tensor | None],
    global_terms: Mapping[str, Tensor] | None,
) -> Weights:
    """Return splicing weights as ``conf/integrate`` describes them."""
    arguments: dict[str, Any] = dict(options.options)
    if options.method == "cki":
        arguments = {
            "perspective": options.perspective,
            "splice": options.splice,
            "gates": gates,
            "global_terms": global_terms,
            "counts": given.counts if options.local == "evidence" else None,
        }
    weigh = METHODS[options.method].weigh
    assert weigh is not None
    weights = weigh(models, given, **arguments)
    decided = overrides(options, models, given.counts)
    return override_weights(weights, decided, decided)


def overrides(options: Integrate, models: Sequence[Params], counts: Sequence[Params]) -> Weights:
    """Return the weights of parameters that ``tables`` and ``bias`` decide, not the method."""
    decided: Weights = {}
    tables = [name for name in models[0] if table_of(name)]
    vectors = [name for name, tensor in models[0].items() if tensor.ndim == 1]
    if options.tables == "evidence":
        weights = evidence_weights(models, counts)
        decided |= {name: weights[name] for name in tables}
    if options.tables == "base" or options.bias == "base":
        weights = base_weights(models)
        decided |= {name: weights[name] for name in tables if options.tables == "base"}
        decided |= {name: weights[name] for name in vectors if options.bias == "base"}
    return decided


def uses_counts(options: Integrate) -> bool:
    """Return whether the rule asks how often each table row was seen."""
    return (
        "counts" in METHODS[options.method].needs
        or options.tables == "evidence"
        or options.local == "evidence"
    )


def initial_gates(options: Integrate, params: Params, seed: int) -> Gates:
    """Return an initial gate for every parameter whose weights the gate decides."""
    gates: Gates = {}
    for name, tensor in params.items():
        is_decided_elsewhere = (
            (table_of(name) and options.tables != "same")
            or (tensor.ndim == 1 and options.bias == "base")
            or name.endswith(STATISTICS)  # of batch norms: no gradient reaches them
        )
        kind = "none" if is_decided_elsewhere or options.method != "cki" else options.gate.kind
        gates[name] = initialize_gate(tensor.shape, kind, seed, name)
    return gates


def trunk_parameters(options: Integrate, params: Params) -> list[str]:
    """Return what trains along with the gates: all that lies below the MLP, as released."""
    if options.gate.train != "trunk":
        return []
    return [name for name in params if not name.startswith("mlp.")]


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
