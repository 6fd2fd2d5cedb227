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
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import train_steps  # noqa: E402
from rounds import take_turns  # noqa: E402
from run import machine  # noqa: E402

from cki_rec.cli import compose_config  # noqa: E402
from cki_rec.config import Config, parse  # noqa: E402
from cki_rec.files import write_atomically  # noqa: E402

TARGETS = {500_000: 1.6, 1_000_000: 1.6, 10_000_000: 9.0}
"""Rows of all tables -> how many times faster a step of ours should be."""
ROUNDS = 5


def measure(config: Config, python: str, rows: int) -> tuple[list[float], list[float]]:
    """Return the seconds of a step per round, ours and FuxiCTR's, with tables of ``rows`` rows."""
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

            def theirs() -> float:
                print(file=peer.stdin, flush=True)
                return float(peer.stdout.readline())  # type: ignore[union-attr]

            ours, other = take_turns(
                train_steps._timed(step, cycle(drawn)), theirs, rounds=ROUNDS
            )
            peer.stdin.close()
    return ours, other


def table(found: dict[int, tuple[list[float], list[float]]]) -> str:
    """Return the Markdown table of the measured rounds."""
    lines = [
        "# Speed of a training step beside FuxiCTR 2.3.10",
        "",
        "Written by `make bench-peers`, see README.md.",
        "",
        "| rows of all tables | cki_rec, ms | FuxiCTR, ms | times faster | rounds | target | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rows, (ours, theirs) in found.items():
        ratio, each = median(theirs) / median(ours), [b / a for a, b in zip(ours, theirs)]  # noqa: B905
        verdict = "reached" if ratio >= TARGETS[rows] else "not reached"
        lines.append(
            f"| {rows:,} | {1000 * median(ours):.1f} | {1000 * median(theirs):.1f} | {ratio:.2f}"
            f" | {min(each):.2f} to {max(each):.2f} | {TARGETS[rows]} | {verdict} |"
        )
    facts = machine()
    lines += [
        "",
        "DeepFM, 39 fields, embeddings of 16, MLP 400-400-400, dropout, 4,096 rows a step. Medians"
        f" of {ROUNDS} rounds of {train_steps.STEPS} steps in turn. FuxiCTR trains by Adam on whole"
        " tables, without a regularizer; ours by row-wise Adagrad on the rows read, with"
        " `train.table_l2`. Batches lie in memory.",
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
        print(f"{rows:,} rows: {median(found[rows][1]) / median(found[rows][0]):.2f} times FuxiCTR")
    write_atomically(Path(path), table(found).encode())
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
