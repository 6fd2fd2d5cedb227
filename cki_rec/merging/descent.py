"""The search for the elements that make sources agree most: coordinate descent.

Shape legend: K sources, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cki_rec.merging.closest import best_element, product_with
from cki_rec.merging.nested import SMALLEST_GAIN, solve_jointly
from cki_rec.merging.nesting import Nest, Step, compose, find_nests, joined
from cki_rec.merging.observed import Second, observe
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.symmetry import Symmetry, transform, units_of

MOST_SWEEPS = 100
DIGITS = 9
"""Digits of the objective; results that differ by less are equal."""


@dataclass(slots=True)
class Problem:
    """Constants of the search for elements."""

    views: list[Params]
    symmetries: Sequence[Symmetry]
    products: Mapping[str, Tensor]
    scale: dict[str, float]
    """Weights of parameters."""
    seen: dict[str, float]
    """Weights of activations."""
    observed: frozenset[int]
    """Places of the symmetries that activations decide."""
    nests: Mapping[int, Nest]
    idle: set[int]
    """Places of symmetries that cannot be composed with others: they do not move."""
    coupled: set[int]
    """Places of symmetries that move a parameter twice: their steps are tried."""

    @classmethod
    def build(
        cls,
        models: Sequence[Params],
        symmetries: Sequence[Symmetry],
        products: Mapping[str, Tensor],
        second: Second,
    ) -> Problem:
        """Return the problem of aligning ``models``."""
        symmetries = [joined(symmetry) for symmetry in symmetries]
        views = [_view(model, symmetries, products) for model in models]
        scale = _scales(views, products)
        nests, idle = find_nests(symmetries)
        observed = observe(symmetries, nests, second)
        for name, product in observed.products.items():
            for view in views:
                view[name] = torch.eye(product.shape[-1], dtype=torch.float64)
        coupled = {place for place, nest in nests.items() if nest.inside}
        for place, symmetry in enumerate(symmetries):
            axes = {(part.parameter, part.axis) for part in symmetry.slices}
            if len(axes) > len({name for name, _ in axes}):
                coupled.add(place)
        return cls(
            views,
            observed.symmetries,
            {**products, **observed.products},
            scale,
            dict.fromkeys(observed.products, 1.0),
            observed.places,
            nests,
            idle,
            coupled,
        )

    def identity(self) -> list[Tensor]:
        """Return the identity of every symmetry."""
        return [torch.eye(s.size, dtype=torch.float64) for s in self.symmetries]

    def value(self, elements: list[list[Tensor]]) -> tuple[float, float]:
        """Return the objective: correlations of activations, then agreement."""
        correlation, moved = 0.0, self._moved(elements)
        for k in range(len(moved) if self.seen else 0):
            correlation += _total(self._reference(k, self._others(k), moved), moved[k], self.seen)
        return round(correlation, DIGITS), round(self.agreement(elements), DIGITS)

    def agreement(self, elements: list[list[Tensor]]) -> float:
        """Return the mean over pairs and parameters of cosines."""
        cosine_KK = self._cosines(elements)
        pairs = len(cosine_KK) * (len(cosine_KK) - 1)
        return float(cosine_KK.sum()) / pairs if pairs and self.scale else 1.0

    def solve(
        self, first: list[Tensor] | None, draw: torch.Generator, anchor: int | None
    ) -> tuple[list[list[Tensor]], int]:
        """Return elements of all sources at a fixed point, from one start, and the sweeps."""
        num_sources = len(self.views)
        order = torch.randperm(len(self.symmetries), generator=draw).tolist()
        candidates, sweeps = [], 0
        centers = range(num_sources if num_sources > 2 else 1)  # of two it is all the same
        for center in centers if anchor is None else [anchor]:
            elements = [self.identity() for _ in self.views]
            for k in self._others(center):
                elements[k], used = self._descend(k, [center], elements, first, order)
                sweeps += used
            candidates.append((self.value(elements), elements))
        value, elements = max(candidates, key=lambda pair: pair[0])
        for _ in range(MOST_SWEEPS if num_sources > 2 else 0):
            improved, cosine_K = list(elements), self._cosines(elements).sum(1).tolist()
            for k in sorted(range(num_sources), key=cosine_K.__getitem__):
                if k == anchor:
                    continue
                improved[k], used = self._descend(k, self._others(k), improved, improved[k], order)
                sweeps += used
            new = self.value(improved)
            if new <= value:
                break
            value, elements = new, improved
        return elements, sweeps

    def _others(self, k: int) -> list[int]:
        return [j for j in range(len(self.views)) if j != k]

    def _cosines(self, elements: list[list[Tensor]]) -> Tensor:
        """Return ``(K, K)`` mean cosines between a parameter of two sources, 0 with itself."""
        num_sources, moved = len(self.views), self._moved(elements)
        cosine_KK = torch.zeros(num_sources, num_sources, dtype=torch.float64)
        for k in range(num_sources):
            for j in range(k):
                total = _total(self._reference(k, [j], moved), moved[k], self.scale)
                cosine_KK[k, j] = cosine_KK[j, k] = total / max(len(self.scale), 1)
        return cosine_KK

    def _moved(self, elements: list[list[Tensor]]) -> list[Params]:
        return [
            transform(view, self.symmetries, source_elements)
            for view, source_elements in zip(self.views, elements, strict=True)
        ]

    def _reference(self, k: int, others: Sequence[int], moved: list[Params]) -> Params:
        """Return the mean of other sources, in the form that source k is multiplied with."""
        reference: Params = {}
        for name in (*self.scale, *self.seen):
            if name in self.products:
                parts = [self.products[name][k, j] @ moved[j][name] for j in others]
            else:
                parts = [moved[j][name] for j in others]
            reference[name] = torch.stack(parts).mean(0)
        return reference

    def _descend(
        self,
        k: int,
        others: Sequence[int],
        elements: list[list[Tensor]],
        first: list[Tensor] | None,
        order: list[int],
    ) -> tuple[list[Tensor], int]:
        """Return the elements of source k after coordinate descent, and the number of sweeps."""
        reference = self._reference(k, others, self._moved(elements))
        if first is None:
            chosen, view = self._from_anchors(k, reference)
        else:
            chosen = list(first)
            view = transform(self.views[k], self.symmetries, chosen)
        for sweep in range(1, MOST_SWEEPS + 1):
            is_better = False
            for place in order:
                scale = self.seen if place in self.observed else self.scale
                steps = self._improve(place, reference, view, chosen, scale)
                is_better |= bool(steps)
                chosen, view = self._take(steps, chosen, view)
            if self.nests and is_better:  # rounding, and compositions, are those of the result
                view = transform(self.views[k], self.symmetries, chosen)
            if not is_better:
                return chosen, sweep
        return chosen, MOST_SWEEPS

    def _take(
        self, steps: list[Step], chosen: list[Tensor], view: Params
    ) -> tuple[list[Tensor], Params]:
        """Return elements and parameters after further steps."""
        for place, step in steps:
            chosen = compose(self.nests, chosen, place, step)
            view = transform(view, [self.symmetries[place]], [step])
        return chosen, view

    def _improve(
        self,
        place: int,
        reference: Params,
        view: Params,
        chosen: list[Tensor],
        scale: Mapping[str, float],
    ) -> list[Step]:
        """Return the best change of one symmetry and of those nested in it; empty: none."""
        if place in self.idle:
            return []
        symmetry, is_seen = self.symmetries[place], place in self.observed
        if place in self.nests:
            signs = self.scale if is_seen else None
            steps, gain = solve_jointly(
                self.symmetries, place, self.nests[place], view, reference, scale, signs
            )
            is_change = gain > SMALLEST_GAIN
        else:
            signed, unsigned = self._by_slices(symmetry, reference, view, scale)
            if is_seen and symmetry.kind != "rotation":  # ties are solved as of the source
                now = chosen[place]
                best = best_element(symmetry.kind, now @ signed, now.abs() @ unsigned)
                step = now.T @ best
                if symmetry.kind == "signed_permutation" and not bool(signed.any()):
                    by_weights, _ = self._by_slices(symmetry, reference, view, self.scale)
                    step = torch.where(by_weights < 0, -step.abs(), step.abs())
                is_change = not bool((step.diagonal() == 1).all())
            else:
                step = best_element(symmetry.kind, signed, unsigned)
                before = float((signed + unsigned).trace())
                is_change = product_with(step, signed, unsigned) > before + SMALLEST_GAIN
            steps = [(place, step)]
        if is_change and place in self.coupled:  # products of one axis are not the objective
            moved = self._take(steps, chosen, view)[1]
            gain = _total(reference, moved, scale) - _total(reference, view, scale)
            is_change = gain > SMALLEST_GAIN
        return steps if is_change else []

    def _by_slices(
        self, symmetry: Symmetry, reference: Params, view: Params, scale: Mapping[str, float]
    ) -> tuple[Tensor, Tensor]:
        """Return ``(S, S)`` products of the slices of a symmetry: signed and unsigned ones."""
        products = torch.zeros(2, symmetry.size, symmetry.size, dtype=torch.float64)
        for part in symmetry.slices:
            if part.parameter in scale:
                left = units_of(view[part.parameter], part, symmetry.size)
                right = units_of(reference[part.parameter], part, symmetry.size)
                product = torch.einsum("...wi,...wj->ij", left, right)
                products[0 if part.signed else 1] += scale[part.parameter] * product
        return products[0], products[1]

    def _from_anchors(self, k: int, reference: Params) -> tuple[list[Tensor], Params]:
        """Return first elements of source k, found from one symmetry to the next.

        A slice can be compared once no unknown symmetry moves its parameter on another axis. The
        symmetry with most such entries per unit comes next.
        """
        chosen, view = self.identity(), self.views[k]
        within = {m for nest in self.nests.values() for f in nest.inside for m in f}
        within |= {sign for nest in self.nests.values() for sign in nest.signs}
        unknown = set(range(len(self.symmetries))) - self.idle - within
        while unknown:
            blocked: dict[str, set[int]] = {}
            for place in unknown:
                for part in self.symmetries[place].slices:
                    blocked.setdefault(part.parameter, set()).add(part.axis)
            comparable: dict[int, dict[str, float]] = {}
            entries: dict[int, float] = {}
            for place in sorted(unknown):
                weights = self.seen if place in self.observed else self.scale
                names = {
                    part.parameter: part
                    for part in self.symmetries[place].slices
                    if part.parameter in weights and blocked[part.parameter] == {part.axis}
                }
                comparable[place] = {name: weights[name] for name in names}
                size = self.symmetries[place].size
                entries[place] = sum(units_of(view[n], p, size).numel() for n, p in names.items())
                entries[place] /= size
            place = max(sorted(unknown), key=entries.__getitem__)
            if not entries[place]:
                break
            steps = self._improve(place, reference, view, chosen, comparable[place])
            chosen, view = self._take(steps, chosen, view)
            unknown.discard(place)
        return chosen, view


def _total(reference: Params, moved: Params, scale: Mapping[str, float]) -> float:
    """Return the weighted sum of products of parameters."""
    return sum(
        weight * float((reference[name] * moved[name]).sum()) for name, weight in scale.items()
    )


def _view(model: Params, symmetries: Sequence[Symmetry], products: Mapping[str, Tensor]) -> Params:
    """Return the parameters that symmetries move, in float64, tables as identities."""
    names = {part.parameter for symmetry in symmetries for part in symmetry.slices}
    view = {}
    for name in sorted(names):
        read = products[name] if name in products else model[name].double().cpu()
        if not bool(read.isfinite().all()):
            raise MergeError(f"{name}: has NaN or infinite entries, so it cannot be aligned")
        is_table = name in products
        view[name] = torch.eye(model[name].shape[1], dtype=torch.float64) if is_table else read
    return view


def _scales(views: Sequence[Params], products: Mapping[str, Tensor]) -> dict[str, float]:
    """Return per parameter 1 / its mean squared norm, so that all count equally."""
    scales = {}
    for name in views[0]:
        if name in products:
            norms = [float(products[name][k, k].trace()) for k in range(len(views))]
        else:
            norms = [float(view[name].square().sum()) for view in views]
        mean = sum(norms) / len(norms)
        if mean > 0:
            scales[name] = 1 / mean
    return scales
