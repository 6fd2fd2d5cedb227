"""Metrics and intervals of a configured model on test rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.analysis.metrics import summarize
from cki_rec.analysis.statistics import (
    Resamples,
    bootstrap_auc,
    bootstrap_log_loss,
    paired_difference,
    resampling_weights,
)
from cki_rec.config import Config, Evaluate, UserError, run_id, section
from cki_rec.data import store
from cki_rec.data.held_out import all_labels
from cki_rec.data.store import EncodedDataset
from cki_rec.engine import checkpoint
from cki_rec.engine.record import Run, add_to_sweep, open_run, save_arrays
from cki_rec.pipelines import finetune, integrate, train
from cki_rec.pipelines.integrate import Source
from cki_rec.pipelines.scores import predictions

log = logging.getLogger(__name__)

REPLICATES = "replicates.npz"
Logits = dict[str, NDArray[np.float64]]


def run(config: Config) -> float | None:
    """Train, integrate and fine-tune what is missing, then measure; return the validation AUC."""
    label, tuned = config.integrate.label, config.finetune.epochs > 0
    if tuned and not integrate.method_of(config).single:
        add_to_sweep(Path(config.runtime.out), config.name, None)
        log.info("  skipped: %s is no single model that could be fine-tuned", label)
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
    AUC) and to the output ensemble of the suite's sources.
    """
    integrate.method_of(config)
    outside = [
        any("path" in s for s in x) for x in (config.integrate.sources, config.suite.sources)
    ]
    if outside == [True, False]:
        raise UserError(
            "integrate.sources names checkpoints, suite.sources does not: name them as"
            " suite.sources=[{path: ...},{path: ...}], which integrate.sources follows"
        )
    parents = integrate.resolve(config, config.suite.sources)
    members = _members(config)
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    options = config.evaluate
    if dataset.group is None:  # rows have no users, and the record must not say they had
        options = replace(options, resample="row")
    reads = {
        "name": [config.suite.name, config.integrate.label, config.finetune.epochs > 0],
        "members": [source.identity for source in members],
        "parents": [source.identity for source in parents],
        "data": dataset.hash,
        "partition": section(config.data.partition),
        "evaluate": section(options),
        "seed": config.seed,
    }
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
        return [Source(config.integrate.label, tuned.path.name, tuned.checkpoint)]
    if integrate.method_of(config).single:
        return [finetune.merged(config)]
    return integrate.resolve(config, config.integrate.sources)


def _evaluate(
    config: Config,
    options: Evaluate,
    dataset: EncodedDataset,
    members: list[Source],
    parents: list[Source],
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Return the result for the record, and the bootstrap replicates of its differences."""
    best = integrate.best_source(config, dataset, parents)
    logits = _mean_logits(config, dataset, members)
    references = {
        "best_parent": _mean_logits(config, dataset, [best]),
        "output_ensemble": _mean_logits(config, dataset, parents),
    }
    rows = dataset.rows("test")
    unit = np.arange(len(rows))
    if options.resample == "user":
        assert dataset.group is not None
        unit = dataset.group[rows].astype(unit.dtype)
    resamples = _resamples(unit.tobytes(), str(unit.dtype), options.bootstrap, options.seed)
    label = all_labels(dataset)[rows]
    own = _replicates(label, logits["test"], resamples)
    result: dict[str, Any] = {
        "suite": config.suite.name,
        "seed": config.seed,
        "method": config.integrate.label,
        "finetuned": config.finetune.epochs > 0,
        "inference_cost": len(members),
        "parameters": _num_parameters(members[0].folder) * len(members),
        "valid": _summary(config, dataset, "valid", logits["valid"]),
        "test": _summary(config, dataset, "test", logits["test"]),
        "difference": {},
        "shares": _shares(config),
    }
    replicates = {}
    for name, reference in references.items():
        if result["method"] == name and not result["finetuned"]:
            result["difference"][name] = None  # the reference itself
            continue
        other = _replicates(label, reference["test"], resamples)
        summary = _summary(config, dataset, "test", reference["test"])
        result["difference"][name] = {}
        for metric in ("auc", "log_loss"):
            a, b = result["test"][metric], summary[metric]
            estimate = None if a is None or b is None else a - b
            interval = paired_difference(own[metric], other[metric], estimate, options.confidence)
            result["difference"][name][metric] = {
                "estimate": interval.estimate,
                "low": interval.low,
                "high": interval.high,
            }
            replicates[f"{name}/{metric}"] = own[metric] - other[metric]
    return result, replicates


def _summary(
    config: Config, dataset: EncodedDataset, split: str, logits: NDArray[np.float64]
) -> dict[str, Any]:
    """Return all metrics on one split; the domains are the parts of ``data.partition``."""
    rows = dataset.rows(split)
    partition = config.data.partition
    has_domains = partition.by != "none" and partition.parts > 1
    domain = dataset.parts(partition).part[rows] if has_domains else None
    names = None if domain is None else np.char.add(f"{partition.by} part ", domain.astype(str))
    group = None if dataset.group is None else dataset.group[rows]
    return summarize(all_labels(dataset)[rows], logits, group=group, domain=names)


def _mean_logits(config: Config, dataset: EncodedDataset, members: Sequence[Source]) -> Logits:
    """Return the mean of the members' logits per split."""
    scores = [predictions(config, dataset, s.identity, s.folder) for s in members]
    return {
        split: np.stack([score[split] for score in scores]).mean(0, dtype=np.float64)
        for split in scores[0]
    }


def _replicates(
    label: NDArray[np.uint8], logits: NDArray[np.float64], resamples: Resamples
) -> dict[str, NDArray[np.float64]]:
    return {
        "auc": bootstrap_auc(label, logits, resamples),
        "log_loss": bootstrap_log_loss(label, logits, resamples),
    }


@functools.lru_cache(maxsize=2)
def _resamples(unit: bytes, dtype: str, num_resamples: int, seed: int) -> Resamples:
    """Return the resamples that all models of an experiment share."""
    return resampling_weights(
        np.frombuffer(unit, dtype=dtype), num_resamples, np.random.default_rng(seed)
    )


def _shares(config: Config) -> dict[str, list[float]] | None:
    """Return what was spliced from whom; None where nothing was."""
    record = integrate.ensure(config).record
    assert record is not None
    shares: dict[str, list[float]] | None = record["result"]["shares"]
    return shares


def _num_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in checkpoint.load(folder).params.values())


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
