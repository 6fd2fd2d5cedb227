"""Train RecBole's SASRec or GRU4Rec on exported sequences; rank the same candidates as ours.

Run in the environment of ``make bench-recbole``: ``python experiments/peers/recbole_ranks.py
FOLDER/MODEL RESULTS.jsonl``. Runs that the results hold already are skipped.

Theirs: the networks, their initial weights and their loss (``CE``, cross entropy over all items,
their default). Ours: the loop, with their default optimizer, and the choice of the best epoch by
NDCG@10 on validation candidates.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.sequential_recommender.gru4rec import GRU4Rec
from recbole.model.sequential_recommender.sasrec import SASRec
from torch import Tensor, nn

BATCH, LEARNING_RATE, CUTOFFS = 2048, 1e-3, (5, 10, 20)
"""RecBole's defaults of its training."""
PACKAGES = ("recbole", "torch", "numpy")
FIELDS = {
    "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item",
    "NEG_PREFIX": "neg_",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "length",
    "device": torch.device("cpu"),
}


class Items:
    """Numbers of users and items, in place of their data set."""

    def __init__(self, items: int) -> None:
        self.items = items

    def num(self, field: str) -> int:
        """Return the number of ids of a field."""
        return self.items


def build(facts: dict[str, Any]) -> nn.Module:
    """Return their network with the widths of ours and their other defaults."""
    options = facts["options"]
    shared = {**FIELDS, "MAX_ITEM_LIST_LENGTH": options["length"], "loss_type": "CE"}
    if facts["model"] == "sasrec":
        own = {
            "n_layers": options["layers"],
            "n_heads": options["heads"],
            "hidden_size": options["width"],
            "inner_size": options["hidden"],
            "hidden_dropout_prob": options["dropout"],
            "attn_dropout_prob": options["dropout"],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "initializer_range": 0.02,
        }
        return SASRec({**shared, **own}, Items(facts["items"]))
    own = {
        "embedding_size": options["width"],
        "hidden_size": options["hidden"],
        "num_layers": options["layers"],
        "dropout_prob": options["dropout"],
    }
    return GRU4Rec({**shared, **own}, Items(facts["items"]))


@torch.no_grad()
def ranks(network: nn.Module, arrays: dict[str, Tensor], split: str) -> np.ndarray:
    """Return the rank of every liked item among its candidates; ties count half."""
    network.eval()
    result = []
    columns = [arrays[f"{split}.{name}"] for name in ("history", "length", "candidates")]
    for history, length, items in zip(*(column.split(BATCH) for column in columns), strict=True):
        state = network(history, length.clamp(min=1))
        score = torch.einsum("bd,bkd->bk", state, network.item_embedding(items))
        others, liked = score[:, 1:], score[:, :1]
        result.append(1 + (others > liked).sum(1) + (others == liked).sum(1) / 2)
    return torch.cat(result).numpy()


def metrics(rank: np.ndarray) -> dict[str, float]:
    """Return HR@k and NDCG@k."""
    gain = 1 / np.log2(1 + rank)
    values = {f"hr_{k}": float((rank <= k).mean()) for k in CUTOFFS}
    return values | {f"ndcg_{k}": float((gain * (rank <= k)).mean()) for k in CUTOFFS}


def fit(network: nn.Module, arrays: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Train until NDCG@10 of validation candidates stops rising, and restore the best epoch."""
    adam = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    best, weights, best_epoch, stalled, epoch = -1.0, None, 0, 0, 0
    while stalled < options["patience"] and epoch < options["epochs"]:
        epoch += 1
        network.train()
        for rows in torch.randperm(len(arrays["train.item"])).split(BATCH):
            batch = {
                "item_list": arrays["train.history"][rows],
                "length": arrays["train.length"][rows],
                "item": arrays["train.item"][rows],
            }
            adam.zero_grad()
            network.calculate_loss(batch).backward()
            adam.step()
        value = metrics(ranks(network, arrays, "valid"))["ndcg_10"]
        stalled += 1
        if value > best:
            best, best_epoch, stalled = value, epoch, 0
            weights = copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    return {"epochs": epoch, "best_epoch": best_epoch, "valid_ndcg_10": best}


def main(stem: str, results: Path) -> None:
    """Run the seeds that ``results`` lacks."""
    facts = json.loads(Path(f"{stem}.json").read_text())
    arrays = {
        name: torch.from_numpy(array.astype(np.int64))
        for name, array in np.load(f"{stem}.npz").items()
    }
    lines = results.read_text().splitlines() if results.exists() else []
    key = ("data_hash", "model", "seed", "options")
    done = [[json.loads(line)[name] for name in key] for line in lines]
    torch.set_num_threads(1)
    for seed in facts["seeds"]:
        known = {**{name: facts[name] for name in ("data", "data_hash", "model", "options")}}
        if [{**known, "seed": seed}[name] for name in key] in done:
            continue
        torch.manual_seed(seed)
        network, start = build(facts), time.perf_counter()
        facts_of_fit = fit(network, arrays, facts["options"])
        line = {
            **known,
            "seed": seed,
            **metrics(ranks(network, arrays, "test")),
            **facts_of_fit,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"RecBole {facts['model']}, seed {seed}: HR@10 {line['hr_10']:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
