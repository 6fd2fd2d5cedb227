"""Write the very rows that our models see, and their options, for deepctr-torch.

Run in our environment: ``python experiments/peers/export.py FOLDER EXPERIMENT [key=value ...]``.
Writes ``FOLDER/EXPERIMENT.npz`` (arrays) and ``FOLDER/EXPERIMENT.json`` (fields, jobs, options).

Shape legend: N rows, W ids of the longest row.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import OmegaConf

from cki_rec import project_root
from cki_rec.config import Config, UserError, parse, register_resolvers
from cki_rec.data.encoding import store
from cki_rec.data.columns import Ragged
from cki_rec.data.test_labels import all_labels
from cki_rec.data.schema import PADDING_ID
from cki_rec.data.encoding.split import SPLITS
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine.record import save_arrays

MODEL = ("embedding_dim", "hidden", "activation", "batch_norm", "dropout", "init_std", "histories")
TRAIN = (
    *("epochs", "batch_size", "learning_rate", "table_l2"),
    *("min_gain", "plateau_factor", "min_learning_rate", "patience"),
)
"""What both sides know."""
FIXED = {"embeddings": "dense", "gradient_clip": None, "precision": "fp32", "ema": None}


def options_of(config: Config) -> dict[str, Any]:
    """Return the options that decide a run on both sides.

    Raises:
        UserError: An option that the other side does not know.
    """
    model, train = asdict(config.model), asdict(config.train)
    ours = {f"train.{key}": (train[key], value) for key, value in FIXED.items()}
    ours["train.monitor"] = (train["monitor"], {"auc": 1.0, "log_loss": 0.0, "gauc": 0.0})
    ours["model.attention.dropout"] = (model["attention"]["dropout"], 0.0)
    for key, (found, needed) in ours.items():
        if found != needed:
            raise UserError(f"{key}={found}: deepctr-torch can be compared with {needed} only")
    options = {key: model[key] for key in MODEL} | {key: train[key] for key in TRAIN}
    if model["name"] == "dcn":
        options["cross_layers"] = model["cross"]["layers"]
    if model["name"] == "din":
        names = ("length", "hidden", "activation", "softmax")
        options |= {f"attention_{key}": model["attention"][key] for key in names}
    return options


def configs(experiment: str, overrides: list[str]) -> tuple[dict[str, Config], list[int]]:
    """Return the configuration of each model that the experiment sweeps over, and the seeds."""
    register_resolvers()
    conf = project_root() / "conf"
    params = OmegaConf.load(conf / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    with initialize_config_dir(str(conf), version_base="1.3"):
        found = {
            name: parse(
                compose("config", [f"experiment={experiment}", f"model={name}", *overrides])
            )
            for name in params.model.split(",")
        }
    return found, [int(seed) for seed in str(params.seed).split(",")]


def padded(column: Ragged, length: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ``(N, W)`` ids, padded at the end, and ``(N,)`` how many there are.

    Args:
        column: Several ids a row.
        length: Keep the last so many ids of a row; None: all.
    """
    lengths = np.asarray(column.lengths)
    kept = lengths if length is None else np.minimum(lengths, length)
    starts = np.asarray(column.starts) + lengths - kept
    places = np.arange(kept.max(initial=1) if length is None else length)
    is_held = places < kept[:, None]
    ids = np.full(is_held.shape, PADDING_ID, np.int32)
    ids[is_held] = column.values[(starts[:, None] + places)[is_held]]
    return ids, kept


def arrays_of(dataset: EncodedDataset, length: int) -> dict[str, NDArray[Any]]:
    """Return ids of every field, labels, users, and the row numbers of each split."""
    arrays: dict[str, NDArray[Any]] = {name: dataset.rows(name) for name in SPLITS}
    arrays["label"] = all_labels(dataset)
    if dataset.group is not None:
        arrays["group"] = dataset.group
    for feature in dataset.schema.lookups:
        column = dataset.column(feature.name)
        if isinstance(column, Ragged):
            is_history = feature.kind == "history"
            column, lengths = padded(column, length if is_history else None)
            if is_history:
                arrays[f"length.{feature.name}"] = lengths
        arrays[f"field.{feature.name}"] = column
    return arrays


def export(folder: Path, experiment: str, overrides: list[str]) -> None:
    """Write both files of an experiment."""
    models, seeds = configs(experiment, overrides)
    first = next(iter(models.values()))
    dataset = store.prepare(first.data, first.runtime.encoded, first.runtime.chunk_mb)
    assert not dataset.schema.numbers, "numbers are not exported"
    save_arrays(folder / f"{experiment}.npz", arrays_of(dataset, first.model.attention.length))
    facts = {
        "data": first.data.name,
        "data_hash": dataset.hash,
        "fields": [
            {
                "name": f.name,
                "kind": f.kind,
                "table": f.table,
                "size": dataset.schema.table_sizes[f.table],
            }
            for f in dataset.schema.lookups
        ],
        "seeds": seeds,
        "models": {name: options_of(config) for name, config in models.items()},
    }
    (folder / f"{experiment}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder / experiment}.npz: {len(dataset):,} rows of {first.data.name}")


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    except UserError as error:
        sys.exit(f"export: {error}")
