"""Edges of the metrics: undefined values, extreme logits, wrong input."""

import json

import numpy as np
import pytest

from cki_rec.evaluation.measure import Rows, summarize
from cki_rec.evaluation.metrics import (
    METRICS,
    auc,
    calibration_error,
    calibration_ratio,
    grouped_auc,
    log_loss,
    undefined,
)
from cki_rec.evaluation.rows import checked


@pytest.mark.parametrize("label", [[], [0, 0, 0], [1, 1]])
def test_auc_without_both_classes_is_none(label):
    assert auc(label, np.arange(len(label))) is None


def test_log_loss_of_extreme_logits_is_finite_and_exact():
    assert log_loss([1, 0], [-800.0, 800.0]) == 800.0
    assert log_loss([1, 0], [800.0, -800.0]) == 0.0
    assert log_loss([1], [-40.0]) == pytest.approx(40.0, rel=1e-15)
    assert log_loss([], []) is None


def test_log_loss_of_float32_logits_is_computed_in_float64():
    logit = np.full(3, 20, dtype=np.float32)
    assert log_loss(np.ones(3), logit) == pytest.approx(2.0611536181902037e-09, rel=1e-12)


def test_grouped_auc_weights_by_rows_and_skips_one_class():
    label = [1, 0, 1, 0, 0, 0, 1, 1]
    score = [2, 1, 1, 2, 1, 1, 9, 8]
    group = [5, 5, 2, 2, 2, 2, 7, 7]
    # group 5: AUC 1 over 2 rows; group 2: (0 + 1/2 + 1/2) / 3 over 4 rows; group 7: one class
    assert grouped_auc(label, score, group) == pytest.approx((2 * 1 + 4 / 3) / 6)
    assert grouped_auc([1, 1, 0], [3, 2, 1], [1, 1, 2]) is None
    assert grouped_auc([], [], []) is None


def test_calibration_ratio_and_error_of_known_bins():
    logit = np.repeat([np.log(1 / 4), np.log(4)], 50)  # probabilities .2 and .8
    label = np.r_[np.ones(20), np.zeros(30), np.ones(40), np.zeros(10)]
    error = calibration_error(label, logit)
    assert calibration_ratio(label, logit) == pytest.approx(50 / 60)
    assert error == pytest.approx(0.1)  # .4 - .2 in half of the rows, 0 in the others
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    assert calibration_error(label[order], logit[order]) == pytest.approx(error)


def test_calibration_error_of_fewer_rows_than_bins_counts_every_row():
    assert calibration_error([1, 0, 1], [0.0, 1.0, 2.0]) == pytest.approx(
        (0.5 + 1 / (1 + np.exp(-1)) + 1 - 1 / (1 + np.exp(-2))) / 3
    )


def test_calibration_ratio_without_positives_is_none():
    assert calibration_ratio([0, 0], [0.0, 0.0]) is None


def test_summarize_is_json_without_nan():
    result = summarize(Rows([0, 0, 0], [1, 1, 2], [0, 0, 1]), [0.1, 0.2, 0.3])
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    assert result["auc"] is None
    assert result["gauc"] is None
    assert result["calibration_ratio"] is None
    assert result["positive_rate"] == 0.0
    json.dumps(summarize(Rows([]), []), allow_nan=False)


def test_summarize_reports_each_domain_by_name():
    label, logit = np.array([1, 0, 1, 0]), np.array([2.0, 1.0, 1.0, 2.0])
    result = summarize(Rows(label, domain=["b", "b", "a", "a"]), logit)
    assert {name: part["auc"] for name, part in result["domains"].items()} == {"a": 0, "b": 1}
    assert result["domains"]["a"]["rows"] == 2
    assert result["domains"]["b"]["log_loss"] == log_loss(label[:2], logit[:2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logit_is_named_by_row(bad):
    with pytest.raises(ValueError, match="score of row 2 is"):
        checked([0, 1, 0, 1], [0.0, 1.0, bad, bad])


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [([0, 2], [0, 0], "label of row 1"), ([0, 1], [0], "equal vectors")],
)
def test_wrong_input_is_rejected(label, score, message):
    with pytest.raises(ValueError, match=message):
        auc(label, score)


OF_ROWS = {name: metric for name, metric in METRICS.items() if metric.function is not undefined}
"""Metrics of labels and scores; ``test_ranking`` has those of lists of candidates."""


@pytest.mark.parametrize("metric", OF_ROWS.values(), ids=OF_ROWS)
class TestEveryMetric:
    """Edges that hold for each row of the table."""

    def test_rows_without_both_classes_give_a_finite_number_or_none(self, metric):
        for label in ([], [0, 0, 0], [1, 1, 1]):
            value = metric(label, np.arange(len(label)), np.zeros(len(label)))
            assert value is None or np.isfinite(value)
        assert metric([], [], []) is None

    def test_constant_scores_give_a_finite_number(self, metric):
        value = metric([0, 1, 1], [0.5, 0.5, 0.5], [1, 1, 1])
        assert isinstance(value, float)
        assert np.isfinite(value)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_scores_that_are_not_finite_are_refused(self, metric, bad):
        with pytest.raises(ValueError, match="score of row 2 is"):
            metric([0, 1, 0], [0.0, 1.0, bad], [1, 1, 1])

    def test_missing_labels_are_refused(self, metric):
        with pytest.raises(ValueError, match="label of row 1 is nan"):
            metric([0, np.nan, 1], [0.0, 1.0, 2.0], [1, 1, 1])

    def test_order_of_rows_does_not_matter(self, metric):
        rng = np.random.default_rng(0)
        label, group = rng.integers(0, 2, size=50), rng.integers(0, 9, size=50)
        logit = np.round(rng.normal(size=50), 1)
        order = rng.permutation(50)
        value = metric(label[order], logit[order], group[order])
        assert value == pytest.approx(metric(label, logit, group), rel=1e-12)

    def test_only_metrics_of_users_need_them(self, metric):
        assert (metric([0, 1], [0.0, 1.0]) is None) == metric.needs_group

    def test_its_row_is_consistent(self, metric):
        assert METRICS[metric.name] is metric
        if metric.bootstrap:
            assert metric.better in ("higher", "lower")  # marks of differences need a direction
            assert metric.over_repetitions
        if metric.primary:
            assert metric.bootstrap
            assert not metric.needs_group
