"""Train one model."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cki_rec.checkpoints import (
    Checkpoint,
    external_identity,
    named_folder,
    outline,
    row_counts,
)
from cki_rec.config import (
    Config,
    Data,
    Model,
    Monitor,
    Train,
    UserError,
    run_id,
    section,
)
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import checkpoint_io, distributed, plans
from cki_rec.engine.embeddings import ShardedModel, build, initialize, table_of
from cki_rec.engine.evaluator import predict
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.resume import RESUME, Checkpointer
from cki_rec.engine.steps import StepLog
from cki_rec.engine.trainer import LABELS, Metrics, Objective, fit
from cki_rec.evaluation.metrics import METRICS, PRIMARY
from cki_rec.models import build_model, model_schema
from cki_rec.models.layers import MASKS
from cki_rec.pipelines import starts, vocabularies
from cki_rec.pipelines.field_notes import warn_of_fields
from cki_rec.pipelines.history import best_epoch, history_summary, log_done, valid_auc
from cki_rec.pipelines.names import give
from cki_rec.pipelines.provenance import data_facts
from cki_rec.plugins import load_class, source_digest

log = logging.getLogger(__name__)


def run(config: Config) -> float:
    """Train as configured, log the model's folder, and return its validation AUC."""
    start = time.time()
    done = give(config, ensure(config, force=config.runtime.force))
    log_done(done, start)
    return valid_auc(done)


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished training run of ``config``; train first if it is not there.

    Raises:
        UserError: The options exclude each other, or the start does not fit.
    """
    dataset = starts.prepared(config)
    reads = _reads(config, dataset)
    distributed.start(config.runtime)
    out, resume = Path(config.runtime.out), config.runtime.resume
    with open_run(out, run_id("train", reads), force, resume) as run:
        if run.record is None:
            _train(config, dataset, run, reads)
    return run


def run_of(config: Config, dataset: EncodedDataset) -> Run:
    """Return the training run of ``config``, finished or not; train nothing."""
    return Run(Path(config.runtime.out) / run_id("train", _reads(config, dataset)))


def outline_of(config: Config) -> tuple[Checkpoint, bool]:
    """Return the outline of the model that a training gives, and whether it is there already.

    Nothing is trained. Tensors are on ``meta``, as in ``checkpoints.outline``.
    """
    dataset = starts.prepared(config)
    run = run_of(config, dataset)
    if run.record is not None and not run.damage():
        return outline(run.checkpoint), True
    schema = model_schema(dataset.schema, config.model)
    with torch.device("meta"):
        params = build_model(dataset.schema, config.model).state_dict()
    accumulators = {name: tensor for name, tensor in params.items() if table_of(name)}
    if config.train.embeddings == "dense":
        accumulators = {}
    elif config.train.table_optimizer == "rowwise_adagrad":
        accumulators = {name: tensor[:, 0] for name, tensor in accumulators.items()}
    return Checkpoint(params, accumulators, {}, config.model, schema, dataset.origin), False


def _reads(config: Config, dataset: EncodedDataset) -> dict[str, Any]:
    """Return everything that a training depends on."""
    reads = {
        "data": data_identity(config, dataset),
        "model": model_identity(config.model),
        "train": schedule_section(config.train),
        "seed": config.seed,
        "masks": MASKS,
    }
    if config.train.start is not None:
        reads["start"] = _start_identity(config, dataset)
    return reads


def model_identity(options: Model) -> dict[str, Any]:
    """Return the options of a network; the source of a user's class in place of its path.

    Raises:
        UserError: The class cannot be imported.
    """
    identity = section(options)
    if options.module is not None:
        identity["module"] = source_digest(load_class(options.module))
    return identity


def schedule_section(options: Train) -> dict[str, Any]:
    """Return the options of a training without its start."""
    schedule = section(options)
    del schedule["start"]
    return schedule


def _start_identity(config: Config, dataset: EncodedDataset) -> str:
    """Return the identity of the start; train nothing.

    Raises:
        UserError: Its data set does not fit (``starts.data_of_start``), or there is no checkpoint.
    """
    assert config.train.start is not None
    if "path" in config.train.start:
        return external_identity(named_folder(config.train.start, "train.start"))
    encoded = starts.data_of_start(config, dataset)
    return run_of(starts.started(config), encoded).path.name


def _train(config: Config, dataset: EncodedDataset, run: Run, reads: dict[str, Any]) -> None:
    data = config.data
    if config.train.epochs and not dataset.manifest["splits"]["train"]["rows"]:
        raise UserError(
            f"{dataset.folder}: no training row, so it serves evaluation only; set"
            " data.split.fractions, e.g. to [0.8,0.1,0.1]"
        )
    warn_of_fields(config, dataset)
    schema = model_schema(dataset.schema, config.model)
    counts = dataset.row_counts(schema, data.partition, data.part)
    if config.train.epochs == 0:  # such a model has seen no row
        counts = {table: np.zeros_like(values) for table, values in counts.items()}
    origin = dataset.origin
    if config.train.start is None:
        model = build(dataset.schema, config.model, config.train, config.runtime)
        initialize(model, config.seed, config.model.init_std, config.model.matrix_std)
    else:
        scratch = run.path / "start"
        model, before, home = starts.restored(
            config, dataset, schema, _start_folder(config), scratch
        )
        origin = Provenance.union([before, origin])
        seen = row_counts(home)
        counts = {table: seen[table].numpy() + counts[table] for table in seen}
        distributed.barrier()  # all have read it
        if distributed.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    run.facts["plan"] = model.plan
    if distributed.world_size() > 1:
        for line in plans.summarize(model.plan, distributed.world_size()):
            log.info("  %s", line)
    part = "all rows" if data.part is None else f"part {data.part} by {data.partition.by}"
    begun = "" if config.train.start is None else f", from {reads['start']}"
    title = f"train {config.model.name}, {part}, seed {config.seed}{begun}"
    valid_part = None if _is_before_validation(data) else data.part
    rows = [
        dataset.rows("train", data.partition, data.part),
        dataset.rows("valid", data.partition, valid_part),
    ]
    run_training(
        *(config, dataset, run, reads, model, config.model, schema),
        *(rows, counts, config.train, title, origin),
    )


def _start_folder(config: Config) -> Path:
    """Return the checkpoint folder of the start; train it first if it is not there."""
    assert config.train.start is not None
    if "path" in config.train.start:
        return named_folder(config.train.start, "train.start")
    return ensure(starts.started(config)).checkpoint


def run_training(
    config: Config,
    dataset: EncodedDataset,
    run: Run,
    reads: dict[str, Any],
    model: ShardedModel,
    options: Model,
    schema: FeatureSchema,
    rows: Sequence[NDArray[np.int64]],
    row_counts: Mapping[str, NDArray[np.int64]],
    schedule: Train,
    title: str,
    origin: Provenance,
    objective: Objective = LABELS,
) -> None:
    """Train ``model`` on the first of ``rows``, choose on the second, and write the record.

    Without epochs the model does not change.

    Args:
        config: Seed and runtime.
        dataset: Data set of the rows.
        run: Directory of the run.
        reads: Everything that the result depends on.
        model: Model to train.
        options: Configuration of the model.
        schema: Features of the model.
        rows: Training rows and validation rows.
        row_counts: Per table, the training rows that look each of its rows up.
        schedule: Options of the training.
        title: Title of the progress display.
        origin: Rows that the trained model has seen.
        objective: The targets that it fits.
    """
    for name, numbers in zip(("training", "validation"), rows, strict=True):
        if len(numbers) < distributed.world_size() > 1:
            raise UserError(
                f"{len(numbers)} {name} rows for {distributed.world_size()} processes; start"
                " fewer processes"
            )
    counts = {table: torch.from_numpy(values) for table, values in row_counts.items()}

    def save() -> None:
        tensors = {
            "model": model.module.state_dict(),
            "accumulator": model.accumulators(),
            "counts": counts,
        }
        checkpoint_io.save(run.checkpoint, tensors, options, schema, origin)

    runtime, start = config.runtime, time.perf_counter()
    keeper = Checkpointer(run.path, runtime, options, schema, origin)
    steps = StepLog(run.path, runtime.log_steps, runtime.tensorboard)
    metrics = monitored(schedule.monitor, dataset, rows[1])
    with run.phase("train"):
        if schedule.epochs == 0:
            history = [untrained(dataset, schema, rows[1], model, metrics)]
            save()
        else:
            history = fit(
                *(model, dataset, schema, rows[0], rows[1], schedule, config.seed),
                *(metrics, save, title, keeper, steps, objective),
            )
    run.facts["resumed_at_step"] = keeper.resumed
    run.facts["legs"] = [*keeper.legs, keeper.leg(history[-1]["step"])]
    run.seconds["train"] += sum(leg["seconds"] for leg in keeper.legs)
    if distributed.rank() == 0:
        vocabularies.carry(run.path / tokens.FOLDER, schema, [dataset.folder])
    finish(run, reads, dataset, history)
    log.info("  %s: %s, %.1f s", title, history_summary(history), time.perf_counter() - start)
    keeper.stop_if_asked(model.device)


def untrained(
    dataset: EncodedDataset,
    schema: FeatureSchema,
    rows: NDArray[np.int64],
    model: ShardedModel,
    metrics: Metrics,
) -> dict[str, Any]:
    """Return an entry of the history for a model before its first step."""
    measured = metrics(
        dataset.labels(rows), predict(model.module, dataset, schema, rows, model.device)
    )
    known = {f"valid_{name}": value for name, value in measured.items()}
    return {"epoch": 0, "step": 0, "train_loss": None, **known, "is_best": True}


def monitored(weights: Monitor, dataset: EncodedDataset, rows: NDArray[np.int64]) -> Metrics:
    """Return a function (labels, logits) -> metrics of ``rows``, and the sum that decides.

    Raises:
        UserError: A metric of users has a weight, and rows have no users.
    """
    weight_of = {name: weight for name, weight in section(weights).items() if weight}
    group = None if dataset.group is None else dataset.group[rows]
    for name in weight_of:
        if METRICS[name].needs_group and group is None:
            raise UserError(f"train.monitor.{name}: the rows of this data set have no users")
    names = dict.fromkeys([*(metric.name for metric in PRIMARY), *weight_of])

    def measure(
        label: NDArray[np.float32], logits: NDArray[np.float32]
    ) -> dict[str, float | None]:
        values = {name: METRICS[name](label, logits, group) for name in names}
        terms = [(values[name], weight) for name, weight in weight_of.items()]
        known = [value * weight for value, weight in terms if value is not None]
        values["monitor"] = sum(known) if len(known) == len(terms) else None
        return values

    return measure


def finish(
    run: Run, reads: dict[str, Any], dataset: EncodedDataset, history: list[dict[str, Any]]
) -> None:
    """Write the record of a training and delete its intermediate checkpoints."""
    if distributed.rank() > 0:
        return
    best = best_epoch(history)
    result = {
        "epochs": history[-1]["epoch"],
        "best_epoch": best["epoch"],
        "valid_auc": best["valid_auc"],
        "history": history,
    }
    run.finish(reads, data_facts(dataset), result)
    shutil.rmtree(run.path / RESUME, ignore_errors=True)


def data_identity(config: Config, dataset: EncodedDataset) -> dict[str, Any]:
    """Return the identity of the training data: its content, and the part if there is one."""
    part = config.data.part
    partition = None if part is None else section(config.data.partition)
    identity = {"hash": dataset.hash, "partition": partition, "part": part}
    return {**identity, "valid": "all"} if _is_before_validation(config.data) else identity


def _is_before_validation(data: Data) -> bool:
    """Return whether rows are trained on by windows of time, and validation rows are later."""
    return data.part is not None and data.partition.by == data.split.by == "time"
