"""Alignment: bring independently trained models into a shared basis; their outputs do not change.

Symmetries are data (``merging.symmetry``). Here group elements are chosen so that parameters of
different models can be compared entry by entry. Tables take part through small products of two
sources, so a table of any size is read once.

Shape legend: K sources, V rows and D columns of a table, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cki_rec.merging.hidden_units import unit_covariance
from cki_rec.merging.params import BLOCK, MergeError, Params, check_same, compute_dtype, generator
from cki_rec.merging.symmetry import Symmetry, random_element, transform, units_of

MOST_SWEEPS = 100
DIGITS = 9
"""Digits of the objective; results that differ by less are equal."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """Group elements that bring each source into the shared basis."""

    elements: list[list[Tensor]]
    """Per source and symmetry a matrix ``(S, S)`` float64."""
    agreement: float
    """Mean cosine between a parameter of two sources, before weighting: 1 for equal ones."""
    agreement_before: float
    sweeps: int


def align(
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    products: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None = None,
    *,
    starts: int = 1,
    seed: int = 0,
) -> Alignment:
    r"""Choose group elements that make the sources agree most.

    The objective is the sum over parameters and sources of :math:`\langle R_k, W_k Q_k \rangle`.
    Each parameter is divided by its norms. :math:`R_k` is the mean of all other sources in the
    shared basis. With all but one symmetry fixed, its best element has a closed form. For
    rotations it is the polar factor of a product of the moved parameters (Schönemann). For
    permutations, with signs, it is a linear assignment.

    The symmetries of a source are taken in turn until none changes; then the next source moves.
    No step lowers the objective. The search starts with all sources aligned to one of them, the
    one with the largest agreement. Then the sources that agree least move first. So the order of
    sources does not matter (up to rounding and exact ties).

    Args:
        models: One per source.
        symmetries: Symmetries of their network.
        products: ``table_products`` of all tables that symmetries move.
        moments: Second moments of the inputs of Linear layers (``MergeInputs.moments``). With
            them, hidden units are matched by the correlation of their activations, not by weights.
        starts: Number of starts: the identity, then random elements. The result with the largest
            correlations (if there are any), then the largest agreement, is returned.
        seed: Seed of the random starts and of the order of symmetries.

    Raises:
        MergeError: Models differ, or a parameter to match has NaN or infinite entries.

    Reference:
        Schönemann, Psychometrika 1966 (rotations); Ainsworth et al., Git Re-Basin, ICLR 2023,
        sections 3.1 and 3.2 (permutations); Gower, Psychometrika 1975 (the shared basis).

    Differs:
        Rotations, signs and permutations of a recommender in one descent, tables included; N
        sources, each toward the mean of the others.
    """
    check_same(models)
    views = [_view(model, symmetries, products) for model in models]
    identity = [torch.eye(s.size, dtype=torch.float64) for s in symmetries]
    elements = [list(identity) for _ in models]
    scale = _scales(views, products)
    correlations = _correlations(symmetries, moments) if moments else {}
    problem = _Problem(views, symmetries, products, scale, correlations)
    before = problem.agreement(elements)
    if len(models) == 1:
        return Alignment(elements, 1.0, 1.0, 0)
    draw = generator(seed, "alignment")
    best: tuple[tuple[float, float], list[list[Tensor]], int] | None = None
    for start in range(starts):
        first = identity if start == 0 else [random_element(s, draw) for s in symmetries]
        candidate, sweeps = problem.solve(first, draw)
        value = problem.value(candidate)
        if best is None or value > best[0]:
            best = (value, candidate, sweeps)
    assert best is not None
    return Alignment(best[1], problem.agreement(best[1]), before, best[2])


def agreement(
    models: Sequence[Params], symmetries: Sequence[Symmetry], products: Mapping[str, Tensor]
) -> float:
    """Return the mean cosine between a parameter of two sources as they are (``align``)."""
    check_same(models)
    views = [_view(model, symmetries, products) for model in models]
    identity = [torch.eye(s.size, dtype=torch.float64) for s in symmetries]
    problem = _Problem(views, symmetries, products, _scales(views, products), {})
    return problem.agreement([identity for _ in models])


@dataclass(slots=True)
class _Problem:
    """Constants of the search for elements."""

    views: list[Params]
    symmetries: Sequence[Symmetry]
    products: Mapping[str, Tensor]
    scale: dict[str, float]
    correlations: dict[int, Tensor]
    """Per symmetry that activations decide: ``(2, K, K, S, S)``, signed and unsigned parts."""

    def value(self, elements: list[list[Tensor]]) -> tuple[float, float]:
        """Return the objective: correlations of activations, then agreement."""
        correlation = 0.0
        for place in self.correlations:
            for k, source_elements in enumerate(elements):
                products = self._by_activations(place, k, self._others(k), elements)
                correlation += _trace(source_elements[place], *products)
        return round(correlation, DIGITS), round(self.agreement(elements), DIGITS)

    def agreement(self, elements: list[list[Tensor]]) -> float:
        """Return the mean over pairs and parameters of cosines."""
        cosine_KK = self._cosines(elements)
        pairs = len(cosine_KK) * (len(cosine_KK) - 1)
        return float(cosine_KK.sum()) / pairs if pairs and self.scale else 1.0

    def solve(self, first: list[Tensor], draw: torch.Generator) -> tuple[list[list[Tensor]], int]:
        """Return elements of all sources at a fixed point, from one start, and the sweeps."""
        num_sources = len(self.views)
        identity = [torch.eye(s.size, dtype=torch.float64) for s in self.symmetries]
        order = torch.randperm(len(self.symmetries), generator=draw).tolist()
        candidates, sweeps = [], 0
        for center in range(num_sources if num_sources > 2 else 1):  # of two it is all the same
            elements = [list(identity) for _ in self.views]
            for k in self._others(center):
                elements[k], used = self._descend(k, [center], elements, first, order)
                sweeps += used
            candidates.append((self.value(elements), elements))
        value, elements = max(candidates, key=lambda pair: pair[0])
        for _ in range(MOST_SWEEPS if num_sources > 2 else 0):
            improved, cosine_K = list(elements), self._cosines(elements).sum(1).tolist()
            for k in sorted(range(num_sources), key=cosine_K.__getitem__):
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
                reference = self._reference(k, [j], moved)
                products = [
                    scale * float((reference[name] * moved[k][name]).sum())
                    for name, scale in self.scale.items()
                ]
                cosine_KK[k, j] = cosine_KK[j, k] = sum(products) / max(len(products), 1)
        return cosine_KK

    def _moved(self, elements: list[list[Tensor]]) -> list[Params]:
        return [
            transform(view, self.symmetries, source_elements)
            for view, source_elements in zip(self.views, elements, strict=True)
        ]

    def _reference(self, k: int, others: Sequence[int], moved: list[Params]) -> Params:
        """Return the mean of ``others`` as source k meets it.

        A table is represented by the product of source k's table with the others' tables. Source
        k views its own table as the identity. The scalar product of both is that of the tables.
        """
        reference: Params = {}
        for name in self.scale:
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
        first: list[Tensor],
        order: list[int],
    ) -> tuple[list[Tensor], int]:
        """Return the elements of source k after coordinate descent, and the number of sweeps."""
        reference = self._reference(k, others, self._moved(elements))
        chosen = list(first)
        view = transform(self.views[k], self.symmetries, chosen)
        for sweep in range(1, MOST_SWEEPS + 1):
            is_better = False
            for place in order:
                symmetry = self.symmetries[place]
                if place in self.correlations:
                    signed, unsigned = self._by_activations(place, k, others, elements)
                    step = chosen[place].T @ _best(symmetry, signed, unsigned)
                    is_change = not bool((step.diagonal() == 1).all())
                else:
                    signed, unsigned = self._by_weights(symmetry, reference, view)
                    step = _best(symmetry, signed, unsigned)
                    now = float((signed + unsigned).trace())
                    is_change = _trace(step, signed, unsigned) > now + 1e-10
                if is_change:
                    is_better = True
                    chosen[place] = chosen[place] @ step
                    view = transform(view, [symmetry], [step])
            if not is_better:
                return chosen, sweep
        return chosen, MOST_SWEEPS

    def _by_weights(
        self, symmetry: Symmetry, reference: Params, view: Params
    ) -> tuple[Tensor, Tensor]:
        """Return ``(S, S)`` products of the slices of a symmetry: signed and unsigned ones."""
        products = torch.zeros(2, symmetry.size, symmetry.size, dtype=torch.float64)
        for part in symmetry.slices:
            if part.parameter in self.scale:
                left = units_of(view[part.parameter], part, symmetry.size)
                right = units_of(reference[part.parameter], part, symmetry.size)
                product = torch.einsum("...wi,...wj->ij", left, right)
                products[0 if part.signed else 1] += self.scale[part.parameter] * product
        return products[0], products[1]

    def _by_activations(
        self, place: int, k: int, others: Sequence[int], elements: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return ``(S, S)`` correlations of source k's units with those of the reference."""
        correlation = self.correlations[place]
        signed = torch.stack([correlation[0, k, j] @ elements[j][place] for j in others]).mean(0)
        unsigned = torch.stack(
            [correlation[1, k, j] @ elements[j][place].abs() for j in others]
        ).mean(0)
        return signed, unsigned


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


def _correlations(
    symmetries: Sequence[Symmetry], moments: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Return correlations of hidden units for the permutations that have moments."""
    correlations = {}
    for place, symmetry in enumerate(symmetries):
        readers = [p for p in symmetry.slices if p.axis == 1 and p.parameter in moments]
        if symmetry.kind == "rotation" or not readers:
            continue
        num_sources, size = len(moments[readers[0].parameter]), symmetry.size
        total = torch.zeros(2, num_sources, num_sources, size, size, dtype=torch.float64)
        for part in readers:
            covariance = unit_covariance(moments[part.parameter], part.start, size * part.width)
            deviation = torch.einsum("kiki->ki", covariance).clamp_min(0).sqrt()
            inverse = torch.where(deviation > 1e-12, 1 / deviation.clamp_min(1e-12), 0.0)
            correlation = torch.einsum("ki,kijm,jm->kjim", inverse, covariance, inverse)
            shape = (num_sources, num_sources, size, part.width, size, part.width)
            units = torch.einsum("kjiwmw->kjim", correlation.reshape(shape))
            total[0 if part.signed else 1] += units
        if bool(total.any()):  # else no unit varies, and weights decide
            correlations[place] = total
    return correlations


def _best(symmetry: Symmetry, signed: Tensor, unsigned: Tensor) -> Tensor:
    """Return the element of the group with the largest product, ``(S, S)``."""
    if symmetry.kind == "rotation":
        return polar(signed)
    is_signed = symmetry.kind == "signed_permutation"
    gain = unsigned + (signed.abs() if is_signed else signed)
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    element = torch.zeros_like(signed)
    negative = (signed[rows, columns] < 0) & is_signed
    element[rows, columns] = torch.where(negative, -1.0, 1.0).to(element)
    return element


def _trace(element: Tensor, signed: Tensor, unsigned: Tensor) -> float:
    return float((element * signed).sum() + (element.abs() * unsigned).sum())


def table_products(
    models: Sequence[Params], tables: Sequence[str], counts: Sequence[Params] = ()
) -> dict[str, Tensor]:
    r"""Return the products of every two sources' tables, weighted by rows that both have seen.

    .. math:: G_{kj} = \sum_r w_{kj}[r] E_k[r]^T E_j[r], \quad w_{kj}[r] = \min(n_k[r], n_j[r])

    Rows that one of two sources never saw have no weight: their initial values are noise. Products
    of shards of rows add up to those of the whole table.

    Args:
        models: One per source.
        tables: Names of ``(V, D)`` parameters.
        counts: Per source and table ``(V,)``; empty: every row weighs the same.

    Returns:
        ``(K, K, D, D)`` float64 per table.
    """
    return {
        name: _products([m[name] for m in models], [c[name] for c in counts]) for name in tables
    }


def polar(product: Tensor) -> Tensor:
    r"""Return the orthogonal matrix Q that maximizes :math:`\langle Q, M \rangle`.

    Reference:
        Schönemann, Psychometrika 1966.
    """
    left, _, right = torch.linalg.svd(product)
    orthogonal: Tensor = left @ right
    return orthogonal


def _products(tables: list[Tensor], counts: list[Tensor]) -> Tensor:
    num_sources, columns = len(tables), tables[0].shape[1]
    total = torch.zeros(num_sources, num_sources, columns, columns, dtype=torch.float64)
    dtype = compute_dtype(tables[0])
    size = BLOCK // 4  # so that sums in float32 stay exact to 1e-6
    for start in range(0, len(tables[0]), size):
        blocks = [table[start : start + size].to(dtype) for table in tables]
        seen = [count[start : start + size] for count in counts]
        for k in range(num_sources):
            for j in range(k + 1):
                left = blocks[k]
                if seen:
                    left = left * torch.minimum(seen[k], seen[j]).to(dtype)[:, None]
                total[k, j] += (left.T @ blocks[j]).double().cpu()
    for k in range(num_sources):
        for j in range(k):
            total[j, k] = total[k, j].T
    return total
