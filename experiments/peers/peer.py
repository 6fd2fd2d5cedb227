"""Train deepctr-torch's networks on exported rows, by the protocol of our dense mode.

Run in the environment of ``make bench-peers``, which holds nothing of ours:
``python experiments/peers/peer.py FOLDER/EXPERIMENT RESULTS.jsonl``. Runs that the results hold
already are skipped; each new one appends a line.

Theirs: the networks, their initial weights (embeddings and MLP with ``init_std``), their L2 term.
Ours: the loop, since their ``fit`` neither lowers learning rates nor restores the best epoch.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

# Importing the package asks a server for its latest version: leave that out.
sys.modules["deepctr_torch.utils"] = types.ModuleType("deepctr_torch.utils")
sys.modules["deepctr_torch.utils"].check_version = lambda _: None

from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat  # noqa: E402
from deepctr_torch.models import DCN, DIN, DeepFM  # noqa: E402

PACKAGES = ("deepctr-torch", "torch", "numpy", "scikit-learn")
HISTORY = "hist_"
"""How their DIN finds the history of a field."""


def inputs_of(facts: dict[str, Any], arrays: Any, dim: int, histories: bool) -> tuple[Any, ...]:
    """Return their feature columns, and what each input is called: name -> array."""
    columns, inputs, attended = [], {}, []
    targets = {f["table"]: f["name"] for f in facts["fields"] if f["kind"] == "categorical"}
    for field in facts["fields"]:
        is_history, ids = field["kind"] == "history", arrays[f"field.{field['name']}"]
        if is_history and not histories:
            continue
        name = HISTORY + targets[field["table"]] if is_history else field["name"]
        column = SparseFeat(name, field["size"], dim, embedding_name=field["table"])
        if is_history:
            attended.append(targets[field["table"]])
            inputs[f"{name}_length"] = arrays[f"length.{field['name']}"]
            column = VarLenSparseFeat(column, ids.shape[1], "mean", f"{name}_length")
        elif field["kind"] == "multi":  # its length, their DIN would take for the history's
            column = VarLenSparseFeat(column, ids.shape[1], "mean")
        columns.append(column)
        inputs[name] = ids
    return columns, inputs, attended


def build(
    name: str, options: dict[str, Any], columns: list[Any], attended: list[str], seed: int
) -> nn.Module:
    """Return their network with the options of ours that it knows."""
    half_l2 = options["table_l2"] / 2  # theirs is not halved
    common = {
        "dnn_hidden_units": tuple(options["hidden"]),
        "dnn_activation": options["activation"],
        "dnn_use_bn": options["batch_norm"],
        "dnn_dropout": options["dropout"],
        "init_std": options["init_std"],
        "l2_reg_embedding": half_l2,
        "seed": seed,
    }
    if name == "deepfm":
        return DeepFM(columns, columns, l2_reg_linear=half_l2, **common)
    if name == "dcn":  # as published: without first-order weights
        layers = options["cross_layers"]
        return DCN([], columns, cross_num=layers, l2_reg_linear=0, l2_reg_cross=0, **common)
    assert name == "din", name
    return DIN(
        columns,
        attended,
        att_hidden_size=tuple(options["attention_hidden"]),
        att_activation=options["attention_activation"],
        att_weight_normalization=options["attention_softmax"],
        **common,
    )


def matrix(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return all inputs side by side, ``(N, columns)``, as their ``fit`` lays them out."""
    width = max(stop for _, stop in model.feature_index.values())
    num_rows = len(next(iter(inputs.values())))
    x = np.empty((num_rows, width), np.float32)  # ids below 2 ** 24 are exact
    for name, (start, stop) in model.feature_index.items():
        assert inputs[name].max() < 2**24, name
        x[:, start:stop] = inputs[name].reshape(num_rows, stop - start)
    return torch.from_numpy(x)


def predict(model: nn.Module, x: Tensor, rows: Tensor) -> np.ndarray:
    """Return the probabilities of ``rows``."""
    model.eval()
    with torch.no_grad():
        parts = [model(x[part]).squeeze(1) for part in rows.split(8192)]
    return torch.cat(parts).double().numpy()


def fit(
    model: nn.Module, x: Tensor, y: Tensor, train: Tensor, valid: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """Train until validation AUC stops rising and restore the best epoch."""
    learning_rate = options["learning_rate"]
    adam = torch.optim.Adam(model.parameters(), lr=learning_rate)
    best, best_epoch, weights, stalled, epoch = -math.inf, 0, None, 0, 0
    while stalled < options["patience"] and epoch < options["epochs"]:
        epoch += 1
        model.train()
        for rows in train[torch.randperm(len(train))].split(options["batch_size"]):
            adam.zero_grad()
            loss = binary_cross_entropy(model(x[rows]).squeeze(1), y[rows])
            (loss + model.get_regularization_loss() + model.aux_loss).sum().backward()
            adam.step()
        value = roc_auc_score(y[valid], predict(model, x, valid))
        if value > best + options["min_gain"]:
            best, best_epoch, stalled = value, epoch, 0
            weights = copy.deepcopy(model.state_dict())
            continue
        stalled += 1
        learning_rate = max(
            learning_rate * options["plateau_factor"], options["min_learning_rate"]
        )
        for group in adam.param_groups:
            group["lr"] = learning_rate
    model.load_state_dict(weights)
    return {"epochs": epoch, "best_epoch": best_epoch, "valid_auc": best}


def run(facts: dict[str, Any], arrays: Any, name: str, seed: int) -> dict[str, Any]:
    """Return the result of one network and seed."""
    options = facts["models"][name]
    columns, inputs, attended = inputs_of(
        facts, arrays, options["embedding_dim"], options["histories"]
    )
    network = build(name, options, columns, attended, seed)
    x, y = matrix(network, inputs), torch.from_numpy(arrays["label"]).float()
    rows = {split: torch.from_numpy(arrays[split]) for split in ("train", "valid", "test")}
    torch.manual_seed(seed)  # order of rows and dropout
    start = time.perf_counter()
    result = fit(network, x, y, rows["train"], rows["valid"], options)
    seconds = time.perf_counter() - start
    label, probability = y[rows["test"]].numpy(), predict(network, x, rows["test"])
    return {
        "data": facts["data"],
        "data_hash": facts["data_hash"],
        "model": name,
        "seed": seed,
        "test_auc": roc_auc_score(label, probability),
        "test_log_loss": log_loss(label, probability),
        **result,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "options": options,
    }


def key(line: dict[str, Any]) -> str:
    """Return what identifies a run."""
    return json.dumps([line[k] for k in ("data_hash", "model", "seed", "options")], sort_keys=True)


def main(stem: str, results: Path) -> None:
    """Run what ``results`` lacks."""
    facts, arrays = json.loads(Path(f"{stem}.json").read_text()), dict(np.load(f"{stem}.npz"))
    lines = results.read_text().splitlines() if results.exists() else []
    done = {key(json.loads(line)) for line in lines}
    torch.set_num_threads(1)
    for name, options in facts["models"].items():
        for seed in facts["seeds"]:
            wanted = {
                "data_hash": facts["data_hash"],
                "model": name,
                "seed": seed,
                "options": options,
            }
            if key(wanted) in done:
                continue
            line = run(facts, arrays, name, seed)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            found = (
                f"test AUC {line['test_auc']:.4f}, {line['epochs']} epochs, {line['seconds']} s"
            )
            print(f"deepctr-torch {name}, {facts['data']}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
