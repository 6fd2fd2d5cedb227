"""Logits of a model on chosen rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.data.loader import Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.data.store import EncodedDataset

BATCH_SIZE = 16_384


@torch.no_grad()
def predict(
    module: nn.Module,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    rows: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """Return ``(len(rows),)`` logits in the order of ``rows``; leaves the module in eval mode."""
    module.eval()
    if not len(rows):
        return np.empty(0, np.float32)
    logits = [
        module(batch.to(device)).float().cpu().numpy()
        for batch in Loader(dataset, schema, rows, BATCH_SIZE)
    ]
    return np.concatenate(logits)
