"""Model Stock: a point between the base model and the mean of the sources."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cki_rec.merging.methods.slerp import TOLERANCE, combine, cosines, gram
from cki_rec.merging.params import Params, check_base, check_finite, compute_dtype
from cki_rec.merging.registry import method


@method(needs=("base",), reference="Model Stock (Jang et al., ECCV 2024)")
def model_stock(models: Sequence[Params], base: Params) -> Params:
    r"""Move from the base toward the mean, further the smaller the angle between sources.

    .. math:: W = t \bar W + (1 - t) W_0, \quad t = \frac{K \cos\theta}{1 + (K-1) \cos\theta}

    The cosine is the mean over pairs of task vectors :math:`W_k - W_0`, at least 0; a task vector
    of zeros is orthogonal to all.

    Raises:
        MergeError: Models or base differ, or have NaN or infinite entries.

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
            cosine_KK = cosines(gram([x.to(dtype) - origin.to(dtype) for x in tensors]))
            pairs = cosine_KK[~torch.eye(num, dtype=torch.bool)].nan_to_num(0.0)
            cosine = min(1.0, max(0.0, float(pairs.mean())))
            t = num * cosine / (1 + (num - 1) * cosine)
        if t > 1 - TOLERANCE:
            result[name] = combine(tensors, [1 / num] * num)
        else:
            result[name] = combine([origin, *tensors], [1 - t, *[t / num] * num])
    return result
