"""DeLong, Holm, wins, p values of bootstraps: against definitions, and where undefined."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cki_rec.evaluation.bootstrap import bootstrap_auc, resampling_weights
from cki_rec.evaluation.metrics import auc
from cki_rec.evaluation.statistics import (
    Interval,
    auc_variance,
    bootstrap_p_value,
    delong,
    holm,
    win_tie_loss,
)


def draw(seed, num_rows, num_values=None):
    """Return labels and two scores; with few values there are many ties."""
    rng = np.random.default_rng(seed)
    label = (rng.random(num_rows) < 0.4).astype(int)
    label[:4] = 0, 0, 1, 1
    first = rng.normal(size=num_rows) + label
    second = first + rng.normal(scale=0.7, size=num_rows)
    if num_values is not None:
        first, second = (np.round(s * num_values / 4) for s in (first, second))
    return label, first, second


def by_definition(label, scores):
    """AUCs and their covariance from the kernel of every pair: DeLong 1988, equations 3 to 5."""
    positive, negative = label == 1, label == 0
    kernels = []
    for score in scores:
        gap = score[positive][:, None] - score[negative][None, :]
        kernels.append((gap > 0) + 0.5 * (gap == 0))
    kernel = np.stack(kernels).astype(np.float64)
    of_positive, of_negative = kernel.mean(2), kernel.mean(1)
    covariance = np.cov(of_positive) / positive.sum() + np.cov(of_negative) / negative.sum()
    return kernel.mean((1, 2)), covariance


@pytest.mark.parametrize("num_values", [None, 3, 12])
@pytest.mark.parametrize(("seed", "num_rows"), [(0, 4), (1, 11), (2, 60), (3, 400)])
def test_delong_equals_the_definition(seed, num_rows, num_values):
    label, *scores = draw(seed, num_rows, num_values)
    aucs, covariance = by_definition(label, scores)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    test = delong(label, *scores)
    assert test.estimate == pytest.approx(aucs[0] - aucs[1], abs=1e-14)
    assert test.variance == pytest.approx(variance, rel=1e-10, abs=1e-16)
    for score, of_one in zip(scores, np.diag(covariance), strict=True):
        assert auc_variance(label, score) == pytest.approx(of_one, rel=1e-12, abs=1e-18)
    if test.variance > 0:
        z = abs(test.estimate) / test.variance**0.5
        assert test.p_value == pytest.approx(2 * stats.norm.sf(z), rel=1e-12)


def test_delong_depends_on_order_only():
    label, first, second = draw(5, 300, 20)
    expected = delong(label, first, second)
    shuffled = np.random.default_rng(0).permutation(300)
    assert delong(label, 3 * first - 7, np.exp(second)) == expected
    moved = delong(label[shuffled], first[shuffled], second[shuffled])
    assert moved.variance == pytest.approx(expected.variance, rel=1e-12)
    swapped = delong(label, second, first)
    assert (swapped.estimate, swapped.p_value) == (-expected.estimate, expected.p_value)


def test_delong_agrees_with_the_bootstrap_over_rows():
    label, first, second = draw(6, 4000)
    resamples = resampling_weights(range(4000), 1500, np.random.default_rng(1))
    replicates = [bootstrap_auc(label, score, resamples) for score in (first, second)]
    test = delong(label, first, second)
    assert test.variance**0.5 == pytest.approx((replicates[0] - replicates[1]).std(), rel=0.06)
    assert auc_variance(label, first) ** 0.5 == pytest.approx(replicates[0].std(), rel=0.06)
    shift = test.estimate - test.variance**0.5  # now the difference is one standard error
    p_value = bootstrap_p_value(replicates[0] - replicates[1] - shift, test.estimate - shift)
    assert p_value == pytest.approx(2 * stats.norm.sf(1), abs=0.03)


def test_delong_rejects_true_hypotheses_at_its_level():
    rng, rejected = np.random.default_rng(8), 0
    for _ in range(1000):
        label = (rng.random(200) < 0.3).astype(int)
        shared = rng.normal(size=200) + label
        scores = [shared + rng.normal(scale=0.5, size=200) for _ in "ab"]
        rejected += delong(label, *scores).p_value < 0.05
    assert 30 <= rejected <= 72


def test_models_that_place_rows_alike_cannot_be_told_apart():
    label, score, _ = draw(7, 50)
    test = delong(label, score, np.exp(score))
    assert (test.estimate, test.variance, test.p_value) == (0.0, 0.0, 1.0)
    constant = delong(label, np.zeros(50), np.ones(50))
    assert (constant.estimate, constant.p_value) == (0.0, 1.0)
    assert auc_variance(label, np.zeros(50)) == 0


def test_delong_without_error_is_undefined():
    label = np.repeat([0, 1], 5)
    test = delong(label, label, -label)
    assert (test.estimate, test.variance, test.p_value) == (1.0, 0.0, None)


def test_delong_of_few_rows_is_undefined():
    for label in ([], [1, 1, 1], [0, 0]):
        score = np.arange(len(label))
        test = delong(label, score, score)
        assert (test.estimate, test.variance, test.p_value) == (None, None, None)
        assert auc_variance(label, score) is None
    label, first, second = [1, 0, 0], np.array([1, 0, 2]), np.array([3, 1, 2])
    test = delong(label, first, second)
    assert test.estimate == auc(label, first) - auc(label, second) == -0.5
    assert (test.variance, test.p_value) == (None, None)


def test_delong_checks_its_rows():
    with pytest.raises(ValueError, match="label of row 1 is 2"):
        delong([0, 2], [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="score of row 0 is nan"):
        delong([0, 1], [0.0, 1.0], [np.nan, 1.0])


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04; the last is made as large as .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.03, None, 0.02]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.0, 0.0]) == [0.0, 0.0]


def test_holm_rejects_what_closed_testing_with_bonferroni_does():
    """Reject H_i if every set of hypotheses with it has a p value below alpha / its size."""
    rng, alpha = np.random.default_rng(0), 0.05
    for _ in range(200):
        p_values = (rng.random(4) ** 4).tolist()
        adjusted = holm(p_values)
        for place in range(4):
            sets = [
                chosen
                for size in range(1, 5)
                for chosen in itertools.combinations(range(4), size)
                if place in chosen
            ]
            closed = all(min(p_values[k] for k in s) <= alpha / len(s) for s in sets)
            assert (adjusted[place] <= alpha) == closed


def test_wins_ties_and_losses():
    win, tie, loss = Interval(0.2, 0.1, 0.3), Interval(0.0, -0.1, 0.1), Interval(-1, -2, -0.5)
    assert win_tie_loss([win, win, tie, loss]) == (2, 1, 1)
    assert win_tie_loss([Interval(0.0, 0.0, 0.0)]) == (0, 1, 0)
    assert win_tie_loss([win, Interval(0.2, None, None)]) is None
    assert win_tie_loss([]) is None


def test_bootstrap_p_value_is_that_of_its_standard_error():
    noise = np.random.default_rng(0).normal(size=2000)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    assert bootstrap_p_value(noise + 1.96, 1.96) == pytest.approx(0.05, abs=1e-4)
    assert bootstrap_p_value(noise - 1.96, -1.96) == pytest.approx(0.05, abs=1e-4)
    holes = np.concatenate([noise, np.full(500, np.nan)])
    assert bootstrap_p_value(holes, 1.0) == bootstrap_p_value(noise, 1.0)


def test_bootstrap_p_value_where_there_is_no_error():
    assert bootstrap_p_value(np.zeros(9), 0.0) == 1.0
    assert bootstrap_p_value(np.ones(9), 1.0) is None
    assert bootstrap_p_value([0.1, 0.2], None) is None
    assert bootstrap_p_value([0.1], 0.1) is None
    assert bootstrap_p_value([0.1, 0.2, np.nan, np.nan, np.nan], 0.1) is None
