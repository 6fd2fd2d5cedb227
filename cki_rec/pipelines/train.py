"""Train one model."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from cki_rec.analysis.metrics import auc
from cki_rec.config import Config, run_id, section
from cki_rec.data import store
from cki_rec.data.store import EncodedDataset
from cki_rec.engine import checkpoint, distributed
from cki_rec.engine.embeddings import initialize, shard
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.trainer import fit
from cki_rec.models import build_model, model_schema

log = logging.getLogger(__name__)


def run(config: Config) -> float:
    """Train as configured and say where the model is; return its validation AUC."""
    done = ensure(config, force=config.runtime.force)
    log.info("model: %s", done.checkpoint)
    return valid_auc(done)


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished training run of ``config``; train first if it is not there."""
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    reads = {
        "data": data_identity(config, dataset),
        "model": section(config.model),
        "train": section(config.train),
        "seed": config.seed,
    }
    with open_run(Path(config.runtime.out), run_id("train", reads), force) as run:
        if run.record is None:
            _train(config, dataset, run, reads)
    return run


def valid_auc(run: Run) -> float:
    """Return the validation AUC of a finished training."""
    assert run.record is not None
    value: float = run.record["result"]["valid_auc"]
    return value


def _train(config: Config, dataset: EncodedDataset, run: Run, reads: dict[str, Any]) -> None:
    device = distributed.start(config.runtime)
    data = config.data
    train_rows = dataset.rows("train", data.partition, data.part)
    valid_rows = dataset.rows("valid", data.partition, data.part)
    schema = model_schema(dataset.schema, config.model)

    with device:
        network = build_model(dataset.schema, config.model, torch.device("meta"))
    model = shard(network, device, config.train.table_learning_rate)
    initialize(model, config.seed, config.model.init_std)
    counts = {
        table: torch.from_numpy(values)
        for table, values in dataset.row_counts(schema, data.partition, data.part).items()
    }

    def save() -> None:
        tensors = {
            "model": model.module.state_dict(),
            "accumulator": model.accumulators(),
            "counts": counts,
        }
        checkpoint.save(run.checkpoint, tensors, config.model, schema, dataset.hash)

    part = "all rows" if data.part is None else f"part {data.part} by {data.partition.by}"
    title = f"train {config.model.name}, {part}, seed {config.seed}"
    start = time.perf_counter()
    with run.phase("train"):
        history = fit(
            *(model, dataset, schema, train_rows, valid_rows),
            *(config.train, config.seed, auc, save, title),
        )
    finish(run, reads, dataset, history)
    log.info("  %s: %s, %.1f s", title, describe(history), time.perf_counter() - start)


def finish(
    run: Run, reads: dict[str, Any], dataset: EncodedDataset, history: list[dict[str, Any]]
) -> None:
    """Write the epochs and the record of a training."""
    lines = [json.dumps(epoch) for epoch in history]
    (run.path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    best = best_epoch(history)
    result = {
        "epochs": len(history),
        "best_epoch": best["epoch"],
        "valid_auc": best["valid_metric"],
    }
    run.finish(reads, data_facts(dataset), result)


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last epoch whose model was saved."""
    return [epoch for epoch in history if epoch["is_best"]][-1]


def describe(history: list[dict[str, Any]]) -> str:
    """Return how many epochs there were and what the best one reached."""
    best = best_epoch(history)
    value = best["valid_metric"]
    return f"best of {len(history)} epochs is {best['epoch']}, validation AUC {value:.4f}"


def data_identity(config: Config, dataset: EncodedDataset) -> dict[str, Any]:
    """Return what a training reads of the data: content, and the part if there is one."""
    part = config.data.part
    partition = None if part is None else section(config.data.partition)
    return {"hash": dataset.hash, "partition": partition, "part": part}


def data_facts(dataset: EncodedDataset) -> dict[str, Any]:
    """Return what a record says of its data set."""
    manifest = dataset.manifest
    return {
        "name": dataset.folder.name.rpartition("-")[0],
        "hash": dataset.hash,
        "rows": {name: split["rows"] for name, split in manifest["splits"].items()},
        "skipped": sum(entry["count"] for entry in manifest["skipped"].values()),
        "synthetic": manifest["synthetic"],
    }
