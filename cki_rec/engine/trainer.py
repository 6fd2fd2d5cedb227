"""The training loop: fused Adagrad for tables, Adam for the rest.

Shape legend: B rows, F fields, D embedding size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from cki_rec.config import Train, UserError
from cki_rec.data.encoding.findings import large_numbers
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import LoadedRows, Loader, Targets
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.embeddings import ShardedModel
from cki_rec.engine.evaluator import predict
from cki_rec.engine.optimization import Average, TableL2, clip, initialized_adam
from cki_rec.engine.pipelining import Pipeline
from cki_rec.engine.resume import Checkpointer, TrainingState
from cki_rec.engine.steps import StepLog
from cki_rec.progress import progress

Metrics = Callable[[NDArray[np.float32], NDArray[np.float32]], dict[str, float | None]]
"""Function of (labels, logits) of validation rows to values by name; ``monitor`` is decisive."""


@dataclass(frozen=True, slots=True)
class Objective:
    """The targets of a training: labels, the logits of a teacher, or both."""

    loss: Literal["labels", "teacher", "both"] = "labels"
    """Cross entropy with labels, mean squared difference to the teacher's logits, or their sum."""
    targets: Targets | None = None
    """The teacher's logits on training rows."""
    data: LoadedRows | None = None
    """The holder of the training rows; None: the data set of the validation rows."""
    refines: bool = False
    """Refine a model: dropout is off, learning rates fall by a cosine over all steps, and the
    initial model is returned unless an epoch is better. The first epoch below it is the last."""


LABELS = Objective()


def fit(
    model: ShardedModel,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    schedule: Train,
    seed: int,
    metrics: Metrics,
    save: Callable[[], None],
    title: str,
    checkpointer: Checkpointer | None = None,
    log: StepLog | None = None,
    objective: Objective = LABELS,
) -> list[dict[str, Any]]:
    """Train until the monitored metric stops rising; call ``save`` after every best epoch.

    Learning rates fall by ``plateau_factor`` after an epoch without improvement. Training ends
    after ``patience`` such epochs in a row. All processes call this and take the same decisions.
    ``objective`` changes the loss, and for refinements the schedule.

    Returns:
        One dictionary per epoch: ``epoch, step, train_loss, learning_rate, is_best`` and metrics.

    Raises:
        UserError: The loss is not finite, or the metric is undefined.
        Stopped: The system asked to stop. A checkpoint is written; the next call resumes from it.
    """
    if not objective.refines:
        _check_batches(model, min(schedule.batch_size, len(train_rows)), title)
    adam = initialized_adam(model, schedule.learning_rate)
    average = Average(model, schedule.ema) if schedule.ema is not None else None
    loader = Loader(
        objective.data or dataset, schema, train_rows, schedule.batch_size, seed=seed,
        rank=distributed.rank(), world_size=distributed.world_size(), device=model.device,
        targets=objective.targets,
    )  # fmt: skip
    total_steps = schedule.epochs * len(loader)
    label = dataset.labels(valid_rows)
    checkpointer, log = checkpointer or Checkpointer.none(), log or StepLog.none()
    state = TrainingState(model, adam, average, loader)
    loop = checkpointer.restore(state)
    log.start(loop.step, loop.epoch)
    step = Stepper(model, adam, schedule, objective)

    def judged() -> dict[str, float | None]:
        """Return the metrics of the model on validation rows."""
        logits = predict(model.module, dataset, schema, valid_rows, model.device)
        if not np.isfinite(logits).all():
            raise UserError(
                f"{title}: scores are not finite after epoch {loop.epoch}; {remedy(dataset)}"
            )
        values = metrics(label, logits)
        if values["monitor"] is None:
            raise UserError(
                f"{title}: a monitored metric is undefined on validation rows: they hold"
                " only one class, or no user with both classes"
            )
        return values

    with progress(title, schedule.epochs * len(train_rows)) as advance, checkpointer, log, step:
        advance((loop.epoch - 1) * len(train_rows) + loop.rows)
        if objective.refines and not loop.history:
            log.epoch(loop.begin(judged()))
            save()
        while loop.epoch <= schedule.epochs and not (
            loop.is_below_start() if objective.refines else loop.stalled >= schedule.patience
        ):
            set_learning_rates(model, adam, schedule, loop.scale)
            model.module.train(not objective.refines)
            for loss, rows in step.epoch(loader, seed, loop.step):
                if not math.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss} in epoch {loop.epoch}; {remedy(dataset)}"
                    )
                if average is not None:
                    average.update()
                loop.count(loss, rows)
                advance(rows, f"epoch {loop.epoch}")
                log.step(loop.step, loss, rows, adam.param_groups[0]["lr"])
                if objective.refines:
                    loop.scale = cosine(loop.step, total_steps)
                    set_learning_rates(model, adam, schedule, loop.scale)
                checkpointer.save_if_due(loop, state)
            with average.applied() if average is not None else nullcontext():
                entry = loop.end_epoch(judged(), schedule)
                if entry["is_best"]:
                    save()
            log.epoch(entry)
    return loop.history


def _check_batches(model: ShardedModel, num_rows: int, title: str) -> None:
    """Check that the batches of a training have the rows that the network requires.

    Raises:
        UserError: A batch has one row, and batch norm or Dice requires a variance.
    """
    if num_rows < 2 and any(isinstance(m, nn.BatchNorm1d) for m in model.module.modules()):
        raise UserError(
            f"{title}: train.batch_size=1 with batch norm or Dice, which require 2 rows or more; "
            "raise train.batch_size, or set model.batch_norm=false and model.activation=relu"
        )


def remedy(dataset: EncodedDataset) -> str:
    """Return advice for a loss that is not finite."""
    rates = "lower train.learning_rate or train.table_learning_rate"
    large = large_numbers(dataset.manifest)
    return (
        f"{'; '.join(large)}: scale them (transform: log1p or quantile), or {rates}"
        if large
        else rates
    )


class Stepper:
    """Takes training steps.

    Args:
        model: The model.
        adam: Optimizer of the parameters without a fused optimizer.
        schedule: Options of the loss and its gradient.
        objective: The loss.
    """

    def __init__(
        self,
        model: ShardedModel,
        adam: torch.optim.Optimizer,
        schedule: Train,
        objective: Objective = LABELS,
    ) -> None:
        self._model, self._adam, self._schedule = model, adam, schedule
        self._loss = objective.loss
        self._l2 = TableL2(model, schedule.table_l2)
        self._num = distributed.world_size()

    def __enter__(self) -> Stepper:
        """Return the stepper."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks from the model."""
        self._l2.remove()

    def epoch(self, loader: Loader, seed: int, step: int) -> Iterator[tuple[float, int]]:
        """Take a step for every remaining batch of the epoch; yield loss and rows of each.

        Random numbers of a step are drawn from (seed, step, process), so a resumed run draws the
        same numbers as an uninterrupted one.

        Args:
            loader: The batches.
            seed: Seed of the run.
            step: Number of the first step.
        """
        numbers, rank = itertools.count(step), distributed.rank()

        def forward(batch: Batch) -> tuple[float, Tensor]:
            torch.manual_seed(step_seed(seed, next(numbers), rank))
            return self._forward(batch)

        if self._model.device.type == "cuda" and self._model.is_fused:
            yield from Pipeline(self._model, self._adam, forward, self._finish).steps(loader)
            return
        for batch in loader:
            yield self._step(batch, forward), batch.step_rows or len(batch)

    def __call__(self, batch: Batch) -> float:
        """Take one step; return the mean loss before it, over the rows of all processes.

        If it is not finite, no parameter is changed on any process.
        """
        return self._step(batch, self._forward)

    def _step(self, batch: Batch, forward: Callable[[Batch], tuple[float, Tensor]]) -> float:
        self._adam.zero_grad()
        value, loss = forward(batch)
        if math.isfinite(value):
            loss.backward()
            self._finish()
            self._adam.step()
        return value

    def _forward(self, batch: Batch) -> tuple[float, Tensor]:
        """Return the mean loss over the rows of all processes, and the local share of it.

        The share is multiplied by the number of processes, which average their gradients.
        """
        rows = batch.step_rows or len(batch)
        self._l2.scale = self._num / rows
        is_bf16 = self._schedule.precision == "bf16"
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=is_bf16):
            logit_B = self._model.module(batch)
        total = self._total(logit_B.float(), batch)
        share = total / rows
        return float(distributed.total(share.detach().clone())), share * self._num

    def _total(self, logit_B: Tensor, batch: Batch) -> Tensor:
        """Return the loss, summed over the rows of the batch."""
        losses = []
        if self._loss != "teacher":
            losses.append(binary_cross_entropy_with_logits(logit_B, batch.label, reduction="sum"))
        if self._loss != "labels":
            assert batch.target is not None
            losses.append(mse_loss(logit_B, batch.target, reduction="sum"))
        return sum(losses[1:], losses[0])

    def _finish(self) -> None:
        """Add the L2 term to the gradient of Adam and clip it."""
        self._l2.add_to_dense()
        clip(self._model, self._schedule.gradient_clip)


def set_learning_rates(
    model: ShardedModel, adam: torch.optim.Optimizer, schedule: Train, scale: float
) -> None:
    """Set both learning rates to ``scale`` times the schedule, bounded from below."""
    smallest = schedule.min_learning_rate
    model.set_table_learning_rate(max(schedule.table_learning_rate * scale, smallest))
    for group in adam.param_groups:
        group["lr"] = max(schedule.learning_rate * scale, smallest)


def cosine(step: int, total: int) -> float:
    """Return the factor of the learning rates before step ``step`` of ``total``: 1 falls to 0."""
    return (1 + math.cos(math.pi * min(step, total) / total)) / 2


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random numbers of a step of one process."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
