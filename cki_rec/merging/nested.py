"""Joint solutions for nested symmetries (``nesting``): a permutation with all that it contains.

Two networks whose heads are permuted and rotated inside can only be matched jointly: a pair of
heads is compared after the best rotation.

Shape legend: S units of the outer permutation, T size of a symmetry inside a unit, R the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cki_rec.merging.closest import best_element, product_with
from cki_rec.merging.nesting import Nest, Step, order_of, spot_of
from cki_rec.merging.params import Params
from cki_rec.merging.symmetry import Symmetry, set_units, units_of

MOST_PATTERNS = 8
"""Sign patterns of one permutation whose combinations are all tried; more are found by turns."""
SMALLEST_GAIN = 1e-10
"""Gains of the objective below this are rounding."""


def solve_jointly(
    symmetries: Sequence[Symmetry],
    place: int,
    nest: Nest,
    view: Params,
    reference: Params,
    scale: Mapping[str, float],
    sign_scale: Mapping[str, float] | None = None,
) -> tuple[list[Step], float]:
    r"""Return the best elements of a permutation and of its nested symmetries, and their gain.

    Units i and j are compared by

    .. math:: s_{ij} = \max_{c} \sum_v \Big(\prod_{q \in v} c_q\Big) G^v_{ij}
                       + \sum_f \max_{Q} \langle Q, M^f_{ij} \rangle

    The sets v of signs reach the same slices, and G are products of their units. The symmetries f
    act inside units, and M are products of their slices. For a rotation the last maximum is a
    nuclear norm. Then units are assigned.

    Args:
        symmetries: All symmetries of the network.
        place: Place of the permutation.
        nest: Symmetries that it contains.
        view: Parameters of a source.
        reference: Parameters to match.
        scale: Weight of every parameter.
        sign_scale: Weights of the parameters that decide signs; None: ``scale``. Activations often
            leave signs open.
    """
    outer = symmetries[place]
    rest = _without(view, symmetries, nest) if nest.inside else view
    by_pattern = _products_by_pattern(symmetries, place, nest, rest, reference, scale)
    score, chosen = _best_signs(by_pattern, outer.size)
    now = _now(by_pattern, outer.size)
    if sign_scale is not None:
        by_sign = _products_by_pattern(symmetries, place, nest, rest, reference, sign_scale)
        best, chosen = _best_signs(by_sign, outer.size)
        sign_gain = float((best.diagonal() - _now(by_sign, outer.size)).sum())
        now = score.diagonal()
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
    if sign_scale is not None and gain <= SMALLEST_GAIN:
        gain = sign_gain
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


def _now(products: Mapping[frozenset[int], Tensor], size: int) -> Tensor:
    """Return the product ``(S,)`` of every unit as it stands."""
    total = torch.zeros(size, dtype=torch.float64)
    for product in products.values():
        total = total + product.diagonal()
    return total


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
        sign: {spot_of(p, outer.size) for p in symmetries[sign].slices} for sign in nest.signs
    }
    products: dict[frozenset[int], Tensor] = {}
    for part in outer.slices:
        if part.parameter not in scale:
            continue
        spot = spot_of(part, outer.size)
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
    chosen |= _independent_signs(products, ones)
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


def _independent_signs(
    products: Mapping[frozenset[int], Tensor], ones: Tensor
) -> dict[int, Tensor]:
    """Return signs that make products positive, the largest first: elimination modulo 2."""
    basis: list[tuple[int, frozenset[int], Tensor]] = []
    for pattern in sorted(products, key=lambda p: float(products[p].norm()), reverse=True):
        rest, sign = pattern, torch.where(products[pattern] < 0, -1.0, 1.0).to(ones)
        for pivot, other, value in basis:
            if pivot in rest:
                rest, sign = rest ^ other, sign * value
        if rest:
            basis.append((min(rest), rest, sign))
    signs: dict[int, Tensor] = {}
    for pivot, rest, sign in reversed(basis):
        known = [signs[name] for name in rest if name in signs]
        for value in known:
            sign = sign * value
        signs[pivot] = sign
    return signs


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
    sorted_slices = [sorted(symmetries[p].slices, key=order_of) for p in family]
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
