"""Logits of models on validation and test rows: computed once, then read from disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.checkpoints import Checkpoint, describe
from cki_rec.config import Config, UserError
from cki_rec.data.candidates import Candidates, candidate_blocks
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.evaluator import predict
from cki_rec.engine.lookups import WithParams, merging_module
from cki_rec.engine.record import load_arrays, save_arrays
from cki_rec.engine.restoration import restore
from cki_rec.evaluation.metrics import auc
from cki_rec.evaluation.recalibration import recalibration
from cki_rec.merging.extras import Calibration
from cki_rec.merging.params import Params
from cki_rec.models import build_model
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.provenance import check_rows, other_tables
from cki_rec.pipelines.sources import Source, is_external

SPLITS = ("valid", "test")


def predictions(
    config: Config, dataset: EncodedDataset, source: Source
) -> dict[str, NDArray[np.float32]]:
    """Return ``valid`` and ``test`` logits of a model, in the order of the data set's rows.

    A model of other vocabularies is moved to the data set's (``vocabularies.on_rows_of``). Logits
    are stored in the model's run directory and removed with it. Those of external checkpoints are
    stored under ``<runtime.out>/logits``.

    Raises:
        UserError: The model does not fit the data set, or gives NaN or infinity.
    """
    path = _home(config, source) / f"logits-{dataset.hash[:16]}.npz"

    def score() -> Iterator[tuple[str, NDArray[np.float32]]]:
        module, schema, device = scoring_model(config, dataset, source)
        for split in SPLITS:
            logits = predict(module, dataset, schema, dataset.rows(split), device)
            _check_finite(config, source, f"{split} rows", logits)
            yield split, logits

    return _stored(path, SPLITS, score)


def candidate_logits(
    config: Config, dataset: EncodedDataset, source: Source, candidates: Mapping[str, Candidates]
) -> dict[str, NDArray[np.float32]]:
    """Return per split the logits ``(C, K)`` of a model on candidates, stored beside its others.

    Args:
        config: The configuration.
        dataset: The data set.
        source: The model.
        candidates: Split -> candidates.

    Raises:
        UserError: See ``predictions``.
    """
    drawn = [part.item_row_CK for part in candidates.values()]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(rows).tobytes() for rows in drawn))
    path = _home(config, source) / f"logits-{dataset.hash[:16]}-{digest.hexdigest()[:16]}.npz"

    def score() -> Iterator[tuple[str, NDArray[np.float32]]]:
        module, schema, device = scoring_model(config, dataset, source)
        for split, part in candidates.items():
            blocks = [
                predict(module, rows, schema, np.arange(len(rows)), device, part.width)
                for rows in candidate_blocks(dataset, part)
            ]
            logits = np.concatenate([np.empty(0, np.float32), *blocks])
            _check_finite(config, source, f"candidates of {split}", logits)
            yield split, logits.reshape(part.item_row_CK.shape)

    return _stored(path, candidates, score)


def _stored(
    path: Path,
    splits: Collection[str],
    score: Callable[[], Iterable[tuple[str, NDArray[np.float32]]]],
) -> dict[str, NDArray[np.float32]]:
    """Return the logits of a file; if it has not those of all splits, compute and store them."""
    if not distributed.from_first((load_arrays(path) or {}).keys() == set(splits)):
        logits = dict(score())
        if distributed.rank() == 0:
            save_arrays(path, logits)
        return logits
    known = load_arrays(path)
    assert known is not None
    return known


def scoring_model(
    config: Config, dataset: EncodedDataset, source: Source
) -> tuple[nn.Module, FeatureSchema, torch.device]:
    """Return the network of a model on its device, ready to score rows, and its features.

    A model of other vocabularies is moved to the data set's (``vocabularies.on_rows_of``).

    Raises:
        UserError: The model does not fit the data set.
    """
    saved = describe(source.folder)
    check_rows(saved, dataset, str(source.folder))
    device = distributed.start(config.runtime)
    if other_tables(saved, dataset):
        moved = vocabularies.on_rows_of(config, source.folder, dataset)
        if distributed.world_size() > 1:
            module = WithParams(merging_module(moved.schema, moved.model), moved.params)
            return module, moved.schema, torch.device("cpu")
        with device:
            network = build_model(moved.schema, moved.model, device)
        network.load_state_dict(moved.params)
        return network, moved.schema, device
    plain = replace(config.train, embeddings="fused", compile=False)
    model = restore(saved, source.folder, plain, config.runtime)
    return model.module, saved.schema, device


def valid_auc(config: Config, dataset: EncodedDataset, source: Source) -> float:
    """Return the AUC of a model on all validation rows; 0 if it is undefined."""
    label = dataset.labels(dataset.rows("valid"))
    return auc(label, predictions(config, dataset, source)["valid"]) or 0.0


def scorer(config: Config, dataset: EncodedDataset, like: Checkpoint) -> Callable[[Params], float]:
    """Return a function (parameters) -> validation AUC of the network of a checkpoint.

    An undefined AUC (one class only) counts as 0.
    """
    label, run = dataset.labels(dataset.rows("valid")), _runner(config, dataset, like)
    return lambda params: auc(label, run(params)) or 0.0


def calibrator(
    config: Config, dataset: EncodedDataset, like: Checkpoint
) -> Callable[[Params], Calibration]:
    """Return a function (parameters) -> scale and shift that fit validation rows best."""
    label, run = dataset.labels(dataset.rows("valid")), _runner(config, dataset, like)

    def calibrate(params: Params) -> Calibration:
        fit = recalibration(label, run(params))
        return Calibration(fit.scale, fit.shift, fit.reason)

    return calibrate


def _runner(
    config: Config, dataset: EncodedDataset, like: Checkpoint
) -> Callable[[Params], NDArray[np.float32]]:
    """Return a function (parameters) -> validation logits of the network of a checkpoint.

    A single process holds one network from the first call on, into which parameters are copied.
    Several have their rows of the tables, on CPU, and score a share of the rows each.
    """
    rows = dataset.rows("valid")
    is_alone = distributed.world_size() == 1

    @functools.cache
    def network() -> nn.Module:
        if not is_alone:
            return merging_module(like.schema, like.model)
        with distributed.start(config.runtime) as device:
            return build_model(like.schema, like.model, device)

    def with_params(params: Params) -> nn.Module:
        if not is_alone:
            return WithParams(network(), params)
        state = network().state_dict()
        for name, tensor in params.items():
            state[name].copy_(tensor)
        return network()

    @torch.no_grad()
    def run(params: Params) -> NDArray[np.float32]:
        device = distributed.start(config.runtime) if is_alone else torch.device("cpu")
        logits = predict(with_params(params), dataset, like.schema, rows, device)
        if not np.isfinite(logits).all():
            raise UserError(
                f"merge={config.merge.label}: the merged model gives NaN or infinite logits on"
                f" validation rows; {_remedy(config)}"
            )
        return logits

    return run


def _home(config: Config, source: Source) -> Path:
    """Return the folder of the scores of a model."""
    name = source.identity
    return Path(config.runtime.out) / (f"logits/{name}" if is_external(name) else name)


def _check_finite(config: Config, source: Source, rows: str, logits: NDArray[np.float32]) -> None:
    """Check scores.

    Raises:
        UserError: One is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise UserError(
            f"{source.folder}: the model gives NaN or infinite logits on {rows}; {_remedy(config)}"
        )


def _remedy(config: Config) -> str:
    """Return the remedy for a model whose logits are not finite."""
    scale = config.merge.options.get("scale")
    if scale is None:
        return "the training of a source may have diverged, leave it out"
    return f"lower merge.options.scale (it is {scale:g})"
