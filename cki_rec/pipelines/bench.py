"""Measure our own parts; the result is ``experiments/bench/bench.json``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cki_rec.config import Config, UserError, nearest
from cki_rec.engine.record import hardware
from cki_rec.files import write_atomically
from cki_rec.pipelines import bench_data, bench_merge, bench_train

COMMAND = [sys.executable, "-m", "cki_rec"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One figure: how to measure it, and what it should be."""

    measure: Callable[[Config], tuple[float, str]]
    """Configuration -> value, and how it came about."""
    unit: str
    side: str
    """Of the target: ``above`` or ``below``."""
    target: float


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
        benchmark = BENCHMARKS[name]
        value, detail = benchmark.measure(config)
        is_above = value > benchmark.target
        verdict = "reached" if is_above == (benchmark.side == "above") else "not reached"
        results[name] = {
            "name": name,
            "value": float(f"{value:.5g}"),
            "unit": benchmark.unit,
            "target": f"{benchmark.side} {benchmark.target:g}",
            "verdict": verdict,
            "detail": detail,
            "hardware": hardware(),
        }
        print(f"{name}: {value:.4g} {benchmark.unit}, {results[name]['target']}: {verdict}")
        print(f"  {detail}")
        write_atomically(path, (json.dumps(list(results.values()), indent=1) + "\n").encode())
    print(path)


def import_seconds(_: Config) -> tuple[float, str]:
    """Return the wall time of ``cki-rec --help``, the median of seven processes."""
    seconds = []
    for _attempt in range(7):
        start = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    detail = f"median of {len(seconds)} processes, {min(seconds):.3f} to {max(seconds):.3f}"
    return statistics.median(seconds), detail


def reproduce_minutes(_: Config) -> tuple[float, str]:
    """Return the wall time of the main experiment, from encoding to report, in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runtime.{key}={folder}/{key}" for key in ("out", "reports", "encoded")]
        start = time.perf_counter()
        for words in (["evaluate", "-m", "experiment=quickstart"], ["report", "name=quickstart"]):
            subprocess.run([*COMMAND, *words, *places], check=True)
        minutes = (time.perf_counter() - start) / 60
    return minutes, "make reproduce after installation, nothing cached"


BENCHMARKS: dict[str, Benchmark] = {
    "import_seconds": Benchmark(import_seconds, "s", "below", 1.0),
    "encode_rows_per_second": Benchmark(
        bench_data.encode_rows_per_second, "rows/s", "above", 200_000
    ),
    "encode_vs_scan": Benchmark(bench_data.encode_vs_scan, "of the bare rate", "above", 0.25),
    "encode_peak_gb_10m": Benchmark(bench_data.encode_peak_gb_10m, "GB", "below", 3.0),
    "encode_flatness": Benchmark(bench_data.encode_flatness, "of the 1M rate", "above", 0.8),
    "loader_rows_per_second": Benchmark(
        bench_data.loader_rows_per_second, "rows/s", "above", 2_000_000
    ),
    "loader_memory_growth_mb": Benchmark(bench_data.loader_memory_growth_mb, "MB", "below", 20.0),
    "loader_wait_share": Benchmark(bench_data.loader_wait_share, "of a step", "below", 0.03),
    "train_vs_dense_bound": Benchmark(
        bench_train.train_vs_dense_bound, "of a step", "above", 0.85
    ),
    "train_vs_plain_500k": Benchmark(bench_train.train_vs_plain_500k, "times", "above", 1.6),
    "train_vs_plain_10m": Benchmark(bench_train.train_vs_plain_10m, "times", "above", 5.0),
    "train_flatness": Benchmark(
        bench_train.train_flatness, "of the step at 1M rows", "below", 1.15
    ),
    "train_two_processes": Benchmark(
        bench_train.train_two_processes, "of one process", "above", 0.8
    ),
    "train_bf16": Benchmark(bench_train.train_bf16, "times", "above", 1.0),
    "train_compiled": Benchmark(bench_train.train_compiled, "times", "above", 1.0),
    "integrate_seconds_100m": Benchmark(bench_merge.integrate_seconds_100m, "s", "below", 10.0),
    "integrate_extra_memory_100m": Benchmark(
        bench_merge.integrate_extra_memory_100m, "times one model", "below", 2.5
    ),
    "reproduce_minutes": Benchmark(reproduce_minutes, "min", "below", 10.0),
}
"""Name -> what measures it, and its target."""
