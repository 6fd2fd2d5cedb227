"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger(__name__)


@contextmanager
def progress(title: str, num_steps: int, rows_per_step: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after every step with a short note, shown beside the rate.

    Shows which step of how many, rows per second and the time left.
    """
    start = time.perf_counter()
    done = 0
    if sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(title, total=num_steps, note="")

            def step(note: str) -> None:
                nonlocal done
                done += 1
                rate = done * rows_per_step / (time.perf_counter() - start)
                bar.update(task, advance=1, note=f"{rate:,.0f} rows/s {note}")

            yield step
        return
    shown = start

    def line(note: str) -> None:
        nonlocal done, shown
        done += 1
        now = time.perf_counter()
        if now - shown >= SECONDS_BETWEEN_LINES:
            shown = now
            rate = done / (now - start)
            log.info(
                "  %s: step %d of at most %d, %s rows/s, at most %.0f s left%s",
                title,
                done,
                num_steps,
                f"{rate * rows_per_step:,.0f}",
                (num_steps - done) / rate,
                f", {note}" if note else "",
            )

    yield line
