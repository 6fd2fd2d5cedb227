"""Sources in sequence: each was trained on from the one before, as in daily retraining.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.methods.evidence import evidence_shares
from cki_rec.merging.params import MergeError, MixingWeights, Params, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.selection import constant_weights


@method(needs=("counts",), row_wise=True, reads_values=False, is_ordered=True, reference="ours")
def sequential(
    models: Sequence[Params],
    counts: Sequence[Params],
    newest: float = 0.5,
    decay: float = 0.0,
) -> MixingWeights:
    """Take tables of the newest source, and average the rest with more weight on the newest.

    Args:
        models: The sources, oldest first.
        counts: Per source, ``(V,)`` counts under the name of each ``(V, D)`` table.
        newest: Share of the newest source in parameters that are not tables; the others share the
            rest equally. 1: the newest source alone.
        decay: Factor of a source's counts per later source. 0: table rows of the newest source. 1:
            as ``evidence``.

    Returns:
        ``(K, V, 1)`` for tables, ``(K, 1, ..., 1)`` for the rest.

    Raises:
        MergeError: Counts do not fit, or an option is outside 0 to 1.
    """
    check_same(models)
    num = len(models)
    if not (0 < newest <= 1 and 0 <= decay <= 1):
        raise MergeError(f"newest={newest}, decay={decay}: must be in 0 to 1, newest above 0")
    rest = 0.0 if num == 1 else (1 - newest) / (num - 1)
    weights = constant_weights(models, [*[rest] * (num - 1), newest if num > 1 else 1.0])
    factors = [decay**age for age in range(num - 1, -1, -1)]
    decayed = [
        {name: count.double() * factor for name, count in source.items()}
        for source, factor in zip(counts, factors, strict=True)
    ]
    for name, known in evidence_shares(models, decayed).items():
        seen_V = torch.stack([source[name] for source in decayed]).sum(0)
        unseen_V1 = seen_V.reshape(known.shape[1:]) == 0
        only_newest = _shaped((torch.arange(num) == num - 1).to(known), models[0][name])
        weights[name] = torch.where(unseen_V1, only_newest, known)
    return weights


def _shaped(shares_K: Tensor, like: Tensor) -> Tensor:
    return shares_K.reshape(len(shares_K), *[1] * like.ndim)
