"""Metrics of click predictions, exact and in float64.

A metric that is not defined on the given rows is None, never 0 or NaN: results become JSON.

Shape legend: B rows, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.metrics import roc_auc_score

Floats = npt.NDArray[np.float64]

NUM_BINS = 10
"""Equal-count bins of the calibration error."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far predicted probabilities are from observed click rates."""

    ratio: float | None
    """Mean prediction / mean label; None without positives. 1 is perfect, above 1 too high."""
    error: float | None
    """Expected calibration error over equal-count bins; None without rows."""


def checked(label: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return labels and scores as float64 vectors of one length.

    Raises:
        ValueError: Shapes differ, a label is not 0 or 1, or a score is not finite; the message
            names the first such row.
    """
    label_B = np.asarray(label, dtype=np.float64)
    score_B = np.asarray(score, dtype=np.float64)
    if label_B.ndim != 1 or label_B.shape != score_B.shape:
        raise ValueError(f"label {label_B.shape} and score {score_B.shape} must be equal vectors")
    wrong = np.flatnonzero((label_B != 0) & (label_B != 1))
    if wrong.size:
        raise ValueError(f"label of row {wrong[0]} is {label_B[wrong[0]]}, not 0 or 1")
    wrong = np.flatnonzero(~np.isfinite(score_B))
    if wrong.size:
        raise ValueError(f"score of row {wrong[0]} is {score_B[wrong[0]]}, not finite")
    return label_B, score_B


def auc(label: npt.ArrayLike, score: npt.ArrayLike) -> float | None:
    """Return the probability that a positive row scores above a negative one; ties count 1/2.

    Args:
        label: ``(B,)``, 0 or 1.
        score: ``(B,)``, any increasing function of the predicted probability.

    Returns:
        Area under the ROC curve; None unless both classes are present.

    Raises:
        ValueError: See ``checked``.

    Reference:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.
    """
    label_B, score_B = checked(label, score)
    if label_B.size == 0 or label_B.min() == label_B.max():
        return None
    return float(roc_auc_score(label_B, score_B))


def row_losses(label: npt.ArrayLike, logit: npt.ArrayLike) -> Floats:
    """Return each row's negative log likelihood, computed from the logit without overflow.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: See ``checked``.
    """
    label_B, logit_B = checked(label, logit)
    # -log sigmoid(z) = log(1 + exp(-z)); a row of label 0 has the sign of its logit flipped
    loss_B: Floats = np.logaddexp(0.0, np.where(label_B == 1, -logit_B, logit_B))
    return loss_B


def log_loss(label: npt.ArrayLike, logit: npt.ArrayLike) -> float | None:
    """Return the mean negative log likelihood in nats; None without rows.

    Equals scikit-learn's ``log_loss`` of the sigmoid, except where that one clips (|logit| > 36).

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Raises:
        ValueError: See ``checked``.
    """
    loss_B = row_losses(label, logit)
    return float(loss_B.mean()) if loss_B.size else None


def grouped_auc(label: npt.ArrayLike, score: npt.ArrayLike, group: npt.ArrayLike) -> float | None:
    """Return the mean AUC within groups (users), weighted by the groups' row counts.

    Groups that hold one class only have no AUC: their rows enter neither sum nor weight.

    Args:
        label: ``(B,)``, 0 or 1.
        score: ``(B,)``.
        group: ``(B,)``, any values that can be sorted.

    Returns:
        None when no group holds both classes.

    Raises:
        ValueError: See ``checked``.

    Reference:
        Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, section 6
        (there weighted by impressions, which are the rows here).
    """
    label_B, score_B = checked(label, score)
    group_B = np.asarray(group)
    if group_B.shape != label_B.shape:
        raise ValueError(f"group {group_B.shape} and label {label_B.shape} must be equal vectors")
    num_rows = label_B.size
    if num_rows == 0:
        return None
    group_B = np.unique(group_B, return_inverse=True)[1]
    order_B = np.lexsort((score_B, group_B))
    label_B, score_B, group_B = label_B[order_B], score_B[order_B], group_B[order_B]
    starts_group_B = np.append(True, group_B[1:] != group_B[:-1])
    starts_tie_B = starts_group_B | np.append(True, score_B[1:] != score_B[:-1])
    group_start_G = np.flatnonzero(starts_group_B)
    rows_G = np.diff(group_start_G, append=num_rows)
    tie_start = np.flatnonzero(starts_tie_B)
    tie_rows = np.diff(tie_start, append=num_rows)
    # 1-based rank within the group; rows of a tie share the average of their ranks
    rank_B = np.repeat(tie_start + (tie_rows + 1) / 2, tie_rows) - np.repeat(group_start_G, rows_G)
    positives_G = np.add.reduceat(label_B, group_start_G)
    rank_sum_G = np.add.reduceat(rank_B * label_B, group_start_G)
    pairs_G = positives_G * (rows_G - positives_G)
    has_both_G = pairs_G > 0
    if not has_both_G.any():
        return None
    wins_G = rank_sum_G - positives_G * (positives_G + 1) / 2
    auc_G = wins_G[has_both_G] / pairs_G[has_both_G]
    return float(np.average(auc_G, weights=rows_G[has_both_G]))


def calibration(label: npt.ArrayLike, logit: npt.ArrayLike) -> Calibration:
    """Return the calibration ratio and the expected calibration error.

    The error sorts rows by prediction, cuts them into ``NUM_BINS`` bins of equal count and
    averages |mean prediction - mean label| over bins, weighted by rows. Rows of equal prediction
    count with their mean label, so the order of rows does not matter.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Raises:
        ValueError: See ``checked``.

    Reference:
        Ratio: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014.
        Error: Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning,
        AAAI 2015. Differs: bins of equal count instead of equal width.
    """
    label_B, logit_B = checked(label, logit)
    num_rows = label_B.size
    if num_rows == 0:
        return Calibration(ratio=None, error=None)
    predicted_B = np.asarray(expit(logit_B), dtype=np.float64)
    positives = label_B.sum()
    ratio = float(predicted_B.sum() / positives) if positives else None
    tie_B = np.unique(predicted_B, return_inverse=True)[1]
    tie_label = np.bincount(tie_B, weights=label_B) / np.bincount(tie_B)
    order_B = np.argsort(tie_B, kind="stable")
    gap_B = (predicted_B - tie_label[tie_B])[order_B]
    edges = np.unique(np.arange(NUM_BINS + 1) * num_rows // NUM_BINS)
    error = float(np.abs(np.add.reduceat(gap_B, edges[:-1])).sum() / num_rows)
    return Calibration(ratio=ratio, error=error)


def summarize(
    label: npt.ArrayLike,
    logit: npt.ArrayLike,
    group: npt.ArrayLike | None = None,
    domain: npt.ArrayLike | None = None,
    domain_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return every metric of one set of rows, ready for JSON; undefined ones are None.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.
        group: ``(B,)``, users for gAUC.
        domain: ``(B,)``, part of the data each row belongs to; metrics are given for each too.
        domain_names: Name of domain i when ``domain`` holds indices; otherwise its values name it.

    Returns:
        ``rows, positive_rate, auc, log_loss, gauc, calibration_ratio, calibration_error`` and
        ``domains``: name to ``rows, auc, log_loss`` (empty without ``domain``).

    Raises:
        ValueError: See ``checked``.
    """
    label_B, logit_B = checked(label, logit)
    calibrated = calibration(label_B, logit_B)
    domains: dict[str, dict[str, Any]] = {}
    if domain is not None:
        domain_B = np.asarray(domain)
        if domain_B.shape != label_B.shape:
            raise ValueError(f"domain {domain_B.shape} and label {label_B.shape} must be equal")
        for value in np.unique(domain_B):
            of_domain = domain_B == value
            name = str(value) if domain_names is None else domain_names[int(value)]
            domains[name] = {
                "rows": int(of_domain.sum()),
                "auc": auc(label_B[of_domain], logit_B[of_domain]),
                "log_loss": log_loss(label_B[of_domain], logit_B[of_domain]),
            }
    return {
        "rows": int(label_B.size),
        "positive_rate": float(label_B.mean()) if label_B.size else None,
        "auc": auc(label_B, logit_B),
        "log_loss": log_loss(label_B, logit_B),
        "gauc": None if group is None else grouped_auc(label_B, logit_B, group),
        "calibration_ratio": calibrated.ratio,
        "calibration_error": calibrated.error,
        "domains": domains,
    }
