"""Choices that validation rows make, and checks of options that methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from cki_rec.merging.params import MergeError, MixingWeights, Params, equal_weights

Score: TypeAlias = Callable[[Params], float]
"""Validation AUC of a model."""


def select_best(
    models: Iterator[Params] | Sequence[Params], score: Score | None, option: str
) -> int:
    """Return the index of the model with the best score, the first of equals.

    Raises:
        MergeError: There is no score; ``option`` names the option that would avoid the choice.
    """
    score = require_score(score, f"{option}=null")
    values = [score(model) for model in models]
    return max(range(len(values)), key=values.__getitem__)


def require_score(score: Score | None, where: str) -> Score:
    """Return the score.

    Raises:
        MergeError: There is none.
    """
    if score is None:
        raise MergeError(f"{where}: is chosen on validation rows, which needs a score of models")
    return score


def check_fraction(option: str, value: float) -> None:
    """Check that an option is in [0, 1].

    Raises:
        MergeError: It is not.
    """
    if not 0 <= value <= 1:
        raise MergeError(f"{option}={value}: must be in [0, 1]")


def check_source(source: int | None, num_sources: int) -> None:
    """Check that an option names a source.

    Raises:
        MergeError: It does not.
    """
    if source is not None and not 0 <= source < num_sources:
        raise MergeError(f"source={source}: sources are 0 to {num_sources - 1}")


def constant_weights(models: Sequence[Params], shares: Sequence[float]) -> MixingWeights:
    """Return ``(K, 1, ..., 1)`` per parameter: one share per source."""
    weights = {}
    for name, tensor in models[0].items():
        weight = equal_weights(tensor, len(models))
        values = torch.tensor(shares, dtype=weight.dtype, device=weight.device)
        weights[name] = values.reshape(weight.shape)
    return weights
