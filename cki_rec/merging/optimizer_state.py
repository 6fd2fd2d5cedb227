"""Row counts and optimizer accumulators of a merged model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import Params


def merge_counts(groups: Sequence[Params], is_disjoint: bool) -> Params:
    """Return the entrywise sum of the counts of disjoint sources, else their maximum.

    The maximum counts no row twice that several sources may have seen.
    """
    return _combined(groups, torch.add if is_disjoint else torch.maximum)


def merge_accumulators(groups: Sequence[Params], is_rotated: bool) -> Params:
    """Return the entrywise maximum of Adagrad accumulators, fit for tables in another basis.

    Args:
        groups: Accumulators of every source, by name of the table.
        is_rotated: Tables were moved or projected. An accumulator per row is the same in every
            basis; of one per column, the mean over the row is.
    """
    merged = _combined(groups, torch.maximum)
    if not is_rotated:
        return merged
    return {
        name: tensor
        if tensor.ndim < 2 or tensor.shape[1] == 1
        else tensor.mean(1, keepdim=True).expand_as(tensor).contiguous()
        for name, tensor in merged.items()
    }


def _combined(groups: Sequence[Params], combine: Callable[..., Tensor]) -> Params:
    merged = {}
    for name in [name for name in groups[0] if all(name in group for group in groups)]:
        merged[name] = groups[0][name].clone()
        for group in groups[1:]:
            combine(merged[name], group[name], out=merged[name])
    return merged
