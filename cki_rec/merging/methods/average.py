"""Averages of the sources: equal shares, or one share per source.

Shapes: weights are ``(K, 1, ..., 1)`` per parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, MixingWeights, Params, check_same, equal_weights
from cki_rec.merging.registry import method
from cki_rec.merging.selection import Score, constant_weights, select_best


@method(
    row_wise=True,
    reads_values=False,
    averages_dense=True,
    reference="CKI (arXiv 2501.07596), baseline averaging",
)
def average(models: Sequence[Params]) -> MixingWeights:
    """Average all sources, entry by entry; for checkpoints of one run this is SWA.

    Returns:
        1/K for every source, as ``(K, 1, ..., 1)``.

    Raises:
        MergeError: Models differ.

    Reference:
        CKI (arXiv 2501.07596), baseline "averaging".

    Differs:
        The released baseline averages weights and keeps the biases of the first source.
    """
    check_same(models)
    return {name: equal_weights(tensor, len(models)) for name, tensor in models[0].items()}


@method(
    row_wise=True,
    is_ordered=True,
    reference="CKI (arXiv 2501.07596), baseline averaging, with shares",
    cost="scores of a grid",
)
def weighted_average(
    models: Sequence[Params],
    score: Score | None,
    weights: list[float] | None = None,
    trials: int = 21,
) -> MixingWeights:
    """Average all sources with one share per source, fixed or chosen on validation rows.

    Args:
        models: One per source.
        score: Validation AUC of a model; needed if ``weights`` is None.
        weights: Shares of sum 1 (within 1e-3; they are normalized). None: the shares with the best
            score, from the grid ``simplex(K, trials)``; the more even of equals.
        trials: Most points of that grid, besides equal shares.

    Raises:
        MergeError: Models differ, weights do not fit, or there is no score to choose by.

    Reference:
        CKI (arXiv 2501.07596), baseline averaging, with shares.
    """
    check_same(models)
    if weights is not None:
        is_share = all(weight >= 0 for weight in weights) and abs(sum(weights) - 1) <= 1e-3
        if len(weights) != len(models) or not is_share:
            raise MergeError(
                f"weights={weights}: one per source ({len(models)}), none negative, of sum 1"
            )
        return constant_weights(models, [weight / sum(weights) for weight in weights])
    if len(models) == 1:
        return constant_weights(models, [1.0])
    points = [constant_weights(models, point) for point in simplex(len(models), trials)]
    return points[select_best((mix(models, point) for point in points), score, "weights")]


def simplex(num_sources: int, most: int) -> Iterator[list[float]]:
    """Yield shares of sum 1: first 1/K for all, then a grid of at most ``most`` points.

    The step of the grid is 1/n for the largest n that this many points allow; n = 1 is each source
    alone. Points are ordered from the most even to the most uneven.

    Raises:
        MergeError: ``most`` is less than the number of sources.
    """
    if most < num_sources:
        raise MergeError(f"trials={most}: must be at least the number of sources, {num_sources}")
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
