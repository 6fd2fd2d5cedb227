"""Intervals and tests: percentiles of a bootstrap, DeLong, Student t over repetitions, Holm.

Shape legend: B rows (P positive, N negative), R resamples, S repetitions (seeds), M hypotheses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy  # which imports scipy.stats when it is used

from cki_rec.evaluation.rows import Floats, checked


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between two bounds; an undefined number is None."""

    estimate: float | None
    low: float | None
    high: float | None

    def excludes_zero(self) -> bool:
        """Return whether both bounds exist and lie strictly on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Delong:
    """A difference of two AUCs on the same rows; an undefined number is None."""

    estimate: float | None
    variance: float | None
    p_value: float | None
    """Two-sided, of no difference."""


def percentile_interval(
    replicates: npt.ArrayLike, estimate: float | None, confidence: float
) -> Interval:
    """Return the estimate between the percentiles of its replicates.

    Args:
        replicates: ``(R,)``; undefined (NaN) resamples are left out, and bounds are None when
            that is more than half of them.
        estimate: On the rows themselves; None gives None bounds.
        confidence: Such as 0.95.

    Reference:
        Efron and Tibshirani, 1993, section 13.3.
    """
    assert 0 < confidence < 1
    values = np.asarray(replicates, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if estimate is None or defined.size == 0 or 2 * defined.size < values.size:
        return Interval(estimate=estimate, low=None, high=None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(estimate=float(estimate), low=float(low), high=float(high))


def bootstrap_p_value(replicates: npt.ArrayLike, estimate: float | None) -> float | None:
    """Return the two-sided p value of no difference: estimate / bootstrap standard error, normal.

    The share of replicates beyond 0 would do without the normal form, but is at least 1 / R: with
    many hypotheses no correction could pass it.

    Args:
        replicates: ``(R,)``; undefined (NaN) resamples are left out as in ``percentile_interval``.
        estimate: On the rows themselves.

    Returns:
        1 if estimate and error are 0, as of a model and itself; None where undefined.

    Reference:
        Efron and Tibshirani, 1993, chapters 6 and 13 (standard normal interval).
    """
    values = np.asarray(replicates, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if estimate is None or defined.size < 2 or 2 * defined.size < values.size:
        return None
    return _two_sided(estimate, float(defined.var(ddof=1)))


def paired_difference(
    replicates_a: npt.ArrayLike,
    replicates_b: npt.ArrayLike,
    estimate: float | None,
    confidence: float,
) -> Interval:
    """Return the interval of metric(a) - metric(b) for two models on the same resamples.

    It covers the choice of test rows for two fixed models, not the luck of training.

    Args:
        replicates_a: ``(R,)``.
        replicates_b: ``(R,)``, of the same ``Resamples``.
        estimate: The difference on the rows themselves.
        confidence: Such as 0.95.
    """
    a_R = np.asarray(replicates_a, dtype=np.float64)
    b_R = np.asarray(replicates_b, dtype=np.float64)
    if a_R.shape != b_R.shape:
        raise ValueError(f"replicates {a_R.shape} and {b_R.shape} are not of the same resamples")
    return percentile_interval(a_R - b_R, estimate, confidence)


def mean_of_paired(
    replicates: npt.ArrayLike, estimates: npt.ArrayLike, confidence: float
) -> Interval:
    """Return the interval of a difference's mean over repetitions.

    All repetitions are judged on the same test rows and the same resamples, so their replicates
    are averaged resample by resample: rows that suit one repetition suit the others too, and that
    shared error stays in the interval. Averaging the S bounds would not keep it.

    Args:
        replicates: ``(S, R)``, differences of each repetition in each resample.
        estimates: ``(S,)``, the differences on the rows themselves.
        confidence: Such as 0.95.
    """
    replicates_SR = np.asarray(replicates, dtype=np.float64)
    estimates_S = np.asarray(estimates, dtype=np.float64)
    if replicates_SR.ndim != 2 or replicates_SR.shape[:1] != estimates_S.shape:
        raise ValueError(f"replicates {replicates_SR.shape}, estimates {estimates_S.shape}")
    return percentile_interval(replicates_SR.mean(axis=0), float(estimates_S.mean()), confidence)


def mean_interval(values: npt.ArrayLike, confidence: float) -> Interval:
    """Return the mean over repetitions with its Student t interval.

    It covers the luck of training on fixed test rows, if repetitions are independent and near
    normal. One value has no interval.

    Args:
        values: ``(S,)``.
        confidence: Such as 0.95.

    Raises:
        ValueError: There is no value.
    """
    assert 0 < confidence < 1
    values_S = np.asarray(values, dtype=np.float64)
    if values_S.ndim != 1 or values_S.size == 0:
        raise ValueError(f"no mean of values {values_S.shape}")
    mean = float(values_S.mean())
    if values_S.size == 1:
        return Interval(estimate=mean, low=None, high=None)
    error = float(values_S.std(ddof=1)) / values_S.size**0.5
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, values_S.size - 1)) * error
    return Interval(estimate=mean, low=mean - half, high=mean + half)


def auc_variance(label: npt.ArrayLike, score: npt.ArrayLike) -> float | None:
    """Return the variance of one AUC over independent rows; None with less than two of a class.

    Args, errors and reference are those of ``delong``.
    """
    return _variance(*_placements(label, score))


def delong(label: npt.ArrayLike, score_a: npt.ArrayLike, score_b: npt.ArrayLike) -> Delong:
    """Return AUC(a) - AUC(b) of two models on the same rows, and how sure it is not 0.

    The placement of a positive row is the share of negatives below it, of a negative row the share
    of positives above it, ties count 1/2. An AUC is the mean placement of either class; its
    variance is the sum over classes of var(placements) / rows. For the difference, placements are
    subtracted row by row before, which equals the covariance form without its cancellation.

    Rows count as independent. Where those of a user are not, the p value is too small: then trust
    the bootstrap over users.

    Args:
        label: ``(B,)``, 0 or 1.
        score_a: ``(B,)``.
        score_b: ``(B,)``.

    Returns:
        p = 1 if both models place every row alike. All None without both
        classes; variance and p None with fewer than two rows of a class; p None if the variance is
        0 and the difference is not (such as perfect against reversed).

    Raises:
        ValueError: See ``rows.checked``.

    Reference:
        DeLong, DeLong and Clarke-Pearson, Comparing the Areas under Two or More Correlated ROC
        Curves, Biometrics 1988; by midranks: Sun and Xu, Fast Implementation of DeLong's
        Algorithm, IEEE Signal Processing Letters 2014.
    """
    (above_a, below_a), (above_b, below_b) = (_placements(label, s) for s in (score_a, score_b))
    above_P, below_N = above_a - above_b, below_a - below_b
    if not above_P.size or not below_N.size:
        return Delong(estimate=None, variance=None, p_value=None)
    estimate = float(above_P.mean()) / below_N.size
    variance = _variance(above_P, below_N)
    p_value = None if variance is None else _two_sided(estimate, variance)
    return Delong(estimate=estimate, variance=variance, p_value=p_value)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for multiple tests (family-wise error).

    The i-th smallest of M is multiplied by M - i (from 0), made as large as those before it, and
    cut at 1. No assumption on their dependence.

    Args:
        p_values: ``(M,)``; None is no hypothesis: it stays None and does not count.

    Reference:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of
        Statistics 1979.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = largest
    return adjusted


def win_tie_loss(intervals: Sequence[Interval]) -> tuple[int, int, int] | None:
    """Return in how many repetitions a difference lies above, around and below 0.

    None if there is no repetition or one without bounds.
    """
    if not intervals or any(i.low is None or i.high is None for i in intervals):
        return None
    wins = sum(i.low is not None and i.low > 0 for i in intervals)
    losses = sum(i.high is not None and i.high < 0 for i in intervals)
    return wins, len(intervals) - wins - losses, losses


def _two_sided(estimate: float, variance: float) -> float | None:
    """Return the normal p value of a difference; without error 1 if it is 0, else undefined."""
    if variance == 0:
        return 1.0 if estimate == 0 else None
    return float(2 * scipy.stats.norm.sf(abs(estimate) / variance**0.5))


def _placements(label: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return how many negatives lie below each positive, and positives above each negative.

    They are counts, not shares: multiples of 1/2 without rounding, so equal ones differ by 0.
    """
    label_B, score_B = checked(label, score)
    positive_P, negative_N = score_B[label_B == 1], score_B[label_B == 0]
    rank = scipy.stats.rankdata  # ties share their mean
    rank_B = rank(np.concatenate([positive_P, negative_N]))
    above_P = rank_B[: positive_P.size] - rank(positive_P)
    below_N = positive_P.size - (rank_B[positive_P.size :] - rank(negative_N))
    return above_P, below_N


def _variance(above_P: Floats, below_N: Floats) -> float | None:
    """Return the variance of the AUC, or of a difference, that these counts are placements of."""
    num_positive, num_negative = above_P.size, below_N.size
    if min(num_positive, num_negative) < 2:
        return None
    of_positive = float(above_P.var(ddof=1)) / num_negative**2 / num_positive
    return of_positive + float(below_N.var(ddof=1)) / num_positive**2 / num_negative
