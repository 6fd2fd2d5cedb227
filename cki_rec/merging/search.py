"""The search for the best recipe of a merge: ``method="auto"``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from cki_rec.merging.params import NotPossible, Params
from cki_rec.merging.registry import Score
from cki_rec.merging.result import MergeResult, Recipe, Refine

AUTO = "auto"
"""The name of the search among the methods."""
RECIPES = (
    Recipe(),
    Recipe(align="weights"),
    Recipe(align="activations"),
    Recipe(align="activations", repair="select_units"),
    Recipe(align="weights", repair="select_units"),
    Recipe(align="activations", repair="project"),
)
"""The recipes that are tried, as in ``conf/merge/auto.yaml``; and every source alone."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """The best of several candidates."""

    name: str
    best: T
    scores: dict[str, float]


def choose(candidates: Iterable[tuple[str, T]], score: Callable[[T], float]) -> Choice[T]:
    """Return the candidate with the largest score, the first of equals.

    At most two candidates are held, so they may be made one after the other.

    Args:
        candidates: Names and candidates; at least one.
        score: Larger is better.
    """
    choice: Choice[T] | None = None
    scores: dict[str, float] = {}
    for name, candidate in candidates:
        scores[name] = score(candidate)
        if choice is None or scores[name] > scores[choice.name]:
            choice = Choice(name, candidate, scores)
    assert choice is not None
    return choice


def possible(
    has_counts: bool, has_symmetries: bool, has_batches: bool, num_models: int
) -> list[Recipe]:
    """Return the recipes that are possible with the inputs of a merge.

    Without row counts, tables are averaged. Alignment needs symmetries. Activations and repairs
    need batches. One model needs neither.
    """
    recipes = [r if has_counts else replace(r, method="average") for r in RECIPES]
    return [
        recipe
        for recipe in recipes
        if recipe == recipes[0]
        or (
            num_models > 1
            and has_symmetries
            and (has_batches or (recipe.align == "weights" and recipe.repair == "none"))
        )
    ]


def search(
    recipes: Sequence[Recipe],
    run: Callable[[Recipe], MergeResult],
    sources: Sequence[Params],
    score: Score,
    progress: Callable[[str, int, int], None],
    refinements: Sequence[Refine] = (),
    refined: Callable[[Refine, Params], Params] | None = None,
) -> MergeResult:
    """Return the best result of all recipes and all sources, with the scores of all.

    Args:
        recipes: The recipes that are tried; those that turn out impossible are left out.
        run: Recipe -> its merge, in the form of the sources.
        sources: The sources.
        score: The quality of a model; larger is better.
        progress: Called before every candidate: name, number of those done, number of all.
        refinements: Teachers that the best candidate is fitted to.
        refined: (teacher, best candidate) -> the fitted model.
    """
    warnings: list[str] = []
    total = len(recipes) + len(sources) + len(refinements)

    def candidates() -> Iterator[tuple[str, MergeResult]]:
        for place, recipe in enumerate(recipes):
            progress(str(recipe), place, total)
            try:
                yield str(recipe), run(recipe)
            except NotPossible as error:
                warnings.append(f"{recipe} is left out: {error}")
        for k, source in enumerate(sources):
            progress(f"source {k}", len(recipes) + k, total)
            alone = [float(k == j) for j in range(len(sources))]
            shares = {name: list(alone) for name in source}
            yield f"source {k}", MergeResult(source, shares, recipe=f"source {k}")

    choice = choose(candidates(), lambda result: score(result.params))
    scores = choice.scores
    if refined is not None and refinements:
        first = choice

        def fitted() -> Iterator[tuple[str, MergeResult]]:
            yield first.name, first.best
            for place, teacher in enumerate(refinements):
                name = f"{first.name}, refine={teacher}"
                progress(name, len(recipes) + len(sources) + place, total)
                params = refined(teacher, first.best.params)
                yield name, replace(first.best, params=params, shares=None, recipe=name)

        choice = choose(fitted(), lambda result: score(result.params))
        scores |= choice.scores
    progress("done", total, total)
    best = choice.best
    return replace(best, scores=scores, warnings=[*best.warnings, *warnings])
