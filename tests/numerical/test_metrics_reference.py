"""Metrics and their bootstrap equal plain references, group by group, resample by resample."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from cki_rec.evaluation import metrics
from cki_rec.evaluation.bootstrap import bootstrap_auc, bootstrap_log_loss, resampling_weights
from cki_rec.evaluation.metrics import METRICS


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


def reference_grouped_auc(label, logit, group):
    total, weight = 0.0, 0
    for value in np.unique(group):
        is_in = group == value
        if label[is_in].min() < label[is_in].max():
            total += is_in.sum() * sklearn_metrics.roc_auc_score(label[is_in], logit[is_in])
            weight += is_in.sum()
    assert weight < len(label)  # some groups hold one class only
    return total / weight


def reference_calibration_error(label, logit, group):
    """Loop over ten bins; the label of a row is the mean label of rows of equal prediction."""
    predicted = sigmoid(logit)
    expected = np.array([label[predicted == value].mean() for value in predicted])
    bins = np.array_split(np.argsort(predicted, kind="stable"), 10)
    return sum(abs((predicted - expected)[rows].sum()) for rows in bins) / len(label)


def reference_log_loss(label, logit, group):
    return sklearn_metrics.log_loss(label, sigmoid(logit))


REFERENCES = {
    "auc": lambda label, logit, group: sklearn_metrics.roc_auc_score(label, logit),
    "log_loss": reference_log_loss,
    "log_loss_recalibrated": reference_log_loss,
    "gauc": reference_grouped_auc,
    "calibration_ratio": lambda label, logit, group: sigmoid(logit).mean() / label.mean(),
    "calibration_error": reference_calibration_error,
}
"""Metric -> plain function of labels, logits and users. Every row of ``METRICS`` has one but those
of candidates (``test_ranking.py``)."""
OF_ROWS = [name for name, metric in METRICS.items() if metric.of_cases is None]


def test_every_metric_has_a_reference():
    assert list(REFERENCES) == OF_ROWS


@pytest.mark.parametrize("name", OF_ROWS)
def test_metric_equals_its_reference(rows, name):
    label, logit, group = rows
    expected = REFERENCES[name](label.astype(np.float64), logit, group)
    assert METRICS[name](label, logit, group) == pytest.approx(expected, rel=1e-12)


def test_log_loss_equals_sklearn_of_clipped_probabilities(rows):
    label, logit, _ = rows
    expected = sklearn_metrics.log_loss(label, sigmoid(logit * 6))
    # 1 - p loses digits near 1, on scikit-learn's side
    assert metrics.log_loss(label, logit * 6) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.bootstrap])
def test_bootstrap_equals_the_metric_of_repeated_rows(rows, name):
    label, logit, group = rows
    metric = METRICS[name]
    resamples = resampling_weights(group, 10, np.random.default_rng(1))
    expected = []
    for weights in resamples.weights:
        repeated = np.repeat(np.arange(len(label)), weights[resamples.unit])
        expected.append(metric(label[repeated], logit[repeated], group[repeated]))
    replicates = metric.bootstrap(label, logit, resamples)
    np.testing.assert_allclose(replicates, expected, rtol=1e-12)


def test_auc_has_the_bits_of_sklearn():
    draw = np.random.default_rng(0)
    for digits in (0, 1, 9) * 20:  # many ties, few, none
        label = np.append(draw.integers(0, 2, int(draw.integers(1, 300))), [0, 1])
        score = np.round(draw.normal(size=len(label)) + draw.random() * label, digits)
        assert metrics.auc(label, score) == sklearn_metrics.roc_auc_score(label, score)


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
    monkeypatch.setattr("cki_rec.evaluation.bootstrap.CHUNK", 1000)  # several blocks of resamples
    unit = np.arange(len(label)) if by == "row" else group
    resamples = resampling_weights(unit, 40, np.random.default_rng(1))
    expected = [
        sklearn_metrics.log_loss(label, sigmoid(logit), sample_weight=weights[resamples.unit])
        for weights in resamples.weights
    ]
    np.testing.assert_allclose(bootstrap_log_loss(label, logit, resamples), expected, rtol=1e-12)
