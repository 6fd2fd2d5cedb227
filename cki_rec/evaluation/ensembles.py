"""Logits of several models -> logits of their ensemble.

Shape legend: B rows, S sources.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .rows import Floats


def mean_logits(logit_SB: npt.ArrayLike) -> Floats:
    """Return ``(B,)``, the mean of the sources' logits."""
    return np.asarray(np.mean(np.asarray(logit_SB), axis=0, dtype=np.float64))


def mean_probabilities(logit_SB: npt.ArrayLike) -> Floats:
    """Return ``(B,)``, the logit of the mean of the sources' probabilities."""
    logit_SB = np.asarray(logit_SB, dtype=np.float64)
    # logarithms of the probabilities of a click and of none, without overflow
    click_SB, none_SB = (-np.logaddexp(0, sign * logit_SB) for sign in (-1, 1))
    return np.asarray(np.logaddexp.reduce(click_SB, 0) - np.logaddexp.reduce(none_SB, 0))


def routed(logit_SB: npt.ArrayLike, source_B: npt.NDArray[np.intp]) -> Floats:
    """Return ``(B,)``, the logit of the source that each row is routed to."""
    logit_SB = np.asarray(logit_SB)
    return logit_SB[source_B, np.arange(logit_SB.shape[1])].astype(np.float64)
