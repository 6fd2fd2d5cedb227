"""Alignment: bring independently trained models into a shared basis; their outputs do not change.

Symmetries are data (``merging.symmetry``). Here group elements are chosen so that parameters of
different models can be compared entry by entry. Tables take part through small products of two
sources, so a table of any size is read once. Activations take part the same way (``observed``).

Shape legend: K sources, V rows and D columns of a table, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cki_rec.merging.descent import Problem
from cki_rec.merging.observed import Second
from cki_rec.merging.params import BLOCK, Params, check_same, compute_dtype, generator
from cki_rec.merging.rows import Block, Rows, in_memory
from cki_rec.merging.symmetry import Symmetry, random_element


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
    outputs: Second | None = None,
    anchor: int | None = None,
    anchored_start: bool = False,
    starts: int = 1,
    seed: int = 0,
) -> Alignment:
    r"""Choose group elements that make the sources agree most.

    The objective is the sum over parameters and sources of :math:`\langle R_k, W_k Q_k \rangle`.
    Each parameter is divided by its norms. :math:`R_k` is the mean of all other sources in the
    shared basis. With all but one symmetry fixed, its best element has a closed form. For
    rotations it is the polar factor of a product of the moved parameters (Schönemann). For
    permutations, with signs, it is a linear assignment. Permutations are solved together with the
    signs and rotations that act on the same units (``nested``).

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
        outputs: Second moments of further activations, read where ``moments`` has none.
        anchor: Index of the source that stays as it is, and that the others are aligned to; None:
            the shared basis.
        anchored_start: Also start from the parameters whose entries correspond in all sources:
            rows of tables, raw inputs, activations.
        starts: Number of starts: the identity, then random elements. The result with the largest
            correlations (if there are any), then the largest agreement, is returned.
        seed: Seed of the random starts and of the order of symmetries.

    Raises:
        MergeError: Models differ, or a parameter to match has NaN or infinite entries.

    Reference:
        Schönemann, Psychometrika 1966 (rotations); Ainsworth et al., Git Re-Basin, ICLR 2023,
        sections 3.1 and 3.2 (permutations); Gower, Psychometrika 1975 (the shared basis).

    Differs:
        Rotations, signs and permutations of a recommender in one descent, tables included; nested
        ones jointly; N sources, each toward the mean of the others.
    """
    check_same(models)
    second = {(name, 1): value for name, value in (moments or {}).items()} | dict(outputs or {})
    problem = Problem.build(models, symmetries, products, second)
    identity = problem.identity()
    before = problem.agreement([identity for _ in models])
    if len(models) == 1:
        return Alignment([identity], 1.0, 1.0, 0)
    draw = generator(seed, "alignment")
    best: tuple[tuple[float, float], list[list[Tensor]], int] | None = None
    for start in range(starts + anchored_start):
        if start == starts:
            first = None
        else:
            first = identity if start == 0 else [random_element(s, draw) for s in symmetries]
        candidate, sweeps = problem.solve(first, draw, anchor)
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
    problem = Problem.build(models, symmetries, products, {})
    return problem.agreement([problem.identity() for _ in models])


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
        name: products_of(in_memory([m[name] for m in models], [c[name] for c in counts]))
        for name in tables
    }


def products_of(rows: Rows) -> Tensor:
    """Return ``table_products`` of one table that is read in blocks, ``(K, K, D, D)``."""
    total: Tensor = rows.in_pieces(BLOCK // 4).reduce(_products)  # float32 sums exact to 1e-6
    for k in range(len(total)):
        for j in range(k):
            total[j, k] = total[k, j].T
    return total


def _products(block: Block) -> Tensor:
    """Return the products of every source and those before it."""
    num_sources, columns = len(block.models), block.models[0].shape[1]
    total = torch.zeros(num_sources, num_sources, columns, columns, dtype=torch.float64)
    tables = [table.to(compute_dtype(table)) for table in block.models]
    for k in range(num_sources):
        for j in range(k + 1):
            left = tables[k]
            if block.counts:
                seen = torch.minimum(block.counts[k], block.counts[j])
                left = left * seen.to(left.dtype)[:, None]
            total[k, j] = (left.T @ tables[j]).double().cpu()
    return total
