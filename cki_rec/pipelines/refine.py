"""Refine a merged model without labels: fit it to a teacher made of its sources.

Shape legend: K sources, R rows, V rows of a table.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.checkpoints import describe, row_counts
from cki_rec.config import Config, Train, run_id, section, with_delta
from cki_rec.data.columns import Ints
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed, sharded
from cki_rec.engine.mapping import fit_maps
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.restoration import restore
from cki_rec.engine.trainer import Objective
from cki_rec.pipelines import train, vocabularies
from cki_rec.pipelines.predictions import valid_auc
from cki_rec.pipelines.preflight import ROWS
from cki_rec.pipelines.provenance import other_tables
from cki_rec.pipelines.sources import Source, Sources
from cki_rec.pipelines.teacher import (
    PASSES,
    Teacher,
    choose_teacher,
    teacher_logits,
    unlabelled_rows,
)


def ensure(config: Config, models: Sources, start: Source, force: bool = False) -> Run:
    """Return the finished refinement of ``start``; refine if there is none.

    Args:
        config: The configuration, of which ``merge.refine`` is not none.
        models: The sources.
        start: The model that is fitted.
        force: Refine again.
    """
    dataset = store.prepared(config)
    options = config.merge
    reads = {
        "start": start.identity,
        "sources": [source.identity for source in models.merged],
        "refine": options.refine,
        "refinement": section(options.refinement),
        "rows": options.rows if options.rows in ROWS else EncodedDataset(Path(options.rows)).hash,
        "train": train.schedule_section(schedule_of(config, PASSES)),
        "data": dataset.hash,
        "seed": config.seed,
    }
    distributed.start(config.runtime)
    out, resume = Path(config.runtime.out), config.runtime.resume
    with open_run(out, run_id("refine", reads), force, resume) as run:
        if run.record is None:
            _refine(config, dataset, models.merged, start, run, reads)
    return run


def _refine(
    config: Config,
    dataset: EncodedDataset,
    sources: Sequence[Source],
    start: Source,
    run: Run,
    reads: dict[str, Any],
) -> None:
    scratch, name = run.path / "start", start.name
    saved, folder = vocabularies.on_data_set(config, start.folder, name, dataset, scratch)
    counts = {table: count.numpy() for table, count in row_counts(folder).items()}
    with run.phase("teacher"):
        teacher = choose_teacher(config, dataset, sources)
        steps = steps_of(config, teacher)
        rows = unlabelled_rows(config, dataset, sources, saved.schema, steps)
        target_R = teacher_logits(config, dataset, sources, teacher, rows, start)
    run.facts["teacher"] = {"field": teacher.field, "share": teacher.share}
    options = config.merge.refinement
    passes = min(options.passes, round(steps * options.batch_size / len(rows.numbers)))
    schedule = schedule_of(config, max(PASSES, passes))

    def targets(numbers: Ints) -> NDArray[np.float32]:
        found: NDArray[np.float32] = target_R[np.searchsorted(rows.numbers, numbers)]
        return found

    mapped = run.path / "mapped"
    if teacher.field is None and _has_maps(config, dataset, sources):
        if not distributed.from_first(mapped.exists()):  # of a run that was interrupted later
            with run.phase("maps"):
                lead = max(sources, key=lambda source: valid_auc(config, dataset, source))
                pass_steps = -(-len(rows.numbers) // options.batch_size)
                params = fit_maps(
                    sharded.load([source.folder for source in sources]),
                    *(sources.index(lead), rows.data, rows.numbers, targets),
                    min(options.map_steps, options.passes * pass_steps),
                    *(options.batch_size, options.learning_rate, config.seed),
                    f"refine {config.merge.label}, maps of tables, seed {config.seed}",
                    distributed.start(config.runtime),
                )
                (begun,) = sharded.load([folder])
                tensors = {"model": params, "accumulator": begun.accumulators}
                sharded.save(mapped, tensors, begun, saved.origin)
        folder = mapped
    model = restore(saved, folder, schedule, config.runtime, to_train=True)
    objective = Objective("teacher", targets, rows.data, refines=True)
    distributed.barrier()  # all have read it
    if distributed.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    routed = "the mean logit" if teacher.field is None else f"sources routed by {teacher.field}"
    train.run_training(
        *(config, dataset, run, reads, model, saved.model, saved.schema),
        *([rows.numbers, dataset.rows("valid")], counts, schedule),
        *(f"refine {config.merge.label} to {routed}, seed {config.seed}", saved.origin, objective),
    )
    if distributed.rank() == 0:
        shutil.rmtree(mapped, ignore_errors=True)


def variants(config: Config, models: Sources) -> list[Config]:
    """Return the refinements that a search tries: to the mean logit, with maps and without."""
    dataset = store.prepared(config)
    teacher = choose_teacher(config, dataset, models.merged)
    if teacher.field is not None or not _has_maps(config, dataset, models.merged):
        return [config]
    return [config, with_delta(config, {"merge.refinement.map_steps": 0})]


def _has_maps(config: Config, dataset: EncodedDataset, sources: Sequence[Source]) -> bool:
    """Return whether tables are mapped first: if vocabularies are equal."""
    if not config.merge.refinement.map_steps:
        return False
    return not any(other_tables(describe(source.folder), dataset) for source in sources)


def steps_of(config: Config, teacher: Teacher) -> int:
    """Return about how many steps a fit to a teacher takes."""
    options = config.merge.refinement
    return options.steps if teacher.field is None else options.routed_steps


def schedule_of(config: Config, passes: int) -> Train:
    """Return the schedule of a refinement."""
    options = config.merge.refinement
    return replace(
        config.train,
        start=None,
        epochs=passes,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        table_learning_rate=options.table_learning_rate,
        table_l2=0.0,
        plateau_factor=1.0,
        min_learning_rate=0.0,
        ema=None,
        gradient_clip=None,
    )
