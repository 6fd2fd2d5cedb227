"""The runs that belong to a name: sweeps and single runs add lines to one list."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from cki_rec import COMMAND_VARIABLE, JOB_VARIABLE
from cki_rec.engine.record import Run

LIST = "members.jsonl"


def start_sweep(out: Path, name: str, num_jobs: int) -> str:
    """Add a sweep to the list of ``name``; return its id.

    A sweep that was started by the same command before is left out from now on.
    """
    sweep = uuid.uuid4().hex[:16]
    command = hashlib.sha256(os.environ.get(COMMAND_VARIABLE, sweep).encode()).hexdigest()[:16]
    _append(out, name, {"sweep": sweep, "jobs": num_jobs, "command": command})
    return sweep


def drop_sweep(out: Path, name: str, sweep: str) -> None:
    """Count no job of a sweep as missing: the user's mistake has failed them all."""
    _append(out, name, {"sweep": sweep, "jobs": 0})


def add_to_sweep(out: Path, name: str, run: Run | None) -> None:
    """Append a finished run to the list of ``name``; None: a job without work."""
    entry: dict[str, Any] = {"skipped": True} if run is None else {"run_id": run.path.name}
    if len(job := os.environ.get(JOB_VARIABLE, "").split()) == 2:  # within a job of a sweep
        entry |= {"sweep": job[0], "job": int(job[1])}
    _append(out, name, entry)


def sweep_runs(out: Path, name: str) -> tuple[list[Run], int]:
    """Return the finished runs of ``name`` without repeats, and the number of missing jobs.

    Of sweeps by one command the last one counts. A single run after a sweep counts as one of its
    missing jobs.
    """
    try:
        lines = list_of(out, name).read_text().splitlines()
    except FileNotFoundError:
        return [], 0
    entries = []
    for line in lines:
        with suppress(ValueError):  # an incomplete line of a killed process
            entries.append(json.loads(line))
    sweeps = {entry.get("sweep"): entry for entry in entries if "jobs" in entry}
    latest = {entry.get("command"): sweep for sweep, entry in sweeps.items()}
    counted = set(latest.values())
    runs, jobs, singles = dict[str, Run](), set[tuple[str, int]](), set[str]()
    is_after_sweep = False
    for place, entry in enumerate(entries):
        sweep = entry.get("sweep")
        is_after_sweep = is_after_sweep or "jobs" in entry
        if "jobs" in entry or (sweep in sweeps and sweep not in counted):
            continue
        if (run_id := entry.get("run_id")) is not None:
            run = Run(out / run_id)
            if run.record is None:
                continue
            runs[run_id] = run
        if sweep is not None:
            jobs.add((sweep, entry["job"]))
        elif is_after_sweep:
            singles.add(run_id or f"skipped {place}")
    of_jobs = {e.get("run_id") for e in entries if "job" in e and e["sweep"] in counted}
    num_jobs = sum(sweeps[sweep]["jobs"] for sweep in counted)
    num_done = len({job for job in jobs if job[0] in counted}) + len(singles - of_jobs)
    return list(runs.values()), max(0, num_jobs - num_done)


def list_of(out: Path, name: str) -> Path:
    """Return the path of the list of ``name``."""
    return out / "sweeps" / name / LIST


def _append(out: Path, name: str, entry: dict[str, Any]) -> None:
    path = list_of(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")  # short lines are appended whole
