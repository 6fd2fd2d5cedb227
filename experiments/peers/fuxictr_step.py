"""Measure training steps of DeepFM by FuxiCTR 2.3.10, one round per line of standard input.

Run in FuxiCTR's environment by ``speed.py``: ``python fuxictr_step.py BATCHES.npz OPTIONS``. Every
line of the output is the median seconds of a step in a round, and its processor time. DeepFM is not in FuxiCTR's wheel, so
it is put together from FuxiCTR's parts here.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class DeepFM(BaseModel):  # type: ignore[misc]
    """FuxiCTR's DeepFM: a factorization machine and an MLP on common embeddings."""

    def __init__(self, feature_map: FeatureMap, options: dict[str, Any]) -> None:
        super().__init__(feature_map, "DeepFM", verbose=0, model_root="", metrics=["AUC"])
        self.embedding_layer = FeatureEmbedding(feature_map, options["embedding_dim"])
        self.fm = FactorizationMachine(feature_map)
        self.mlp = MLP_Block(
            input_dim=feature_map.num_fields * options["embedding_dim"],
            hidden_units=options["hidden"],
            output_dim=1,
            dropout_rates=options["dropout"],
        )
        self.compile("adam", "binary_crossentropy", options["learning_rate"])
        self.reset_parameters()
        self._max_gradient_norm = 10.0  # the default of its fit()

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the probabilities of the rows."""
        x = self.get_inputs(inputs)
        emb = self.embedding_layer(x)
        return {"y_pred": self.output_activation(self.fm(x, emb) + self.mlp(emb.flatten(1)))}


def feature_map_of(sizes: list[int]) -> FeatureMap:
    """Return one categorical feature per table."""
    feature_map = FeatureMap("bench", "")
    feature_map.labels = ["label"]
    feature_map.features = OrderedDict(
        (f"field{place}", {"type": "categorical", "vocab_size": size, "source": ""})
        for place, size in enumerate(sizes)
    )
    feature_map.num_fields = len(sizes)
    return feature_map


def main(path: str, text: str) -> None:
    """Answer each line with the seconds of a step, and of the processor."""
    options = json.loads(text)
    torch.set_num_threads(options["threads"])
    model = DeepFM(feature_map_of(options["sizes"]), options)
    model.train()
    stored = np.load(path)
    batches = [
        {
            **{f"field{place}": torch.from_numpy(ids) for place, ids in enumerate(ids_FB)},
            "label": torch.from_numpy(label_B),
        }
        for ids_FB, label_B in zip(stored["ids"], stored["labels"], strict=True)
    ]
    for _line in sys.stdin:
        clocks, times = (time.perf_counter, time.process_time), []
        for batch in batches:
            start = [clock() for clock in clocks]
            model.train_step(batch)
            times.append([clock() - begun for clock, begun in zip(clocks, start, strict=True)])
        columns = zip(*times[options["warm"] :], strict=True)
        print(*(statistics.median(column) for column in columns), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
