"""Distillation: one source trained to reproduce the mean logit of all sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from cki_rec.merging.params import MergeError, Params, check_finite, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.selection import Score, check_source, select_best

Imitate: TypeAlias = Callable[[Params, int, float], Params]
"""(first parameters, epochs, learning rate) -> a model fitted to the sources' mean logit."""


@method(
    needs=("imitate",),
    is_ordered=True,
    reference="Hinton et al., arXiv 1503.02531",
    cost="a training; K + 1 forward passes a step",
)
def distillation(
    models: Sequence[Params],
    score: Score | None,
    imitate: Imitate | None,
    epochs: int = 1,
    learning_rate: float = 0.001,
    source: int | None = None,
) -> Params:
    """TRAIN one source to reproduce the mean logit of all sources, without labels.

    Args:
        models: One per source: the teachers.
        score: Validation AUC of a model; needed if ``source`` is None.
        imitate: The training (``engine.distillation``).
        epochs: Passes over the training rows; 0 returns the source.
        learning_rate: Learning rate of Adam.
        source: Index of the source to start from. None: the one with the best score, the first of
            equals.

    Raises:
        MergeError: Models differ, a source has NaN or infinite entries, an option is out of range,
            or there is nothing to choose or to train with.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    Differs:
        Soft labels alone, at temperature 1; the student starts from one of its teachers.
    """
    check_same(models)
    check_finite(models)
    if epochs < 0 or learning_rate <= 0:
        raise MergeError(f"epochs={epochs}, learning_rate={learning_rate}: must be positive")
    check_source(source, len(models))
    if source is None:
        source = 0 if len(models) == 1 else select_best(models, score, "source")
    if len(models) == 1 or epochs == 0:
        return {name: tensor.clone() for name, tensor in models[source].items()}
    if imitate is None:
        raise MergeError("distillation needs training rows")
    return imitate(models[source], epochs, learning_rate)
