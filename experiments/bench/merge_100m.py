"""Measurements of merging: two models of 100M table parameters, aligned, rows by evidence."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from itertools import pairwise

import torch

from rounds import Figure

from cki_rec.config import Config
from cki_rec.merging.alignment import align, table_products
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import Params, generator
from cki_rec.merging.symmetry import Slice, Symmetry, random_element, transform

ROWS = (4_000_000, 600_000, 300_000, 80_000, 15_000, 4_000, 900, 100)
"""Rows of eight tables: 16 columns, and 4 of first-order weights, make 100M numbers."""
DIM, HIDDEN = 16, (400, 400, 400)


def merge_seconds_100m(config: Config) -> Figure:
    """Return the time to align two models and merge them by evidence, in memory."""
    measured = _measured(config)
    return Figure(measured["seconds"], _detail(measured))


def merge_extra_memory_100m(config: Config) -> Figure:
    """Return the peak memory of that beyond the two models, as a multiple of one model."""
    measured = _measured(config)
    return Figure(measured["extra"] / measured["bytes"], _detail(measured))


def _detail(measured: dict[str, float]) -> str:
    return (
        f"DeepFM, {measured['parameters'] / 1e6:.0f}M parameters, {measured['bytes'] / 1e6:.0f} MB"
        f" a model; {measured['seconds']:.1f} s, {measured['extra'] / 1e6:.0f} MB beyond the two;"
        f" agreement {measured['before']:.2f}, aligned {measured['after']:.2f};"
        f" {measured['threads']:.0f} threads"
    )


def _measured(config: Config) -> dict[str, float]:
    """Measure in a process of its own, whose peak is then that of this work."""
    threads = config.runtime.threads or torch.get_num_threads()
    command = [sys.executable, __file__, str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(threads: int) -> None:
    """Print time and memory of one merge, as JSON."""
    torch.set_num_threads(threads)
    symmetries = _symmetries()
    first = _model(0)
    second = transform(_model(0), symmetries, _planted(symmetries))
    for name, tensor in second.items():
        for start in range(0, len(tensor), 1 << 16):
            block = tensor[start : start + (1 << 16)]
            noise = torch.randn(block.shape, generator=generator(start, name))
            block.add_(noise, alpha=0.3 * float(block.std()) if block.numel() > 1 else 0.1)
    models = [first, second]
    del first, second
    counts = [
        {name: _counts(k, name, len(table)) for name, table in model.items() if "table" in name}
        for k, model in enumerate(models)
    ]
    tables = [name for name in counts[0] if not name.endswith("first_order")]
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = resident()
    start_time = time.perf_counter()
    alignment = align(models, symmetries, table_products(models, tables, counts))
    aligned = [
        transform(model, symmetries, elements, in_place=True)
        for model, elements in zip(models, alignment.elements, strict=True)
    ]
    merged = mix(aligned, evidence(aligned, counts))
    seconds = time.perf_counter() - start_time
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = sum(tensor.numel() for tensor in merged.values())
    assert peak > base, "the models themselves took more than the work on them"
    sys.stdout.write(
        json.dumps(
            {
                "seconds": seconds,
                "extra": (peak - held) * 1024.0,
                "bytes": 4.0 * parameters,
                "parameters": parameters,
                "before": alignment.agreement_before,
                "after": alignment.agreement,
                "threads": threads,
            }
        )
    )


def resident() -> int:
    """Return the resident memory now, in KiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def _symmetries() -> list[Symmetry]:
    basis = [Slice(f"table{t}", 1) for t in range(len(ROWS))]
    basis += [Slice("mlp.0.weight", 1, t * DIM) for t in range(len(ROWS))]
    units = [
        Symmetry(
            "permutation",
            size,
            (
                Slice(f"mlp.{layer}.weight", 0),
                Slice(f"mlp.{layer}.bias", 0),
                Slice(f"mlp.{layer + 1}.weight", 1),
            ),
        )
        for layer, size in enumerate(HIDDEN)
    ]
    return [Symmetry("rotation", DIM, tuple(basis)), *units]


def _planted(symmetries: list[Symmetry]) -> list[torch.Tensor]:
    return [random_element(s, generator(s.size, "bench")) for s in symmetries]


def _model(seed: int) -> Params:
    shapes: dict[str, tuple[int, ...]] = {f"table{t}": (rows, DIM) for t, rows in enumerate(ROWS)}
    shapes |= {f"table{t}.first_order": (rows, 4) for t, rows in enumerate(ROWS)}
    widths = [len(ROWS) * DIM, *HIDDEN, 1]
    for layer, (before, after) in enumerate(pairwise(widths)):
        shapes |= {f"mlp.{layer}.weight": (after, before), f"mlp.{layer}.bias": (after,)}
    return {
        name: torch.empty(shape).normal_(0, 0.1, generator=generator(seed, name))
        for name, shape in shapes.items()
    }


def _counts(k: int, name: str, rows: int) -> torch.Tensor:
    table = name.removesuffix(".first_order")
    return torch.randint(0, 20, (rows,), generator=generator(k, table), dtype=torch.int64)


if __name__ == "__main__":
    measure(int(sys.argv[1]))
