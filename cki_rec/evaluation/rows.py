"""Labels and logits of single rows: checks and losses.

Shape legend: B rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def checked(label: npt.ArrayLike, score: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return labels and scores as float64 vectors of one length.

    Raises:
        ValueError: Shapes differ, a label is not 0 or 1, or a score is not finite; the message
            names the first such row.
    """
    label_B = np.asarray(label, dtype=np.float64)
    score_B = np.asarray(score, dtype=np.float64)
    if label_B.ndim != 1 or label_B.shape != score_B.shape:
        raise ValueError(f"label {label_B.shape} and score {score_B.shape} must be equal vectors")
    wrong = np.flatnonzero((label_B != 0) & (label_B != 1))
    if wrong.size:
        raise ValueError(f"label of row {wrong[0]} is {label_B[wrong[0]]}, not 0 or 1")
    wrong = np.flatnonzero(~np.isfinite(score_B))
    if wrong.size:
        raise ValueError(f"score of row {wrong[0]} is {score_B[wrong[0]]}, not finite")
    return label_B, score_B


def row_losses(label: npt.ArrayLike, logit: npt.ArrayLike) -> Floats:
    """Return each row's negative log likelihood, computed from the logit without overflow.

    Args:
        label: ``(B,)``, 0 or 1.
        logit: ``(B,)``, log odds of a click.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: See ``checked``.
    """
    label_B, logit_B = checked(label, logit)
    # -log sigmoid(z) = log(1 + exp(-z)); a row of label 0 has the sign of its logit flipped
    loss_B: Floats = np.logaddexp(0.0, np.where(label_B == 1, -logit_B, logit_B))
    return loss_B
