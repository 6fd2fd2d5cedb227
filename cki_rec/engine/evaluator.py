"""Logits of a model on rows of a data set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.data.loader import LoadedRows, Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.progress import progress

BATCH_SIZE = 16_384


@torch.no_grad()
def predict(
    module: nn.Module,
    dataset: LoadedRows,
    schema: FeatureSchema,
    rows: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """Return ``(len(rows),)`` logits in the order of ``rows``; leave the module in eval mode.

    Processes share the work, and each returns the logits of all rows, so metrics are exact.
    """
    module.eval()
    if not len(rows):
        return np.empty(0, np.float32)
    num = distributed.world_size()
    loader = Loader(
        dataset, schema, rows, max(BATCH_SIZE, num), rank=distributed.rank(), world_size=num
    )
    places = [loader.places(rank) for rank in range(num)]
    logits = []
    with progress("score", len(rows)) as advance:
        for batch in loader:
            logits.append(module(batch.to(device)).float().cpu().numpy())
            advance(num * len(logits[-1]))
    return distributed.gather(np.concatenate(logits), places)
