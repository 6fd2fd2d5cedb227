"""The Karcher mean of directions on the sphere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.methods.slerp import SMALLEST_SINE, TOLERANCE, combine, cosines, gram_of
from cki_rec.merging.params import STATISTICS, Params, check_finite, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.rows import in_blocks

MOST_STEPS = 100


@method(
    row_wise=True,
    reference="Karcher, 1977; Buss and Fillmore, ACM TOG 2001",
    statistics=gram_of,
)
def karcher(models: Sequence[Params], *, statistics: Mapping[str, Tensor] | None = None) -> Params:
    r"""Take the Karcher mean of the directions, times the mean norm, per parameter.

    With :math:`u_k = W_k / |W_k|`, it is the point :math:`\mu` of the sphere with the least sum of
    squared angles to the u_k. From their normalized sum on,
    :math:`\mu \leftarrow \exp_\mu \big( \tfrac1K \sum_k \log_\mu u_k \big)` until it stays. The
    steps are taken on the K coefficients of the u_k.

    The plain mean is taken where that is not defined: a zero vector, opposite ones (parameters of
    one entry), and for statistics of batch norms.

    Args:
        models: One per source.
        statistics: Per parameter ``gram`` of the models; None: computed here.

    Raises:
        MergeError: Models differ, or have NaN or infinite entries.

    Reference:
        Karcher, Riemannian center of mass and mollifier smoothing, 1977; Buss and Fillmore,
        Spherical averages, ACM TOG 2001, algorithm A1.

    Differs:
        Norms are averaged; slerp's formula with t = 1/2 mixes them into the direction.
    """
    check_same(models)
    check_finite(models)
    result, rows = {}, in_blocks(models)
    for name in models[0]:
        tensors = [model[name] for model in models]
        coefficients = [1 / len(models)] * len(models)
        products = gram_of(rows[name]) if statistics is None else statistics[name]
        norms = products.diagonal().sqrt()
        on_sphere = _mean_direction(cosines(products))
        if on_sphere is not None and not name.endswith(STATISTICS):
            coefficients = (on_sphere * norms.mean() / norms).tolist()
        result[name] = combine(tensors, coefficients)
    return result


def _mean_direction(cosines_KK: Tensor) -> Tensor | None:
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
