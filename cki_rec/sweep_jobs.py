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


def clear(folder: Path) -> None:
    """Remove the marks of an earlier sweep."""
    for path in [folder / FAILURES, *folder.glob(f"{RUNNING}*")]:
        path.unlink(missing_ok=True)


@contextmanager
def running(folder: Path, number: int, job: str) -> Iterator[None]:
    """Mark a job as running until the block ends; the mark of a killed process stays."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{RUNNING}{number}"
    mark.write_text(job)
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def unfinished(folder: Path) -> list[str]:
    """Return the jobs that a killed process has left."""
    return [path.read_text() for path in sorted(folder.glob(f"{RUNNING}*"))]


def add_failure(folder: Path, job: str, error: str) -> bool:
    """Record a failed job; return whether its error is the first of this kind."""
    is_new = error not in {failure.error for failure in failures(folder)}
    with (folder / FAILURES).open("a") as file:
        file.write(json.dumps({"job": job, "error": error}) + "\n")
    return is_new


def failures(folder: Path) -> list[Failure]:
    """Return the failed jobs of the latest sweep in a folder."""
    try:
        lines = (folder / FAILURES).read_text().splitlines()
    except OSError:
        return []
    return [Failure(**json.loads(line)) for line in lines if line.endswith("}")]


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
