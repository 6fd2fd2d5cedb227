"""Integrate, then train briefly on all rows."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cki_rec.analysis.metrics import auc
from cki_rec.config import Config, Train, UserError, run_id, section
from cki_rec.data import store
from cki_rec.data.store import EncodedDataset
from cki_rec.engine import checkpoint
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.trainer import fit
from cki_rec.pipelines import integrate, train
from cki_rec.pipelines.integrate import Source
from cki_rec.pipelines.scores import check_data, restore

log = logging.getLogger(__name__)


def run(config: Config) -> float:
    """Fine-tune as configured and say where the model is; return its validation AUC."""
    if config.finetune.epochs == 0:
        raise UserError("finetune.epochs=0: nothing to do; choose finetune=one_epoch")
    done = ensure(config, force=config.runtime.force)
    log.info("model: %s", done.checkpoint)
    return train.valid_auc(done)


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished fine-tuning of ``config``; integrate first if that is not there.

    The start may be a parent as it is (``integrate=best_parent``): the control that trains equally
    long.

    Raises:
        UserError: The method does not give one model.
    """
    if not integrate.method_of(config).single:
        raise UserError(f"integrate={config.integrate.label} gives no single model to fine-tune")
    start = merged(config)
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    reads = {
        "start": start.identity,
        "data": dataset.hash,
        "schedule": section(_schedule(config)),
        "seed": config.seed,
    }
    with open_run(Path(config.runtime.out), run_id("finetune", reads), force) as run:
        if run.record is None:
            _finetune(config, dataset, start, run, reads)
    return run


def merged(config: Config) -> Source:
    """Return the one model that the configured integration gives."""
    done = integrate.ensure(config)
    assert done.record is not None
    kept = done.record["result"]["kept"]
    if kept is None:
        return Source(config.integrate.label, done.path.name, done.checkpoint)
    sources = integrate.resolve(config, config.integrate.sources)
    return next(source for source in sources if source.identity in kept)


def _schedule(config: Config) -> Train:
    """Return how to train on: as before, but for what ``conf/finetune`` sets."""
    return replace(config.train, **section(config.finetune))


def _finetune(
    config: Config, dataset: EncodedDataset, start: Source, run: Run, reads: dict[str, Any]
) -> None:
    saved = checkpoint.load(start.folder)
    check_data(saved, dataset, start.name)
    schedule = _schedule(config)
    model = restore(config, saved, schedule.table_learning_rate)
    rows = dataset.rows("train")
    seen = dataset.row_counts(saved.schema)  # as after training on these rows alone
    counts = {table: torch.from_numpy(values) for table, values in seen.items()}

    def save() -> None:
        tensors = {
            "model": model.module.state_dict(),
            "accumulator": model.accumulators(),
            "counts": counts,
        }
        checkpoint.save(run.checkpoint, tensors, saved.model, saved.schema, dataset.hash)

    title = f"fine-tune {config.integrate.label}, {config.suite.name}, seed {config.seed}"
    began = time.perf_counter()
    with run.phase("finetune"):
        history = fit(
            model,
            dataset,
            saved.schema,
            rows,
            dataset.rows("valid"),
            schedule,
            config.seed,
            auc,
            save,
            title,
        )
    train.finish(run, reads, dataset, history)
    log.info("  %s: %s, %.1f s", title, train.describe(history), time.perf_counter() - began)
