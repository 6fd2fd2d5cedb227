"""Metrics and their bootstrap equal scikit-learn's, group by group and resample by resample."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from cki_rec.evaluation import metrics
from cki_rec.evaluation.statistics import bootstrap_auc, bootstrap_log_loss, resampling_weights


@pytest.fixture(params=["continuous", "tied"])
def rows(request):
    rng = np.random.default_rng(7)
    label = (rng.random(600) < 0.3).astype(np.float32)
    logit = rng.normal(size=600) + label
    if request.param == "tied":
        logit = np.round(logit * 2) / 2
    return label, logit, rng.integers(0, 90, size=600)


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def test_auc_equals_sklearn(rows):
    label, logit, _ = rows
    assert metrics.auc(label, logit) == sklearn_metrics.roc_auc_score(label, logit)


def test_log_loss_equals_sklearn_of_clipped_probabilities(rows):
    label, logit, _ = rows
    expected = sklearn_metrics.log_loss(label, sigmoid(logit * 6))
    # 1 - p loses digits near 1, on scikit-learn's side
    assert metrics.log_loss(label, logit * 6) == pytest.approx(expected, rel=1e-10)


def test_grouped_auc_equals_loop_over_groups(rows):
    label, logit, group = rows
    total, weight, skipped = 0.0, 0, 0
    for value in np.unique(group):
        member = group == value
        if label[member].min() == label[member].max():
            skipped += 1
            continue
        total += member.sum() * sklearn_metrics.roc_auc_score(label[member], logit[member])
        weight += member.sum()
    assert skipped > 0
    assert metrics.grouped_auc(label, logit, group) == pytest.approx(total / weight, abs=1e-13)


def test_grouped_auc_takes_names_as_groups(rows):
    label, logit, group = rows
    names = np.array([f"user {value}" for value in group])
    assert metrics.grouped_auc(label, logit, names) == pytest.approx(
        metrics.grouped_auc(label, logit, group), abs=1e-13
    )


@pytest.mark.parametrize("by", ["row", "user"])
def test_bootstrap_auc_equals_weighted_sklearn(rows, by):
    label, logit, group = rows
    unit = np.arange(len(label)) if by == "row" else group
    resamples = resampling_weights(unit, 40, np.random.default_rng(1))
    expected = [
        sklearn_metrics.roc_auc_score(label, logit, sample_weight=weights[resamples.unit])
        for weights in resamples.weights
    ]
    np.testing.assert_allclose(
        bootstrap_auc(label, logit, resamples), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("by", ["row", "user"])
def test_bootstrap_log_loss_equals_weighted_sklearn(rows, by, monkeypatch):
    label, logit, group = rows
    monkeypatch.setattr("cki_rec.evaluation.statistics.CHUNK", 1000)  # several blocks of resamples
    unit = np.arange(len(label)) if by == "row" else group
    resamples = resampling_weights(unit, 40, np.random.default_rng(1))
    expected = [
        sklearn_metrics.log_loss(label, sigmoid(logit), sample_weight=weights[resamples.unit])
        for weights in resamples.weights
    ]
    np.testing.assert_allclose(bootstrap_log_loss(label, logit, resamples), expected, rtol=1e-12)
