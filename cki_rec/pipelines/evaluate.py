"""Metrics and intervals of a configured model on test rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec import project_root
from cki_rec.checkpoints import describe, outline
from cki_rec.config import Config, Evaluate, UserError, run_id, section
from cki_rec.data.candidates import Candidates, draw_candidates
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.test_labels import all_labels
from cki_rec.engine import distributed
from cki_rec.engine.record import Run, open_run, save_arrays
from cki_rec.engine.sweeps import add_to_sweep
from cki_rec.evaluation.bootstrap import Resamples, resampling_weights
from cki_rec.evaluation.measure import CANDIDATES, Logits, Rows, compare, summarize
from cki_rec.evaluation.metrics import METRICS, PRIMARY
from cki_rec.evaluation.ranking import Cases
from cki_rec.evaluation.rows import Floats
from cki_rec.evaluation.settings import common, flat
from cki_rec.pipelines import finetune, merge, preflight
from cki_rec.pipelines.foreign_sources import check_own
from cki_rec.pipelines.predictions import SPLITS, candidate_logits, predictions, valid_auc
from cki_rec.pipelines.provenance import check_rows, data_facts
from cki_rec.pipelines.references import Reference, mean_logits
from cki_rec.pipelines.sources import Source, Sources, are_disjoint, is_external, shard_of
from cki_rec.plugins import load, source_digest

log = logging.getLogger(__name__)

REPLICATES = "replicates.npz"
OWN = "own_sources"
"""Name of a suite of checkpoints that the user named by path."""


def run(config: Config) -> float | None:
    """Make the configured model, measure it on test rows, and return its validation AUC."""
    check_own(config, "evaluate")
    preflight.check_label(config)
    label, is_tuned = config.merge.label, config.finetune.epochs > 0
    is_first = distributed.rank() == 0
    if reason := _refusal(config):
        if is_first:
            add_to_sweep(Path(config.runtime.out), config.name, None)
        log.info("  skipped: %s %s", label, reason)
        return None
    done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    if is_first:
        add_to_sweep(Path(config.runtime.out), config.name, done)
    test = done.record["result"]["test"]
    shown = ", ".join(f"{metric.title} {_shown(test[metric.name])}" for metric in PRIMARY)
    log.info("  test %s: %s%s", shown, label, ", fine-tuned" if is_tuned else "")
    valid: float | None = done.record["result"]["valid"]["auc"]
    return valid


def _refusal(config: Config) -> str | None:
    """Return the reason why there is nothing to evaluate; None: there is something."""
    entry = preflight.entry_of(config.merge)
    if isinstance(entry, Reference) and (reason := entry.refusal(config)):
        return reason
    if config.finetune.epochs > 0 and not preflight.is_single_model(config.merge):
        return "is no single model that could be fine-tuned"
    return None


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished evaluation of ``config``; train and merge missing models first.

    Differences are paired, on the same test rows and resamples, to the best source (by validation
    AUC) and to the output ensemble of the suite's sources. For LogLoss after recalibration, each
    side is recalibrated on validation rows. DeLong's p value takes rows as independent; intervals
    resample the unit of ``evaluate.resample``.
    """
    config = preflight.without_unused(config)
    preflight.check_options(config)
    metrics = own_metrics(config)
    are_external = [
        any("path" in source for source in section.sources)
        for section in (config.merge, config.suite)
    ]
    if are_external == [True, False]:
        raise UserError(
            "merge.sources names checkpoints, suite.sources does not: name them as"
            " suite.sources=[{path: ...},{path: ...}], which merge.sources follows"
        )
    if reason := _refusal(config):
        raise UserError(f"merge.method={config.merge.method}: {reason}")
    models = merge.resolve(config, needs_suite=True)
    dataset = store.prepared(config)
    options = config.evaluate
    everyone = [*models.suite, *models.merged, *([models.base] if models.base else [])]
    _check_unseen(options, dataset, everyone)  # before any merging
    members = _members(config, models)
    if dataset.group is None:  # rows have no users, and the record must not claim users
        options = replace(options, resample="row")
    evaluated = section(options)
    evaluated.pop("plugins", None)
    if metrics:
        evaluated["metrics"] = metrics
    if not options.disjoint_files:
        del evaluated["disjoint_files"]
    reads = {
        "name": [config.suite.name, config.merge.label, config.finetune.epochs > 0],
        "method": config.merge.method,
        "members": [source.identity for source in members],
        "sources": [source.identity for source in models.suite],
        "data": dataset.hash,
        "partition": section(config.data.partition),
        "evaluate": evaluated,
        "seed": config.seed,
    }
    if are_disjoint([shard_of(source) for source in models.suite]):
        reads["disjoint"] = True  # a joint model knows more than any source can
    with open_run(Path(config.runtime.out), run_id("evaluate", reads), force) as run:
        if run.record is None:
            with run.phase("evaluate"):
                measured = _evaluate(config, options, dataset, members, models)
            if measured is not None:
                result, replicates = measured
                save_arrays(run.path / REPLICATES, replicates)
                settings = {"settings": _settings(config, models)}  # follow from the identities
                run.finish(reads | settings, data_facts(dataset), result)
    return run


def own_metrics(config: Config) -> dict[str, str]:
    """Load ``evaluate.plugins``; return the metrics of the user and the digests of their sources.

    Raises:
        UserError: A plugin cannot be imported.
    """
    for plugin in config.evaluate.plugins:
        load(plugin, "evaluate.plugins")
    sources = {name: source_digest(metric.function) for name, metric in METRICS.items()}
    return {name: digest for name, digest in sources.items() if digest is not None}


def _settings(config: Config, models: Sources) -> dict[str, dict[str, Any]]:
    """Return the options that the runs of one table share (``evaluation.settings``)."""
    sources = []
    for source in models.suite:
        trained = (Run(source.folder.parent).record or {}).get("config", {})
        known = {"model": section(describe(source.folder).model)}
        if "train" in trained:
            known["train"] = {**trained["train"], "start": "start" in trained}
        sources.append(flat(known))
    method = section(config.merge)
    of_refinement = ("effort", "margin", "refinement", "rows")
    ignored = ("sources", "base", "label", "vocabularies")
    for name in (*ignored, *(of_refinement if config.merge.refine == "none" else ())):
        del method[name]
    settings = {"sources": common(sources), "method": flat(method, "merge.")}
    if config.finetune.epochs > 0:
        settings["finetune"] = flat(section(config.finetune), "finetune.")
        del settings["finetune"]["finetune.objective"]
    return settings


def _members(config: Config, models: Sources) -> list[Source]:
    """Return the models whose scores are evaluated: one, or all that a reference combines."""
    if config.finetune.epochs > 0:
        tuned = finetune.ensure(config, models)
        return [Source(config.merge.label, tuned.path.name, tuned.checkpoint)]
    if preflight.is_single_model(config.merge):
        return [merge.model_of(config, models)]
    return models.merged


def _logits(
    config: Config,
    dataset: EncodedDataset,
    members: Sequence[Source],
    candidates: Mapping[str, Candidates],
) -> Logits:
    """Return the logits of one model, or as the reference combines its sources."""
    scores = [_scores(config, dataset, source, candidates) for source in members]
    entry = preflight.entry_of(config.merge)
    combine = entry.combine if isinstance(entry, Reference) and entry.combine else mean_logits
    by_item = config.data.partition.by == "item"
    rows = {split: dataset.rows(split) for split in SPLITS}
    rows |= {CANDIDATES[split]: part.rows(by_item) for split, part in candidates.items()}
    return combine(scores, config, dataset, rows)


def _scores(
    config: Config,
    dataset: EncodedDataset,
    source: Source,
    candidates: Mapping[str, Candidates],
) -> Logits:
    """Return the logits of one model on both splits, and on candidates if there are any."""
    scores: dict[str, Any] = {**predictions(config, dataset, source)}
    if candidates:
        ranked = candidate_logits(config, dataset, source, candidates)
        scores |= {CANDIDATES[split]: logits for split, logits in ranked.items()}
    return scores


def _candidates(options: Evaluate, dataset: EncodedDataset) -> dict[str, Candidates]:
    """Return the candidates of both splits; none without ``evaluate.ranking``.

    Validation rows do not depend on test labels: their items may be liked in test rows.
    """
    if options.ranking is None:
        return {}
    known = dataset.labels(np.arange(len(dataset)))
    labels: dict[str, NDArray[Any]] = {"valid": known, "test": all_labels(dataset)}
    return {s: draw_candidates(dataset, s, labels[s], options.ranking) for s in SPLITS}


def _evaluate(
    config: Config,
    options: Evaluate,
    dataset: EncodedDataset,
    members: list[Source],
    models: Sources,
) -> tuple[dict[str, Any], dict[str, Floats]] | None:
    """Return the result for the record, and the bootstrap replicates of its differences.

    All processes score rows. The first one measures; others return None.
    """
    for name in _check_unseen(options, dataset, [*models.suite, *members]):
        log.info("  %s: evaluate.disjoint_files covers its other raw files", name)
    is_tuned = config.finetune.epochs > 0
    best = max(models.suite, key=lambda source: valid_auc(config, dataset, source))
    candidates = _candidates(options, dataset)
    everyone = {s: _scores(config, dataset, s, candidates) for s in dict.fromkeys(models.suite)}
    baselines: dict[str, Logits | None] = {
        "best_source": mean_logits([everyone[best]]),
        "output_ensemble": mean_logits([everyone[s] for s in models.suite]),
    }
    is_unchanged = config.merge.refine == "none" and models.merged == models.suite
    if config.merge.method in baselines and is_unchanged and not is_tuned:
        baselines[config.merge.method] = None  # the baseline itself
    logits, shares = _logits(config, dataset, members, candidates), _shares(config, models)
    if distributed.rank() > 0:
        return None
    model, difference, replicates = compare(
        logits,
        baselines,
        {split: _rows(config, dataset, split, candidates) for split in SPLITS},
        _resamples(options, dataset),
        options.confidence,
    )
    result = {
        "suite": suite_name(config, models.suite),
        "seed": config.seed,
        "method": config.merge.label,
        "finetuned": is_tuned,
        "inference_cost": len(members),
        "parameters": _num_parameters(members[0].folder) * len(members),
        "valid": model.valid,
        "test": model.test,
        "recalibration": asdict(model.recalibration),
        "difference": difference,
        "shares": shares,
    }
    if candidates:
        result["ranking"] = {split: part.protocol for split, part in candidates.items()}
    if any(is_external(source.identity) for source in models.suite):
        result["sources"] = [source.name for source in models.suite]
    if config.data.partition.column is not None:
        names = [source.name.removeprefix("data.part=") for source in models.suite]
        result["of_sources"] = _of_sources(
            _rows(config, dataset, "test", {}),
            names,
            [mean_logits([everyone[source]]) for source in models.suite],
        )
    return result, replicates


def _of_sources(
    rows: Rows, names: Sequence[str], scores: Sequence[Logits]
) -> list[dict[str, Any]]:
    """Return name and AUC of every source, on all test rows and on those of each region."""
    measured = []
    for name, logits in zip(names, scores, strict=True):
        found = summarize(rows, logits["test"])
        domains = {region: domain["auc"] for region, domain in found["domains"].items()}
        measured.append({"name": name, "auc": found["auc"], "domains": domains})
    return measured


def suite_name(config: Config, sources: Sequence[Source]) -> str:
    """Return the name of the suite in tables; checkpoints of the user are no preset's sources."""
    name = config.suite.name
    is_preset = (project_root() / "conf" / "suite" / f"{name}.yaml").exists()
    return OWN if is_preset and any(is_external(s.identity) for s in sources) else name


def _check_unseen(
    options: Evaluate, dataset: EncodedDataset, models: Sequence[Source]
) -> list[str]:
    """Check that no test row was a training row; return the models that the user answers for.

    Raises:
        UserError: A model was trained on other raw files, and ``evaluate.disjoint_files`` is
            false.
    """
    assumed = []
    for model in dict.fromkeys(models):
        saved = describe(model.folder)
        check_rows(saved, dataset, model.name)
        if saved.origin.has_other_files(dataset.source_rows):
            assumed.append(model.name)
    if assumed and not options.disjoint_files:
        raise UserError(
            f"{assumed[0]}: also trained on other raw files than {dataset.folder.name} is of;"
            " if they hold none of its test rows, which nothing checks, set"
            " evaluate.disjoint_files=true"
        )
    return assumed


def _rows(
    config: Config, dataset: EncodedDataset, split: str, candidates: Mapping[str, Candidates]
) -> Rows:
    """Return the labelled rows of a split; the domains are the parts of ``data.partition``."""
    rows = dataset.rows(split)
    partition = config.data.partition
    domain = None
    if partition.size > 1:
        parts = dataset.parts(partition)
        names = parts.names or [f"{partition.by} part {n}" for n in range(partition.size)]
        domain = np.array(names)[parts.part[rows]]
    group = None if dataset.group is None else dataset.group[rows]
    cases = None
    if candidates and dataset.group is not None:
        drawn = candidates[split]
        cases = Cases(drawn.place_C, np.asarray(dataset.group[drawn.row_C]))
    return Rows(all_labels(dataset)[rows], group, domain, cases)


def _resamples(options: Evaluate, dataset: EncodedDataset) -> Resamples:
    """Return the resamples of the test rows, which all models of an experiment share."""
    rows = dataset.rows("test")
    unit = np.arange(len(rows))
    if options.resample == "user":
        assert dataset.group is not None
        unit = dataset.group[rows].astype(unit.dtype)
    return _drawn(unit.tobytes(), str(unit.dtype), options.bootstrap, options.seed)


@functools.lru_cache(maxsize=2)
def _drawn(unit: bytes, dtype: str, num_resamples: int, seed: int) -> Resamples:
    return resampling_weights(
        np.frombuffer(unit, dtype=dtype), num_resamples, np.random.default_rng(seed)
    )


def _shares(config: Config, models: Sources) -> dict[str, list[float]] | None:
    """Return the mean mixing weights of the sources; None if the method has none."""
    record = merge.ensure(config, models).record
    assert record is not None
    shares: dict[str, list[float]] | None = record["result"]["shares"]
    return shares


def _num_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in outline(folder).params.values())


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
