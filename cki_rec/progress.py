"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger(__name__)

Advance = Callable[..., None]
"""(amount, note=""): to call after every piece of work."""
title_of_outer: ContextVar[str] = ContextVar("title_of_outer", default="")
"""Title of the work that is being displayed; empty: none."""


@contextmanager
def progress(title: str, total: int, unit: str = "rows") -> Iterator[Advance]:
    """Yield a function to call with the amount done since the last call, and a short note.

    The display shows the share done, the rate and the time left. ``total`` is an upper bound of
    the amount; 0: unknown. Work inside of other work shows nothing.
    """
    is_inside = title_of_outer.get() != ""
    if is_inside or os.environ.get("RANK", "0") != "0":  # of processes the first one prints
        yield lambda *_: None
        return
    token = title_of_outer.set(title)
    try:
        with _display(title, total, unit) as advance:
            yield advance
    finally:
        title_of_outer.reset(token)


@contextmanager
def _display(title: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield ``advance`` of a bar on a terminal, of lines elsewhere."""
    start = time.perf_counter()
    done = 0
    if sys.stdout.isatty():
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task(title, total=total or None, note="")

            def advance(amount: int, note: str = "") -> None:
                nonlocal done
                done += amount
                rate = done / (time.perf_counter() - start)
                bar.update(task, advance=amount, note=f"{rate:,.0f} {unit}/s {note}")

            yield advance
        return
    shown = start

    def line(amount: int, note: str = "") -> None:
        nonlocal done, shown
        done += amount
        now = time.perf_counter()
        if now - shown < SECONDS_BETWEEN_LINES:
            return
        shown = now
        rate = done / (now - start)
        share, left = "", ""
        if total:
            share = f" of at most {total:,}"
            left = f", at most {max(0, total - done) / rate:.0f} s left"
        text = f"{done:,}{share} {unit}, {rate:,.0f} {unit}/s{left}"
        log.info("  %s: %s%s", title, text, f", {note}" if note else "")

    yield line
