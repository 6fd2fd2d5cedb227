"""Logits of models at rest on validation and test rows, computed once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.checkpoints import checkpoint
from cki_rec.checkpoints.checkpoint import Checkpoint, Description
from cki_rec.config import Config, Runtime, Train, UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import SEVERAL
from cki_rec.engine import checkpoint_io, distributed
from cki_rec.engine.embeddings import ShardedModel, build
from cki_rec.engine.evaluator import predict
from cki_rec.engine.record import save_arrays
from cki_rec.evaluation.metrics import auc
from cki_rec.evaluation.recalibration import recalibration
from cki_rec.merging.params import Params
from cki_rec.merging.repair import recalibrate
from cki_rec.merging.symmetry import LogitScale
from cki_rec.models import build_model
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.external import is_external

log = logging.getLogger(__name__)

SPLITS = ("valid", "test")


def predictions(
    config: Config, dataset: EncodedDataset, identity: str, folder: Path
) -> dict[str, NDArray[np.float32]]:
    """Return ``valid`` and ``test`` logits of a checkpoint, in the order of the data set's rows.

    A model of other vocabularies is moved to the data set's (``vocabularies.on_rows_of``). Logits
    are kept in the model's run directory, and go when it is made again; those of external
    checkpoints under ``<runtime.out>/logits``.
    """
    home = Path(config.runtime.out) / (f"logits/{identity}" if is_external(identity) else identity)
    path = home / f"logits-{dataset.hash[:16]}.npz"
    if not path.exists():
        saved = checkpoint.describe(folder)
        check_rows(saved, dataset, str(folder))
        device = distributed.start(config.runtime)
        if other_tables(saved, dataset):
            moved = vocabularies.on_rows_of(config, folder, dataset)
            schema = moved.schema
            with device:
                module = build_model(schema, moved.model, device)
            module.load_state_dict(moved.params)
        else:
            plain = replace(config.train, embeddings="fused", compile=False)
            schema, module = saved.schema, restore(saved, folder, plain, config.runtime).module
        logits = {
            split: predict(module, dataset, schema, dataset.rows(split), device)
            for split in SPLITS
        }
        save_arrays(path, logits)
    with np.load(path, allow_pickle=False) as arrays:
        return {split: arrays[split] for split in SPLITS}


def scorer(config: Config, dataset: EncodedDataset, like: Checkpoint) -> Callable[[Params], float]:
    """Return a function (parameters) -> validation AUC of the network of a checkpoint.

    An AUC that is undefined (one class only) counts as 0.
    """
    label, run = dataset.labels(dataset.rows("valid")), runner(config, dataset, like)
    return lambda params: auc(label, run(params)) or 0.0


def runner(
    config: Config, dataset: EncodedDataset, like: Checkpoint
) -> Callable[[Params], NDArray[np.float32]]:
    """Return a function (parameters) -> validation logits of the network of a checkpoint.

    It holds one network, unsharded, into which parameters are copied, from the first call on.
    """
    rows = dataset.rows("valid")

    @functools.cache
    def network() -> nn.Module:
        with distributed.start(config.runtime) as device:
            return build_model(like.schema, like.model, device)

    @torch.no_grad()
    def run(params: Params) -> NDArray[np.float32]:
        device = distributed.start(config.runtime)
        state = network().state_dict()
        for name, tensor in params.items():
            state[name].copy_(tensor)
        return predict(network(), dataset, like.schema, rows, device)

    return run


def recalibrated(
    config: Config, params: Params, dataset: EncodedDataset, like: Checkpoint
) -> tuple[Params, dict[str, Any]]:
    """Return parameters whose logits fit validation rows best, up to scale and shift.

    They are the given ones where there is no best scale, or a negative one: the second value, for
    the record, says why.
    """
    logits = runner(config, dataset, like)(params)
    found = recalibration(dataset.labels(dataset.rows("valid")), logits)
    if found.scale is None or found.shift is None or found.scale <= 0:
        reason = found.reason or "the model ranks rows the wrong way round"
        log.warning("  merge.recalibrate: not done, %s (validation rows)", reason)
        return params, asdict(replace(found, reason=reason))
    network = build_model(like.schema, like.model, torch.device("meta"))
    how: LogitScale = network.logit_scale()  # type: ignore[operator]
    return recalibrate(params, how, found.scale, found.shift), asdict(found)


def check_data(saved: Checkpoint | Description, dataset: EncodedDataset, name: str) -> None:
    """Check that a checkpoint was trained on this data set, or fits it as it is.

    Raises:
        UserError: See ``check_rows``; or its vocabularies are others.
    """
    check_rows(saved, dataset, name)
    if other := other_tables(saved, dataset):
        raise UserError(
            f"{name}: trained on another data set, encoding or split than {dataset.folder.name}:"
            f" table '{other[0]}' has other tokens, or in another order; encode the rows with"
            " those of the model: data.vocabularies=[FOLDER,...], in the order of"
            " merge.sources"
        )


def other_tables(saved: Checkpoint | Description, dataset: EncodedDataset) -> list[str]:
    """Return the tables of a checkpoint whose rows mean other tokens than the data set's ids."""
    if saved.origin.data_hash == dataset.hash:
        return []
    own, given = saved.schema.vocabulary_hashes, dataset.schema.vocabulary_hashes
    return [table for table in saved.schema.table_sizes if own[table] != given[table]]


def check_rows(saved: Checkpoint | Description, dataset: EncodedDataset, name: str) -> None:
    """Check that no row of validation or test is known to have been a training row.

    Equal vocabularies would not do: with another split, test rows may have been training rows.
    Of raw files that the checkpoint has not seen, ``evaluate.disjoint_files`` has to tell.

    Raises:
        UserError: Raw files of this data set were divided otherwise for the checkpoint, or may
            have been; or fields differ.
    """
    origin = saved.origin
    if origin.data_hash == dataset.hash:
        return
    what = f"{name}: trained on another data set, encoding or split than {dataset.folder.name}"
    if origin.rows is None:
        mend = "choose the data options it was trained with"
        if origin.data_hash == SEVERAL:
            mend = "it does not say on which rows; train and merge its sources with this release"
        raise UserError(f"{what}; {mend}")
    if origin.may_have_seen(dataset.source_rows):
        raise UserError(
            f"{what}: the same raw files were divided otherwise, so test rows may have been its"
            " training rows; choose the data options it was trained with"
        )
    schema = dataset.schema
    for feature in saved.schema.features:
        key = feature.table or feature.name
        learnt = saved.schema.vocabulary_hashes.get(key), schema.vocabulary_hashes.get(key)
        if feature not in schema.features or (not feature.table and learnt[0] != learnt[1]):
            raise UserError(
                f"{what}: field '{feature.name}' ({feature.kind}) is not there, or of other"
                " numbers; choose the data options it was trained with"
            )


def moved_start(
    config: Config, dataset: EncodedDataset, folder: Path, name: str, scratch: Path
) -> tuple[Description, Path]:
    """Return the description and the folder of a model that is to be trained on a data set.

    The folder is ``scratch`` where the model had to be moved to the data set's vocabularies.

    Raises:
        UserError: See ``check_rows`` and ``vocabularies.on_rows_of``.
    """
    saved = checkpoint.describe(folder)
    check_rows(saved, dataset, name)
    if not other_tables(saved, dataset):
        return saved, folder
    moved = vocabularies.on_rows_of(config, folder, dataset)
    tensors = {"model": moved.params, "accumulator": moved.accumulators, "counts": moved.counts}
    checkpoint_io.save(scratch, tensors, moved.model, moved.schema, moved.origin)
    return checkpoint.describe(scratch), scratch


def restore(
    saved: Description, folder: Path, schedule: Train, runtime: Runtime, to_train: bool = False
) -> ShardedModel:
    """Return a model on its devices from a checkpoint, ready to predict or to train on.

    To train on fused tables, accumulators come along where the checkpoint has some; others are
    zero, as before any training.

    Raises:
        UserError: The accumulators are of another table optimizer.
    """
    model = build(saved.schema, saved.model, schedule, runtime)
    tensors: dict[str, dict[str, Any]] = {"model": model.module.state_dict()}
    accumulators = model.accumulators() if to_train else {}
    shapes = checkpoint.accumulator_shapes(folder) if accumulators else {}
    for name, shape in shapes.items():
        needed = tuple(accumulators[name].metadata().size)
        if shape != needed:
            raise UserError(
                f"{folder}: the accumulator of {name} is {shape}, train.table_optimizer="
                f"{schedule.table_optimizer} needs {needed}; name the one it was trained with"
            )
    if shapes:
        tensors["accumulator"] = accumulators
    elif accumulators:
        log.info("  %s has no accumulators: fused tables start without", folder)
    checkpoint_io.load_into(tensors, folder)
    return model
