"""Write sequences and candidates as our models see them, and our options, for RecBole.

Run in our environment: ``python experiments/peers/export_ranks.py FOLDER EXPERIMENT MODEL
[key=value ...]``. Writes ``FOLDER/MODEL.npz`` (arrays) and ``FOLDER/MODEL.json`` (options).
Liked training rows are the steps to learn; liked validation and test rows are cases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from export import padded
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import OmegaConf

from cki_rec import project_root
from cki_rec.config import Config, UserError, parse, register_resolvers
from cki_rec.data.candidates import draw_candidates
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.test_labels import all_labels
from cki_rec.engine.record import save_arrays

ITEM, HISTORY = "item", "history"


def arrays_of(dataset: EncodedDataset, config: Config) -> dict[str, NDArray[Any]]:
    """Return histories, their lengths and items of training steps, and candidates of cases."""
    assert config.model.sequence is not None
    assert config.evaluate.ranking is not None
    column, items = dataset.column(HISTORY), dataset.column(ITEM)
    assert isinstance(column, Ragged)
    history, length = padded(column, config.model.sequence.length)
    known = dataset.labels(np.arange(len(dataset)))
    liked = dataset.rows("train")
    liked = liked[known[liked] == 1]
    liked = liked[length[liked] > 0]  # RecBole has no state of an empty history
    arrays = {"train.history": history[liked], "train.length": length[liked]}
    arrays["train.item"] = np.asarray(items[liked])
    for split, label in (("valid", known), ("test", all_labels(dataset))):
        drawn = draw_candidates(dataset, split, label, config.evaluate.ranking)
        arrays[f"{split}.history"] = history[drawn.row_C]
        arrays[f"{split}.length"] = length[drawn.row_C]
        arrays[f"{split}.candidates"] = np.asarray(items[drawn.item_row_CK])
    return arrays


def export(folder: Path, experiment: str, name: str, overrides: list[str]) -> None:
    """Write both files of a model."""
    register_resolvers()
    conf = project_root() / "conf"
    params = OmegaConf.load(conf / "experiment" / f"{experiment}.yaml").hydra.sweeper.params
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = parse(
            compose("config", [f"experiment={experiment}", f"model={name}", *overrides])
        )
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    save_arrays(folder / f"{name}.npz", arrays_of(dataset, config))
    sequence = config.model.sequence
    assert sequence is not None
    facts = {
        "data": config.data.name,
        "data_hash": dataset.hash,
        "model": name,
        "items": dataset.schema.table_sizes[ITEM],
        "seeds": [int(seed) for seed in str(params.seed).split(",")],
        "options": {
            "width": config.model.embedding_dim,
            "length": sequence.length,
            "layers": sequence.layers,
            "hidden": sequence.hidden,
            "heads": sequence.heads,
            "dropout": sequence.dropout,
            "epochs": config.train.epochs,
            "patience": config.train.patience,
            "negatives": config.evaluate.ranking.negatives if config.evaluate.ranking else 0,
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder / name}.npz: {dataset.folder.name}")


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
    except UserError as error:
        sys.exit(f"export: {error}")
