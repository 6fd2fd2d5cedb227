"""The result of a merge, and its report as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cki_rec.merging.extras import Calibration, Learned
from cki_rec.merging.params import Params

Align = Literal["none", "weights", "activations"]
Repair = Literal["none", "rescale", "least_squares", "select_units", "project"]
Refine = Literal["none", "mean", "router"]
Effort = Literal["closed_form", "refine"]
SHOWN = 40
"""Most tensors that a report lists."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to merge: a method and the steps around it, ``refine`` with its default options."""

    method: str = "evidence"
    align: Align = "none"
    repair: Repair = "none"
    refine: Refine = "none"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        steps = {"align": self.align, "repair": self.repair, "refine": self.refine}
        values = {**self.options, **{n: step for n, step in steps.items() if step != "none"}}
        return ", ".join([self.method, *(f"{name}={value}" for name, value in values.items())])


@dataclass(frozen=True, slots=True, repr=False)
class MergeResult:
    """One model, and the facts about its making."""

    params: Params
    """The state dict of the new model, for ``module.load_state_dict``."""
    shares: dict[str, list[float]] | None
    """Per merged tensor the mean mixing weight of each source; None if there are no weights."""
    alignment: dict[str, Any] | None = None
    """Agreement of the sources before and after alignment: mean cosines, 1 for equal ones."""
    recipe: str = ""
    """Method and steps that made the model; of ``auto``, those that won."""
    scores: dict[str, float] = field(default_factory=dict)
    """Per recipe of ``auto`` its score, every source included."""
    anchor: dict[str, Any] | None = None
    """The source that element-wise modules are copied from, and the scores of all."""
    learned: Learned | None = None
    calibration: Calibration | None = None
    warnings: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Return recipe, scores, alignment, shares and warnings as readable text."""
        return "\n".join(self._lines())

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        return f"MergeResult(recipe={self.recipe!r}, {len(self.params)} tensors)"

    def _lines(self) -> Iterator[str]:
        yield f"recipe: {self.recipe}"
        if self.scores:
            yield "scores, best first:"
            for name in sorted(self.scores, key=lambda name: -self.scores[name]):
                yield f"  {self.scores[name]:9.5g}  {name}"
        if self.alignment is not None:
            before, after = self.alignment["agreement_before"], self.alignment["agreement"]
            yield f"alignment by {self.alignment['by']}: agreement {before:.3f}, then {after:.3f}"
        if self.anchor is not None:
            yield f"element-wise modules: of source {self.anchor['source']}"
        if self.shares:
            yield from _share_table(self.shares)
        rest = len(self.params) - len(self.shares or self.params)
        if rest > 0:  # the tensors of a merge from disk to disk are in files alone
            yield f"not merged, or tied to another tensor: {rest}"
        yield from (f"warning: {warning}" for warning in self.warnings)


def _share_table(shares: Mapping[str, Sequence[float]]) -> Iterator[str]:
    width = min(60, max(map(len, shares)))
    numbers = range(len(next(iter(shares.values()))))
    heads = "  ".join(f"{f'source {k}':>9}" for k in numbers)
    yield f"{'shares of the sources':<{width + 2}}  {heads}"
    for name in list(shares)[:SHOWN]:
        yield f"  {name:<{width}}  " + "  ".join(f"{share:9.1%}" for share in shares[name])
    if len(shares) > SHOWN:
        yield f"  and {len(shares) - SHOWN} more"
