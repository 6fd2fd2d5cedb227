"""Measurements of merging tables by raw key: keys per second, and peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from rounds import Figure

from cki_rec.checkpoints.formats.keyed import KEYS, SCORES, VALUES, Column, mixed
from cki_rec.checkpoints.formats.dynamicemb import DTYPES, DynamicembWriter
from cki_rec.config import Config

NUM, SHARED, DIM = 20_000_000, 0.3, 16
"""Keys of a source, the share of them that both have, and columns."""
BLOCK = 1 << 18


def merge_keyed_rate(config: Config, num: int = NUM) -> Figure:
    """Return the keys of both sources that are merged in a second of processor time."""
    m = _measured(num)
    return Figure(m["keys"] / m["processor"], _detail(m))


def merge_keyed_wall_rate(config: Config, num: int = NUM) -> Figure:
    """Return the keys of both sources that are merged in a second."""
    m = _measured(num)
    return Figure(m["keys"] / m["seconds"], _detail(m))


def merge_keyed_memory(config: Config, num: int = NUM) -> Figure:
    """Return the peak memory of a merge by raw key in GB."""
    m = _measured(num)
    return Figure(m["peak"] / 1e9, _detail(m))


def _detail(m: dict[str, float]) -> str:
    return (
        f"two dumps of {m['keys'] / 2:,.0f} keys with scores, {SHARED:.0%} shared, {DIM} columns,"
        f" merge=evidence, the whole command: {m['seconds']:.1f} s, {m['processor']:.1f} s of"
        f" processor time, peak {m['peak'] / 1e9:.2f} GB; plain reading and writing of the same"
        f" bytes {m['plain']:.1f} s; load average of the machine before {m['load']:.1f}"
    )


@cache
def _measured(num: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, str(num)], check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def write_source(folder: Path, source: int, num: int) -> None:
    """Write a dump of two ranks; its keys are spread over all numbers."""
    columns = {VALUES: Column(DTYPES[VALUES], DIM), SCORES: Column(DTYPES[SCORES], 1)}
    writer = DynamicembWriter(folder, "model.ebc/user", columns)
    draw = np.random.default_rng(source)
    start = source * int(num * (1 - SHARED))
    for first in range(start, start + num, BLOCK):
        keys = mixed(np.arange(first, min(first + BLOCK, start + num))).view(np.int64)
        values = draw.normal(size=(len(keys), DIM)).astype(np.float32)
        scores = draw.integers(0, 100, (len(keys), 1))
        writer.add({KEYS: keys, VALUES: values, SCORES: scores})
    writer.close()


def measure(num: int, folder: Path) -> dict[str, float]:
    """Return time and memory of the merge of two sources of this size."""
    sources = [folder / "a", folder / "b"]
    for k, source in enumerate(sources):
        write_source(source, k, num)
    words = [f"merge.sources=[{sources[0]},{sources[1]}]", f"runtime.out={folder}/out"]
    command = [sys.executable, "-m", "cki_rec", "merge", "merge=evidence", *words]
    os.sync()
    load = os.getloadavg()[0]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    os.sync()
    start = time.perf_counter()
    files = [file for place in (*sources, folder / "out") for file in place.rglob("*_emb_*")]
    with (folder / "copy").open("wb") as target:
        for file in files:
            with file.open("rb") as opened:
                while block := opened.read(1 << 24):
                    if folder / "out" in file.parents:
                        target.write(block)
    plain = time.perf_counter() - start
    return {
        "keys": 2 * num,
        "seconds": seconds,
        "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": after.ru_maxrss * 1024,
        "plain": plain,
        "load": load,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        figures = measure(int(sys.argv[1]), Path(place))
    sys.stdout.write(json.dumps(figures) + "\n")
