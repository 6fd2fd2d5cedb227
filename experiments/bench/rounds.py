"""Measurements in rounds: opponents take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ROUNDS = 3
"""Fewest turns of each opponent in a comparison."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    value: float
    detail: str
    """How the value was measured, in words."""
    rounds: list[list[float]] = field(default_factory=list)
    """Per opponent the figure of every round; empty if there is no opponent."""
    spread: tuple[float, float] | None = None
    """Smallest and largest ratio of a round."""


def take_turns(*works: Callable[[], float], rounds: int = ROUNDS) -> list[list[float]]:
    """Return per work the figures of all rounds, measured in turn: A B A B A B.

    Raises:
        ValueError: Fewer rounds than ``ROUNDS``.
    """
    if rounds < ROUNDS:
        raise ValueError(f"a comparison needs at least {ROUNDS} rounds, not {rounds}")
    figures: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for place, work in enumerate(works):
            figures[place].append(work())
    return figures


def ratio(
    detail: str, over: Sequence[float], under: Sequence[float], *more: Sequence[float]
) -> Figure:
    """Return the ratio of the medians of two opponents, with the spread of the rounds' ratios.

    Args:
        detail: How it was measured, in words.
        over: Figures of the numerator, one per round.
        under: Figures of the denominator.
        more: Figures of opponents that are only recorded.
    """
    each = [a / b for a, b in zip(over, under, strict=True)]
    value = statistics.median(over) / statistics.median(under)
    rounds = [[float(f"{x:.5g}") for x in figures] for figures in (over, under, *more)]
    return Figure(value, detail, rounds, (min(each), max(each)))
