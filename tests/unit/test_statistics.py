"""Resamples and intervals: coverage and undefined values."""

import time

import numpy as np
import pytest
from scipy import stats

from cki_rec.evaluation.bootstrap import (
    bootstrap_auc,
    bootstrap_log_loss,
    resampling_weights,
)
from cki_rec.evaluation.metrics import auc
from cki_rec.evaluation.statistics import (
    Interval,
    mean_interval,
    mean_of_paired,
    paired_difference,
    percentile_interval,
)


def draw(rng, num_rows):
    label = (rng.random(num_rows) < 0.4).astype(int)
    return label, rng.normal(size=num_rows) + label


def test_resamples_draw_units_with_replacement():
    user = np.array([70, 30, 30, 70, 10])
    resamples = resampling_weights(user, 500, np.random.default_rng(0))
    assert resamples.weights.shape == (500, 3)
    assert (resamples.weights.sum(axis=1) == 3).all()
    assert list(resamples.unit) == [2, 1, 1, 2, 0]
    # a unit is left out of a resample with probability (1 - 1/3)^3
    assert (resamples.weights == 0).mean() == pytest.approx(8 / 27, abs=0.04)


def test_resamples_depend_on_the_generator_only():
    first, second = (resampling_weights(range(50), 9, np.random.default_rng(3)) for _ in "ab")
    other = resampling_weights(range(50), 9, np.random.default_rng(4))
    assert (first.weights == second.weights).all()
    assert (first.weights != other.weights).any()


def test_resamples_of_nothing_are_rejected():
    with pytest.raises(ValueError, match="cannot draw"):
        resampling_weights([], 10, np.random.default_rng(0))


def test_resamples_of_other_rows_are_rejected():
    resamples = resampling_weights(range(4), 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="resamples of 4 rows, data of 3"):
        bootstrap_auc([0, 1, 1], [0, 1, 2], resamples)


def test_bootstrap_auc_with_one_class_is_nan_and_left_out_of_the_interval():
    resamples = resampling_weights(range(3), 200, np.random.default_rng(0))
    replicates = bootstrap_auc([1, 0, 0], [1.0, 0.0, 2.0], resamples)
    missing = (resamples.weights[:, 0] == 0) | (resamples.weights[:, 0] == 3)
    assert (np.isnan(replicates) == missing).all()
    assert missing.any()
    assert percentile_interval(replicates, 0.5, 0.9) == Interval(0.5, 0.0, 1.0)


def test_interval_of_mostly_undefined_replicates_is_undefined():
    replicates = [0.1, np.nan, np.nan]
    assert percentile_interval(replicates, 0.1, 0.95) == Interval(0.1, None, None)
    assert percentile_interval([0.1, 0.2], None, 0.95) == Interval(None, None, None)


def test_difference_of_identical_models_is_exactly_zero():
    label, score = draw(np.random.default_rng(0), 300)
    resamples = resampling_weights(range(300), 100, np.random.default_rng(1))
    for bootstrap in (bootstrap_auc, bootstrap_log_loss):
        first, second = (bootstrap(label, score, resamples) for _ in "ab")
        interval = paired_difference(first, second, 0.0, 0.95)
        assert interval == Interval(0.0, 0.0, 0.0)
        assert not interval.excludes_zero()


def test_paired_interval_is_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    label, score = draw(rng, 500)
    close = score + rng.normal(scale=0.05, size=500)
    resamples, others = (resampling_weights(range(500), 300, rng) for _ in "ab")
    first = bootstrap_auc(label, score, resamples)

    def width(second):
        interval = paired_difference(first, second, 0.0, 0.95)
        return interval.high - interval.low

    assert width(bootstrap_auc(label, close, resamples)) < 0.3 * width(
        bootstrap_auc(label, close, others)
    )


def test_bootstrap_interval_covers_the_true_auc():
    truth, rng, covered = stats.norm.cdf(0.5**0.5), np.random.default_rng(5), 0
    for _ in range(150):
        label, score = draw(rng, 250)
        replicates = bootstrap_auc(label, score, resampling_weights(range(250), 150, rng))
        interval = percentile_interval(replicates, auc(label, score), 0.9)
        covered += interval.low <= truth <= interval.high
    assert 0.82 <= covered / 150 <= 0.96


def test_user_resamples_are_wider_when_rows_of_a_user_agree():
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(60), 20)
    label = np.repeat(rng.random(60) < 0.5, 20).astype(int)
    score = np.repeat(rng.normal(size=60), 20) + label
    spread = [
        bootstrap_auc(label, score, resampling_weights(unit, 200, rng)).std()
        for unit in (user, np.arange(1200))
    ]
    assert spread[0] > 3 * spread[1]


def test_mean_interval_equals_scipy_t():
    values = [0.71, 0.74, 0.72, 0.78]
    interval = mean_interval(values, 0.95)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-12)
    assert interval.estimate == pytest.approx(np.mean(values))


def test_mean_interval_of_one_value_has_no_bounds():
    assert mean_interval([0.7], 0.95) == Interval(0.7, None, None)


def test_mean_over_repetitions_keeps_the_shared_error_of_test_rows():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=2000)
    interval = mean_of_paired([shared, shared + 2], [0.0, 2.0], 0.95)
    assert interval.estimate == 1.0
    assert interval.high - interval.low == pytest.approx(2 * 1.96, rel=0.1)
    with pytest.raises(ValueError, match="replicates"):
        mean_of_paired([shared], [0.0, 1.0], 0.95)


def test_bootstrap_auc_of_ten_thousand_rows_is_fast():
    label, score = draw(np.random.default_rng(0), 10_000)
    resamples = resampling_weights(range(10_000), 200, np.random.default_rng(1))
    start = time.perf_counter()
    bootstrap_auc(label, score, resamples)
    assert time.perf_counter() - start < 1.0  # 0.01 s on an idle core; a sort each would take 0.2
