"""One source taught what all sources say: a reference that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from cki_rec.merging.methods.soups import Score, best_of
from cki_rec.merging.params import Params, check_finite, check_same

Imitate: TypeAlias = Callable[[Params, int, float], Params]
"""Start, epochs, learning rate -> a model trained to give the sources' mean logit."""


def distill(
    models: Sequence[Params],
    score: Score | None,
    imitate: Imitate | None,
    epochs: int = 1,
    learning_rate: float = 0.001,
    source: int | None = None,
) -> Params:
    """Return one source, trained on to give the mean logit of all of them.

    Args:
        models: One per source: the teachers.
        score: Where ``source`` is None.
        imitate: What trains (``engine.distillation``).
        epochs: Passes over the training rows; 0 returns the source.
        learning_rate: Of Adam.
        source: The start; None: the one with the best score, the first of equals.

    Raises:
        ValueError: Models differ, a source has NaN or infinite entries, an option is out of range,
            or there is nothing to choose or to train with.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    Differs:
        Soft labels alone, at temperature 1; the student starts from one of its teachers.
    """
    check_same(models)
    check_finite(models)
    if epochs < 0 or learning_rate <= 0:
        raise ValueError(f"epochs={epochs}, learning_rate={learning_rate}: must be positive")
    if source is not None and not 0 <= source < len(models):
        raise ValueError(f"source={source}: sources are 0 to {len(models) - 1}")
    if source is None:
        source = 0 if len(models) == 1 else best_of(models, score, "source")
    if len(models) == 1 or epochs == 0:
        return {name: tensor.clone() for name, tensor in models[source].items()}
    if imitate is None:
        raise ValueError("distillation needs training rows")
    return imitate(models[source], epochs, learning_rate)
