"""Checkpoints of unfinished trainings, and resuming from the last one.

A checkpoint holds the complete state of a training, so a resumed run ends with the same numbers as
an uninterrupted one. It can be read by any number of processes with any plan. It needs no random
states: the dropout of a step is drawn from (seed, step, process).
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
STEPS_BETWEEN_EXCHANGES = 10
"""Several processes decide together about a checkpoint once per this number of steps."""
RESUME = "resume"
"""Folder of the checkpoints of an unfinished training, in its run directory."""


@dataclass(slots=True)
class LoopState:
    """State of the training loop; plain JSON values."""

    step: int = 0
    epoch: int = 1
    rows: int = 0
    """Rows of this epoch that are done."""
    loss_sum: float = 0.0
    """Sum of the loss over these rows."""
    best: float | None = None
    stalled: int = 0
    """Consecutive epochs without improvement."""
    scale: float = 1.0
    """Factor of the learning rates."""
    history: list[dict[str, Any]] = field(default_factory=list)
    loader: dict[str, Any] | None = None
    legs: list[dict[str, Any]] = field(default_factory=list)
    """Processes, steps and seconds from each start of the program to its last checkpoint."""

    def count(self, loss: float, rows: int) -> None:
        """Count a step."""
        self.step += 1
        self.rows += rows
        self.loss_sum += loss * rows

    def begin(self, metrics: dict[str, float | None]) -> dict[str, Any]:
        """Take the model before the first step as the best one; return its entry."""
        self.best = metrics["monitor"]
        known = {f"valid_{name}": metric for name, metric in metrics.items()}
        entry = {"epoch": 0, "step": 0, "train_loss": None, **known, "is_best": True}
        self.history.append(entry)
        return entry

    def is_below_start(self) -> bool:
        """Return whether the last epoch is below the model before the first step."""
        first, last = self.history[0]["valid_monitor"], self.history[-1]["valid_monitor"]
        return bool(last < first)

    def end_epoch(self, metrics: dict[str, float | None], schedule: Train) -> dict[str, Any]:
        """Finish an epoch with its validation metrics; return its entry in the history."""
        value = metrics["monitor"]
        assert value is not None
        is_best = value > (-math.inf if self.best is None else self.best + schedule.min_gain)
        entry = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": self.loss_sum / self.rows,
            **{f"valid_{name}": metric for name, metric in metrics.items()},
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
    """Objects that a training changes."""

    model: ShardedModel
    adam: torch.optim.Adam
    average: Average | None
    loader: Loader

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Return all tensors, without copies, in the groups of a checkpoint."""
        groups: dict[str, dict[str, Any]] = {
            "model": self.model.module.state_dict(),
            "accumulator": self.model.accumulators(),
            "adam": moments(self.model, self.adam),
        }
        return groups if self.average is None else {**groups, "average": self.average.state}


class Checkpointer:
    """Writes checkpoints of an unfinished training, and stops the training on SIGTERM.

    Args:
        folder: The run directory; None: no checkpoints.
        runtime: Frequency and number of checkpoints.
        model: Configuration of the network.
        schema: Features of the network.
        origin: Training data of the model.
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
        self._last_time, self._is_asked_to_stop = time.monotonic(), False
        self._previous: Any = None
        self.resumed: int | None = None
        """The step at which the training was resumed."""
        self.legs: list[dict[str, Any]] = []
        """The legs of the training before it was resumed (``LoopState.legs``)."""
        self._start = time.perf_counter()

    @classmethod
    def none(cls) -> Checkpointer:
        """Return a checkpointer that writes nothing."""
        return cls(None, None)

    def restore(self, state: TrainingState) -> LoopState:
        """Restore the last undamaged checkpoint; without one, return the initial state."""
        name, position = distributed.from_first(self._last_whole())
        if self._folder is None or position is None:
            return LoopState()
        checkpoint_io.load_into(state.tensors(), self._folder / name)
        loop = LoopState(**position)
        assert loop.loader is not None
        state.loader.load_state_dict(loop.loader)
        self.resumed, self.legs = loop.step, loop.legs
        return loop

    def leg(self, step: int) -> dict[str, Any]:
        """Return the present leg of the training, which ends after ``step``."""
        return {
            "world_size": distributed.world_size(),
            "first_step": (self.resumed or 0) + 1,
            "last_step": step,
            "seconds": round(time.perf_counter() - self._start, 3),
        }

    def _last_whole(self) -> tuple[str, dict[str, Any] | None]:
        """Return name and loop state of the last undamaged checkpoint, on the first process."""
        if distributed.rank() == 0:
            for folder in reversed(unfinished_checkpoints(self._folder)):
                try:
                    return folder.name, checkpoints.describe(folder).position
                except UserError:
                    continue  # damaged: try the one before
        return "", None

    def save_if_due(self, loop: LoopState, state: TrainingState) -> None:
        """Write a checkpoint if one is due or the system asks the program to stop.

        Raises:
            Stopped: The system asks the program to stop.
        """
        if self._folder is None or self._runtime is None:
            return
        minutes, every = self._runtime.checkpoint_minutes, self._runtime.checkpoint_steps
        is_late = minutes > 0 and time.monotonic() - self._last_time > 60 * minutes
        must_stop, late = False, False
        if distributed.world_size() == 1 or loop.step % STEPS_BETWEEN_EXCHANGES == 0:
            must_stop, late = any_process(state.model.device, self._is_asked_to_stop, is_late)
        if must_stop or late or (every and loop.step % every == 0):
            # the position of the loader itself may be ahead of the trained rows on CUDA
            done = {"epoch": loop.epoch - 1, "rows_done": loop.rows}
            loop.loader = {**state.loader.state_dict(), **done}
            loop.legs = [*self.legs, self.leg(loop.step)]
            folder = self._folder / f"step-{loop.step:0{STEP_DIGITS}d}"
            model, schema, origin = self._about
            assert model is not None
            assert schema is not None
            assert origin is not None
            checkpoint_io.save(folder, state.tensors(), model, schema, origin, asdict(loop))
            if distributed.rank() == 0:
                folders = unfinished_checkpoints(self._folder)
                now = folders.index(folder) + 1  # later ones were damaged when we resumed
                for other in [*folders[: max(0, now - self._runtime.keep)], *folders[now:]]:
                    shutil.rmtree(other)
            self._last_time = time.monotonic()
        if must_stop:
            raise Stopped(
                f"stopped by the system after step {loop.step}; the state is saved in"
                f" {self._folder}: the same command resumes from there"
            )

    def stop_if_asked(self, device: torch.device) -> None:
        """Stop after the training if the system asked for it during the last validation.

        Raises:
            Stopped: The system asked at least one process to stop.
        """
        if any_process(device, self._is_asked_to_stop)[0]:
            raise Stopped("stopped by the system; this training is finished")

    def __enter__(self) -> Checkpointer:
        """Install the handler of SIGTERM."""
        if self._folder is not None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask_to_stop)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handler of SIGTERM."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask_to_stop(self, _: int, __: FrameType | None) -> None:
        self._is_asked_to_stop = True


def unfinished_checkpoints(folder: Path | None) -> list[Path]:
    """Return the checkpoints of an unfinished training, oldest first."""
    if folder is None:
        return []
    names = f"step-{'[0-9]' * STEP_DIGITS}/{checkpoints.DESCRIPTION}"
    return sorted(path.parent for path in folder.glob(names))


def any_process(device: torch.device, *flags: bool) -> tuple[bool, ...]:
    """Return for every flag whether it is set on at least one process."""
    if distributed.world_size() == 1:
        return flags
    counts = distributed.total(torch.tensor(flags, dtype=torch.float32, device=device))
    return tuple(bool(count) for count in counts)
