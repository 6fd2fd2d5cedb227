"""Merge, then train briefly on all rows."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec.config import Config, Train, UserError, run_id, section
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed
from cki_rec.engine.record import Run, open_run
from cki_rec.pipelines import merge, train
from cki_rec.pipelines.merge import Source
from cki_rec.pipelines.scores import moved_start, restore

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

    The start may be a parent as it is (``merge=best_source``): the control that trains equally
    long.

    Raises:
        UserError: The method does not give one model.
    """
    if not merge.method_of(config).single:
        raise UserError(f"merge={config.merge.label} gives no single model to fine-tune")
    start = merged(config)
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    reads = {
        "start": start.identity,
        "data": dataset.hash,
        "schedule": train.schedule_section(_schedule(config)),
        "seed": config.seed,
    }
    distributed.start(config.runtime)
    out, resume = Path(config.runtime.out), config.runtime.resume
    with open_run(out, run_id("finetune", reads), force, resume) as run:
        if run.record is None:
            _finetune(config, dataset, start, run, reads)
    return run


def merged(config: Config) -> Source:
    """Return the one model that the configured integration gives."""
    done = merge.ensure(config)
    assert done.record is not None
    merge.warn_if_worse(config, done.record["result"])
    kept = done.record["result"]["kept"]
    if kept is None:
        return Source(config.merge.label, done.path.name, done.checkpoint)
    sources = merge.sources_of(config)
    return next(source for source in sources if source.identity in kept)


def _schedule(config: Config) -> Train:
    """Return how to train on: as before, but for what ``conf/finetune`` sets."""
    return replace(config.train, **section(config.finetune))


def _finetune(
    config: Config, dataset: EncodedDataset, start: Source, run: Run, reads: dict[str, Any]
) -> None:
    scratch, schedule = run.path / "start", _schedule(config)
    saved, folder = moved_start(config, dataset, start.folder, start.name, scratch)
    model = restore(saved, folder, schedule, config.runtime, to_train=True)
    shutil.rmtree(scratch, ignore_errors=True)
    rows = [dataset.rows(split) for split in ("train", "valid")]
    counts = dataset.row_counts(saved.schema)  # as after training on these rows alone
    title = f"fine-tune {config.merge.label}, {config.suite.name}, seed {config.seed}"
    train.run_training(
        *(config, dataset, run, reads, model, saved.model, saved.schema),
        *(rows, counts, schedule, title, Provenance.union([saved.origin, dataset.origin])),
    )
