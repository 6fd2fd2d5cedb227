"""Logits of a model on chosen rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.data.loader import batches
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
    logits = [
        module(batch.to(device)).float().cpu().numpy()
        for batch in batches(dataset, schema, rows, BATCH_SIZE, None)
    ]
    return np.concatenate(logits) if logits else np.empty(0, np.float32)
