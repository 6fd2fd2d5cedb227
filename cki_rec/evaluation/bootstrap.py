"""Bootstrap of metrics over rows or users.

One set of resamples serves every model of an experiment. Differences are therefore paired: both
models see the same resampled rows.

Shape legend: B rows, U units of resampling (rows or users), R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cki_rec.evaluation.rows import Floats, checked, row_losses

CHUNK = 1 << 24
"""Elements of one float64 block of weights in ``bootstrap_mean`` (128 MB)."""


@dataclass(frozen=True, slots=True)
class Resamples:
    """Bootstrap resamples of one set of rows: how often each unit was drawn."""

    weights: npt.NDArray[np.uint8]
    """``(R, U)``; each row sums to U."""
    unit: npt.NDArray[np.intp]
    """``(B,)``, the column of ``weights`` that each row of data belongs to."""


def resampling_weights(
    unit: npt.ArrayLike, num_resamples: int, rng: np.random.Generator
) -> Resamples:
    """Return how often each unit is drawn in each resample (U draws with replacement).

    Weights take one byte per unit. Readers expand one resample at a time.

    Args:
        unit: ``(B,)``; ``arange(B)`` resamples rows, user ids resample users with all their rows
            (a user's rows depend on each other, which intervals over rows ignore).
        num_resamples: R.
        rng: Its state decides the resamples.

    Raises:
        ValueError: There is no row or no resample.

    Reference:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 8.
    """
    unit_B = np.asarray(unit)
    if unit_B.ndim != 1 or unit_B.size == 0 or num_resamples < 1:
        raise ValueError(f"cannot draw {num_resamples} resamples of units {unit_B.shape}")
    column_B = np.unique(unit_B, return_inverse=True)[1].astype(np.intp)
    num_units = int(column_B.max()) + 1
    weights_RU = np.empty((num_resamples, num_units), dtype=np.uint8)
    for weights_U in weights_RU:
        draws = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        assert draws.max() < 256  # a count is about Poisson(1): beyond 255 has no real chance
        weights_U[:] = draws
    return Resamples(weights=weights_RU, unit=column_B)


def bootstrap_auc(label: npt.ArrayLike, score: npt.ArrayLike, resamples: Resamples) -> Floats:
    """Return the AUC of every resample, exactly; ties count 1/2.

    Scores are sorted once. For a positive row, the drawn negatives below it and not above it are
    two entries of one cumulative sum; their mean counts a tie as 1/2. Sums are of whole numbers
    below 2**53, so float64 holds them without error.

    Args:
        label: ``(B,)``, 0 or 1.
        score: ``(B,)``.
        resamples: Of the same rows.

    Returns:
        ``(R,)``; NaN where a resample holds one class only.

    Raises:
        ValueError: See ``rows.checked``.
    """
    label_B, score_B = _checked_rows(label, score, resamples)
    positive = np.flatnonzero(label_B == 1)
    negative = np.flatnonzero(label_B == 0)
    positive = positive[np.argsort(score_B[positive], kind="stable")]
    negative = negative[np.argsort(score_B[negative], kind="stable")]
    below = np.searchsorted(score_B[negative], score_B[positive], side="left")
    not_above = np.searchsorted(score_B[negative], score_B[positive], side="right")
    has_ties = bool((below != not_above).any())
    unit_positive, unit_negative = resamples.unit[positive], resamples.unit[negative]
    auc_R = np.full(len(resamples.weights), np.nan)
    cumulative = np.zeros(len(negative) + 1)
    for resample, weights_U in enumerate(resamples.weights):
        np.cumsum(weights_U[unit_negative], dtype=np.float64, out=cumulative[1:])
        weight_positive = weights_U[unit_positive].astype(np.float64)
        pairs = weight_positive.sum() * cumulative[-1]
        if pairs == 0:
            continue
        wins = weight_positive @ cumulative[below]
        if has_ties:
            wins = (wins + weight_positive @ cumulative[not_above]) / 2
        auc_R[resample] = wins / pairs
    return auc_R


def bootstrap_log_loss(label: npt.ArrayLike, logit: npt.ArrayLike, resamples: Resamples) -> Floats:
    """Return the mean negative log likelihood of every resample.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.
        resamples: Of the same rows.

    Returns:
        ``(R,)``.

    Raises:
        ValueError: See ``rows.checked``.
    """
    label_B, logit_B = _checked_rows(label, logit, resamples)
    return bootstrap_mean(row_losses(label_B, logit_B), np.ones(len(label_B)), resamples)


def bootstrap_mean(value: Floats, weight: Floats, resamples: Resamples) -> Floats:
    """Return the weighted mean of every resample.

    Args:
        value: ``(B,)``.
        weight: ``(B,)``, not negative.
        resamples: Of the same rows.

    Returns:
        ``(R,)``; NaN where a resample has no weight.
    """
    num_resamples, num_units = resamples.weights.shape
    sums_U2 = np.stack(
        [np.bincount(resamples.unit, part, num_units) for part in (value * weight, weight)], axis=1
    )
    step = max(1, CHUNK // num_units)
    sums_R2 = np.concatenate(
        [
            resamples.weights[start : start + step].astype(np.float64) @ sums_U2
            for start in range(0, num_resamples, step)
        ]
    )
    with np.errstate(invalid="ignore"):
        return np.asarray(sums_R2[:, 0] / sums_R2[:, 1], dtype=np.float64)


def _checked_rows(
    label: npt.ArrayLike, score: npt.ArrayLike, resamples: Resamples
) -> tuple[Floats, Floats]:
    label_B, score_B = checked(label, score)
    if label_B.shape != resamples.unit.shape:
        raise ValueError(f"resamples of {resamples.unit.size} rows, data of {label_B.size}")
    return label_B, score_B
