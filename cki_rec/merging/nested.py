"""Nested symmetries: signs on the units of a permutation, or symmetries inside its units.

Two networks whose heads are permuted and rotated inside can only be matched jointly: a pair of
heads is compared after the best rotation. ``find_nests`` finds such cases from the slices alone.

Shape legend: S units of the outer permutation, T size of a symmetry inside a unit, R the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cki_rec.merging.closest import best_element, product_with
from cki_rec.merging.params import Params
from cki_rec.merging.symmetry import Slice, Symmetry, set_units, units_of

MOST_PATTERNS = 8
"""Sign patterns of one permutation whose combinations are all tried; more are found by turns."""
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
    one of them permutes the other's elements. Permutations that overlap otherwise are left alone.
    """
    signs: dict[int, list[int]] = {}
    inside: dict[int, dict[tuple[object, ...], dict[int, int]]] = {}
    idle: set[int] = set()
    for pair in _overlapping(symmetries):
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
    it passes conjugates it, and it conjugates what its own permutation contains.
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


def solve_jointly(
    symmetries: Sequence[Symmetry],
    place: int,
    nest: Nest,
    view: Params,
    reference: Params,
    scale: Mapping[str, float],
) -> tuple[list[Step], float]:
    r"""Return the best elements of a permutation and of what it contains, and their gain.

    Units i and j are compared by

    .. math:: s_{ij} = \max_{c} \sum_v \Big(\prod_{q \in v} c_q\Big) G^v_{ij}
                       + \sum_f \max_{Q} \langle Q, M^f_{ij} \rangle

    where v runs over the sets of signs that reach some slices, G are products of units, f runs
    over the symmetries inside units, and M are products of their slices. With kind rotation the
    last maximum is a nuclear norm. Then units are assigned.

    Args:
        symmetries: All symmetries of the network.
        place: Place of the permutation.
        nest: Symmetries that it contains.
        view: Parameters of a source.
        reference: Parameters to match.
        scale: Weight of every parameter.
    """
    outer = symmetries[place]
    rest = _without(view, symmetries, nest) if nest.inside else view
    by_pattern = _products_by_pattern(symmetries, place, nest, rest, reference, scale)
    score, chosen = _best_signs(by_pattern, outer.size)
    now = sum(
        (product.diagonal() for product in by_pattern.values()),
        torch.zeros(outer.size, dtype=torch.float64),
    )
    families = [
        family
        for family in nest.inside
        if any(part.parameter in scale for part in symmetries[family[0]].slices)
    ]
    inner: list[list[list[Tensor]]] = []
    for family in families:
        products = _products_inside(symmetries, family, view, reference, scale)
        values, elements = _best_inside(symmetries[family[0]].kind, products)
        score = score + values
        units = range(outer.size)
        now = now + torch.stack([products[:, u, u].diagonal(dim1=1, dim2=2).sum() for u in units])
        inner.append(elements)
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    gain = float(score[rows, columns].sum() - now.sum())
    element = torch.zeros(outer.size, outer.size, dtype=torch.float64)
    element[rows, columns] = 1.0
    if place in chosen:
        element = element * chosen[place]
    steps: list[Step] = [(place, element)]
    for sign in nest.signs:
        if sign in chosen:
            flips = torch.ones(outer.size, dtype=torch.float64)
            flips[columns] = chosen[sign][rows, columns]
            steps.append((sign, flips.diag()))
    for family, table in zip(families, inner, strict=True):
        pairs = zip(rows.tolist(), columns.tolist(), strict=True)
        steps += [(family[j], table[i][j]) for i, j in pairs]
    is_identity = [bool((element.diagonal() == 1).all()) for _, element in steps]
    return [step for step, same in zip(steps, is_identity, strict=True) if not same], gain


def _products_by_pattern(
    symmetries: Sequence[Symmetry],
    place: int,
    nest: Nest,
    view: Params,
    reference: Params,
    scale: Mapping[str, float],
) -> dict[frozenset[int], Tensor]:
    """Return ``(S, S)`` products of units per set of signs that reach them."""
    outer = symmetries[place]
    reached = {
        sign: {_spot(p, outer.size) for p in symmetries[sign].slices} for sign in nest.signs
    }
    products: dict[frozenset[int], Tensor] = {}
    for part in outer.slices:
        if part.parameter not in scale:
            continue
        spot = _spot(part, outer.size)
        signs = {sign for sign, spots in reached.items() if spot in spots}
        signs |= {place} if outer.kind == "signed_permutation" and part.signed else set()
        left = units_of(view[part.parameter], part, outer.size)
        right = units_of(reference[part.parameter], part, outer.size)
        product = scale[part.parameter] * torch.einsum("...wi,...wj->ij", left, right)
        pattern = frozenset(signs)
        products[pattern] = products[pattern] + product if pattern in products else product
    return products


def _best_signs(
    products: Mapping[frozenset[int], Tensor], size: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return per pair of units the largest sum over signs ``(S, S)``, and each sign there."""
    names = sorted(set().union(*products))
    ones = torch.ones(size, size, dtype=torch.float64)
    chosen = dict.fromkeys(names, ones)

    def total(signs: Mapping[int, Tensor]) -> Tensor:
        terms = [_product(signs, pattern, ones) * value for pattern, value in products.items()]
        return sum(terms, torch.zeros_like(ones))

    if len(names) <= MOST_PATTERNS:
        score = total(chosen)
        for flips in itertools.product((1.0, -1.0), repeat=len(names)):
            signs = {name: flip * ones for name, flip in zip(names, flips, strict=True)}
            value = total(signs)
            is_better = value > score
            score = torch.where(is_better, value, score)
            chosen = {n: torch.where(is_better, signs[n], chosen[n]) for n in names}
        return score, chosen
    for _ in range(len(names)):
        before = chosen
        for name in names:
            terms = [
                _product(chosen, pattern, ones) * value
                for pattern, value in products.items()
                if name in pattern
            ]
            flip = torch.where(sum(terms, torch.zeros_like(ones)) < 0, -1.0, 1.0)
            chosen = {**chosen, name: chosen[name] * flip}
        if all(torch.equal(chosen[name], before[name]) for name in names):
            break
    return total(chosen), chosen


def _product(signs: Mapping[int, Tensor], pattern: frozenset[int], ones: Tensor) -> Tensor:
    for name in pattern:
        ones = ones * signs[name]
    return ones


def _products_inside(
    symmetries: Sequence[Symmetry],
    family: Sequence[int],
    view: Params,
    reference: Params,
    scale: Mapping[str, float],
) -> Tensor:
    """Return ``(2, S, S, T, T)``: of every two units' inner slices, signed and unsigned ones."""
    num, size = len(family), symmetries[family[0]].size
    products = torch.zeros(2, num, num, size, size, dtype=torch.float64)
    sorted_slices = [sorted(symmetries[p].slices, key=_order) for p in family]
    for parts in zip(*sorted_slices, strict=True):
        name = parts[0].parameter
        if name in scale:
            left, right = (
                torch.stack([units_of(m[name], part, size).reshape(-1, size) for part in parts])
                for m in (view, reference)
            )
            product = torch.einsum("ira,jrb->ijab", left, right)
            products[0 if parts[0].signed else 1] += scale[name] * product
    return products


def _best_inside(kind: str, products: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Return ``(S, S)`` the largest product of every two units, and its element."""
    units = range(products.shape[1])
    if kind == "rotation":
        left, values, right = torch.linalg.svd(products[0])
        return values.sum(-1), [list(row) for row in left @ right]
    elements = [[best_element(kind, *products[:, i, j]) for j in units] for i in units]
    best = [[product_with(elements[i][j], *products[:, i, j]) for j in units] for i in units]
    return torch.tensor(best, dtype=torch.float64), elements


def _without(view: Params, symmetries: Sequence[Symmetry], nest: Nest) -> Params:
    """Return parameters in which the entries inside units, that inner symmetries move, are 0."""
    rest = dict(view)
    for place in itertools.chain(*nest.inside):
        for part in symmetries[place].slices:
            name = part.parameter
            if name in view:
                rest[name] = view[name].clone() if rest[name] is view[name] else rest[name]
                units = units_of(rest[name], part, symmetries[place].size)
                set_units(rest[name], part, torch.zeros_like(units))
    return rest


def joined(symmetry: Symmetry) -> Symmetry:
    """Return a symmetry whose slices are joined where the units of one continue those of another.

    It acts as before; ``find_nests`` sees units as a whole.
    """
    parts = sorted(symmetry.slices, key=lambda p: (_order(p)[:2], starts_of(p, symmetry.size)))
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


def _spot(part: Slice, size: int) -> tuple[object, ...]:
    """Return the place of a slice, whatever way it is written."""
    within = tuple(sorted(part.within))
    return part.parameter, part.axis, starts_of(part, size), part.width, within


def is_same_place(part: Slice, other: Slice, size: int) -> bool:
    """Return whether two slices hold the same units."""
    return _spot(part, size) == _spot(other, size)


def _is_signs_on(outer: Symmetry, inner: Symmetry) -> bool:
    spots = {_spot(part, outer.size) for part in outer.slices}
    return (
        inner.kind == "signs"
        and inner.size == outer.size
        and all(_spot(part, inner.size) in spots for part in inner.slices)
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


def _order(part: Slice) -> tuple[object, ...]:
    """Return a key that sorts the slices of symmetries inside units alike."""
    return part.parameter, part.axis, part.starts or (part.start,), part.within
