"""Metrics of click predictions, exact and in float64.

A metric that is undefined on some rows is None, never 0 or NaN: results become JSON.

Shape legend: B rows, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from cki_rec.evaluation.bootstrap import Resamples, bootstrap_auc, bootstrap_log_loss
from cki_rec.evaluation.ranking import CUTOFFS, Values, gains, hits
from cki_rec.evaluation.rows import Floats, checked, row_losses

Function = TypeVar("Function", bound=Callable[..., float | None])
NUM_BINS = 10
"""Equal-count bins of the calibration error."""
COMPARED_CUTOFF = 10
"""Cutoff of the ranking metrics that are compared with baselines."""


def auc(label: npt.ArrayLike, score: npt.ArrayLike) -> float | None:
    """Return the probability that a positive row scores above a negative one; ties count 1/2.

    Args:
        label: ``(B,)``, 0 or 1.
        score: ``(B,)``, any increasing function of the predicted probability.

    Returns:
        Area under the ROC curve; None unless both classes are present.

    Raises:
        ValueError: See ``rows.checked``.

    Reference:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.
    """
    label_B, score_B = checked(label, score)
    if label_B.size == 0 or label_B.min() == label_B.max():
        return None
    from sklearn.metrics import roc_auc_score  # its import takes a second

    return float(roc_auc_score(label_B, score_B))


def log_loss(label: npt.ArrayLike, logit: npt.ArrayLike) -> float | None:
    """Return the mean negative log likelihood in nats; None without rows.

    Equals scikit-learn's ``log_loss`` of the sigmoid, except where that one clips (|logit| > 36).

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Raises:
        ValueError: See ``rows.checked``.
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
        ValueError: See ``rows.checked``.

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


def calibration_ratio(label: npt.ArrayLike, logit: npt.ArrayLike) -> float | None:
    """Return mean prediction / mean label; 1 is perfect, above 1 is too high.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Returns:
        None without positives.

    Raises:
        ValueError: See ``rows.checked``.

    Reference:
        He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014.
    """
    label_B, logit_B = checked(label, logit)
    positives = label_B.sum()
    return float(_probabilities(logit_B).sum() / positives) if positives else None


def calibration_error(label: npt.ArrayLike, logit: npt.ArrayLike) -> float | None:
    """Return the expected calibration error over ``NUM_BINS`` bins of equal count.

    Rows are sorted by prediction and cut into bins. The result is the mean over bins of
    |mean prediction - mean label|, weighted by rows. Rows of equal prediction count with their
    mean label, so the order of rows does not matter.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Returns:
        None without rows.

    Raises:
        ValueError: See ``rows.checked``.

    Reference:
        Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.

    Differs:
        Bins have equal count instead of equal width.
    """
    label_B, logit_B = checked(label, logit)
    num_rows = label_B.size
    if num_rows == 0:
        return None
    predicted_B = _probabilities(logit_B)
    tie_B = np.unique(predicted_B, return_inverse=True)[1]
    tie_label = np.bincount(tie_B, weights=label_B) / np.bincount(tie_B)
    order_B = np.argsort(tie_B, kind="stable")
    gap_B = (predicted_B - tie_label[tie_B])[order_B]
    edges = np.unique(np.arange(NUM_BINS + 1) * num_rows // NUM_BINS)
    return float(np.abs(np.add.reduceat(gap_B, edges[:-1])).sum() / num_rows)


def undefined(label: npt.ArrayLike, logit: npt.ArrayLike) -> None:
    """Return None: rows alone do not define a metric of candidates."""


def _probabilities(logit_B: Floats) -> Floats:
    return np.asarray(expit(logit_B), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: its computation, and its place in tables, figures and notes."""

    name: str
    """Key in records and column of frames."""
    title: str
    """Heading for readers."""
    function: Callable[..., float | None]
    """``(label, logit)``, or ``(label, logit, group)`` with ``needs_group``, to a number."""
    better: Literal["higher", "lower", "near 1"]
    """Direction of improvement."""
    note: str = ""
    """Explanation below the tables."""
    bootstrap: Callable[[npt.ArrayLike, npt.ArrayLike, Resamples], Floats] | None = None
    """``(label, logit, resamples)`` to ``(R,)``; with it, differences to baselines are made."""
    of_cases: Values | None = None
    """Of ranking metrics: logits of candidates to one value per case. They are means over users
    (``ranking``); ``function`` and ``bootstrap`` are not used."""
    compared: bool = False
    """Of ranking metrics: whether differences to baselines are made."""
    needs_group: bool = False
    """Whether rows must have users."""
    recalibrated: bool = False
    """Whether it is computed on test rows only, after recalibration on validation rows."""
    primary: bool = False
    """Whether it has a figure, a number per domain and an interval in tables."""
    over_repetitions: bool = True
    """Whether its mean over repetitions has a Student t interval."""
    shown: bool = True
    """Whether tables show it; others are in records and CSV only."""
    digits: int = 4
    """Decimals in tables."""

    def __call__(
        self, label: npt.ArrayLike, logit: npt.ArrayLike, group: npt.ArrayLike | None = None
    ) -> float | None:
        """Return the metric of some rows; None where it is undefined.

        Raises:
            ValueError: See ``rows.checked``.
        """
        if not self.needs_group:
            value = self.function(label, logit)
        else:
            value = None if group is None else self.function(label, logit, group)
        return value if value is None or math.isfinite(value) else None


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            name="auc",
            title="AUC",
            function=auc,
            better="higher",
            bootstrap=bootstrap_auc,
            primary=True,
        ),
        Metric(
            name="log_loss",
            title="LogLoss",
            function=log_loss,
            better="lower",
            bootstrap=bootstrap_log_loss,
            primary=True,
            note="LogLoss: lower is better, so a negative difference is an improvement.",
        ),
        Metric(
            name="log_loss_recalibrated",
            title="LogLoss recal.",
            function=log_loss,
            better="lower",
            bootstrap=bootstrap_log_loss,
            recalibrated=True,
            note="LogLoss recal.: LogLoss after logits are scaled and shifted by the two numbers "
            "that fit validation rows best. The baseline has its own two numbers. A gain in "
            "LogLoss by milder logits alone is not counted here.",
        ),
        Metric(
            name="gauc",
            title="gAUC",
            function=grouped_auc,
            better="higher",
            needs_group=True,
            note="gAUC: AUC within each user, weighted by the user's rows. Users with one class "
            "are left out.",
        ),
        *(
            Metric(
                name=f"{name}_{cutoff}",
                title=f"{title}@{cutoff}",
                function=undefined,
                better="higher",
                of_cases=values(cutoff),
                compared=cutoff == COMPARED_CUTOFF,
                note=note if cutoff == CUTOFFS[0] else "",
            )
            for name, title, values, note in (
                (
                    "hr",
                    "HR",
                    hits,
                    "HR@k: whether a liked test item is among the k best of itself and sampled "
                    "items, as a mean within users, then over users. Ties count by expectation.",
                ),
                (
                    "ndcg",
                    "NDCG",
                    gains,
                    "NDCG@k: the same with 1 / log2(1 + rank) in place of 1.",
                ),
            )
            for cutoff in CUTOFFS
        ),
        Metric(
            name="calibration_ratio",
            title="pred./clicks",
            function=calibration_ratio,
            better="near 1",
            over_repetitions=False,
            digits=3,
            note="pred./clicks: mean predicted probability / observed click rate; 1 is "
            "calibrated.",
        ),
        Metric(
            name="calibration_error",
            title="calibration error",
            function=calibration_error,
            better="lower",
            over_repetitions=False,
            shown=False,
        ),
    )
}
"""Every metric by name, in the order of tables. A new metric is one function and one row."""

SHOWN = [metric for metric in METRICS.values() if metric.shown]
"""Metrics in tables."""
PRIMARY = [metric for metric in METRICS.values() if metric.primary]
"""Metrics with a figure, a number per domain and an interval in tables."""
COMPARED = [metric for metric in METRICS.values() if metric.bootstrap or metric.compared]
"""Metrics with paired differences to the baselines."""
RANKING = [metric for metric in METRICS.values() if metric.of_cases is not None]
"""Metrics of candidates, measured if ``evaluate.ranking`` is set."""
REPEATED = [metric for metric in METRICS.values() if metric.over_repetitions]
"""Metrics with an interval over repetitions."""


def metric(
    *,
    title: str,
    better: Literal["higher", "lower", "near 1"],
    note: str = "",
    bootstrap: Callable[[npt.ArrayLike, npt.ArrayLike, Resamples], Floats] | None = None,
    needs_group: bool = False,
    digits: int = 4,
) -> Callable[[Function], Function]:
    """Register a function as the metric of its name, for metrics outside of this package.

    Args:
        title: See ``Metric``, as for the other arguments.
        better: See ``Metric``.
        note: See ``Metric``.
        bootstrap: See ``Metric``.
        needs_group: See ``Metric``.
        digits: See ``Metric``.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        taken = METRICS.get(name)
        if taken is not None and taken.function.__module__ != function.__module__:
            raise ValueError(f"a metric named {name} is registered already")
        row = Metric(
            name=name,
            title=title,
            function=function,
            better=better,
            note=note,
            bootstrap=bootstrap,
            needs_group=needs_group,
            digits=digits,
        )
        METRICS[name] = row
        for listed, is_listed in ((SHOWN, True), (COMPARED, bool(bootstrap)), (REPEATED, True)):
            listed[:] = [m for m in listed if m.name != name] + ([row] if is_listed else [])
        return function

    return register
