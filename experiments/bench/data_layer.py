"""Measurements of the data layer: encoding and loading of synthetic rows in Criteo's format.

One synthetic file and one encoding of each size serve all measurements of a run.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from rounds import Figure, ratio, take_turns

from cki_rec.config import Config
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.store import PREPARATION
from cki_rec.data.loader import Loader
from cki_rec.data.raw.formats import criteo
from cki_rec.engine.embeddings import build, initialize
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.trainer import Stepper

ROWS = 1_000_000
BATCH_SIZE = 4096
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "data=synthetic_criteo", "data.synthetic.vocabulary=1.0", "data.synthetic.skew=1.1",
    "data.min_count=1",
]  # fmt: skip


def encode_rows_per_second(_: Config) -> Figure:
    """Return the rate of encoding a million rows, digests and counts included."""
    facts = _encoded(ROWS)
    return Figure(ROWS / facts["seconds"], f"{ROWS:,} rows, {_facts(facts)}")


def encode_vs_scan(_: Config) -> Figure:
    """Return the time of a bare parse and write as a share of the time of encoding.

    The bare work: polars parses all columns of the same file as text, and as many bytes as the
    encoded set has are written. Both in new processes, in turn, medians of three.
    """
    attempts = iter(range(1, 100))

    def encode() -> float:
        seconds: float = _encoded(ROWS, next(attempts))["seconds"]
        return seconds

    facts = _encoded(ROWS)
    files = [path for path in Path(facts["folder"]).rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    words = [facts["raw"], str(num_bytes), str(Path(_scratch().name) / "written")]

    def bare() -> float:
        os.sync()
        command = [sys.executable, __file__, *words]
        return float(subprocess.run(command, check=True, capture_output=True).stdout)

    encodings, scans = take_turns(encode, bare)
    detail = (
        f"bare parse and write of {num_bytes:,} bytes {np.median(scans):.2f} s, encoding"
        f" {np.median(encodings):.2f} s"
    )
    return ratio(detail, scans, encodings)


def encode_vs_0_1(_: Config) -> Figure:
    """Return the time of encoding at commit 01e8936 as a multiple of ours, same file and machine.

    The commit is checked out beside the scratch files. Both run in new processes, in turn.
    """
    attempts, old_attempts = iter(range(100, 200)), iter(range(200, 300))
    _encoded(ROWS)  # writes the raw file
    tree = Path(_scratch().name) / "01e8936"
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "worktree", "add", "--detach", str(tree), "01e8936"], check=True,
                   capture_output=True)  # fmt: skip
    try:
        olds, ours = take_turns(
            lambda: float(_encode(ROWS, next(old_attempts), tree=tree)["seconds"]),
            lambda: float(_encode(ROWS, next(attempts))["seconds"]),
            rounds=5,
        )
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    detail = f"{ROWS:,} rows/s: then {ROWS / np.median(olds):,.0f}, now {ROWS / np.median(ours):,.0f}"
    return ratio(detail, olds, ours)


def encode_second_core(_: Config) -> Figure:
    """Return the time of one process on one core as a multiple of two workers on two cores."""
    attempts = iter(range(300, 400))
    cores = sorted(os.sched_getaffinity(0))[:2]
    rows = 4 * ROWS

    def seconds(number: int) -> float:
        words = [f"runtime.workers={number}"]
        facts = _encode(rows, next(attempts), words, cores=set(cores[:number]))
        return float(facts["seconds"])

    ones, twos = take_turns(lambda: seconds(1), lambda: seconds(2))
    detail = f"{rows:,} rows: one core {np.median(ones):.1f} s, two {np.median(twos):.1f} s"
    return ratio(detail, ones, twos)


def encode_peak_gb_10m(_: Config) -> Figure:
    """Return the peak memory of the process that encodes ten million rows."""
    facts = _encoded(10 * ROWS)
    return Figure(facts["peak_memory_mb"] / 1024, f"{10 * ROWS:,} rows, {_facts(facts)}")


def encode_flatness(_: Config) -> Figure:
    """Return the rate at ten million rows as a share of the rate at one million."""
    attempts = [iter(range(1, 100)), iter(range(1, 100))]

    def rate(rows: int, numbers: Iterator[int]) -> float:
        return rows / float(_encoded(rows, next(numbers))["seconds"])

    small, large = take_turns(
        lambda: rate(ROWS, attempts[0]), lambda: rate(10 * ROWS, attempts[1])
    )
    detail = f"rows/s: 1M {np.median(small):,.0f}, 10M {np.median(large):,.0f}"
    return ratio(detail, large, small)


def loader_rows_per_second(_: Config) -> Figure:
    """Return the rate of shuffled batches of 39 fields on one core, page cache warm."""
    dataset = EncodedDataset(Path(_encoded(ROWS)["folder"]))
    loader = Loader(dataset, dataset.schema, dataset.rows("train"), BATCH_SIZE, seed=1)
    with _one_core():
        rates = []
        for _epoch in range(5):
            start = time.perf_counter()
            rows = sum(len(batch) for batch in loader)
            rates.append(rows / (time.perf_counter() - start))
    detail = f"{len(dataset.schema.features)} fields, batch {BATCH_SIZE}, median of epochs 2 to 5"
    return Figure(float(np.median(rates[1:])), detail)


def loader_memory_growth_mb(_: Config) -> Figure:
    """Return how much memory of its own the process gains over an epoch of ten million rows."""
    dataset = EncodedDataset(Path(_encoded(10 * ROWS)["folder"]))
    loader = Loader(dataset, dataset.schema, dataset.rows("train"), BATCH_SIZE, seed=1)
    sizes = []
    for number, _batch in enumerate(loader):
        if number % 20 == 0:
            sizes.append(_memory_mb())
    own, mapped = np.array(sizes).T
    warm = len(own) // 10
    detail = (
        f"anonymous memory {own[warm]:.0f} MB after a tenth of the epoch, at most "
        f"{own[warm:].max():.0f} MB later; pages of the file mapped: {mapped[warm]:.0f} to "
        f"{mapped[-1]:.0f} MB, which the system takes back when it needs them"
    )
    return Figure(float(own[warm:].max() - own[warm]), detail)


def loader_wait_share(config: Config) -> Figure:
    """Return the share of a DeepFM training step spent waiting for its batch."""
    dataset = EncodedDataset(Path(_encoded(ROWS)["folder"]))
    options = replace(config.model, histories=False)
    model = build(dataset.schema, options, config.train, config.runtime)
    initialize(model, 1, options.init_std)
    adam = initialized_adam(model, config.train.learning_rate)
    step = Stepper(model, adam, config.train)
    batches = iter(Loader(dataset, dataset.schema, dataset.rows("train"), BATCH_SIZE, seed=1))
    waits, steps = [], []
    for _step in range(60):
        start = time.perf_counter()
        batch = next(batches).to(model.device)
        waited = time.perf_counter()
        step(batch)
        waits.append(waited - start)
        steps.append(time.perf_counter() - start)
    share = sum(waits[10:]) / sum(steps[10:])
    detail = (
        f"{1000 * np.median(waits[10:]):.2f} ms of {1000 * np.median(steps[10:]):.1f} ms a step, "
        f"{torch.get_num_threads()} threads, MLP {options.hidden}"
    )
    return Figure(share, detail)


def encoded_folder() -> Path:
    """Return an encoded set of a million rows."""
    return Path(_encoded(ROWS)["folder"])


@functools.lru_cache(maxsize=1)
def _scratch() -> Any:
    """Return a folder that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="cki_rec_bench_")


@functools.lru_cache(maxsize=8)
def _encoded(rows: int, attempt: int = 0) -> dict[str, Any]:
    """Return folder, raw file, seconds and peak memory of encoding ``rows`` in a new process."""
    return _encode(rows, attempt)


def _encode(
    rows: int,
    attempt: int,
    more: Sequence[str] = (),
    tree: Path | None = None,
    cores: set[int] | None = None,
) -> dict[str, Any]:
    """Encode as ``_encoded`` does, with more options, code of another folder or on some cores."""
    scratch = Path(_scratch().name)
    words = [*OPTIONS, f"data.synthetic.rows={rows}", f"data.raw={scratch / 'raw'}", *more]
    encoded = scratch / f"encoded-{rows}-{attempt}"
    command = [sys.executable, "-m", "cki_rec", "prepare", *words, f"runtime.encoded={encoded}"]
    os.sync()  # what was written before is no part of what is measured now
    code = str(tree or ROOT)
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=code,
        env={**os.environ, "PYTHONPATH": code},
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores) if cores else None,
    )
    (manifest,) = encoded.glob("*/manifest.json")
    facts = json.loads((manifest.parent / PREPARATION).read_text())
    size = json.loads(manifest.read_text())["source"][0]["size"]
    (raw,) = (p for p in (scratch / "raw").glob("*/train.txt") if p.stat().st_size == size)
    return {**facts, "folder": str(manifest.parent), "raw": str(raw)}


def _facts(facts: dict[str, Any]) -> str:
    return f"{facts['seconds']:.1f} s, peak {facts['peak_memory_mb']:,} MB"


def scan(raw: str, num_bytes: str, target: str) -> None:
    """Print the seconds that polars takes to parse a file, and the system to write some bytes."""
    schema = dict.fromkeys(criteo.LAYOUT.columns, pl.String)
    start = time.perf_counter()
    frame = pl.read_csv(raw, has_header=False, separator="\t", quote_char=None, schema=schema)
    assert frame.height == ROWS
    with Path(target).open("wb") as file:
        for _block in range(int(num_bytes) >> 20):
            file.write(bytes(1 << 20))
    print(time.perf_counter() - start)


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process on one core, where the system can."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if cores:
            os.sched_setaffinity(0, {min(cores)})
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def _memory_mb() -> tuple[float, float]:
    """Return memory of the process's own, and mapped pages of files, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return peak, 0.0
    lines = status.read_text().splitlines()
    own, mapped = (
        int(line.split()[1]) / 1024 for line in lines if line.startswith(("RssAnon", "RssFile"))
    )
    return own, mapped


if __name__ == "__main__":
    scan(*sys.argv[1:])
