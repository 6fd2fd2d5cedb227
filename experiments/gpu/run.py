"""Check and measure what runs on GPUs; the result is ``experiments/gpu/``: results.json, table.md.

    python experiments/gpu/run.py [--device cpu]      or      make gpu-check

Runs the tests marked ``gpu``, trains DeepFM and DCNv2 with 50M rows of tables, merges two models by
``auto`` and ``cki_dual_soft`` on as many processes as there are GPUs, and compares with the same
commands on the CPU. Without a GPU it says so and checks nothing. ``--device cpu`` rehearses the
script with small tables and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "bench"))

import train_steps  # noqa: E402
from run import machine  # noqa: E402

from cki_rec import merge  # noqa: E402
from cki_rec.cli import compose_config  # noqa: E402
from cki_rec.config import Config, parse  # noqa: E402
from cki_rec.engine import distributed  # noqa: E402
from cki_rec.engine.embeddings import build, initialize  # noqa: E402
from cki_rec.engine.optimization import initialized_adam  # noqa: E402
from cki_rec.engine.trainer import Stepper  # noqa: E402
from cki_rec.files import write_atomically  # noqa: E402
from cki_rec.models import build_model  # noqa: E402

MODELS = ("deepfm", "dcnv2")
METHODS = ("auto", "cki_dual_soft")
TABLE_ROWS, SMALL_ROWS = 50_000_000, 500_000
WARM, STEPS = 10, 50
TOLERANCE = 2e-3
"""Largest difference of a test AUC between devices: sums round otherwise in training, too."""


def main() -> int:
    """Check, measure and write; return 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device on this machine; nothing was checked")
        return 0
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")]
    tests_passed = subprocess.run(tests, check=False, cwd=ROOT).returncode == 0
    rows = TABLE_ROWS if device == "cuda" else SMALL_ROWS
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "devices": torch.cuda.device_count(),
        "tests_passed": tests_passed,
        "training": [training(name, device, rows) for name in MODELS],
        "merging": [merging(name, device, rows) for name in ("average", "cki_dual_soft")],
        "commands": [commands(name, device) for name in METHODS],
        "machine": machine(),
    }
    print(json.dumps(facts, indent=1))
    if device == "cuda":
        write_atomically(HERE / "results.json", (json.dumps(facts, indent=1) + "\n").encode())
        write_atomically(HERE / "table.md", table(facts).encode())
    agrees = all(abs(e["difference"]) <= TOLERANCE for e in facts["commands"])
    return 0 if tests_passed and agrees else 1


def configured(*words: str) -> Config:
    """Return the configuration of these overrides."""
    return parse(compose_config(list(words)))


def wait(device: str) -> None:
    """Wait for the kernels of a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def training(name: str, device: str, rows: int) -> dict[str, Any]:
    """Return rows per second of whole training steps, and the share of time of GPU kernels."""
    config = configured(f"model={name}", f"runtime.device={device}")
    place = distributed.start(config.runtime)
    schema, batches = train_steps._data(train_steps._stretch(rows))
    options = replace(train_steps.model_of(config), name=name)
    model = build(schema, options, config.train, config.runtime)
    initialize(model, 1, config.model.init_std)
    model.module.train()
    stepper = Stepper(model, initialized_adam(model, config.train.learning_rate), config.train)
    stream = batches()
    for _ in range(WARM):
        stepper(next(stream).to(place))
    wait(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        stepper(next(stream).to(place))
    wait(device)
    seconds = time.perf_counter() - start
    result = {
        "model": name,
        "rows_of_tables": sum(schema.table_sizes.values()),
        "batch_size": train_steps.BATCH_SIZE,
        "rows_per_second": round(STEPS * train_steps.BATCH_SIZE / seconds),
        "kernel_share": kernel_share(lambda: stepper(next(stream).to(place)), device),
    }
    del model, stepper
    return result


def kernel_share(step: Any, device: str) -> float | None:
    """Return the time of GPU kernels as a share of ten steps; None on a CPU."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(10):
            step()
        wait(device)
        seconds = time.perf_counter() - start
    kernels = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return round(kernels / seconds, 3)


def merging(method: str, device: str, rows: int) -> dict[str, Any]:
    """Return bytes per second that a merge reads and writes, and those of a copy on the device."""
    config = configured()
    schema, _ = train_steps._data(train_steps._stretch(rows))
    shapes = build_model(schema, train_steps.model_of(config), torch.device("meta")).state_dict()
    draw = torch.Generator(device).manual_seed(1)
    models = [
        {n: torch.randn(t.shape, generator=draw, device=device) for n, t in shapes.items()}
        for _ in range(2)
    ]
    name, options = ("cki", {"splice": "soft"}) if method != "average" else (method, {})
    size = sum(t.numel() * t.element_size() for t in models[0].values())

    def seconds_of(work: Any) -> float:
        times = []
        for _ in range(3):
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    merged = seconds_of(lambda: merge(models, name, **options))
    copied = seconds_of(lambda: [tensor.clone() for tensor in models[0].values()])
    return {
        "method": method,
        "model_gb": round(size / 1e9, 3),
        "merge_bytes_per_second": round(3 * size / merged),
        "copy_bytes_per_second": round(2 * size / copied),
    }


def commands(merge_name: str, device: str) -> dict[str, Any]:
    """Return the test AUC of training, merging and evaluating on GPUs, and on one CPU process."""
    auc = {}
    for place in (device, "cpu"):
        processes = max(1, torch.cuda.device_count()) if place == "cuda" else 1
        with tempfile.TemporaryDirectory() as folder:
            places = [f"runtime.{key}={folder}/{key}" for key in ("out", "reports", "encoded")]
            words = ["suite=seeds", f"merge={merge_name}", f"runtime.device={place}", *places]
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            launcher = [sys.executable, "-m", *(launcher + ["-m"] if processes > 1 else [])]
            subprocess.run([*launcher, "cki_rec", "evaluate", *words], check=True, cwd=ROOT)
            (path,) = Path(folder).glob("out/evaluate-*/record.json")
            auc[place] = json.loads(path.read_text())["result"]["test"]["auc"]
    return {
        "merge": merge_name,
        "auc": auc[device],
        "auc_on_cpu": auc["cpu"],
        "difference": auc[device] - auc["cpu"],
    }


def table(facts: dict[str, Any]) -> str:
    """Return the figures as a page."""
    lines = [f"# {facts['devices']} x {facts['device']}", "", "Written by `make gpu-check`.", ""]
    lines += [f"Tests marked gpu: {'passed' if facts['tests_passed'] else 'FAILED'}.", ""]
    for key in ("training", "merging", "commands"):
        names = list(facts[key][0])
        lines += [f"## {key}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(str(entry[n]) for n in names)} |" for entry in facts[key]]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
