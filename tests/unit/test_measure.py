"""A model and its baselines on the same rows: pairs and recalibration."""

import numpy as np
import pytest

from cki_rec.evaluation.bootstrap import resampling_weights
from cki_rec.evaluation.measure import CANDIDATES, Rows, compare, measure, summarize
from cki_rec.evaluation.metrics import COMPARED, METRICS, RANKING, log_loss
from cki_rec.evaluation.ranking import Cases, hits, mean_over_users

OF_ROWS = [metric for metric in COMPARED if metric.of_cases is None]


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
    assert set(model.replicates) == {metric.name for metric in OF_ROWS}


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
    assert set(replicates) == {f"{b}/{m.name}" for b in ("other", "same") for m in OF_ROWS}
    for metric in OF_ROWS:
        value = METRICS[metric.name](rows["test"].label, other["test"])
        interval = difference["other"][metric.name]
        if not metric.recalibrated:
            assert interval["estimate"] == model.test[metric.name] - value
        assert interval["low"] < interval["estimate"] < interval["high"]
        assert difference["same"][metric.name]["estimate"] == 0
        assert not replicates[f"same/{metric.name}"].any()
    assert difference["same"]["auc"]["delong_p"] == 1.0


def test_candidates_give_ranking_metrics_with_paired_differences(setting):
    rows, models, resamples = setting
    rng = np.random.default_rng(1)
    for split in ("valid", "test"):
        liked = np.flatnonzero(rows[split].label)
        cases = Cases(liked, rows[split].group[liked])
        rows[split] = Rows(rows[split].label, rows[split].group, cases=cases)
        for logits in models:
            logits[CANDIDATES[split]] = rng.normal(size=(len(liked), 31))
    model, difference, replicates = compare(
        models[0], {"other": models[1], "same": models[0]}, rows, resamples, 0.9
    )
    for split, result in (("valid", model.valid), ("test", model.test)):
        for metric in RANKING:
            value = metric.of_cases(models[0][CANDIDATES[split]])
            assert result[metric.name] == mean_over_users(value, rows[split].cases)
    other = mean_over_users(hits(10)(models[1][CANDIDATES["test"]]), rows["test"].cases)
    assert difference["other"]["hr_10"]["estimate"] == model.test["hr_10"] - other
    assert difference["other"]["hr_10"]["low"] < difference["other"]["hr_10"]["high"]
    assert difference["same"]["ndcg_10"] == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    assert set(difference["other"]) == {metric.name for metric in COMPARED}
    assert replicates["other/hr_10"].std() > 0
