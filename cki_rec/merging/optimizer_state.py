"""Row counts and optimizer accumulators of a merged model, and evidence from optimizer state.

Shape legend: V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


ADAGRAD = ("sum", "momentum1", "accumulator")
"""Names of sums of squared gradients."""
ADAM = ("exp_avg_sq", "momentum2")
"""Names of moving averages of squared gradients."""


def squared_gradients(
    state: Mapping[str, Tensor], initial: float = 0.0, beta: float = 0.999
) -> Tensor | None:
    r"""Return the sum of squared gradients of every row of a table, from optimizer state.

    It grows with the training rows that looked a row up, so it stands in for their counts.
    Adagrad holds the sum. Adam holds a moving average v; the sum is estimated as
    :math:`t\, v / (1 - \beta_2^t)`, with t steps. That forgets rows which were last seen many
    times :math:`1 / (1 - \beta_2)` steps ago.

    Args:
        state: Of one table: ``sum`` or ``momentum1`` ``(V, D)``, ``(V,)`` or ``(V, 1)``, or
            ``exp_avg_sq`` ``(V, D)`` with ``step``, one number or ``(V,)``.
        initial: The sum of Adagrad before the first step.
        beta: Adam's :math:`\beta_2`.

    Returns:
        ``(V,)`` float64, the mean over columns. None: the state has no squared gradients.
    """
    if second := [state[name] for name in ADAM if name in state]:
        if "step" not in state:
            return None
        step = state["step"].double().reshape(-1)
        mean = _row_means(second[0])
        return torch.where(step > 0, step * mean / (1 - beta ** step.clamp(min=1)), 0.0)
    if sums := [state[name] for name in ADAGRAD if name in state]:
        return (_row_means(sums[0]) - initial).clamp(min=0)
    return None


def _row_means(tensor: Tensor) -> Tensor:
    return tensor.double().reshape(len(tensor), -1).mean(1)


def _combined(groups: Sequence[Params], combine: Callable[..., Tensor]) -> Params:
    merged = {}
    for name in [name for name in groups[0] if all(name in group for group in groups)]:
        merged[name] = groups[0][name].clone()
        for group in groups[1:]:
            combine(merged[name], group[name], out=merged[name])
    return merged
