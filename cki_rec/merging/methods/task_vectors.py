r"""Merges of models with a common base: arithmetic on task vectors.

All are one formula, with W_0 the base and :math:`\tau_k = W_k - W_0`:

.. math:: W = W_0 + \lambda \, m\big(s(\tau_1), \dots, s(\tau_K)\big)

They differ in s, which keeps some entries of a task vector, and in m, the sum or the mean of those
that agree in sign. Statistics of batch norms are no directions, and a sum may make a variance
negative: they move from the base to the mean of the sources, and no further.

Thresholds and ranks are per parameter, exact, and found in blocks; random draws depend on (seed,
name, source, row).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import TypeAlias

import torch
from torch import Tensor

from cki_rec.merging.params import (
    STATISTICS,
    MergeError,
    Params,
    check_base,
    check_finite,
    compute_dtype,
)
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Block, Rows, in_blocks
from cki_rec.merging.selection import Score, check_fraction, select_best
from cki_rec.merging.sparsification import (
    keep_magnitudes,
    keep_random,
    keep_random_by_rank,
    kept_magnitudes,
)

SCALED = "one pass; scores of 10 scales"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5)
"""Values that ``scale: null`` chooses from, by validation AUC."""
Sparsify: TypeAlias = Callable[[Tensor, str, int], Tensor]
"""(task vector, name of the parameter, index of its source) -> the same with entries left out."""


def _ends(rows: Rows, density: float, skipped: float = 0.0) -> Tensor | None:
    """Return ``(K, 2)``: the magnitudes of changes that stay; None for statistics."""
    check_fraction("density", density)
    check_fraction("skipped", skipped)
    if rows.name.endswith(STATISTICS):
        return None

    def changes(block: Block) -> list[Tensor]:
        assert block.base is not None
        dtype = compute_dtype(block.base)
        return [tensor.to(dtype) - block.base.to(dtype) for tensor in block.models]

    return kept_magnitudes(rows, changes, density, skipped)


def _keep(
    models: Sequence[Params],
    base: Params,
    statistics: Mapping[str, Tensor] | None,
    density: float,
    skipped: float = 0.0,
) -> Sparsify:
    """Return the function that keeps magnitudes in a range."""
    rows = in_blocks(models, base)

    @cache
    def ends_of(name: str) -> Tensor:
        ends = _ends(rows[name], density, skipped) if statistics is None else statistics[name]
        assert ends is not None
        return ends

    return lambda tau, name, source: keep_magnitudes(tau, ends_of(name)[source])


@method(
    needs=("base",),
    row_wise=True,
    reference="Ilharco et al., ICLR 2023",
    cost=SCALED,
    without_score={"scale": 0.4},  # TIES-Merging (NeurIPS 2023), section 4
)
def task_arithmetic(
    models: Sequence[Params], base: Params, score: Score | None, scale: float | None = None
) -> Params:
    r"""Add the scaled sum of all changes since the base: :math:`W_0 + \lambda \sum_k \tau_k`.

    Args:
        models: One per source.
        base: The model that all sources started from.
        score: Validation AUC of a model; needed if ``scale`` is None.
        scale: :math:`\lambda`; 0: the base; 1/K: the mean. None: the one of ``SCALES`` with the
            best score.

    Raises:
        MergeError: Models or base differ or have NaN or infinite entries; an option is out of
            range; or there is no score to choose by.

    Reference:
        Ilharco et al., Editing models with task arithmetic, ICLR 2023, section 2.
    """
    return _merge(models, base, score, scale, lambda tau, *_: tau, elect=False)


@method(
    needs=("base",),
    row_wise=True,
    statistics=lambda rows, density=0.2, scale=None: _ends(rows, density),
    reference="TIES-Merging (Yadav et al., NeurIPS 2023)",
    cost=SCALED,
    without_score={"scale": 1.0},  # there, section 4
)
def ties(
    models: Sequence[Params],
    base: Params,
    score: Score | None,
    density: float = 0.2,
    scale: float | None = None,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Params:
    r"""Keep the largest changes since the base, and average those that agree in sign.

    Args:
        models: One per source.
        base: The model that all sources started from.
        score: Validation AUC of a model; needed if ``scale`` is None.
        density: Share of the entries of every task vector and parameter that is kept.
        scale: :math:`\lambda`, as in ``task_arithmetic``.
        statistics: Per parameter the magnitudes that stay; None: computed here.

    Raises:
        MergeError: As ``task_arithmetic``.

    Reference:
        Yadav et al., TIES-Merging, NeurIPS 2023, algorithm 1.

    Differs:
        Thresholds are per parameter, not over the whole vector, where tables would outvote the
        rest; entries equal to the threshold stay.
    """
    check_fraction("density", density)
    return _merge(
        *(models, base, score, scale),
        _keep(models, base, statistics, density),
        elect=True,
    )


@method(
    needs=("base",),
    is_ordered=True,
    row_wise=True,
    reference="DARE (Yu et al., ICML 2024)",
    cost=SCALED,
)
def dare(
    models: Sequence[Params],
    base: Params,
    score: Score | None,
    seed: int,
    density: float = 0.5,
    elect: bool = False,
    scale: float | None = None,
    *,
    first_rows: Mapping[str, int] | None = None,
) -> Params:
    r"""Drop changes since the base at random, divide the others by ``density``, and add them.

    Args:
        models: One per source.
        base: The model that all sources started from.
        score: Validation AUC of a model; needed if ``scale`` is None.
        seed: Of the draws.
        density: Chance of an entry to stay: 1 minus the paper's drop rate p.
        elect: Join by sign election as TIES does, instead of the sum.
        scale: :math:`\lambda`, as in ``task_arithmetic``.
        first_rows: Number of the first row of parameters that are not whole.

    Raises:
        MergeError: As ``task_arithmetic``.

    Reference:
        Yu et al., Language models are super Mario, ICML 2024, section 3.
    """
    check_fraction("density", density)
    return _merge(
        *(models, base, score, scale),
        lambda tau, name, k: keep_random(
            tau, density, seed, f"{name}/{k}", (first_rows or {}).get(name, 0)
        ),
        elect,
    )


@method(
    needs=("base",),
    is_ordered=True,
    row_wise=True,
    reference="DELLA-Merging (Deep et al., arXiv 2406.11617)",
    cost=SCALED,
)
def della(
    models: Sequence[Params],
    base: Params,
    score: Score | None,
    seed: int,
    density: float = 0.5,
    window: float = 0.4,
    scale: float | None = None,
    *,
    first_rows: Mapping[str, int] | None = None,
) -> Params:
    r"""Drop changes since the base at random, small ones more often, and elect signs.

    Args:
        models: One per source.
        base: The model that all sources started from.
        score: Validation AUC of a model; needed if ``scale`` is None.
        seed: Of the draws.
        density: Mean chance of an entry to stay.
        window: Chance of the largest entry of a row minus that of the smallest (the paper's
            epsilon); narrowed where chances would leave [0, 1].
        scale: :math:`\lambda`, as in ``task_arithmetic``.
        first_rows: Number of the first row of parameters that are not whole.

    Raises:
        MergeError: As ``task_arithmetic``.

    Reference:
        Deep et al., DELLA-Merging, arXiv 2406.11617, section 3 (MagPrune, elect, fuse).

    Differs:
        Ranks are centered, so that the mean chance in a row is ``density``.
    """
    check_fraction("density", density)
    check_fraction("window", window)
    return _merge(
        *(models, base, score, scale),
        lambda tau, name, k: keep_random_by_rank(
            tau, density, window, seed, f"{name}/{k}", (first_rows or {}).get(name, 0)
        ),
        elect=True,
    )


@method(
    needs=("base",),
    row_wise=True,
    statistics=lambda rows, density=0.85, skipped=0.01, scale=None: _ends(rows, density, skipped),
    reference="Model Breadcrumbs (Davari and Belilovsky, ECCV 2024)",
    cost=SCALED,
)
def breadcrumbs(
    models: Sequence[Params],
    base: Params,
    score: Score | None,
    density: float = 0.85,
    skipped: float = 0.01,
    scale: float | None = None,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Params:
    r"""Drop the smallest and the very largest changes since the base, and add the others.

    Args:
        models: One per source.
        base: The model that all sources started from.
        score: Validation AUC of a model; needed if ``scale`` is None.
        density: Share of the entries of every task vector and parameter that is kept.
        skipped: Share of the largest entries that is dropped, rounded down.
        scale: :math:`\lambda`, as in ``task_arithmetic``.
        statistics: Per parameter the magnitudes that stay; None: computed here.

    Raises:
        MergeError: As ``task_arithmetic``.

    Reference:
        Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, section 3.
    """
    check_fraction("density", density)
    check_fraction("skipped", skipped)
    return _merge(
        *(models, base, score, scale),
        _keep(models, base, statistics, density, skipped),
        elect=False,
    )


def _merge(
    models: Sequence[Params],
    base: Params,
    score: Score | None,
    scale: float | None,
    sparsify: Sparsify,
    elect: bool,
) -> Params:
    check_base(models, base)
    check_finite(models)
    check_finite([base], "the base")
    if scale is not None and scale < 0:
        raise MergeError(f"scale={scale}: must be at least 0")
    moves = {}
    for name, origin in base.items():
        dtype = compute_dtype(origin)
        taus = [model[name].to(dtype) - origin.to(dtype) for model in models]
        if name.endswith(STATISTICS):
            moves[name] = torch.stack(taus).mean(0)
            continue
        taus = [sparsify(tau, name, k) for k, tau in enumerate(taus)]
        moves[name] = _elect(taus) if elect else reduce(torch.add, taus)  # in order, of any shape
    num_added = 1 if elect else len(models)
    if scale is None:
        recipes = (_move(base, moves, value, num_added) for value in SCALES)
        scale = SCALES[select_best(recipes, score, "scale")]
    return _move(base, moves, scale, num_added)


def _elect(taus: Sequence[Tensor]) -> Tensor:
    """Return the mean of the entries whose sign is that of the sum; 0 where none is."""
    sign = torch.stack(list(taus)).sum(0).sign()
    total, voters = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for tau in taus:
        agrees = (tau.sign() == sign) & (sign != 0)
        total = total + torch.where(agrees, tau, 0)
        voters = voters + agrees
    return total / voters.clamp(min=1)


def _move(base: Params, moves: Params, scale: float, num_added: int) -> Params:
    """Return base + scale * move; statistics get no further than to the sources' mean."""
    result = {}
    for name, origin in base.items():
        factor = min(1.0, scale * num_added) if name.endswith(STATISTICS) else scale
        move = factor * moves[name]
        moved = torch.where(move == 0, origin.to(move.dtype), origin.to(move.dtype) + move)
        result[name] = moved.to(origin.dtype)
    return result
