"""Logits of a model on rows of a data set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cki_rec.data.loader import LoadedRows, Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine import distributed
from cki_rec.models.embeddings import Embedded
from cki_rec.progress import progress

BATCH_SIZE = 16_384


@torch.no_grad()
def predict(
    module: nn.Module,
    dataset: LoadedRows,
    schema: FeatureSchema,
    rows: NDArray[np.int64],
    device: torch.device,
    group: int = 1,
) -> NDArray[np.float32]:
    """Return ``(len(rows),)`` logits in the order of ``rows``; leave the module in eval mode.

    Processes share the work, and each returns the logits of all rows, so metrics are exact.

    Args:
        module: The network, which may be sharded.
        dataset: The rows.
        schema: The features that it reads.
        rows: Row numbers.
        device: Of the network.
        group: Every so many rows have the same histories. One process encodes these once, if the
            network can (``models``).
    """
    module.eval()
    if not len(rows):
        return np.empty(0, np.float32)
    num = distributed.world_size()
    network = getattr(module, "module", module)
    is_shared = group > 1 and num == 1 and hasattr(network, "encode")
    size = max(BATCH_SIZE // group, 1) * group if is_shared else max(BATCH_SIZE, num)
    loader = Loader(dataset, schema, rows, size, rank=distributed.rank(), world_size=num)
    places = [loader.places(rank) for rank in range(num)]
    logits = []
    with progress("score", len(rows)) as advance:
        for batch in loader:
            batch = batch.to(device)
            logit_B = _shared(network, batch, group) if is_shared else module(batch)
            logits.append(logit_B.float().cpu().numpy())
            advance(num * len(logits[-1]))
    return distributed.gather(np.concatenate(logits), places)


def _shared(network: nn.Module, batch: Batch, group: int) -> Tensor:
    """Return the logits of a batch of groups with equal histories, each encoded once."""
    emb: Embedded = network.sparse(batch)  # type: ignore[operator]
    first = slice(None, None, group)
    histories, masks = (
        {name: part[first] for name, part in parts.items()} for parts in (emb.histories, emb.masks)
    )
    firsts = Embedded(emb.fields_BFD[first], emb.first_order_B[first], histories, masks)
    states = [state.repeat_interleave(group, 0) for state in network.encode(firsts)]  # type: ignore[operator]
    logit_B: Tensor = network.score(emb, states)  # type: ignore[operator]
    return logit_B
