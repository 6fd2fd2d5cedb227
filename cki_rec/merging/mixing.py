"""From scores to weights, and from weights to one model.

Shapes: scores and weights are ``(K, *s)``, ``*s`` broadcastable to the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import (
    BLOCK,
    MergeError,
    MixingWeights,
    Params,
    check_same,
    check_weights,
    compute_dtype,
)

FLAT = 1 << 16
"""Entries that are mixed at a time if a tensor has one weight per source."""


def soften(scores_K: Tensor) -> Tensor:
    """Return soft mixing weights, the softmax of the scores over the sources.

    Reference:
        CKI (arXiv 2501.07596), soft splicing, as in the released recommendation code.
    """
    return torch.softmax(scores_K, dim=0)


def harden(scores_K: Tensor) -> Tensor:
    """Return hard mixing weights: exactly 1 for the source with the largest score, else 0.

    Reference:
        CKI (arXiv 2501.07596), hard splicing.

    Differs:
        Ties go to the first source. Neither text nor recommendation code gives a rule; the
        natural pair form, A where its score is larger, would give them to B.
    """
    best, winner = scores_K[0], torch.zeros_like(scores_K[0], dtype=torch.int64)
    for k, scores in enumerate(scores_K):
        larger = scores > best
        best = torch.where(larger, scores, best)
        winner = torch.where(larger, k, winner)
    return torch.stack([(winner == k).to(scores_K.dtype) for k in range(len(scores_K))])


def mix(models: Sequence[Params], weights: MixingWeights) -> Params:
    r"""Join models into one of the same size.

    .. math:: W = W_0 + \sum_{k \ge 1} \alpha_k (W_k - W_0)

    Where a weight is exactly 1, the result is that source's value bit for bit. Where it is exactly
    0, that source has no influence (NaN included). Equal sources give their common value bit for
    bit. Differentiable with respect to weights strictly between 0 and 1.

    Args:
        models: One per source.
        weights: Mixing weights of every parameter.

    Returns:
        New tensors, in the dtype of the models; computed in float32 or wider.

    Raises:
        MergeError: Models differ or weights do not fit them, by name.

    Reference:
        CKI (arXiv 2501.07596), splicing, as in the released recommendation code.

    Differs:
        The released form is the plain sum of weighted sources, equal up to rounding.
    """
    check_same(models)
    check_weights(weights, models)
    return {name: _splice_one([m[name] for m in models], weights[name]) for name in models[0]}


def source_shares(weights: MixingWeights, models: Sequence[Params]) -> dict[str, list[float]]:
    """Return per parameter the mean weight of each source over the parameter's entries.

    Raises:
        MergeError: MixingWeights do not fit the models, by name.
    """
    check_weights(weights, models)
    return {
        name: weight.detach().reshape(len(models), -1).mean(dim=1, dtype=torch.float64).tolist()
        for name, weight in weights.items()
    }


def override_weights(
    weights: MixingWeights, names: Iterable[str], replacement: MixingWeights
) -> MixingWeights:
    """Return the weights with those of ``names`` taken from ``replacement``.

    Raises:
        MergeError: A name is in one of the two only.
    """
    result = dict(weights)
    for name in names:
        if name not in weights or name not in replacement:
            raise MergeError(f"{name}: has no weights to override")
        result[name] = replacement[name]
    return result


def _splice_one(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    first = tensors[0]
    is_learned = weight.requires_grad or any(tensor.requires_grad for tensor in tensors)
    if not is_learned and weight.numel() == len(tensors):
        return _mix_wholes(tensors, weight)
    if is_learned:
        return _splice_block(tensors, weight)
    if first.ndim < 2 or len(first) <= BLOCK:
        return _mix_block(tensors, weight)
    result = torch.empty_like(first)
    for start in range(0, len(first), BLOCK):
        rows = slice(start, start + BLOCK)
        share = weight if weight.shape[1] == 1 else weight[:, rows]
        result[rows] = _mix_block([tensor[rows] for tensor in tensors], share)
    return result


def _mix_wholes(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return the mix of tensors with one weight each, in blocks that fit caches.

    The result is that of ``_splice_block``. It is written as a - w (a - b), so that equal entries
    stay as they are, negative zeros too.
    """
    dtype = compute_dtype(tensors[0])
    shares = weight.reshape(-1).to(dtype).tolist()
    used = [k for k, share in enumerate(shares) if share != 0] or [0]
    if any(share == 1 for share in shares):  # the last, as in the general form
        return tensors[max(k for k, share in enumerate(shares) if share == 1)].clone()
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    first, *others = [tensors[k].reshape(-1) for k in used]
    if len(others) == 1 and shares[used[1]] == 0.5 and first.dtype == dtype:
        torch.lerp(others[0], first, 0.5, out=result.view(-1))  # the same bits, in one pass
        return result
    flat, size = result.view(-1), min(FLAT, first.numel())
    difference = torch.empty(size, dtype=dtype, device=first.device)
    mixed = torch.empty(size, dtype=dtype, device=first.device)
    for start in range(0, first.numel(), FLAT):
        part = slice(start, start + FLAT)
        base, target = first[part].to(dtype), flat[part]
        away = difference[: len(target)]
        total = base
        out = target if target.dtype == dtype else mixed[: len(target)]
        for k, other in zip(used[1:], others, strict=True):
            torch.sub(base, other[part].to(dtype), out=away)
            torch.sub(total, away.mul_(shares[k]), out=out)
            total = out
        if total is not target:
            target.copy_(total)
    return result


def _mix_block(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return ``_splice_block``, of two finite sources in fewer passes; a zero may change its sign.

    A finite sum of their differences proves that they are finite.
    """
    if len(tensors) != 2 or not tensors[0].numel():
        return _splice_block(tensors, weight)
    dtype = compute_dtype(tensors[0])
    first, second = (tensor.to(dtype) for tensor in tensors)
    ours, theirs = weight.to(dtype)
    away = first - second
    if not bool(away.sum().isfinite()):
        return _splice_block(tensors, weight)
    result = torch.sub(first, away.mul_(theirs), out=away)
    low, high = weight.aminmax()
    if low <= 0 or high >= 1:
        _take((theirs == 0) | (ours == 1), first, result)
        _take((ours == 0) | (theirs == 1), second, result)
    return result.to(tensors[0].dtype)


def _take(is_taken: Tensor, source: Tensor, result: Tensor) -> None:
    """Set entries of ``result`` to those of a source, in place; whole rows are faster."""
    if is_taken.numel() == len(is_taken):
        rows = is_taken.reshape(-1).nonzero()[:, 0]
        result.index_copy_(0, rows, source.index_select(0, rows))
    else:
        torch.where(is_taken, source, result, out=result)


def _splice_block(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    dtype = compute_dtype(tensors[0])
    weight = weight.to(dtype)
    base, unused = tensors[0].to(dtype), weight[0] == 0
    for tensor, share in zip(tensors[1:], weight[1:], strict=True):
        base = torch.where(unused, tensor.to(dtype), base)  # the first source with a weight
        unused = unused & (share == 0)
    result = base
    for tensor, share in zip(tensors[1:], weight[1:], strict=True):
        moves = (share != 0) & (tensor != base)
        result = torch.where(moves, result + share * (tensor.to(dtype) - base), result)
    for tensor, share in zip(tensors, weight, strict=True):
        result = torch.where(share == 1, tensor.to(dtype), result)
    return result.to(tensors[0].dtype)
