"""Jobs of a running sweep, in files beside its list: which ones run, and which failed and why."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILURES = "failures.jsonl"
RUNNING = "running-"
"""Begins the name of a file that exists while its job runs."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that ended with a mistake of the user."""

    job: str
    error: str


def folder_of(config: Any) -> Path:
    """Return the folder of the sweep that a composed configuration belongs to."""
    return Path(config.runtime.out) / "sweeps" / str(config.name)


def begin(folder: Path, sweep: str) -> None:
    """Record that a sweep starts; marks of others stay, they may still run."""
    _append(folder, {"sweep": sweep})


@contextmanager
def running(folder: Path, sweep: str, number: int, job: str) -> Iterator[None]:
    """Mark a job as running until the block ends; the mark of a killed process stays."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{RUNNING}{sweep}-{number}"
    mark.write_text(job)
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def unfinished(folder: Path, sweep: str) -> list[str]:
    """Return the jobs of a sweep that a killed process has left, under any name; forget them."""
    marks = sorted(folder.parent.glob(f"*/{RUNNING}{sweep}-*"))
    jobs = [mark.read_text() for mark in marks]
    for mark in marks:
        mark.unlink(missing_ok=True)
    return jobs


def add_failure(folder: Path, sweep: str, job: str, error: str) -> bool:
    """Record a failed job; return whether its error is the first of this kind."""
    is_new = error not in {failure.error for failure in failures(folder, sweep)}
    _append(folder, {"sweep": sweep, "job": job, "error": error})
    return is_new


def failures(folder: Path, sweep: str) -> list[Failure]:
    """Return the failed jobs of a sweep, under any name (a sweep may be over names)."""
    paths = sorted(folder.parent.glob(f"*/{FAILURES}"))
    entries = [entry for path in paths for entry in _entries(path)]
    return [
        Failure(entry["job"], entry["error"])
        for entry in entries
        if entry.get("sweep") == sweep and "error" in entry
    ]


def latest_failures(folder: Path) -> list[Failure]:
    """Return the failed jobs of the latest sweep of a name."""
    entries = _entries(folder / FAILURES)
    return failures(folder, entries[-1].get("sweep", "")) if entries else []


def _append(folder: Path, entry: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FAILURES).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _entries(path: Path) -> list[dict[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def summary(failed: Sequence[Failure], total: int) -> str:
    """Return one line about the failed jobs of a sweep; every error once."""
    errors = dict.fromkeys(failure.error for failure in failed)
    shown = "; ".join(list(errors)[:3])
    more = f" (and {len(errors) - 3} other errors)" if len(errors) > 3 else ""
    return f"{len(failed)} of {total} jobs failed: {shown}{more}"


def title(words: Sequence[str], swept: Collection[str]) -> str:
    """Return the swept options of a job, ``seed=1 merge=average``."""
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    return " ".join(
        word.lstrip("+") for word, key in zip(words, keys, strict=True) if key in swept
    )


def killed(jobs: Sequence[str], error: Exception) -> str:
    """Return one line about a process of a sweep that the system has ended."""
    signal = re.search(r"SIG[A-Z]+", str(error))
    cause = f" ({signal[0]}; too little memory is the usual cause)" if signal else ""
    which = f"job {jobs[0]}" if len(jobs) == 1 else f"one of the jobs {'; '.join(jobs)}"
    return (
        f"the process of {which} was ended by the system{cause}; finished runs are kept: run again"
        " with fewer jobs at a time, hydra.launcher.n_jobs=1"
    )
