"""Merge, then train briefly on all rows: ``cki-rec finetune``."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cki_rec.config import Config, Train, UserError, run_id, section
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.restoration import restore
from cki_rec.engine.trainer import LABELS, Objective
from cki_rec.models.layers import MASKS
from cki_rec.pipelines import merge, names, preflight, teacher, train, vocabularies
from cki_rec.pipelines.foreign_sources import check_own
from cki_rec.pipelines.history import log_done, valid_auc
from cki_rec.pipelines.sources import Source, Sources

log = logging.getLogger(__name__)


def run(config: Config) -> float:
    """Fine-tune as configured and log the folder of the model; return its validation AUC."""
    check_own(config, "finetune")
    if config.finetune.epochs == 0:
        raise UserError("finetune.epochs=0: nothing to do; choose finetune=one_epoch")
    start = time.time()
    done = names.give(config, ensure(config, force=config.runtime.force))
    log_done(done, start)
    return valid_auc(done)


def ensure(config: Config, models: Sources | None = None, force: bool = False) -> Run:
    """Return the finished fine-tuning of ``config``; merge first if there is no merged model.

    The first model may be a source (``merge=best_source``): the ablation that trains equally long.

    Args:
        config: The configuration.
        models: The sources of the merge, if they are resolved already.
        force: Fine-tune again.

    Raises:
        UserError: The method does not give one model.
    """
    if not preflight.is_single_model(config.merge):
        raise UserError(f"merge={config.merge.label} gives no single model to fine-tune")
    models = models or merge.resolve(config)
    start = merge.model_of(config, models)
    dataset = store.prepared(config)
    reads = {
        "start": start.identity,
        "data": dataset.hash,
        "schedule": train.schedule_section(_schedule(config)),
        "seed": config.seed,
        "masks": MASKS,
    }
    if config.finetune.objective != "labels":
        reads["teacher"] = {
            **section(config.finetune),
            "sources": [source.identity for source in models.merged],
            "refine": config.merge.refine,
            "field": config.merge.refinement.field,
            "share": config.merge.refinement.share,
            "control": config.merge.refinement.control,
        }
    distributed.start(config.runtime)
    out, resume = Path(config.runtime.out), config.runtime.resume
    with open_run(out, run_id("finetune", reads), force, resume) as run:
        if run.record is None:
            _finetune(config, dataset, models.merged, start, run, reads)
    return run


def _schedule(config: Config) -> Train:
    """Return the schedule of training with the changes of ``conf/finetune``."""
    changes = section(config.finetune)
    del changes["objective"]
    return replace(config.train, **changes)


def _finetune(
    config: Config,
    dataset: EncodedDataset,
    sources: Sequence[Source],
    start: Source,
    run: Run,
    reads: dict[str, Any],
) -> None:
    scratch, schedule = run.path / "start", _schedule(config)
    saved, folder = vocabularies.on_data_set(config, start.folder, start.name, dataset, scratch)
    model = restore(saved, folder, schedule, config.runtime, to_train=True)
    distributed.barrier()  # all have read it
    if distributed.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [dataset.rows(split) for split in ("train", "valid")]
    counts = dataset.row_counts(saved.schema)  # as after training on these rows alone
    title = f"fine-tune {config.merge.label}, {config.suite.name}, seed {config.seed}"
    train.run_training(
        *(config, dataset, run, reads, model, saved.model, saved.schema),
        *(rows, counts, schedule, title, Provenance.union([saved.origin, dataset.origin])),
        _objective(config, dataset, sources, start),
    )


def _objective(
    config: Config, dataset: EncodedDataset, sources: Sequence[Source], start: Source
) -> Objective:
    """Return the targets of the fine-tuning: labels, a teacher's logits, or both."""
    loss = config.finetune.objective
    if loss == "labels":
        return LABELS
    rows = np.asarray(dataset.rows("train"))
    chosen = teacher.choose_teacher(config, dataset, sources)
    read = teacher.UnlabelledRows(dataset, rows, f"{dataset.hash[:16]}-all")
    target_R = teacher.teacher_logits(config, dataset, sources, chosen, read, start)
    return Objective(loss, lambda numbers: target_R[np.searchsorted(rows, numbers)])
