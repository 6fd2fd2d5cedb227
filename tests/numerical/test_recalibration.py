"""Recalibration equals unpenalized logistic regression, or gives the reason why there is none."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from cki_rec.evaluation.metrics import log_loss
from cki_rec.evaluation.recalibration import Recalibration, recalibration


def draw(seed, num_rows, scale, shift):
    """Labels of a model whose logits are off by ``scale`` and ``shift``."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=num_rows)
    label = (rng.random(num_rows) < expit(scale * logits + shift)).astype(int)
    return label, logits


@pytest.mark.parametrize(
    ("scale", "shift", "num_rows"),
    [(1.0, 0.0, 500), (3.0, -2.0, 800), (0.2, 1.0, 60), (-1.5, 0.3, 500), (1.0, -5.0, 5000)],
)
def test_fit_equals_scikit_learn(scale, shift, num_rows):
    label, logits = draw(1, num_rows, scale, shift)
    peer = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(logits[:, None], label)
    fit = recalibration(label, logits)
    assert fit.reason is None
    assert fit.scale == pytest.approx(peer.coef_[0, 0], rel=1e-5)
    assert fit.shift == pytest.approx(peer.intercept_[0], rel=1e-5, abs=1e-6)


def test_fit_is_where_the_likelihood_has_no_slope():
    for seed, (scale, shift) in enumerate([(2.0, 1.0), (0.5, -3.0), (40.0, 3.0)]):
        label, logits = draw(seed, 3000, scale, shift)
        error = expit(recalibration(label, logits).apply(logits)) - label
        assert abs(error.mean()) < 1e-12
        assert abs((error * logits).mean()) < 1e-12


def test_known_distortion_is_undone_up_to_chance():
    label, logits = draw(2, 200_000, 2.0, -0.7)
    fit = recalibration(label, logits)
    assert (fit.scale, fit.shift) == pytest.approx((2.0, -0.7), abs=0.04)


def test_fit_does_not_depend_on_how_logits_were_distorted():
    label, logits = draw(3, 400, 1.0, 0.0)
    plain = recalibration(label, logits)
    for scale, shift in ((1e-6, 0.0), (1e6, 0.0), (1.0, 1e4), (-3.0, 1.0)):
        distorted = scale * logits + shift
        again = recalibration(label, distorted)
        assert again.apply(distorted) == pytest.approx(plain.apply(logits), abs=1e-7)


def test_recalibration_never_costs_log_loss_where_it_was_fitted():
    label, logits = draw(4, 300, 0.3, 2.0)
    fit = recalibration(label, logits)
    assert log_loss(label, fit.apply(logits)) < log_loss(label, logits) - 0.1
    again = recalibration(label, fit.apply(logits))
    assert (again.scale, again.shift) == pytest.approx((1.0, 0.0), abs=1e-9)


def test_outlying_logits_are_no_trouble():
    label, logits = draw(5, 1000, 1.0, 0.0)
    logits[0], label[0] = 1e4, 1
    logits[1], label[1] = -500.0, 1
    fit = recalibration(label, logits)
    error = expit(fit.apply(logits)) - label
    assert abs(error.mean()) < 1e-9


@pytest.mark.parametrize(
    ("label", "logits", "reason"),
    [
        ([], [], "one class only"),
        ([1, 1], [0.1, 0.2], "one class only"),
        ([0, 1, 0], [0.3, 0.3, 0.3], "all logits are equal"),
        ([0, 0, 1, 1], [-2.0, -1.0, 1.0, 2.0], "a threshold separates the classes"),
        ([1, 1, 0, 0], [-2.0, -1.0, 1.0, 2.0], "a threshold separates the classes"),
        ([0, 0, 1, 1], [-2.0, 1.0, 1.0, 2.0], "a threshold separates the classes"),
        ([0, 1], [0.0, 1.0], "a threshold separates the classes"),
    ],
)
def test_without_a_maximum_there_is_none_and_a_reason(label, logits, reason):
    fit = recalibration(label, logits)
    assert fit == Recalibration(None, None, reason)
    assert fit.apply(logits) is None


def test_one_row_inside_the_other_class_is_enough():
    fit = recalibration([0, 1, 0], [-1.0, 0.0, 1.0])
    assert fit.scale == pytest.approx(0, abs=1e-9)
    assert fit.shift == pytest.approx(np.log(0.5))


def test_nearly_separated_classes_have_a_maximum_far_away():
    label = np.repeat([0, 1], 50)
    logits = np.linspace(-1, 1, 100)
    logits[[49, 50]] = logits[[50, 49]]
    fit = recalibration(label, logits)
    assert fit.scale > 10
    assert abs((expit(fit.apply(logits)) - label).mean()) < 1e-9
