"""Averages whose members or shares are chosen on validation rows, and pruning: one member alone.

Shapes: weights are ``(K, 1, ..., 1)`` per parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from cki_rec.merging.mixing import mix
from cki_rec.merging.params import (
    MixingWeights,
    Params,
    check_finite,
    check_same,
    compute_dtype,
    equal_weights,
)
from cki_rec.merging.sparsification import keep_largest

Score: TypeAlias = Callable[[Params], float]
"""Validation AUC of a model."""


def weighted_average(
    models: Sequence[Params],
    score: Score | None,
    weights: list[float] | None = None,
    trials: int = 21,
) -> MixingWeights:
    """Return one share per source, the same for every parameter.

    Args:
        models: One per source.
        score: Where ``weights`` is None.
        weights: Shares, which must sum to 1 (within 1e-3; the rest is divided up); None: the ones
            with the best score, from the grid ``simplex(K, trials)``; the more even of equals.
        trials: Most points of that grid, besides equal shares.

    Raises:
        ValueError: Models differ, weights do not fit, or there is no score to choose by.

    Reference:
        CKI (arXiv 2501.07596), baseline averaging, with shares.
    """
    check_same(models)
    if weights is not None:
        is_share = all(weight >= 0 for weight in weights) and abs(sum(weights) - 1) <= 1e-3
        if len(weights) != len(models) or not is_share:
            raise ValueError(
                f"weights={weights}: one per source ({len(models)}), none negative, of sum 1"
            )
        return _shares(models, [weight / sum(weights) for weight in weights])
    if len(models) == 1:
        return _shares(models, [1.0])
    points = [_shares(models, point) for point in simplex(len(models), trials)]
    return points[best_of((mix(models, point) for point in points), score, "weights")]


def greedy_soup(models: Sequence[Params], score: Score | None) -> MixingWeights:
    """Return equal shares of the sources that a greedy search keeps, and 0 for the others.

    Sources are tried from the best score to the worst; one is kept if the average of those kept
    so far and it scores no worse than without it.

    Raises:
        ValueError: Models differ, or there is no score to choose by.

    Reference:
        Wortsman et al., Model soups, ICML 2022, recipe 1.
    """
    check_same(models)
    if len(models) == 1:
        return _shares(models, [1.0])
    score = _needed(score, "greedy_soup")
    alone = [score(model) for model in models]
    ranked = sorted(range(len(models)), key=lambda k: -alone[k])
    kept, best = ranked[:1], alone[ranked[0]]
    for k in ranked[1:]:
        value = score(mix(models, _soup(models, [*kept, k])))
        if value >= best:
            kept, best = [*kept, k], value
    return _soup(models, kept)


def prune(
    models: Sequence[Params],
    score: Score | None,
    density: float = 0.5,
    source: int | None = None,
) -> Params:
    """Return one source without the smallest entries of its tables and matrices.

    The threshold is exact and each parameter's own (``sparsification.kth_largest``). Parameters
    of fewer than two axes (biases, scales, statistics) stay.

    Args:
        models: One per source.
        score: Where ``source`` is None.
        density: Share of the entries of a parameter that stays.
        source: Which one; None: the one with the best score, the first of equals.

    Raises:
        ValueError: Models differ, an option is out of range, the source has NaN or infinite
            entries, or there is no score to choose by.

    Reference:
        Han et al., Learning both weights and connections, NeurIPS 2015, section 3;
        CKI (arXiv 2501.07596), baseline pruning.

    Differs:
        CKI's released code keeps ``w > 0.02``, by sign: it deletes all negative weights. We go by
        magnitude, as pruning does.
    """
    check_same(models)
    check_share("density", density)
    if source is not None and not 0 <= source < len(models):
        raise ValueError(f"source={source}: sources are 0 to {len(models) - 1}")
    if source is None:
        source = 0 if len(models) == 1 else best_of(models, score, "source")
    check_finite(models[source : source + 1], f"source {source}")
    result = {}
    for name, tensor in models[source].items():
        wide = tensor.to(compute_dtype(tensor))
        kept = wide if tensor.ndim < 2 else torch.where(keep_largest(wide, density), wide, 0)
        result[name] = kept.to(tensor.dtype).clone()
    return result


def simplex(num_sources: int, most: int) -> Iterator[list[float]]:
    """Yield shares of sum 1: 1/K for all first, then a grid of at most ``most`` points.

    Its step is 1/n for the largest n that so many points allow; n = 1 is each source alone. Points
    come from the most even to the most uneven.
    """
    if most < num_sources:
        raise ValueError(f"trials={most}: must be at least the number of sources, {num_sources}")
    steps = 1
    while math.comb(steps + num_sources, num_sources - 1) <= most:
        steps += 1
    draws = itertools.combinations_with_replacement(range(num_sources), steps)
    points = [[draw.count(k) for k in range(num_sources)] for draw in draws]
    even = [1 / num_sources] * num_sources
    yield even
    for point in sorted(points, key=lambda point: sum(part * part for part in point)):
        shares = [part / steps for part in point]
        if shares != even:
            yield shares


def best_of(models: Iterator[Params] | Sequence[Params], score: Score | None, what: str) -> int:
    """Return the place of the model with the best score, the first of equals.

    Raises:
        ValueError: There is no score; ``what`` names the option that would need none.
    """
    score = _needed(score, f"{what}=null")
    values = [score(model) for model in models]
    return max(range(len(values)), key=lambda place: values[place])


def check_share(option: str, value: float) -> None:
    """Check that an option is in [0, 1].

    Raises:
        ValueError: It is not.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{option}={value}: must be in [0, 1]")


def _needed(score: Score | None, what: str) -> Score:
    if score is None:
        raise ValueError(f"{what}: is chosen on validation rows, which needs a score of models")
    return score


def _shares(models: Sequence[Params], shares: Sequence[float]) -> MixingWeights:
    weights = {}
    for name, tensor in models[0].items():
        weight = equal_weights(tensor, len(models))
        values = torch.tensor(shares, dtype=weight.dtype, device=weight.device)
        weights[name] = values.reshape(weight.shape)
    return weights


def _soup(models: Sequence[Params], kept: Sequence[int]) -> MixingWeights:
    return _shares(models, [(k in kept) / len(kept) for k in range(len(models))])
