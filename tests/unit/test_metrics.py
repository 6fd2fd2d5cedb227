"""Edges of the metrics: undefined values, extreme logits, wrong input."""

import json

import numpy as np
import pytest

from cki_rec.evaluation.metrics import auc, calibration, grouped_auc, log_loss, summarize


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
    result = calibration(label, logit)
    assert result.ratio == pytest.approx(50 / 60)
    assert result.error == pytest.approx(0.1)  # .4 - .2 in half of the rows, 0 in the others
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    assert calibration(label[order], logit[order]).error == pytest.approx(result.error)


def test_calibration_error_of_fewer_rows_than_bins_counts_every_row():
    assert calibration([1, 0, 1], [0.0, 1.0, 2.0]).error == pytest.approx(
        (0.5 + 1 / (1 + np.exp(-1)) + 1 - 1 / (1 + np.exp(-2))) / 3
    )


def test_calibration_ratio_without_positives_is_none():
    assert calibration([0, 0], [0.0, 0.0]).ratio is None


def test_summarize_is_json_without_nan():
    result = summarize([0, 0, 0], [0.1, 0.2, 0.3], group=[1, 1, 2], domain=[0, 0, 1])
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    assert result["auc"] is None
    assert result["gauc"] is None
    assert result["calibration_ratio"] is None
    assert result["positive_rate"] == 0.0
    json.dumps(summarize([], []), allow_nan=False)


def test_summarize_reports_each_domain_by_name():
    label, logit = np.array([1, 0, 1, 0]), np.array([2.0, 1.0, 1.0, 2.0])
    result = summarize(label, logit, domain=np.array([1, 1, 0, 0]), domain_names=["a", "b"])
    assert {name: part["auc"] for name, part in result["domains"].items()} == {"a": 0, "b": 1}
    assert result["domains"]["a"]["rows"] == 2
    assert result["domains"]["b"]["log_loss"] == log_loss(label[:2], logit[:2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logit_is_named_by_row(bad):
    with pytest.raises(ValueError, match="score of row 2 is"):
        summarize([0, 1, 0, 1], [0.0, 1.0, bad, bad])


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [([0, 2], [0, 0], "label of row 1"), ([0, 1], [0], "equal vectors")],
)
def test_wrong_input_is_rejected(label, score, message):
    with pytest.raises(ValueError, match=message):
        auc(label, score)
