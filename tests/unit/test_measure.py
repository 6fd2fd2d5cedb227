"""A model and its baselines on the same rows: pairs and recalibration."""

import numpy as np
import pytest

from cki_rec.evaluation.bootstrap import resampling_weights
from cki_rec.evaluation.measure import Rows, compare, measure, summarize
from cki_rec.evaluation.metrics import COMPARED, METRICS, log_loss


@pytest.fixture
def setting():
    rng = np.random.default_rng(0)
    rows, models = {}, ({}, {})
    for split in ("valid", "test"):
        label = rng.integers(0, 2, size=200)
        rows[split] = Rows(label, rng.integers(0, 20, size=200))
        for logits in models:
            logits[split] = rng.normal(size=200) + label
    return rows, models, resampling_weights(np.arange(200), 50, rng)


def test_measure_recalibrates_test_rows_by_validation_rows(setting):
    rows, (logits, _), resamples = setting
    model = measure(logits, rows, resamples)
    recalibrated = model.recalibration.apply(logits["test"])
    assert model.test["log_loss_recalibrated"] == log_loss(rows["test"].label, recalibrated)
    assert model.test.keys() == model.valid.keys() | {"log_loss_recalibrated"}
    assert model.valid == summarize(rows["valid"], logits["valid"])
    assert set(model.replicates) == {metric.name for metric in COMPARED}


def test_measure_without_recalibration_has_no_metric_after_it(setting):
    rows, (logits, _), resamples = setting
    model = measure(logits | {"valid": np.zeros(200)}, rows, resamples)
    assert model.recalibration.reason == "all logits are equal"
    assert model.test["log_loss_recalibrated"] is None
    assert "log_loss_recalibrated" not in model.replicates


def test_compare_pairs_every_metric_with_every_baseline(setting):
    rows, (logits, other), resamples = setting
    baselines = {"other": other, "same": logits, "itself": None}
    model, difference, replicates = compare(logits, baselines, rows, resamples, 0.9)
    assert difference["itself"] is None
    assert set(replicates) == {f"{b}/{m.name}" for b in ("other", "same") for m in COMPARED}
    for metric in COMPARED:
        value = METRICS[metric.name](rows["test"].label, other["test"])
        interval = difference["other"][metric.name]
        if not metric.recalibrated:
            assert interval["estimate"] == model.test[metric.name] - value
        assert interval["low"] < interval["estimate"] < interval["high"]
        assert difference["same"][metric.name]["estimate"] == 0
        assert not replicates[f"same/{metric.name}"].any()
    assert difference["same"]["auc"]["delong_p"] == 1.0
