"""Mixing weights from Fisher information: how much a source's outputs depend on each entry.

Shapes: weights are ``(K, *shape)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cki_rec.merging.params import (
    MergeError,
    MixingWeights,
    Params,
    check_same,
    compute_dtype,
    equal_weights,
)
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Rows


def _squares(rows: Rows, **_: Any) -> Tensor | None:
    """Return ``(K,)``: the sum of squares of each F; None for parameters without one."""
    if not next(iter(rows.read())).fisher:
        return None
    return rows.reduce(lambda block: _sums_of_squares(block.fisher))


def _sums_of_squares(fisher: Sequence[Tensor]) -> Tensor:
    return torch.stack([score.double().square().sum() for score in fisher])


@method(
    needs=("fisher",),
    row_wise=True,
    statistics=_squares,
    reference="Fisher merging (Matena and Raffel, NeurIPS 2022)",
    cost="gradients of each sampled row",
)
def fisher(
    models: Sequence[Params],
    fisher: Sequence[Params],
    floor: float = 1e-6,
    normalize: bool = True,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> MixingWeights:
    r"""Weigh entries by how much the scores of each source depend on them.

    .. math:: \alpha_k = F_k \big/ \textstyle\sum_j F_j

    F is the diagonal of the Fisher information. Parameters without an F are averaged: buffers,
    such as statistics of norms.

    Args:
        models: One per source; a subset of the names of ``fisher`` will do.
        fisher: Per source, entries not negative (``engine.fisher``).
        floor: Least F, after normalization: entries that matter to nobody are averaged.
        normalize: Divide each source's F by its L2 norm over all parameters. Otherwise less
            certain sources, whose gradients are larger, would weigh more.
        statistics: Per parameter, of all parameters of the sources, the sum of squares of each F;
            None: those of ``fisher``.

    Raises:
        MergeError: Models differ; an F is missing, does not fit, or has entries that are negative,
            NaN or infinite; names the tensor.

    Reference:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, sections 3
        and 4.

    Differs:
        F is exact for one logit.
    """
    check_same(models)
    if floor < 0:
        raise MergeError(f"floor={floor}: must not be negative")
    if len(fisher) != len(models):
        raise MergeError(f"Fisher information of {len(fisher)} sources for {len(models)} models")
    for k, source in enumerate(fisher):
        for name, value in source.items():
            if not bool((value.isfinite() & (value >= 0)).all()):
                raise MergeError(f"{name}: the F of source {k} must be finite and not negative")
    if statistics is None:
        statistics = {
            name: _sums_of_squares([source[name] for source in fisher])
            for name in fisher[0]
            if all(name in source for source in fisher)
        }
    scales = [1 / _norm(statistics, k) if normalize else 1.0 for k in range(len(models))]
    weights = {}
    for name, tensor in models[0].items():
        if not any(name in source for source in fisher):
            weights[name] = equal_weights(tensor, len(models))
            continue
        for k, source in enumerate(fisher):
            if name not in source or source[name].shape != tensor.shape:
                shape = tuple(source[name].shape) if name in source else "none"
                raise MergeError(f"{name}: F of source {k} is {shape}, not {tuple(tensor.shape)}")
        each = [
            (source[name].double() * scale).clamp_min(floor)
            for source, scale in zip(fisher, scales, strict=True)
        ]
        weights[name] = _shares(torch.stack(each)).to(tensor.device, compute_dtype(tensor))
    return weights


def _shares(fisher_K: Tensor) -> Tensor:
    total = fisher_K.sum(0)
    known = total > 0
    return torch.where(known, fisher_K / torch.where(known, total, 1), 1 / len(fisher_K))


def _norm(squares: Mapping[str, Tensor], source: int) -> float:
    total = sum(float(squares[name][source]) for name in sorted(squares))
    return total**0.5 or 1.0
