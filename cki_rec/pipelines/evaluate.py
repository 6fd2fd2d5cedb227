"""Metrics and intervals of a configured model on test rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.checkpoints import checkpoint
from cki_rec.config import Config, Evaluate, UserError, run_id, section
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.test_labels import all_labels
from cki_rec.engine.record import Run, add_to_sweep, open_run, save_arrays
from cki_rec.evaluation.metrics import log_loss, summarize
from cki_rec.evaluation.recalibration import Recalibration, recalibration
from cki_rec.evaluation.statistics import (
    Interval,
    Resamples,
    bootstrap_auc,
    bootstrap_log_loss,
    delong,
    paired_difference,
    resampling_weights,
)
from cki_rec.pipelines import finetune, merge, train
from cki_rec.pipelines.merge import Source
from cki_rec.pipelines.scores import check_rows, predictions

log = logging.getLogger(__name__)

REPLICATES = "replicates.npz"
Floats = NDArray[np.float64]
Logits = dict[str, Floats]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one model, or mean of models, is on validation and on test rows."""

    valid: dict[str, Any]
    test: dict[str, Any]
    recalibration: Recalibration
    replicates: dict[str, Floats]
    """Metric -> ``(R,)`` on resamples of the test rows; without metrics that are undefined."""


def run(config: Config) -> float | None:
    """Train, integrate and fine-tune what is missing, then measure; return the validation AUC."""
    label, tuned = config.merge.label, config.finetune.epochs > 0
    why = None
    if tuned and not merge.method_of(config).single:
        why = "is no single model that could be fine-tuned"
    elif config.merge.method == "oracle_router" and not _has_one_source_a_part(config):
        why = "needs one source for each part of the data, as suite=shards has them"
    if why:
        add_to_sweep(Path(config.runtime.out), config.name, None)
        log.info("  skipped: %s %s", label, why)
        return None
    done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    add_to_sweep(Path(config.runtime.out), config.name, done)
    test = done.record["result"]["test"]
    log.info(
        "  test AUC %s, LogLoss %s: %s%s",
        _shown(test["auc"]),
        _shown(test["log_loss"]),
        label,
        ", fine-tuned" if tuned else "",
    )
    valid: float | None = done.record["result"]["valid"]["auc"]
    return valid


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished evaluation of ``config``.

    Differences are paired, on the same test rows and resamples, to the best parent (by validation
    AUC) and to the output ensemble of the suite's sources; each side is recalibrated on validation
    rows for LogLoss after recalibration. DeLong's p value takes rows as independent, intervals
    resample what ``evaluate.resample`` says.
    """
    merge.method_of(config)
    outside = [any("path" in s for s in x) for x in (config.merge.sources, config.suite.sources)]
    if outside == [True, False]:
        raise UserError(
            "merge.sources names checkpoints, suite.sources does not: name them as"
            " suite.sources=[{path: ...},{path: ...}], which merge.sources follows"
        )
    parents = merge.resolve(config, config.suite.sources)
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    options = config.evaluate
    start = merge.start_of(config)
    sources = [*parents, *merge.resolve(config, config.merge.sources)]
    _check_unseen(options, dataset, [*sources, *([start] if start else [])])  # before any merging
    members = _members(config)
    if dataset.group is None:  # rows have no users, and the record must not say they had
        options = replace(options, resample="row")
    evaluated = section(options)
    if not options.disjoint_files:
        del evaluated["disjoint_files"]
    reads = {
        "name": [config.suite.name, config.merge.label, config.finetune.epochs > 0],
        "method": config.merge.method,
        "members": [source.identity for source in members],
        "parents": [source.identity for source in parents],
        "data": dataset.hash,
        "partition": section(config.data.partition),
        "evaluate": evaluated,
        "seed": config.seed,
    }
    if train.are_disjoint([train.part_of(parent.folder) for parent in parents]):
        reads["disjoint"] = True  # a joint model knows more than any parent can
    with open_run(Path(config.runtime.out), run_id("evaluate", reads), force) as run:
        if run.record is None:
            with run.phase("evaluate"):
                result, replicates = _evaluate(config, options, dataset, members, parents)
            save_arrays(run.path / REPLICATES, replicates)
            run.finish(reads, train.data_facts(dataset), result)
    return run


def _members(config: Config) -> list[Source]:
    """Return the models whose mean logit is evaluated: one, or those of an ensemble."""
    if config.finetune.epochs > 0:
        tuned = finetune.ensure(config)
        return [Source(config.merge.label, tuned.path.name, tuned.checkpoint)]
    if merge.method_of(config).single:
        return [finetune.merged(config)]
    return merge.resolve(config, config.merge.sources)


def _evaluate(
    config: Config,
    options: Evaluate,
    dataset: EncodedDataset,
    members: list[Source],
    parents: list[Source],
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Return the result for the record, and the bootstrap replicates of its differences."""
    for name in _check_unseen(options, dataset, [*parents, *members]):
        log.info("  %s: taken as said, no test row is in its other raw files", name)
    best = merge.best_source(config, dataset, parents)
    kinds = {"probability_ensemble": _mean_probabilities, "oracle_router": _routed}
    logits = kinds.get(config.merge.method, _mean_logits)(config, dataset, members)
    references = {
        "best_source": _mean_logits(config, dataset, [best]),
        "output_ensemble": _mean_logits(config, dataset, parents),
    }
    rows = dataset.rows("test")
    unit = np.arange(len(rows))
    if options.resample == "user":
        assert dataset.group is not None
        unit = dataset.group[rows].astype(unit.dtype)
    resamples = _resamples(unit.tobytes(), str(unit.dtype), options.bootstrap, options.seed)
    own = _measure(config, dataset, logits, resamples)
    result: dict[str, Any] = {
        "suite": config.suite.name,
        "seed": config.seed,
        "method": config.merge.label,
        "finetuned": config.finetune.epochs > 0,
        "inference_cost": len(members),
        "parameters": _num_parameters(members[0].folder) * len(members),
        "valid": own.valid,
        "test": own.test,
        "recalibration": asdict(own.recalibration),
        "difference": {},
        "shares": _shares(config),
    }
    replicates = {}
    for name, reference in references.items():
        if result["method"] == name and not result["finetuned"]:
            result["difference"][name] = None  # the reference itself
            continue
        other = _measure(config, dataset, reference, resamples)
        found = _differences(own, other, options.confidence)
        test = delong(all_labels(dataset)[rows], logits["test"], reference["test"])
        found["auc"]["delong_p"] = test.p_value
        result["difference"][name] = found
        for metric in own.replicates:
            if metric in other.replicates:
                difference_R = own.replicates[metric] - other.replicates[metric]
                replicates[f"{name}/{metric}"] = difference_R
    return result, replicates


def _check_unseen(
    options: Evaluate, dataset: EncodedDataset, models: Sequence[Source]
) -> list[str]:
    """Check that test rows are known, or said, to be no training rows; return of whom it is said.

    Raises:
        UserError: A model has seen other raw files, and nobody says that these hold no test row.
    """
    said = []
    for model in dict.fromkeys(models):
        saved = checkpoint.describe(model.folder)
        check_rows(saved, dataset, model.name)
        if saved.origin.has_other_files(dataset.source_rows):
            said.append(model.name)
    if said and not options.disjoint_files:
        raise UserError(
            f"{said[0]}: also trained on other raw files than {dataset.folder.name} is of;"
            " if they hold none of its test rows, which nothing checks, say so:"
            " evaluate.disjoint_files=true"
        )
    return said


def _measure(
    config: Config, dataset: EncodedDataset, logits: Logits, resamples: Resamples
) -> Measured:
    """Return metrics of both splits; what recalibrates test logits is fitted on validation."""
    valid, test = (_summary(config, dataset, split, logits[split]) for split in ("valid", "test"))
    fitted = recalibration(dataset.labels(dataset.rows("valid")), logits["valid"])
    label = all_labels(dataset)[dataset.rows("test")]
    replicates = {
        "auc": bootstrap_auc(label, logits["test"], resamples),
        "log_loss": bootstrap_log_loss(label, logits["test"], resamples),
    }
    test["log_loss_recalibrated"] = None
    recalibrated = fitted.apply(logits["test"])
    if recalibrated is not None:
        test["log_loss_recalibrated"] = log_loss(label, recalibrated)
        replicates["log_loss_recalibrated"] = bootstrap_log_loss(label, recalibrated, resamples)
    return Measured(valid, test, fitted, replicates)


def _differences(own: Measured, other: Measured, confidence: float) -> dict[str, dict[str, Any]]:
    """Return metric -> estimate and bounds of own minus other, paired, on test rows."""
    found = {}
    for metric in ("auc", "log_loss", "log_loss_recalibrated"):
        a, b = own.test[metric], other.test[metric]
        interval = Interval(estimate=None, low=None, high=None)
        if a is not None and b is not None:
            pair = own.replicates[metric], other.replicates[metric]
            interval = paired_difference(*pair, a - b, confidence)
        found[metric] = asdict(interval)
    return found


def _summary(
    config: Config, dataset: EncodedDataset, split: str, logits: Floats
) -> dict[str, Any]:
    """Return all metrics on one split; the domains are the parts of ``data.partition``."""
    rows = dataset.rows(split)
    label = all_labels(dataset)[rows]
    partition = config.data.partition
    has_domains = partition.by != "none" and partition.parts > 1
    domain = dataset.parts(partition).part[rows] if has_domains else None
    names = None if domain is None else np.char.add(f"{partition.by} part ", domain.astype(str))
    group = None if dataset.group is None else dataset.group[rows]
    return summarize(label, logits, group=group, domain=names)


def _mean_logits(config: Config, dataset: EncodedDataset, members: Sequence[Source]) -> Logits:
    """Return the mean of the members' logits per split."""
    scores = [predictions(config, dataset, s.identity, s.folder) for s in members]
    return {
        split: np.stack([score[split] for score in scores]).mean(0, dtype=np.float64)
        for split in scores[0]
    }


def _mean_probabilities(
    config: Config, dataset: EncodedDataset, members: Sequence[Source]
) -> Logits:
    """Return per split the logit of the mean of the members' probabilities."""
    scores = [predictions(config, dataset, s.identity, s.folder) for s in members]
    found = {}
    for split in scores[0]:
        logit = np.stack([score[split] for score in scores]).astype(np.float64)
        click, none = (-np.logaddexp(0, sign * logit) for sign in (-1, 1))  # of each, logarithms
        found[split] = np.logaddexp.reduce(click, 0) - np.logaddexp.reduce(none, 0)
    return found


def _routed(config: Config, dataset: EncodedDataset, members: Sequence[Source]) -> Logits:
    """Return per split the logit of the member that trained on a row's part.

    Raises:
        UserError: Sources are not the parts of the data, one each.
    """
    if not _has_one_source_a_part(config):
        raise UserError(
            "merge.method=oracle_router: needs one source for each part of the data,"
            " [{data.part: 0}, {data.part: 1}, ...], as suite=shards has them"
        )
    partition = config.data.partition
    named = [source["data.part"] for source in config.merge.sources]
    part = dataset.parts(partition).part
    scores = [predictions(config, dataset, s.identity, s.folder) for s in members]
    found = {}
    for split in scores[0]:
        of_part = np.stack([scores[named.index(p)][split] for p in range(partition.parts)])
        rows = dataset.rows(split)
        found[split] = of_part[part[rows], np.arange(len(rows))].astype(np.float64)
    return found


def _has_one_source_a_part(config: Config) -> bool:
    named = [source.get("data.part") for source in config.merge.sources]
    parts = config.data.partition.parts
    return len(named) == parts and set(named) == set(range(parts))


@functools.lru_cache(maxsize=2)
def _resamples(unit: bytes, dtype: str, num_resamples: int, seed: int) -> Resamples:
    """Return the resamples that all models of an experiment share."""
    return resampling_weights(
        np.frombuffer(unit, dtype=dtype), num_resamples, np.random.default_rng(seed)
    )


def _shares(config: Config) -> dict[str, list[float]] | None:
    """Return what was spliced from whom; None where nothing was."""
    record = merge.ensure(config).record
    assert record is not None
    shares: dict[str, list[float]] | None = record["result"]["shares"]
    return shares


def _num_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in checkpoint.load(folder).params.values())


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
