r"""Merges that look at angles between models, parameter by parameter.

Every formula here needs scalar products of whole parameters only, so a table is read twice, in
blocks: for its Gram matrix, and for the weighted sum. With u_k = W_k / |W_k|, all points of the
sphere that occur are combinations of the u_k.

Shape legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.methods.soups import check_share
from cki_rec.merging.params import (
    STATISTICS,
    Params,
    check_base,
    check_finite,
    check_same,
    compute_dtype,
)

BLOCK = 1 << 20
"""Entries of a parameter that are multiplied at a time, in float64."""
SMALLEST_SINE = 1e-6
"""Vectors nearer to parallel than this are interpolated along the chord."""
MOST_STEPS = 100
TOLERANCE = 1e-12


def slerp(models: Sequence[Params], t: float = 0.5) -> Params:
    r"""Interpolate between two models along the great circle, per parameter.

    .. math:: W = \frac{\sin((1-t)\Omega)}{\sin\Omega} W_0 + \frac{\sin(t\Omega)}{\sin\Omega} W_1

    Along the chord, :math:`W_0 + t (W_1 - W_0)`, where there is no great circle: parallel,
    opposite or zero vectors (all parameters of one entry), and statistics of batch norms.

    Args:
        models: Two; one comes back as it is.
        t: 0 is the first model, bit for bit, 1 the second.

    Raises:
        ValueError: Models differ, are more than two, or have NaN or infinite entries; t is not in
            [0, 1].

    Reference:
        Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    check_same(models)
    check_share("t", t)
    if len(models) > 2:
        raise ValueError(f"slerp takes 2 models, not {len(models)}; karcher takes any number")
    if t == 0 or len(models) == 1:
        return {name: tensor.clone() for name, tensor in models[0].items()}
    if t == 1:
        return {name: tensor.clone() for name, tensor in models[1].items()}
    check_finite(models)
    result = {}
    for name, tensor in models[0].items():
        pair = [tensor, models[1][name]]
        coefficients = [1 - t, t]
        cosine = _cosines(gram(pair))[0, 1]
        angle = math.acos(max(-1.0, min(1.0, float(cosine)))) if cosine.isfinite() else 0.0
        if math.sin(angle) > SMALLEST_SINE and not name.endswith(STATISTICS):
            coefficients = [math.sin(x * angle) / math.sin(angle) for x in (1 - t, t)]
        result[name] = combine(pair, coefficients)
    return result


def karcher(models: Sequence[Params]) -> Params:
    r"""Return the Karcher mean of the directions, times the mean norm, per parameter.

    The point :math:`\mu` of the sphere with the least sum of squared angles to the u_k: from their
    normalized sum on, :math:`\mu \leftarrow \exp_\mu \big( \tfrac1K \sum_k \log_\mu u_k \big)`
    until it stays. The steps are taken on the K coefficients of the u_k.

    The plain mean is taken where that is not defined: a zero vector, opposite ones (parameters of
    one entry), and for statistics of batch norms.

    Raises:
        ValueError: Models differ, or have NaN or infinite entries.

    Reference:
        Karcher, Riemannian center of mass and mollifier smoothing, 1977; Buss and Fillmore,
        Spherical averages, ACM TOG 2001, algorithm A1.

    Differs:
        Norms are averaged; slerp's formula with t = 1/2 mixes them into the direction.
    """
    check_same(models)
    check_finite(models)
    result = {}
    for name in models[0]:
        tensors = [model[name] for model in models]
        coefficients = [1 / len(models)] * len(models)
        products = gram(tensors)
        norms = products.diagonal().sqrt()
        on_sphere = _karcher(_cosines(products))
        if on_sphere is not None and not name.endswith(STATISTICS):
            coefficients = (on_sphere * norms.mean() / norms).tolist()
        result[name] = combine(tensors, coefficients)
    return result


def model_stock(models: Sequence[Params], base: Params) -> Params:
    r"""Return a point between the base and the mean of the models, per parameter.

    .. math:: W = t \bar W + (1 - t) W_0, \quad t = \frac{K \cos\theta}{1 + (K-1) \cos\theta}

    The cosine is the mean over pairs of task vectors :math:`W_k - W_0`, at least 0; a task vector
    of zeros is orthogonal to all.

    Raises:
        ValueError: Models or base differ, or have NaN or infinite entries.

    Reference:
        Jang et al., Model Stock, ECCV 2024, the ratio for N fine-tuned models.

    Differs:
        Applied once, after training; the paper also merges at the end of every epoch.
    """
    check_base(models, base)
    check_finite(models)
    check_finite([base], "the base")
    num = len(models)
    result = {}
    for name, origin in base.items():
        tensors = [model[name] for model in models]
        t = 1.0
        if num > 1:
            dtype = compute_dtype(origin)
            cosines = _cosines(gram([x.to(dtype) - origin.to(dtype) for x in tensors]))
            pairs = cosines[~torch.eye(num, dtype=torch.bool)].nan_to_num(0.0)
            cosine = min(1.0, max(0.0, float(pairs.mean())))
            t = num * cosine / (1 + (num - 1) * cosine)
        if t > 1 - TOLERANCE:
            result[name] = combine(tensors, [1 / num] * num)
        else:
            result[name] = combine([origin, *tensors], [1 - t, *[t / num] * num])
    return result


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Return the ``(K, K)`` scalar products of tensors of one shape, in float64 on the CPU."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for blocks in zip(*(vector.split(BLOCK) for vector in flat), strict=True):
        rows = torch.stack([block.double() for block in blocks])
        total += rows @ rows.T
    return total.cpu()


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


def _cosines(products_KK: Tensor) -> Tensor:
    """Return cosines from a Gram matrix, exactly 1 on the diagonal; NaN where a vector is zero."""
    norms = products_KK.diagonal().sqrt()
    cosines = products_KK / (norms[:, None] * norms)
    on_diagonal = torch.eye(len(norms), dtype=torch.bool)
    return torch.where(on_diagonal & cosines.isfinite(), 1.0, cosines)


def _karcher(cosines_KK: Tensor) -> Tensor | None:
    """Return the ``(K,)`` coefficients of the Karcher mean of unit vectors; None: undefined."""
    num = len(cosines_KK)
    if not bool(cosines_KK.isfinite().all()):
        return None
    mean = torch.full((num,), 1 / num, dtype=torch.float64)
    for _ in range(MOST_STEPS):
        length = float((mean @ cosines_KK @ mean).clamp(min=0).sqrt())
        if length < SMALLEST_SINE:
            return None
        mean = mean / length
        cosine = (cosines_KK @ mean).clamp(-1, 1)
        if float(cosine.min()) < SMALLEST_SINE - 1:
            return None
        angle = cosine.arccos()
        ratio = torch.where(angle > SMALLEST_SINE, angle / angle.sin(), 1.0)  # log: r (u - cos mu)
        step = (ratio - (ratio * cosine).sum() * mean) / num
        size = float((step @ cosines_KK @ step).clamp(min=0).sqrt())
        if size < TOLERANCE:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
    return mean
