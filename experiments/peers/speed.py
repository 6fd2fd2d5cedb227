"""Compare the speed of training steps with FuxiCTR's: DeepFM on 39 fields, in turn.

Run in our environment: ``python speed.py PYTHON_OF_FUXICTR TABLE.md [runtime.threads=1]``. Both
processes hold their model and step through the same batches in memory. While one measures a round,
the other waits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import train_steps  # noqa: E402
from run import machine  # noqa: E402

from cki_rec.cli import compose_config  # noqa: E402
from cki_rec.config import Config, parse  # noqa: E402
from cki_rec.files import write_atomically  # noqa: E402

TARGETS = {500_000: 1.6, 1_000_000: 1.6, 10_000_000: 9.0}
"""Rows of all tables -> how many times faster a step of ours should be."""
ROUNDS = 5
CLOCKS = (time.perf_counter, time.process_time)
Rounds = list[list[float]]
"""Per round the median seconds of a step, and of the processor."""


def measure(config: Config, python: str, rows: int) -> tuple[Rounds, Rounds]:
    """Return the rounds of ours and of FuxiCTR, with tables of ``rows`` rows."""
    schema, batches = train_steps._data(train_steps._stretch(rows))
    total = train_steps.WARM + train_steps.STEPS
    drawn = list(islice(batches(), total))
    model = train_steps.model_of(config)
    options = {
        "sizes": [schema.table_sizes[feature.table] for feature in schema.features],
        "embedding_dim": model.embedding_dim,
        "hidden": model.hidden,
        "dropout": model.dropout,
        "learning_rate": config.train.learning_rate,
        "threads": torch.get_num_threads(),
        "warm": train_steps.WARM,
    }
    step, _ = train_steps._ours(config, schema)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "batches.npz"
        ids = np.stack([b.values.view(len(schema.features), -1).numpy() for b in drawn])
        np.savez(stored, ids=ids, labels=np.stack([b.label.numpy() for b in drawn]))
        script = Path(__file__).with_name("fuxictr_step.py")
        command = [python, str(script), str(stored), json.dumps(options)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as peer:
            assert peer.stdin is not None
            assert peer.stdout is not None

            sides: tuple[Rounds, Rounds] = ([], [])
            for _round in range(ROUNDS):
                times = []
                for batch in drawn:
                    start = [clock() for clock in CLOCKS]
                    step(batch)
                    times.append([c() - begun for c, begun in zip(CLOCKS, start, strict=True)])
                counted = zip(*times[train_steps.WARM :], strict=True)
                sides[0].append([median(column) for column in counted])
                print(file=peer.stdin, flush=True)
                sides[1].append([float(word) for word in peer.stdout.readline().split()])
            peer.stdin.close()
    return sides


def table(found: dict[int, tuple[Rounds, Rounds]]) -> str:
    """Return the Markdown table of the measured rounds."""
    lines = [
        "# Speed of a training step beside FuxiCTR 2.3.10",
        "",
        "Written by `make bench-fuxictr`, see README.md.",
        "",
        "| rows of all tables | cki_rec, ms | FuxiCTR, ms | times faster | rounds | target | |"
        " processor time, cki_rec, ms | FuxiCTR, ms | times less |",
        "| --- " * 10 + "|",
    ]
    for rows, sides in found.items():
        ours, theirs = ([median(column) for column in zip(*side, strict=True)] for side in sides)
        each = [b[0] / a[0] for a, b in zip(*sides, strict=True)]
        ratio, target = theirs[0] / ours[0], TARGETS[rows]
        lines.append(
            f"| {rows:,} | {1000 * ours[0]:.1f} | {1000 * theirs[0]:.1f} | {ratio:.2f}"
            f" | {min(each):.2f} to {max(each):.2f} | {target}"
            f" | {'reached' if ratio >= target else 'not reached'}"
            f" | {1000 * ours[1]:.1f} | {1000 * theirs[1]:.1f} | {theirs[1] / ours[1]:.2f} |"
        )
    facts = machine()
    lines += [
        "",
        "DeepFM, 39 fields, embeddings of 16, MLP 400-400-400, dropout, 4,096 rows a step. Medians"
        f" of {ROUNDS} rounds of {train_steps.STEPS} steps in turn. FuxiCTR trains by Adam on whole"
        " tables, without a regularizer; ours by row-wise Adagrad on the rows read, with"
        " `train.table_l2`. Batches lie in memory. On a busy machine only processor times compare,"
        " and only with one thread.",
        "",
        f"Machine: {facts['hardware']}; torch {torch.__version__} with"
        f" {facts['torch_capability']} kernels, {facts['threads']} threads. Commit"
        f" {facts['commit']}{', changed' if facts['dirty'] else ''}.",
    ]
    return "\n".join(lines) + "\n"


def main(python: str, path: str, *overrides: str) -> None:
    """Measure all sizes and write the table."""
    config = parse(compose_config(list(overrides)))
    config = replace(config, train=replace(config.train, learning_rate=1e-3))
    found = {}
    for rows in TARGETS:
        found[rows] = measure(config, python, rows)
        text = table(found)
        write_atomically(Path(path), text.encode())
        print(text.splitlines()[5 + len(found)], flush=True)
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
