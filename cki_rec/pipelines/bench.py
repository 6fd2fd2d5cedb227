"""Measure our own parts; the result is ``experiments/bench/bench.json``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cki_rec.config import Config, UserError, nearest
from cki_rec.engine.record import hardware, write_atomically

COMMAND = [sys.executable, "-m", "cki_rec"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure, and what it should be."""

    name: str
    value: float
    unit: str
    higher_is_better: bool
    target: float
    detail: str


def run(config: Config) -> None:
    """Measure everything, or ``select``; entries that are not measured now stay in the file.

    Raises:
        UserError: No measurement of that name.
    """
    if config.select is not None and config.select not in BENCHMARKS:
        hint = nearest(config.select, BENCHMARKS)
        raise UserError(f"select={config.select}: {hint}one of {', '.join(BENCHMARKS)}")
    path = Path(config.runtime.reports) / "bench" / "bench.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    results = {entry["name"]: entry for entry in entries}
    for name in [config.select] if config.select else BENCHMARKS:
        measured = BENCHMARKS[name](config)
        results[name] = asdict(measured)
        reached = measured.value > measured.target
        if not measured.higher_is_better:
            reached = measured.value < measured.target
        verdict = "reached" if reached else "not reached"
        print(
            f"{name}: {measured.value:.3g} {measured.unit}, target"
            f" {'above' if measured.higher_is_better else 'below'} {measured.target:g} {verdict}"
        )
        write_atomically(path, (json.dumps(list(results.values()), indent=1) + "\n").encode())
    print(path)


def import_seconds(_: Config) -> Measurement:
    """Return the wall time of ``cki-rec --help``, the median of seven processes."""
    seconds = []
    for _attempt in range(7):
        start = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    detail = f"median of {len(seconds)} processes, {min(seconds):.3f} to {max(seconds):.3f}; "
    value = round(statistics.median(seconds), 4)
    return Measurement("import_seconds", value, "s", False, 1.0, detail + hardware())


def reproduce_minutes(_: Config) -> Measurement:
    """Return the wall time of the main experiment, from encoding to report, in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runtime.{key}={folder}/{key}" for key in ("out", "reports", "encoded")]
        start = time.perf_counter()
        for words in (["evaluate", "-m", "experiment=quickstart"], ["report", "name=quickstart"]):
            subprocess.run([*COMMAND, *words, *places], check=True)
        minutes = (time.perf_counter() - start) / 60
    detail = f"make reproduce after installation, nothing cached; {hardware()}"
    return Measurement("reproduce_minutes", round(minutes, 3), "min", False, 10.0, detail)


BENCHMARKS: dict[str, Callable[[Config], Measurement]] = {
    "import_seconds": import_seconds,
    "reproduce_minutes": reproduce_minutes,
}
"""Name -> what measures it."""
