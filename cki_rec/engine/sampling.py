"""Random samples of training rows for statistics of activations."""

from __future__ import annotations

import numpy as np
from torch import nn

from cki_rec.data.columns import Ints
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.merging.statistics import ActivationStatistics

BATCH = 4096


def sample_statistics(
    network: nn.Module,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    size: int,
    seed: int,
    rows: Ints | None = None,
) -> ActivationStatistics:
    """Return activation statistics on rows that are drawn without replacement.

    Args:
        network: A network with unsharded tables.
        dataset: The encoded data set.
        schema: The features that ``network`` reads.
        size: Rows to draw; fewer rows are all used.
        seed: Seed of the draw.
        rows: Rows to draw from; None: all training rows.
    """
    rows = dataset.rows("train") if rows is None else rows
    if len(rows) > size:
        rows = np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))
    return ActivationStatistics(network, list(Loader(dataset, schema, rows, BATCH)))
