"""Labels of test rows. In this package, only ``pipelines.evaluate`` imports them (tested).

``EncodedDataset.labels`` returns NaN for test rows. Metrics refuse NaN, and a loss of NaN is not
finite. So no model can be trained on test rows, or chosen by them, without an error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cki_rec.data.dataset import EncodedDataset


def all_labels(dataset: EncodedDataset) -> NDArray[np.uint8]:
    """Return ``(N,)`` the labels of all rows, test rows included, memory-mapped."""
    return dataset._label
