"""Measure our own parts; the result is ``experiments/bench/bench.json``.

    python experiments/bench/run.py [NAME]      or      make bench [SELECT=NAME]

Without a name all entries are measured; entries that are not measured now stay in the file.
"""

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

import average_100m
import data_layer
import merge_100m
import merge_keyed
import merge_streamed
import torch
import train_steps
from rounds import Figure

from cki_rec.cli import compose_config
from cki_rec.config import Config, nearest, parse
from cki_rec.engine.record import provenance
from cki_rec.files import write_atomically

COMMAND = [sys.executable, "-m", "cki_rec"]
RESULT = Path(__file__).with_name("bench.json")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Vector instructions that are named in the result."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One figure: its measurement, and its target."""

    measure: Callable[[Config], Figure]
    unit: str
    side: str
    """Side of the target: ``above`` or ``below``."""
    target: float


def main(names: list[str]) -> int:
    """Measure the named entries, or all; return the exit code."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        hint = nearest(unknown[0], BENCHMARKS)
        print(f"bench: {unknown[0]}: {hint}one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    config = parse(compose_config([]))
    entries = json.loads(RESULT.read_text()) if RESULT.exists() else []
    results = {entry["name"]: entry for entry in entries if entry["name"] in BENCHMARKS}
    for name in names or BENCHMARKS:
        figure = BENCHMARKS[name].measure(config)
        results[name] = entry_of(name, figure)
        print(f"{name}: {figure.value:.4g} {BENCHMARKS[name].unit}, {results[name]['verdict']}")
        print(f"  {figure.detail}", flush=True)
        write_atomically(RESULT, (json.dumps(list(results.values()), indent=1) + "\n").encode())
    print(RESULT)
    return 0


def entry_of(name: str, figure: Figure) -> dict[str, object]:
    """Return one entry of the result: figure, target, verdict, rounds and machine."""
    benchmark = BENCHMARKS[name]
    is_above = figure.value > benchmark.target
    verdict = "reached" if is_above == (benchmark.side == "above") else "not reached"
    return {
        "name": name,
        "value": float(f"{figure.value:.5g}"),
        "unit": benchmark.unit,
        "target": f"{benchmark.side} {benchmark.target:g}",
        "verdict": verdict,
        "detail": figure.detail,
        "rounds": figure.rounds,
        "spread": figure.spread and [float(f"{bound:.4g}") for bound in figure.spread],
        "machine": machine(),
    }


def machine() -> dict[str, object]:
    """Return processor, vector instructions, threads, versions and commit."""
    facts = provenance({})
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    return {
        "hardware": facts["hardware"],
        "vector_instructions": [flag for flag in FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": facts["versions"],
        "commit": facts["commit"],
        "dirty": facts["dirty"],
    }


def import_seconds(_: Config) -> Figure:
    """Return the wall time of ``cki-rec --help``, the median of seven processes."""
    seconds = []
    for _attempt in range(7):
        start = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    detail = f"median of {len(seconds)} processes, {min(seconds):.3f} to {max(seconds):.3f}"
    return Figure(statistics.median(seconds), detail)


def reproduce_minutes(_: Config) -> Figure:
    """Return the wall time of the main experiment, from encoding to report, in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"runtime.{key}={folder}/{key}" for key in ("out", "reports", "encoded")]
        start = time.perf_counter()
        for words in (["evaluate", "-m", "experiment=quickstart"], ["report", "name=quickstart"]):
            subprocess.run([*COMMAND, *words, *places], check=True)
        minutes = (time.perf_counter() - start) / 60
    return Figure(minutes, "make reproduce after installation, nothing cached")


BENCHMARKS: dict[str, Benchmark] = {
    "import_seconds": Benchmark(import_seconds, "s", "below", 1.0),
    "encode_rows_per_second": Benchmark(
        data_layer.encode_rows_per_second, "rows/s", "above", 200_000
    ),
    "encode_vs_scan": Benchmark(data_layer.encode_vs_scan, "of the bare rate", "above", 0.4),
    "encode_vs_0_1": Benchmark(
        data_layer.encode_vs_0_1, "times the rate of 01e8936", "above", 1.5
    ),
    "encode_second_core": Benchmark(data_layer.encode_second_core, "times", "above", 1.7),
    "encode_peak_gb_10m": Benchmark(data_layer.encode_peak_gb_10m, "GB", "below", 3.0),
    "encode_flatness": Benchmark(data_layer.encode_flatness, "of the 1M rate", "above", 0.8),
    "loader_rows_per_second": Benchmark(
        data_layer.loader_rows_per_second, "rows/s", "above", 2_000_000
    ),
    "loader_memory_growth_mb": Benchmark(data_layer.loader_memory_growth_mb, "MB", "below", 20.0),
    "loader_wait_share": Benchmark(data_layer.loader_wait_share, "of a step", "below", 0.03),
    "train_vs_dense_bound": Benchmark(train_steps.train_vs_dense_bound, "of a step", "above", 0.85),
    "train_vs_plain_500k": Benchmark(train_steps.train_vs_plain_500k, "times", "above", 1.25),
    "train_vs_plain_10m": Benchmark(train_steps.train_vs_plain_10m, "times", "above", 8.0),
    "train_vs_fbgemm": Benchmark(train_steps.train_vs_fbgemm, "times", "above", 1.0),
    "train_flatness": Benchmark(train_steps.train_flatness, "of the step at 1M rows", "below", 1.15),
    "train_two_processes": Benchmark(train_steps.train_two_processes, "of one process", "above", 0.8),
    "train_bf16": Benchmark(train_steps.train_bf16, "times", "above", 1.0),
    "train_compiled": Benchmark(train_steps.train_compiled, "times", "above", 1.0),
    "average_vs_lerp": Benchmark(
        average_100m.average_vs_lerp, "times torch.lerp", "below", 1.2
    ),
    "average_extra_memory": Benchmark(
        average_100m.average_extra_memory, "times one model", "below", 1.3
    ),
    "merge_seconds_100m": Benchmark(merge_100m.merge_seconds_100m, "s", "below", 10.0),
    "merge_extra_memory_100m": Benchmark(
        merge_100m.merge_extra_memory_100m, "times one model", "below", 2.5
    ),
    "merge_streamed_time": Benchmark(
        merge_streamed.merge_streamed_time, "times reading both and writing one", "below", 2.5
    ),
    "merge_streamed_memory": Benchmark(merge_streamed.merge_streamed_memory, "GB", "below", 1.5),
    "merge_streamed_processes": Benchmark(
        merge_streamed.merge_streamed_processes, "times one process", "above", 1.5
    ),
    "merge_keyed_rate": Benchmark(
        merge_keyed.merge_keyed_rate, "keys per s of processor time", "above", 1_000_000
    ),
    "merge_keyed_wall_rate": Benchmark(
        merge_keyed.merge_keyed_wall_rate, "keys/s", "above", 1_000_000
    ),
    "merge_keyed_memory": Benchmark(merge_keyed.merge_keyed_memory, "GB", "below", 1.0),
    "reproduce_minutes": Benchmark(reproduce_minutes, "min", "below", 10.0),
}
"""Name -> measurement and target."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
