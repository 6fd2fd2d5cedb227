"""Logits of models on labelled rows -> metrics, bootstrap replicates and paired differences.

Shape legend: B rows, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cki_rec.evaluation.bootstrap import Resamples
from cki_rec.evaluation.metrics import COMPARED, METRICS, PRIMARY, RANKING
from cki_rec.evaluation.ranking import Cases, bootstrap_over_users, mean_over_users
from cki_rec.evaluation.recalibration import Recalibration, recalibration
from cki_rec.evaluation.rows import Floats, checked
from cki_rec.evaluation.statistics import Interval, delong, paired_difference

Logits = Mapping[str, Floats]
"""Split (``valid``, ``test``) -> ``(B,)`` logits; ``CANDIDATES`` of a split -> ``(C, 1 + N)``."""
CANDIDATES = {split: f"{split}_candidates" for split in ("valid", "test")}
"""Split -> key of the logits of its candidates (``ranking``)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Labelled rows of one split."""

    label: npt.ArrayLike
    """``(B,)``, 0 or 1."""
    group: npt.ArrayLike | None = None
    """``(B,)``, users; None if rows have none."""
    domain: npt.ArrayLike | None = None
    """``(B,)``, names of the parts of the data; None if it is not partitioned."""
    cases: Cases | None = None
    """The liked rows that have candidates; None: no candidates are scored."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics of one model, or ensemble, on validation and on test rows."""

    valid: dict[str, Any]
    test: dict[str, Any]
    recalibration: Recalibration
    replicates: dict[str, Floats]
    """Metric -> ``(R,)`` on resamples of the test rows; without metrics that are undefined."""


def summarize(rows: Rows, logit: npt.ArrayLike) -> dict[str, Any]:
    """Return every metric of one set of rows, ready for JSON; undefined ones are None.

    ``measure`` adds metrics after recalibration to test rows, and ranking metrics.

    Returns:
        ``rows``, ``positive_rate``, the metrics by name, and ``domains``: name to ``rows`` and
        the primary metrics (empty without domains).

    Raises:
        ValueError: See ``rows.checked``; or groups or domains are not one per row.
    """
    label_B, logit_B = checked(rows.label, logit)
    domains: dict[str, dict[str, Any]] = {}
    if rows.domain is not None:
        domain_B = np.asarray(rows.domain)
        if domain_B.shape != label_B.shape:
            raise ValueError(f"domain {domain_B.shape} and label {label_B.shape} must be equal")
        for name in np.unique(domain_B):
            is_in = domain_B == name
            primary = {metric.name: metric(label_B[is_in], logit_B[is_in]) for metric in PRIMARY}
            domains[str(name)] = {"rows": int(is_in.sum()), **primary}
    return {
        "rows": int(label_B.size),
        "positive_rate": float(label_B.mean()) if label_B.size else None,
        **{
            metric.name: metric(label_B, logit_B, rows.group)
            for metric in METRICS.values()
            if not metric.recalibrated and metric.of_cases is None
        },
        "domains": domains,
    }


def measure(logits: Logits, rows: Mapping[str, Rows], resamples: Resamples) -> Measured:
    """Return the metrics of both splits, and the replicates on test rows.

    The recalibration of test logits is fitted on validation rows.

    Args:
        logits: Of the model, for ``valid`` and ``test``.
        rows: The rows of the same splits.
        resamples: Of the test rows.
    """
    valid, test = (summarize(rows[split], logits[split]) for split in ("valid", "test"))
    fit = recalibration(rows["valid"].label, logits["valid"])
    plain, recalibrated = logits["test"], fit.apply(logits["test"])
    label, group = rows["test"].label, rows["test"].group
    replicates = {}
    for metric in METRICS.values():
        logit = recalibrated if metric.recalibrated else plain
        if metric.of_cases is not None:
            continue
        if metric.recalibrated:
            test[metric.name] = None if logit is None else metric(label, logit, group)
        if metric.bootstrap is not None and logit is not None:
            replicates[metric.name] = metric.bootstrap(label, logit, resamples)
    for split, result in (("valid", valid), ("test", test)):
        if (cases := rows[split].cases) is None:
            continue
        for metric in RANKING:
            assert metric.of_cases is not None
            value_C = metric.of_cases(logits[CANDIDATES[split]])
            result[metric.name] = mean_over_users(value_C, cases)
            if split == "test" and metric.compared and len(value_C):
                replicates[metric.name] = bootstrap_over_users(value_C, cases, resamples)
    return Measured(valid, test, fit, replicates)


def differences(model: Measured, baseline: Measured, confidence: float) -> dict[str, Any]:
    """Return metric -> estimate and bounds of model minus baseline, paired, on test rows."""
    by_metric = {}
    for metric in COMPARED:
        if metric.name not in model.test:
            continue
        a, b = model.test[metric.name], baseline.test[metric.name]
        interval = Interval(estimate=None, low=None, high=None)
        if a is not None and b is not None:
            pair = model.replicates[metric.name], baseline.replicates[metric.name]
            interval = paired_difference(*pair, a - b, confidence)
        by_metric[metric.name] = asdict(interval)
    return by_metric


def compare(
    logits: Logits,
    baselines: Mapping[str, Logits | None],
    rows: Mapping[str, Rows],
    resamples: Resamples,
    confidence: float,
) -> tuple[Measured, dict[str, Any], dict[str, Floats]]:
    """Measure a model and its differences to baselines on the same rows and resamples.

    Args:
        logits: Of the model.
        baselines: Name -> logits; None for the baseline that the model itself is.
        rows: The rows of both splits.
        resamples: Of the test rows.
        confidence: Of the intervals.

    Returns:
        The measured model; baseline -> ``differences`` with DeLong's p value of the AUC, or None;
        ``BASELINE/METRIC`` -> ``(R,)`` replicates of the difference.
    """
    model = measure(logits, rows, resamples)
    difference: dict[str, Any] = {}
    replicates = {}
    for name, baseline_logits in baselines.items():
        if baseline_logits is None:
            difference[name] = None
            continue
        baseline = measure(baseline_logits, rows, resamples)
        difference[name] = differences(model, baseline, confidence)
        test = delong(rows["test"].label, logits["test"], baseline_logits["test"])
        difference[name]["auc"]["delong_p"] = test.p_value
        for metric in model.replicates:
            if metric in baseline.replicates:
                pair = model.replicates[metric], baseline.replicates[metric]
                replicates[f"{name}/{metric}"] = pair[0] - pair[1]
    return model, difference, replicates
