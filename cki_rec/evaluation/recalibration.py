"""Two-parameter recalibration of logits: fitted on validation rows, applied to test rows.

Merging may shrink or shift logits, which costs LogLoss and can be undone by two numbers. LogLoss
after recalibration leaves these two numbers out of the comparison.

Shape legend: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from cki_rec.evaluation.rows import Floats, checked, row_losses

MAX_STEPS = 100
TOLERANCE = 1e-12
"""Gain in nats a row (twice, by the quadratic form) that the last step is allowed to have."""


@dataclass(frozen=True, slots=True)
class Recalibration:
    """``scale * logit + shift``, or the reason why there is none."""

    scale: float | None
    shift: float | None
    reason: str | None = None

    def apply(self, logit: npt.ArrayLike) -> Floats | None:
        """Return the recalibrated logits; None where there is no recalibration."""
        if self.scale is None or self.shift is None:
            return None
        return self.scale * np.asarray(logit, dtype=np.float64) + self.shift


def recalibration(label: npt.ArrayLike, logits: npt.ArrayLike) -> Recalibration:
    """Return the scale and shift of the largest likelihood.

    Newton's method with halved steps on standardized logits, from the base rate. The likelihood is
    concave; it has one maximum unless a threshold on the logit separates the classes or all logits
    are equal. Then only the reason is returned: the identity would pass for a fit. The
    scale may be negative: then the model ranks rows in reverse.

    Args:
        label: ``(B,)``, 0 or 1.
        logits: ``(B,)``, log odds of a click.

    Raises:
        ValueError: See ``rows.checked``.

    Reference:
        Platt, Probabilistic Outputs for Support Vector Machines, Advances in Large Margin
        Classifiers 1999. Differs: labels are not smoothed. Existence: Albert and Anderson, On the
        Existence of Maximum Likelihood Estimates in Logistic Regression, Biometrika 1984.
    """
    label_B, logit_B = checked(label, logits)
    positive, negative = logit_B[label_B == 1], logit_B[label_B == 0]
    if not positive.size or not negative.size:
        return Recalibration(None, None, "one class only")
    if logit_B.min() == logit_B.max():
        return Recalibration(None, None, "all logits are equal")
    if positive.min() >= negative.max() or negative.min() >= positive.max():
        return Recalibration(None, None, "a threshold separates the classes")
    mean, deviation = float(logit_B.mean()), float(logit_B.std())
    x_B = (logit_B - mean) / deviation
    place_2 = np.array([0.0, logit(label_B.mean())])  # scale and shift, standardized

    def loss(place_2: Floats) -> float:
        return float(row_losses(label_B, place_2[0] * x_B + place_2[1]).mean())

    for _ in range(MAX_STEPS):
        predicted_B = expit(place_2[0] * x_B + place_2[1])
        error_B, weight_B = predicted_B - label_B, predicted_B * (1 - predicted_B)
        gradient_2 = np.array([(error_B * x_B).mean(), error_B.mean()])
        mixed = (weight_B * x_B).mean()
        hessian_22 = np.array([[(weight_B * x_B**2).mean(), mixed], [mixed, weight_B.mean()]])
        step_2 = np.linalg.lstsq(hessian_22, gradient_2, rcond=None)[0]
        gain = float(gradient_2 @ step_2)
        while gain > TOLERANCE and loss(place_2 - step_2) > loss(place_2):
            step_2 = step_2 / 2
        place_2 = place_2 - step_2
        if gain <= TOLERANCE:
            scale = float(place_2[0]) / deviation
            return Recalibration(scale, float(place_2[1]) - scale * mean)
    return Recalibration(None, None, f"not converged in {MAX_STEPS} steps")
