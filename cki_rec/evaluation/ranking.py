"""Ranks of liked items among sampled ones, exact and in float64.

Every liked row is a case: its item is ranked among N items that its user did not like. Metrics are
means within users, then over users.

Shape legend: C cases, N sampled items of a case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cki_rec.evaluation.bootstrap import Resamples, bootstrap_mean
from cki_rec.evaluation.rows import Floats

CUTOFFS = (5, 10, 20)


@dataclass(frozen=True, slots=True)
class Cases:
    """The liked rows of one split."""

    row: npt.NDArray[np.int64]
    """``(C,)`` places among the rows of the split."""
    user: npt.NDArray[np.integer]
    """``(C,)``."""


Values = Callable[[npt.ArrayLike], Floats]
"""``(C, 1 + N)`` logits to one value per case."""


def hits(cutoff: int) -> Values:
    """Return a function that returns whether a liked item is among the ``cutoff`` best, HR@k.

    Items that tie with it are in random order, and the value is the expectation: a model that
    scores all items alike has ``cutoff / (1 + N)``.

    Reference:
        He et al., Neural Collaborative Filtering, WWW 2017, section 4.1.

    Differs:
        The authors' code leaves the order of ties to a heap.
    """

    def value_of(logit: npt.ArrayLike) -> Floats:
        above_C, tied_C = _above_and_tied(logit)
        return np.clip((cutoff - above_C) / (tied_C + 1), 0.0, 1.0)

    return value_of


def gains(cutoff: int) -> Values:
    r"""Return a function that returns NDCG@k of one liked item.

    .. math:: 1 / \log_2(1 + rank) \text{ if } rank \le k \text{, else } 0

    The ideal rank is 1, so the ideal gain is 1. Ties are treated as by ``hits``.

    Reference:
        He et al., Neural Collaborative Filtering, WWW 2017, section 4.1.
    """
    gain_of_rank = 1 / np.log2(np.arange(1, cutoff + 1) + 1)
    total_to_rank = np.concatenate([[0.0], np.cumsum(gain_of_rank)])

    def value_of(logit: npt.ArrayLike) -> Floats:
        above_C, tied_C = _above_and_tied(logit)
        first_C, last_C = (np.minimum(n, cutoff) for n in (above_C, above_C + tied_C + 1))
        return np.asarray((total_to_rank[last_C] - total_to_rank[first_C]) / (tied_C + 1))

    return value_of


def mean_over_users(value: Floats, cases: Cases) -> float | None:
    """Return the mean over users of the means of their cases; None without cases."""
    if not len(value):
        return None
    weight_C = user_weights(cases)
    return float(weight_C @ value / weight_C.sum())


def bootstrap_over_users(value: Floats, cases: Cases, resamples: Resamples) -> Floats:
    """Return ``(R,)``: ``mean_over_users`` in every resample of the rows of the split."""
    of_cases = Resamples(resamples.weights, resamples.unit[cases.row])
    return bootstrap_mean(value, user_weights(cases), of_cases)


def user_weights(cases: Cases) -> Floats:
    """Return ``(C,)`` weights, of which every user has 1 in total."""
    user_C, count = np.unique(cases.user, return_inverse=True, return_counts=True)[1:]
    return np.asarray(1.0 / count[user_C])


def _above_and_tied(logit: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return per case how many sampled items score above the liked one, and as high.

    Raises:
        ValueError: A logit is not finite.
    """
    logit_CN = np.asarray(logit)
    if logit_CN.ndim != 2 or logit_CN.shape[1] < 2:
        raise ValueError(
            f"logits of candidates {logit_CN.shape} must be a matrix, liked ones first"
        )
    if not np.isfinite(logit_CN).all():
        case = int(np.flatnonzero(~np.isfinite(logit_CN).all(1))[0])
        raise ValueError(f"a logit of case {case} is not finite")
    liked_C1, others_CN = logit_CN[:, :1], logit_CN[:, 1:]
    return (others_CN > liked_C1).sum(1), (others_CN == liked_C1).sum(1)
