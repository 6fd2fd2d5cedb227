"""The log of a training: ``steps.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cki_rec.engine import distributed

STEPS, EVENTS = "steps.jsonl", "tensorboard"


class StepLog:
    """The log of a run: one line per epoch, and one per ``every`` steps.

    Only the first process writes. A resumed run drops the lines after its checkpoint.

    Args:
        folder: The run directory; None: nothing is written.
        every: Steps between lines; 0: epochs only.
        tensorboard: Whether to write events too.
    """

    def __init__(self, folder: Path | None, every: int, tensorboard: bool) -> None:
        self._folder = folder if distributed.rank() == 0 else None
        self._every, self._has_events = every, tensorboard
        self._events: Any = None
        self._since, self._rows = time.perf_counter(), 0
        self._losses: list[float] = []

    @classmethod
    def none(cls) -> StepLog:
        """Return a log that writes nothing."""
        return cls(None, 0, False)

    def start(self, step: int, epoch: int) -> None:
        """Open the log; drop lines after ``step`` and lines of ``epoch`` and later epochs."""
        if self._folder is None:
            return
        path = self._folder / STEPS
        lines = []
        if path.exists():
            for line in path.read_text().splitlines():
                with suppress(ValueError, KeyError):  # an incomplete line
                    entry = json.loads(line)
                    if entry["step"] <= step and entry.get("epoch", 0) < epoch:
                        lines.append(line + "\n")
        path.write_text("".join(lines))
        if self._has_events:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._folder / EVENTS), purge_step=step + 1)
        self._since = time.perf_counter()

    def step(self, step: int, loss: float, rows: int, learning_rate: float) -> None:
        """Count a step, and write a line if one is due."""
        if self._folder is None or not self._every:
            return
        self._losses.append(loss)
        self._rows += rows
        if step % self._every:
            return
        now = time.perf_counter()
        values = {
            "train_loss": sum(self._losses) / len(self._losses),
            "learning_rate": learning_rate,
            "rows_per_second": round(self._rows / (now - self._since)),
        }
        self._write(step, values, {})
        self._since, self._losses, self._rows = now, [], 0

    def epoch(self, entry: dict[str, Any]) -> None:
        """Write the line of an epoch."""
        values = {
            key: value
            for key, value in entry.items()
            if isinstance(value, float) and key != "train_loss"
        }
        others = {key: value for key, value in entry.items() if key not in (*values, "step")}
        self._write(entry["step"], values, others)

    def __enter__(self) -> StepLog:
        """Return the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        if self._events is not None:
            self._events.close()

    def _write(self, step: int, values: dict[str, float], others: dict[str, Any]) -> None:
        if self._folder is None:
            return
        with (self._folder / STEPS).open("a") as file:
            file.write(json.dumps({"step": step, **others, **values}) + "\n")
        for name, value in values.items() if self._events is not None else ():
            self._events.add_scalar(name, value, step)
