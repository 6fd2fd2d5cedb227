"""Unfinished trainings: checkpoints along the way, and going on from the last of them.

A checkpoint holds everything that the rest of a training depends on, so an interrupted run ends
with the very numbers of an unbroken one. It fits any number of processes and any plan; what it
does not hold are random states: dropout of a step is drawn from (seed, step, process).
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cki_rec import checkpoints
from cki_rec.config import Model, Runtime, Stopped, Train, UserError
from cki_rec.data.loader import Loader
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import checkpoint_io, distributed
from cki_rec.engine.embeddings import ShardedModel
from cki_rec.engine.optimization import Average, moments

STEP_DIGITS = 10
STEPS_BETWEEN_TALKS = 10
"""Several processes ask each other this often whether it is time for a checkpoint."""
RESUME = "resume"
"""Folder of the checkpoints of an unfinished training, in its run directory."""


@dataclass(slots=True)
class LoopState:
    """Where a training stands; plain JSON values."""

    step: int = 0
    epoch: int = 1
    rows: int = 0
    """Of this epoch, done."""
    loss_sum: float = 0.0
    """Over these rows."""
    best: float | None = None
    stalled: int = 0
    """Epochs in a row that were not better."""
    scale: float = 1.0
    """Of learning rates."""
    history: list[dict[str, Any]] = field(default_factory=list)
    loader: dict[str, Any] | None = None

    def count(self, loss: float, rows: int) -> None:
        """Add a step."""
        self.step += 1
        self.rows += rows
        self.loss_sum += loss * rows

    def end_epoch(self, metrics: dict[str, float | None], schedule: Train) -> dict[str, Any]:
        """Add an epoch by its validation metrics; return its entry in the history."""
        value = metrics["monitor"]
        assert value is not None
        is_best = value > (-math.inf if self.best is None else self.best + schedule.min_gain)
        entry = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": self.loss_sum / self.rows,
            **{f"valid_{name}": found for name, found in metrics.items()},
            "learning_rate": max(schedule.learning_rate * self.scale, schedule.min_learning_rate),
            "is_best": is_best,
        }
        self.history.append(entry)
        if is_best:
            self.best, self.stalled = value, 0
        else:
            self.stalled += 1
            self.scale *= schedule.plateau_factor
        self.epoch, self.rows, self.loss_sum = self.epoch + 1, 0, 0.0
        return entry


@dataclass(slots=True)
class TrainingState:
    """What a training changes."""

    model: ShardedModel
    adam: torch.optim.Adam
    average: Average | None
    loader: Loader

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return all tensors, the very ones in use, as a checkpoint groups them."""
        groups: dict[str, dict[str, Any]] = {
            "model": self.model.module.state_dict(),
            "accumulator": self.model.accumulators(),
            "adam": moments(self.model, self.adam),
        }
        return groups if self.average is None else {**groups, "average": self.average.state}


class Checkpointer:
    """Keeps checkpoints of an unfinished training, and stops it where the system asks to.

    Args:
        folder: Of the run; None: nothing is kept.
        runtime: How often, how many, and whether to resume.
        model: Configuration of the network.
        schema: Its features.
        origin: What it is trained on.
    """

    def __init__(
        self,
        folder: Path | None,
        runtime: Runtime | None,
        model: Model | None = None,
        schema: FeatureSchema | None = None,
        origin: Provenance | None = None,
    ) -> None:
        self._folder = None if folder is None else folder / RESUME
        self._runtime, self._about = runtime, (model, schema, origin)
        self._last, self._is_asked_to_stop = time.monotonic(), False
        self._previous: Any = None
        self.resumed: int | None = None
        """Step that the training went on from."""

    @classmethod
    def none(cls) -> Checkpointer:
        """Return one that keeps nothing."""
        return cls(None, None)

    def restore(self, state: TrainingState) -> LoopState:
        """Go back to the last checkpoint that is whole, or to the start where there is none."""
        name, position = distributed.from_first(self._last_whole())
        if self._folder is None or position is None:
            return LoopState()
        checkpoint_io.load_into(state.tensors(), self._folder / name)
        at = LoopState(**position)
        assert at.loader is not None
        state.loader.load_state_dict(at.loader)
        self.resumed = at.step
        return at

    def _last_whole(self) -> tuple[str, dict[str, Any] | None]:
        """Return name and position of the last whole checkpoint; the first process looks."""
        if distributed.rank() == 0:
            for folder in reversed(kept(self._folder)):
                try:
                    return folder.name, checkpoints.describe(folder).position
                except UserError:
                    continue  # damaged; an older one will do
        return "", None

    def keep_if_due(self, at: LoopState, state: TrainingState) -> None:
        """Write a checkpoint if it is time to, or if the system asks to stop.

        Raises:
            Stopped: It does.
        """
        if self._folder is None or self._runtime is None:
            return
        minutes, every = self._runtime.checkpoint_minutes, self._runtime.checkpoint_steps
        is_late = minutes > 0 and time.monotonic() - self._last > 60 * minutes
        asked, late = False, False
        if distributed.world_size() == 1 or at.step % STEPS_BETWEEN_TALKS == 0:
            asked, late = any_process(state.model.device, self._is_asked_to_stop, is_late)
        if asked or late or (every and at.step % every == 0):
            # not the loader's own position: on CUDA it is ahead of what was trained on
            done = {"epoch": at.epoch - 1, "rows_done": at.rows}
            at.loader = {**state.loader.state_dict(), **done}
            folder = self._folder / f"step-{at.step:0{STEP_DIGITS}d}"
            model, schema, origin = self._about
            assert model is not None
            assert schema is not None
            assert origin is not None
            checkpoint_io.save(folder, state.tensors(), model, schema, origin, asdict(at))
            if distributed.rank() == 0:
                found = kept(self._folder)
                now = found.index(folder) + 1  # what lies after it was damaged when we resumed
                for other in [*found[: max(0, now - self._runtime.keep)], *found[now:]]:
                    shutil.rmtree(other)
            self._last = time.monotonic()
        if asked:
            raise Stopped(
                f"stopped by the system after step {at.step}; what was done is kept in"
                f" {self._folder}: the same command goes on from there"
            )

    def stop_if_asked(self, device: torch.device) -> None:
        """Stop after the training, where the system asked for it during the last validation.

        Raises:
            Stopped: It did, on one process or more.
        """
        if any_process(device, self._is_asked_to_stop)[0]:
            raise Stopped("stopped by the system; this training is finished")

    def __enter__(self) -> Checkpointer:
        """Listen for the system's wish to stop (SIGTERM)."""
        if self._folder is not None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask_to_stop)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask_to_stop(self, _: int, __: FrameType | None) -> None:
        self._is_asked_to_stop = True


def kept(folder: Path | None) -> list[Path]:
    """Return the checkpoints of an unfinished training, the oldest first."""
    if folder is None:
        return []
    names = f"step-{'[0-9]' * STEP_DIGITS}/{checkpoints.DESCRIPTION}"
    return sorted(path.parent for path in folder.glob(names))


def any_process(device: torch.device, *flags: bool) -> tuple[bool, ...]:
    """Return which flags are set on one process or more."""
    if distributed.world_size() == 1:
        return flags
    counts = distributed.total(torch.tensor(flags, dtype=torch.float32, device=device))
    return tuple(bool(count) for count in counts)
