"""The recipe that an assessment suggests, by a few rules of thumb.

The first rule that holds decides. All thresholds are constants below. A suggestion is a start: the
recipe ``auto`` tries several and keeps the best one on validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EQUAL = 1e-6
"""Relative distance below which sources are equal."""
GAIN = 0.05
"""Rise of the mean cosine of layers that makes alignment worthwhile."""
SHARED = 0.3
"""Mean cosine of layers from which sources share a basis."""
UNEVEN = 0.1
"""Share of the seen rows of tables that not all sources have seen, from which counts matter."""
FLAT = 0.01
"""Height of a barrier, relative to the sources' own value, that no repair is needed for."""
OPPOSED, ALIKE = -0.1, 0.2
"""Mean cosine of the changes since the base: below, sources undo each other; above, they agree."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The figures that the rules read."""

    distance: float
    """Relative distance of the sources, all parameters together."""
    before: float | None
    """Mean cosine of layers before alignment; None: no layer."""
    after: float | None
    """Mean cosine of layers after alignment; None: not aligned."""
    uneven: float | None
    """Share of the rows seen by any source that not all have seen; None: no counts."""
    changes: float | None
    """Mean cosine of the changes since the base; None: no base."""
    is_flat: bool | None
    """Whether the barrier (aligned, if it is known) is flat; None: not measured."""
    has_moved_tables: bool
    """Alignment moves tables."""


def suggest(facts: Facts) -> str:
    """Return one sentence: the recipe that the figures suggest, and the reason."""
    if facts.distance <= EQUAL:
        return "The sources are equal, so any of them is the merge: average."
    before, after = facts.before, facts.after
    if after is not None and before is not None and after - before >= GAIN:
        return (
            f"Align first: layers agree with cosine {before:.2f} before and {after:.2f} after"
            f" alignment; then {_after_alignment(facts)}."
        )
    basis = after if after is not None else before
    if basis is not None and basis < SHARED:
        if after is None:
            return (
                f"Align first: layers agree with cosine {basis:.2f} only, so the sources have no"
                " common basis; find the symmetries of the network and assess again."
            )
        return (
            f"Do not average: layers agree with cosine {basis:.2f} only, also after alignment;"
            " take the best source (merge=best_source), or fit it to all of them"
            " (merge=best_source merge.refine=mean)."
        )
    if facts.uneven is not None and facts.uneven >= UNEVEN:
        return (
            f"The sources saw different rows ({facts.uneven:.0%} of the seen rows of tables are"
            " unknown to some of them): merge=evidence, which weighs rows by their counts."
        )
    if facts.changes is not None and facts.changes < OPPOSED:
        return (
            f"The changes since the base oppose each other (cosine {facts.changes:.2f}):"
            " merge=ties, which drops the entries that disagree."
        )
    if facts.changes is not None and facts.changes < ALIKE:
        return (
            f"The changes since the base hardly overlap (cosine {facts.changes:.2f}):"
            " merge=task_arithmetic, which adds them up."
        )
    if facts.is_flat is False:
        return (
            "The sources share a basis, but their average is worse than they are (see the"
            " barrier): merge=average with repair=least_squares."
        )
    return "The sources share a basis: merge=average."


def facts_of(
    rows: Sequence[Mapping[str, Any]], barrier: Mapping[str, Any] | None, is_aligned: bool
) -> Facts:
    """Return the figures that the rules read, from the rows and the barrier of an assessment."""
    parameters = [row for row in rows if row["kind"] in ("table", "tensor")]
    matrices = [row for row in parameters if len(row["shape"]) > 1]
    layers = [row for row in matrices if row["kind"] == "tensor"] or matrices or parameters
    model = next(row for row in rows if row["kind"] == "model")
    tables = [row for row in parameters if row["rows_none"] is not None]
    seen = sum(row["rows"] - row["rows_none"] for row in tables)
    by_all = sum(row["rows_all"] for row in tables)
    return Facts(
        distance=model["distance"],
        before=_mean([row["cosine"] for row in layers]),
        after=_mean([row["aligned_cosine"] for row in layers]) if is_aligned else None,
        uneven=1 - by_all / seen if seen else None,
        changes=_mean([row["task_cosine"] for row in layers]),
        is_flat=None if barrier is None else _is_flat(barrier),
        has_moved_tables=any(
            row["aligned_distance"] != row["distance"]
            for row in parameters
            if row["kind"] == "table" and is_aligned
        ),
    )


def _after_alignment(facts: Facts) -> str:
    rule = "merge=average" if facts.uneven is None else "merge=evidence"
    if facts.is_flat:
        return f"{rule}, without repair, because the aligned barrier is flat"
    return f"{rule} with repair={'project' if facts.has_moved_tables else 'least_squares'}"


def _is_flat(barrier: Mapping[str, Any]) -> bool:
    """Return whether the barrier of the aligned (else raw) sources is low.

    A deviation is relative already: the sources' outputs vary by 1. Scores and losses are compared
    with the mean size of the sources' own values.
    """
    basis = "raw" if barrier["aligned"] is None else "aligned"
    values = [abs(p["expected"]) for p in barrier["points"] if p["basis"] == basis]
    size = 1.0 if barrier["measure"] == "deviation" else math.fsum(values) / len(values)
    return bool(barrier[basis] <= FLAT * size)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
