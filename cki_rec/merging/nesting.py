"""Nested symmetries: signs on the units of a permutation, or symmetries inside its units.

``find_nests`` finds them from the slices alone. Their elements do not commute; ``compose`` brings
any sequence of them into the order of the list.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cki_rec.merging.symmetry import Slice, Symmetry

PERMUTATIONS = ("permutation", "signed_permutation")
Step = tuple[int, Tensor]
"""Place of a symmetry in the list, and one of its elements."""


@dataclass(frozen=True, slots=True)
class Nest:
    """A permutation, and symmetries that act on the same entries."""

    signs: tuple[int, ...] = ()
    """Places of signs on the permuted units."""
    inside: tuple[tuple[int, ...], ...] = ()
    """Per kind of symmetry inside the units, its place for every unit."""


def find_nests(symmetries: Sequence[Symmetry]) -> tuple[dict[int, Nest], set[int]]:
    """Return the nested symmetries by the place of their permutation, and places to leave alone.

    Symmetries overlap if they move the same entries on the same axis. They can be composed if
    one of them permutes the other's elements, or is one sign of all entries that the other moves.
    Permutations that overlap otherwise are left alone.
    """
    signs: dict[int, list[int]] = {}
    inside: dict[int, dict[tuple[object, ...], dict[int, int]]] = {}
    idle: set[int] = set()
    for pair in _overlapping(symmetries):
        first, second = (symmetries[place] for place in pair)
        if _is_sign_of(first, second) or _is_sign_of(second, first):
            continue  # they commute
        for outer, inner in (pair, pair[::-1]):
            if symmetries[outer].kind not in PERMUTATIONS:
                continue
            if _is_signs_on(symmetries[outer], symmetries[inner]):
                signs.setdefault(outer, []).append(inner)
                break
            unit = _unit_around(symmetries[outer], symmetries[inner])
            if unit is not None:
                key = _key(symmetries[outer], symmetries[inner])
                inside.setdefault(outer, {}).setdefault(key, {})[unit] = inner
                break
        else:
            if all(symmetries[place].kind == "signs" for place in pair):  # they commute
                continue
            is_outer = [symmetries[place].kind in PERMUTATIONS for place in pair]
            idle.add(pair[is_outer.index(True)] if any(is_outer) else pair[1])
    nests: dict[int, Nest] = {}
    for outer in {**signs, **inside}:
        units = range(symmetries[outer].size)
        families = list(inside.get(outer, {}).values())
        for family in families:
            is_complete = set(family) == set(units)
            if not is_complete or len({place < outer for place in family.values()}) > 1:
                idle.add(outer)
        if outer not in idle:
            members = tuple(tuple(family[unit] for unit in units) for family in families)
            nests[outer] = Nest(tuple(sorted(signs.get(outer, []))), members)
    return nests, idle


def compose(
    nests: Mapping[int, Nest], elements: list[Tensor], place: int, step: Tensor
) -> list[Tensor]:
    """Return elements that act, in the order of the list, as ``elements`` and then ``step``.

    The step is moved towards its place, past the elements that come after it. A permutation that
    it passes conjugates it. A permutation conjugates the nested elements that it passes.
    """
    elements, moved = list(elements), set[tuple[int, ...]]()
    for passed in reversed(range(len(elements))):
        if passed <= place:
            break
        own, other = nests.get(place, Nest()), nests.get(passed, Nest())
        family = next((f for f in own.inside if passed in f), None)
        around = next((f for f in other.inside if place in f), None)
        if passed in own.signs:
            elements[passed] = step.abs().T @ elements[passed] @ step.abs()
        elif family is not None and family not in moved:
            moved.add(family)
            origin = step.abs().argmax(0).tolist()
            before = [elements[member] for member in family]
            for unit, member in enumerate(family):
                elements[member] = before[origin[unit]]
        elif place in other.signs:
            step = elements[passed].abs() @ step @ elements[passed].abs().T
        elif around is not None:
            place = around[int(elements[passed][:, around.index(place)].abs().argmax())]
    elements[place] = elements[place] @ step
    return elements


def joined(symmetry: Symmetry) -> Symmetry:
    """Return a symmetry whose slices are joined where the units of one continue those of another.

    It acts as before; ``find_nests`` sees units as a whole.
    """
    parts = sorted(symmetry.slices, key=lambda p: (order_of(p)[:2], starts_of(p, symmetry.size)))
    if symmetry.kind not in PERMUTATIONS:
        return symmetry
    slices: list[Slice] = []
    for part in parts:
        starts = starts_of(part, symmetry.size)
        for number, other in enumerate(slices):
            behind = tuple(start + other.width for start in starts_of(other, symmetry.size))
            alike = replace(part, start=0, step=0, starts=(), width=1)
            if behind == starts and alike == replace(other, start=0, step=0, starts=(), width=1):
                ahead = starts_of(other, symmetry.size)
                slices[number] = replace(other, starts=ahead, width=other.width + part.width)
                break
        else:
            slices.append(part)
    is_shorter = len(slices) < len(symmetry.slices)
    return replace(symmetry, slices=tuple(slices)) if is_shorter else symmetry


def _overlapping(symmetries: Sequence[Symmetry]) -> list[tuple[int, int]]:
    """Return the pairs of symmetries that move the same entries on the same axis."""
    groups: dict[tuple[str, int], list[tuple[int, set[int], Slice]]] = {}
    for place, symmetry in enumerate(symmetries):
        for part in symmetry.slices:
            entries = {s + w for s in starts_of(part, symmetry.size) for w in range(part.width)}
            groups.setdefault((part.parameter, part.axis), []).append((place, entries, part))
    pairs: dict[tuple[int, int], None] = {}
    for group in groups.values():
        for (one, left, first), (two, right, second) in itertools.combinations(group, 2):
            if one != two and (one, two) not in pairs and left & right and _meet(first, second):
                pairs[one, two] = None
    return list(pairs)


def _meet(first: Slice, second: Slice) -> bool:
    """Return whether the boxes of two slices share entries."""
    boxes = {axis: (start, stop) for axis, start, stop in second.within}
    return all(
        start < boxes.get(axis, (0, stop))[1] and boxes.get(axis, (start, stop))[0] < stop
        for axis, start, stop in first.within
    )


def starts_of(part: Slice, size: int) -> tuple[int, ...]:
    """Return where every unit of a slice begins."""
    step = part.step or part.width
    return part.starts or tuple(part.start + unit * step for unit in range(size))


def spot_of(part: Slice, size: int) -> tuple[object, ...]:
    """Return the place of a slice, whatever way it is written."""
    within = tuple(sorted(part.within))
    return part.parameter, part.axis, starts_of(part, size), part.width, within


def is_same_place(part: Slice, other: Slice, size: int) -> bool:
    """Return whether two slices hold the same units."""
    return spot_of(part, size) == spot_of(other, size)


def _is_sign_of(sign: Symmetry, other: Symmetry) -> bool:
    """Return whether a symmetry is one sign of all entries that another moves where they meet."""
    if sign.kind != "signs" or sign.size != 1:
        return False
    for part in sign.slices:
        entries = {s + w for s in starts_of(part, 1) for w in range(part.width)}
        for q in other.slices:
            if (q.parameter, q.axis) == (part.parameter, part.axis) and _meet(part, q):
                moved = {s + w for s in starts_of(q, other.size) for w in range(q.width)}
                if entries & moved and not moved <= entries:
                    return False
    return True


def _is_signs_on(outer: Symmetry, inner: Symmetry) -> bool:
    spots = {spot_of(part, outer.size) for part in outer.slices}
    return (
        inner.kind == "signs"
        and inner.size == outer.size
        and all(spot_of(part, inner.size) in spots for part in inner.slices)
    )


def _unit_around(outer: Symmetry, inner: Symmetry) -> int | None:
    """Return the unit of ``outer`` that all slices of ``inner`` are in; None: there is none."""
    units: set[int | None] = set()
    for part in inner.slices:
        around = slice_around(outer, inner, part)
        units.add(None if around is None else around[1])
    return units.pop() if len(units) == 1 else None


def slice_around(outer: Symmetry, inner: Symmetry, part: Slice) -> tuple[int, int] | None:
    """Return the slice of ``outer``, and its unit, that contain a slice of ``inner``."""
    boxes = _boxes(part, inner.size)
    for number, other in enumerate(outer.slices):
        around = {axis: (start, stop) for axis, start, stop in other.within}
        is_inside = other.parameter == part.parameter and other.axis in boxes
        for unit, start in enumerate(starts_of(other, outer.size) if is_inside else ()):
            around[other.axis] = (start, start + other.width)
            if all(
                axis in boxes and low <= boxes[axis][0] and boxes[axis][1] <= high
                for axis, (low, high) in around.items()
            ):
                return number, unit
    return None


def _boxes(part: Slice, size: int) -> dict[int, tuple[int, int]]:
    """Return per axis the first entry of a slice and the entry behind the last."""
    starts = starts_of(part, size)
    boxes = {axis: (start, stop) for axis, start, stop in part.within}
    return {**boxes, part.axis: (min(starts), max(starts) + part.width)}


def _key(outer: Symmetry, inner: Symmetry) -> tuple[object, ...]:
    """Return the place of a symmetry inside a unit, equal for those that correspond."""
    slices = []
    for part in inner.slices:
        around = slice_around(outer, inner, part)
        assert around is not None
        other = outer.slices[around[0]]
        begin = starts_of(other, outer.size)[around[1]]
        entries = [
            (start - begin if part.axis == other.axis else start)
            for start in starts_of(part, inner.size)
        ]
        within = [
            (axis, start - begin, stop - begin) if axis == other.axis else (axis, start, stop)
            for axis, start, stop in sorted(part.within)
        ]
        slices.append((around[0], part.axis, entries, part.width, within, part.signed))
    return inner.kind, inner.size, str(sorted(slices))


def order_of(part: Slice) -> tuple[object, ...]:
    """Return a key that sorts the slices of symmetries inside units alike."""
    return part.parameter, part.axis, part.starts or (part.start,), part.within
