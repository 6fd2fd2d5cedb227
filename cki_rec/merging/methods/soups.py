"""Model soups: averages whose members are chosen on validation rows.

Shapes: weights are ``(K, 1, ..., 1)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MixingWeights, Params, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.selection import Score, constant_weights, require_score


@method(
    needs=("score",),
    row_wise=True,
    reference="Model soups (Wortsman et al., ICML 2022)",
    cost="scores of 2K - 1 models",
)
def greedy_soup(models: Sequence[Params], score: Score | None) -> MixingWeights:
    """Average those sources whose addition does not lower the validation AUC.

    Sources are tried from the best score to the worst. One is kept if the average of those kept
    so far and of this one scores no worse than without it.

    Returns:
        Equal shares of the sources that are kept, and 0 for the others.

    Raises:
        MergeError: Models differ, or there is no score to choose by.

    Reference:
        Wortsman et al., Model soups, ICML 2022, recipe 1.
    """
    check_same(models)
    if len(models) == 1:
        return constant_weights(models, [1.0])
    score = require_score(score, "greedy_soup")
    alone = [score(model) for model in models]
    ranked = sorted(range(len(models)), key=lambda k: -alone[k])
    members, best = ranked[:1], alone[ranked[0]]
    for k in ranked[1:]:
        value = score(mix(models, _soup(models, [*members, k])))
        if value >= best:
            members, best = [*members, k], value
    return _soup(models, members)


def _soup(models: Sequence[Params], members: Sequence[int]) -> MixingWeights:
    shares = [(k in members) / len(members) for k in range(len(models))]
    return constant_weights(models, shares)
