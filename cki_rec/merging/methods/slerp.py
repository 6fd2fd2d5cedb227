r"""Spherical interpolation of two models, and the geometry that merges by angles share.

All formulas use scalar products of whole parameters only. So a table is read twice, in blocks:
once for its Gram matrix, once for the weighted sum.

Shape legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import (
    STATISTICS,
    MergeError,
    Params,
    check_finite,
    check_same,
    compute_dtype,
)
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Rows, in_blocks
from cki_rec.merging.selection import check_fraction

BLOCK = 1 << 20
"""Entries of a parameter that are multiplied at a time, in float64."""
SMALLEST_SINE = 1e-6
"""Vectors nearer to parallel than this are interpolated along the chord."""
TOLERANCE = 1e-12


@method(
    is_ordered=True,
    max_models=2,
    row_wise=True,
    reference="Shoemake, SIGGRAPH 1985",
    statistics=lambda rows, t=0.5: None if t in (0, 1) else gram_of(rows),
)
def slerp(
    models: Sequence[Params],
    t: float = 0.5,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Params:
    r"""Interpolate between two models along the great circle, per parameter.

    .. math:: W = \frac{\sin((1-t)\Omega)}{\sin\Omega} W_0 + \frac{\sin(t\Omega)}{\sin\Omega} W_1

    Along the chord, :math:`W_0 + t (W_1 - W_0)`, where there is no great circle: parallel,
    opposite or zero vectors (all parameters of one entry), and statistics of batch norms.

    Args:
        models: Two; one comes back as it is.
        t: 0 is the first model, bit for bit, 1 the second.
        statistics: Per parameter ``gram`` of the models; None: computed here.

    Raises:
        MergeError: Models differ, are more than two, or have NaN or infinite entries; t is not in
            [0, 1].

    Reference:
        Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    check_same(models)
    check_fraction("t", t)
    if len(models) > 2:
        raise MergeError(f"slerp takes 2 models, not {len(models)}; karcher takes any number")
    if t == 0 or len(models) == 1:
        return {name: tensor.clone() for name, tensor in models[0].items()}
    if t == 1:
        return {name: tensor.clone() for name, tensor in models[1].items()}
    check_finite(models)
    result, rows = {}, in_blocks(models)
    for name, tensor in models[0].items():
        pair = [tensor, models[1][name]]
        coefficients = [1 - t, t]
        products = gram_of(rows[name]) if statistics is None else statistics[name]
        cosine = cosines(products)[0, 1]
        angle = math.acos(max(-1.0, min(1.0, float(cosine)))) if cosine.isfinite() else 0.0
        if math.sin(angle) > SMALLEST_SINE and not name.endswith(STATISTICS):
            coefficients = [math.sin(x * angle) / math.sin(angle) for x in (1 - t, t)]
        result[name] = combine(pair, coefficients)
    return result


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Return the ``(K, K)`` scalar products of tensors of one shape, in float64 on the CPU."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for blocks in zip(*(vector.split(BLOCK) for vector in flat), strict=True):
        rows = torch.stack([block.double() for block in blocks])
        total += rows @ rows.T
    return total.cpu()


def gram_of(rows: Rows) -> Tensor:
    """Return ``gram`` of the sources of a parameter that is read in blocks."""
    return rows.reduce(lambda block: gram(block.models))


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    r"""Return :math:`s x_0 + \sum_{k \ge 1} c_k (x_k - x_0)`, s the sum of the coefficients.

    Where they sum to 1 (within 1e-12), equal tensors give themselves back bit for bit. Computed in
    float32 or wider, returned in the dtype of the tensors.
    """
    total = math.fsum(coefficients)
    first = tensors[0].to(compute_dtype(tensors[0]))
    result = first.clone() if abs(total - 1) <= TOLERANCE else first * total
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        wide = tensor.to(first.dtype)
        result = torch.where(wide == first, result, result + coefficient * (wide - first))
    return result.to(tensors[0].dtype)


def cosines(products_KK: Tensor) -> Tensor:
    """Return cosines from a Gram matrix, exactly 1 on the diagonal; NaN where a vector is zero."""
    norms = products_KK.diagonal().sqrt()
    cosines = products_KK / (norms[:, None] * norms)
    on_diagonal = torch.eye(len(norms), dtype=torch.bool)
    return torch.where(on_diagonal & cosines.isfinite(), 1.0, cosines)
