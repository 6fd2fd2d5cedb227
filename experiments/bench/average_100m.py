"""Measurements of the library's average of two models of 100M parameters, beside ``torch.lerp``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

import cki_rec
from merge_100m import ROWS, resident
from rounds import Figure

from cki_rec.config import Config
from cki_rec.merging.params import Params, generator

ROUNDS = 7


def average_vs_lerp(config: Config) -> Figure:
    """Return the time of ``merge`` as a multiple of that of ``torch.lerp``, the median of rounds."""
    measured = _measured(config)
    pairs = zip(measured["merge"], measured["lerp"], strict=True)
    ratios = sorted(merged / plain for merged, plain in pairs)
    detail = (
        f"{measured['parameters'] / 1e6:.0f}M parameters; merge"
        f" {statistics.median(measured['merge']):.3f} s, lerp"
        f" {statistics.median(measured['lerp']):.3f} s, {config.runtime.threads or 'all'} threads"
    )
    rounds = [measured["merge"], measured["lerp"]]
    return Figure(statistics.median(ratios), detail, rounds, (ratios[0], ratios[-1]))


def average_extra_memory(config: Config) -> Figure:
    """Return the peak memory of ``merge`` beyond the two models, as a multiple of one model."""
    measured = _measured(config)
    detail = f"{measured['extra'] / 1e6:.0f} MB beyond the two models, the result included"
    return Figure(measured["extra"] / (4 * measured["parameters"]), detail)


def _measured(config: Config) -> dict[str, Any]:
    threads = config.runtime.threads or torch.get_num_threads()
    command = [sys.executable, __file__, str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(threads: int) -> None:
    """Print the seconds of both in turn, and the extra memory of the first merge, as JSON."""
    torch.set_num_threads(threads)
    models = [_model(seed) for seed in (1, 2)]
    cki_rec.merge([{"a": torch.ones(2)}] * 2)  # imports
    held = resident()
    result = cki_rec.merge(models)
    extra = 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - held)
    del result
    first, second = models
    seconds: dict[str, list[float]] = {"merge": [], "lerp": []}
    for _ in range(ROUNDS):
        seconds["merge"].append(_seconds(lambda: cki_rec.merge(models).params))
        seconds["lerp"].append(
            _seconds(lambda: {n: torch.lerp(t, second[n], 0.5) for n, t in first.items()})
        )
    facts = {"parameters": sum(t.numel() for t in first.values()), "extra": extra}
    sys.stdout.write(json.dumps({**facts, **seconds}))


def _seconds(work: Callable[[], Params]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _model(seed: int) -> Params:
    shapes = {f"table{t}.weight": (rows, 20) for t, rows in enumerate(ROWS)}
    shapes |= {"mlp.weight": (400, 160), "mlp.bias": (400,)}
    return {
        name: torch.empty(shape).normal_(0, 0.1, generator=generator(seed, name))
        for name, shape in shapes.items()
    }


if __name__ == "__main__":
    measure(int(sys.argv[1]))
