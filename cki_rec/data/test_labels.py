"""Labels of test rows. Of the package, ``pipelines.evaluate`` alone may import this (tested).

All others ask ``EncodedDataset.labels``, which has NaN in their place: metrics refuse NaN and a
loss of it is not finite, so nothing is trained on test rows or chosen by them unnoticed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cki_rec.data.dataset import EncodedDataset


def all_labels(dataset: EncodedDataset) -> NDArray[np.uint8]:
    """Return ``(N,)`` the labels of all rows, test rows too, memory-mapped."""
    return dataset._label
