"""Model Stock: a point between the base model and the mean of the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.methods.slerp import TOLERANCE, combine, cosines, gram
from cki_rec.merging.params import Params, check_base, check_finite, compute_dtype
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Block, Rows, in_blocks


def _gram(rows: Rows) -> Tensor:
    """Return the ``(K, K)`` scalar products of the task vectors."""

    def products(block: Block) -> Tensor:
        assert block.base is not None
        dtype = compute_dtype(block.base)
        return gram([x.to(dtype) - block.base.to(dtype) for x in block.models])

    return rows.reduce(products)


@method(
    needs=("base",),
    row_wise=True,
    reference="Model Stock (Jang et al., ECCV 2024)",
    statistics=_gram,
)
def model_stock(
    models: Sequence[Params],
    base: Params,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Params:
    r"""Move from the base toward the mean, further the smaller the angle between sources.

    .. math:: W = t \bar W + (1 - t) W_0, \quad t = \frac{K \cos\theta}{1 + (K-1) \cos\theta}

    The cosine is the mean over pairs of task vectors :math:`W_k - W_0`, at least 0; a task vector
    of zeros is orthogonal to all.

    Args:
        models: One per source.
        base: The model that all sources started from.
        statistics: Per parameter the scalar products of task vectors; None: computed here.

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
    result, rows = {}, in_blocks(models, base)
    for name, origin in base.items():
        tensors = [model[name] for model in models]
        t = 1.0
        if num > 1:
            products = _gram(rows[name]) if statistics is None else statistics[name]
            cosine_KK = cosines(products)
            pairs = cosine_KK[~torch.eye(num, dtype=torch.bool)].nan_to_num(0.0)
            cosine = min(1.0, max(0.0, float(pairs.mean())))
            t = num * cosine / (1 + (num - 1) * cosine)
        if t > 1 - TOLERANCE:
            result[name] = combine(tensors, [1 / num] * num)
        else:
            result[name] = combine([origin, *tensors], [1 - t, *[t / num] * num])
    return result
