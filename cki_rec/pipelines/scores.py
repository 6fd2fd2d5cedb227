"""Logits of models at rest on validation and test rows, computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cki_rec.config import Config, UserError
from cki_rec.data.store import EncodedDataset
from cki_rec.engine import checkpoint, distributed
from cki_rec.engine.checkpoint import Checkpoint
from cki_rec.engine.embeddings import ShardedModel, load_params, shard
from cki_rec.engine.evaluator import predict
from cki_rec.engine.record import save_arrays
from cki_rec.models import build_model

SPLITS = ("valid", "test")
EXTERNAL = "external-"
"""Begins the identity of a checkpoint named by path."""


def predictions(
    config: Config, dataset: EncodedDataset, identity: str, folder: Path
) -> dict[str, NDArray[np.float32]]:
    """Return ``valid`` and ``test`` logits of a checkpoint, in the order of the data set's rows.

    They are kept in the model's run directory, and go when it is made again; those of external
    checkpoints under ``<runtime.out>/logits``.
    """
    home = Path(config.runtime.out) / (f"logits/{identity}" if is_external(identity) else identity)
    path = home / f"logits-{dataset.hash[:16]}.npz"
    if not path.exists():
        saved = checkpoint.load(folder)
        check_data(saved, dataset, str(folder))
        model = restore(config, saved)
        logits = {
            split: predict(model.module, dataset, saved.schema, dataset.rows(split), model.device)
            for split in SPLITS
        }
        save_arrays(path, logits)
    with np.load(path, allow_pickle=False) as arrays:
        return {split: arrays[split] for split in SPLITS}


def is_external(identity: str) -> bool:
    """Return whether a source is a checkpoint that no run of ours made."""
    return identity.startswith(EXTERNAL)


def check_data(saved: Checkpoint, dataset: EncodedDataset, name: str) -> None:
    """Check that a checkpoint was trained on this very data set.

    Equal vocabularies would not do: with another split, test rows may have been training rows.

    Raises:
        UserError: It was trained on another one, or on another encoding or split of this one.
    """
    if saved.data_hash != dataset.hash:
        raise UserError(
            f"{name}: trained on another data set, encoding or split than {dataset.folder.name};"
            " choose the data options it was trained with"
        )


def restore(config: Config, saved: Checkpoint, table_learning_rate: float = 0.0) -> ShardedModel:
    """Return a sharded model, ready to predict or to train on, from a checkpoint."""
    device = distributed.start(config.runtime)
    with device:
        network = build_model(saved.schema, saved.model, torch.device("meta"))
    model = shard(network, device, table_learning_rate)
    load_params(model, saved.params, saved.accumulators)
    return model
