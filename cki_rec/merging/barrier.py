"""The barrier between models: how much worse they are on the straight line between them.

Shape legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from cki_rec.merging.calling import call, evaluating, rows_of
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.registry import Score
from cki_rec.merging.selection import constant_weights

Loss: TypeAlias = Callable[[Any, Any], Tensor | float]
"""(output of the module, batch) -> mean loss over the rows of the batch."""
Measure = Literal["score", "loss", "deviation"]
Evaluate: TypeAlias = Callable[[Params, Sequence[float]], float]
"""(mixed parameters, their shares of the sources) -> value of the measure."""
Lines: TypeAlias = dict[str, dict[float, list[float]]]
"""Name of a line -> fraction -> share of each source."""


def measure_barrier(
    models_of: Mapping[str, Sequence[Params]],
    measure: Measure,
    evaluate: Evaluate,
    num_points: int,
) -> dict[str, Any]:
    r"""Return the values on straight lines between sources, and the height of the barrier.

    Two sources have one line, ``0-1``. More have a line from each to the mean of all, ``0-mean``
    and so on. The height of the barrier is the largest excess over all points,

    .. math:: \max_t \; \ell\big(\textstyle\sum_k \alpha_k(t) \theta_k\big)
        - \sum_k \alpha_k(t) \, \ell(\theta_k)

    for losses; for scores with the other sign. So it is never negative, and equal sources have 0.

    Args:
        models_of: Name of a basis (``raw``, ``aligned``) -> the sources in it.
        measure: The measure that ``evaluate`` returns.
        evaluate: Function that measures a mixed model.
        num_points: Fractions of a line, both ends included; at least 3.

    Returns:
        ``measure``, the height for each basis (None for one that is absent), and ``points``.

    Raises:
        MergeError: Too few points, or a value is NaN or infinite.

    Reference:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020.

    Differs:
        Lines to the mean of more than two sources are ours.
    """
    if num_points < 3:
        raise MergeError(f"points must be at least 3 (both ends and the middle), not {num_points}")
    heights: dict[str, float] = {}
    points = []
    for basis, models in models_of.items():
        value_of = _measured(models, measure, evaluate, basis)
        ends = [value_of(_one(len(models), k)) for k in range(len(models))]
        for line, fractions in _lines(len(models), num_points).items():
            for fraction, shares in fractions.items():
                value = value_of(shares)
                expected = math.fsum(a * end for a, end in zip(shares, ends, strict=True))
                excess = expected - value if measure == "score" else value - expected
                heights[basis] = max(heights.get(basis, 0.0), excess)
                place = {"basis": basis, "line": line, "fraction": fraction}
                points.append({**place, "value": value, "expected": expected, "excess": excess})
    return {
        "measure": measure,
        "raw": heights.get("raw"),
        "aligned": heights.get("aligned"),
        "points": points,
    }


def by_score(score: Score) -> Evaluate:
    """Return the evaluation by a score of parameters; larger is better."""
    return lambda params, _: score(params)


def by_loss(module: nn.Module, batches: Sequence[Any], loss: Loss) -> Evaluate:
    """Return the evaluation by the mean loss over the rows of all batches."""

    def evaluate(params: Params, _: Sequence[float]) -> float:
        total, rows = 0.0, 0
        for output, batch in zip(_outputs(module, params, batches), batches, strict=True):
            total += float(loss(output, batch)) * rows_of(batch)
            rows += rows_of(batch)
        return total / rows

    return evaluate


def by_deviation(module: nn.Module, batches: Sequence[Any], models: Sequence[Params]) -> Evaluate:
    r"""Return the evaluation by outputs alone, without labels.

    It is the mean square of :math:`f(\sum_k \alpha_k \theta_k) - \sum_k \alpha_k f(\theta_k)`,
    divided by the mean variance of the sources' outputs over rows. It is 0 at every source.

    Raises:
        MergeError: The output of the module is no floating tensor.

    Reference:
        Zhou et al., Going Beyond Linear Mode Connectivity: The Layerwise Linear Feature
        Connectivity, NeurIPS 2023, for the output layer.

    Differs:
        The paper compares directions of features; this is a relative mean square error.
    """
    outputs = [_joined(module, model, batches) for model in models]
    variance = math.fsum(float(output.var(0, correction=0).mean()) for output in outputs)
    variance /= len(models)

    def evaluate(params: Params, shares: Sequence[float]) -> float:
        expected = torch.stack([a * f for a, f in zip(shares, outputs, strict=True)]).sum(0)
        error = float((_joined(module, params, batches) - expected).square().mean())
        return error / variance if variance > 0 else error

    return evaluate


def _measured(
    models: Sequence[Params], measure: Measure, evaluate: Evaluate, basis: str
) -> Callable[[list[float]], float]:
    """Return a function (shares) -> value of the mixed model; it measures no model twice."""
    known: dict[tuple[float, ...], float] = {}

    def value_of(shares: list[float]) -> float:
        key = tuple(shares)
        if key not in known:
            value = float(evaluate(mix(models, constant_weights(models, shares)), shares))
            if not math.isfinite(value):
                raise MergeError(f"{measure} is {value} at shares {shares} of the {basis} sources")
            known[key] = value
        return known[key]

    return value_of


def _lines(num_sources: int, num_points: int) -> Lines:
    fractions = [place / (num_points - 1) for place in range(num_points)]
    if num_sources == 2:
        return {"0-1": {t: [1 - t, t] for t in fractions}}
    return {
        f"{k}-mean": {
            t: [t / num_sources + (1 - t) * (k == j) for j in range(num_sources)]
            for t in fractions
        }
        for k in range(num_sources)
    }


def _one(num_sources: int, k: int) -> list[float]:
    return [float(j == k) for j in range(num_sources)]


def _joined(module: nn.Module, params: Params, batches: Sequence[Any]) -> Tensor:
    """Return the outputs for the rows of all batches, in float64."""
    outputs = _outputs(module, params, batches)
    for output in outputs:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise MergeError(f"the module returns {kind}, no floating tensor; give loss or score")
    return torch.cat([output.double().reshape(-1, *output.shape[1:]) for output in outputs])


def _outputs(module: nn.Module, params: Params, batches: Sequence[Any]) -> list[Any]:
    """Return the outputs of a module in evaluation mode; its own state does not change."""
    with evaluating(module):
        return [call(module, batch, params) for batch in batches]
