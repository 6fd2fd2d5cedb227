"""A small trained model with fields of every kind, and the scores of its rows."""

from __future__ import annotations

import numpy as np
import torch
from conftest import SMALL

from cki_rec import notebook
from cki_rec.cli import main
from cki_rec.engine import evaluator

FIELDS = (
    "[user,item,weekday,history,{name: price,kind: numeric},{name: age,kind: numeric,"
    "transform: quantile},{name: tags,kind: multi},{name: past,kind: history,separator: '|',"
    "max_length: 2,table: item},{name: hashed,column: user,hash_size: 7}]"
)


def write_rows(path, rows=400, seed=0):
    """Write rows with empty values, empty lists, quotes and unknown tokens."""
    draw = np.random.default_rng(seed)
    lines = ["y,user,item,at,price,age,tags,past"]
    for _ in range(rows):
        past = "|".join(f"i{n}" for n in draw.integers(0, 12, draw.integers(0, 4)))
        tags = "|".join(f"t{n}" for n in draw.integers(0, 5, draw.integers(0, 4)))
        price, age = (f"{9 * draw.random():.3f}" if draw.random() < 0.9 else "" for _ in range(2))
        cells = [draw.integers(0, 2), f'u{draw.integers(0, 30)},"i{draw.integers(0, 12)}"']
        cells += [1_700_000_000 + draw.integers(0, 10**6), price, age, tags, past]
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    return path


def train_mixed(folder):
    """Return a folder, options, and the id and the scores of a model on ``rows.csv``."""
    raw = write_rows(folder / "rows.csv")
    words = [f"runtime.{name}={folder / name}" for name in ("out", "reports", "encoded")]
    words += [*SMALL, "runtime.device=cpu"]
    data = ["data=csv", f"data.raw={raw}", "data.label=y", "data.user=user", "data.item=item"]
    data += ["data.time=at", f"data.fields={FIELDS}", "data.numeric=log1p", "data.buckets=4"]
    assert main(["train", *data, "model.histories=true", *words]) == 0
    (run,) = (path.parent.name for path in (folder / "out").glob("train-*/record.json"))
    model = notebook.load_model(run, *words)
    rows = np.arange(len(model.dataset))
    logits = evaluator.predict(
        model.network, model.dataset, model.schema, rows, torch.device("cpu")
    )
    return folder, words, run, 1 / (1 + np.exp(-logits.astype(np.float64)))
