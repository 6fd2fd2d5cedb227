"""How much of each source is worth keeping: the global, the local and the dual perspective.

Shapes: K sources of one parameter ``*shape``; results are per source, ``(K, ...)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.integration.gate import apply_gate
from cki_rec.integration.params import Params, check_same, compute_dtype

_CHUNK = 1 << 22
"""Entries of a table binned at once: bounds the temporaries."""


def entropy(weight: Tensor, bins: int = 10) -> float:
    r"""Return the entropy of a tensor's histogram over its own range, in nats.

    .. math:: H(W) = -\sum_{h_i > 0} h_i \ln h_i

    :math:`h_i` is the share of entries in ``[min + i s, min + (i + 1) s)``. Entries equal to the
    maximum fall in no bin (unless rounding, in float32 or wider, puts the last edge above it, as
    in the released code), so shares may sum to less than 1; constant tensors give 0.

    Raises:
        ValueError: ``bins`` is not positive, or an entry is NaN or infinite.

    Reference:
        CKI (arXiv 2501.07596), global assessment, as in the released recommendation code, which
        has it from Filter Grafting (CVPR 2020).
    """
    if bins < 1:
        raise ValueError(f"bins must be positive, not {bins}")
    if weight.numel() == 0:
        return 0.0
    flat = weight.detach().reshape(-1)
    dtype = compute_dtype(flat)
    low, high = (bound.cpu().to(dtype) for bound in torch.aminmax(flat))
    if not bool(torch.isfinite(high - low)):
        raise ValueError("entropy of NaN or infinite entries")
    step = (high - low) / bins  # on the CPU: a GPU multiplies by the rounded reciprocal
    edges = (low + torch.arange(bins + 1) * step).to(flat.device)
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(dtype)
        counts += torch.bincount(torch.bucketize(chunk, edges, right=True), minlength=bins + 2)
    shares = [count / flat.numel() for count in counts[1:-1].tolist()]
    return math.fsum(-share * math.log(share) for share in shares if share > 0)


def global_compatibility(
    tensors: Sequence[Tensor], a: float = 0.4, c: float = 500.0, bins: int = 10
) -> Tensor:
    r"""Compare the information content of the sources of one parameter.

    .. math:: G = \tfrac{a}{\pi} \arctan\big(c\,(H(W_A) - H(W_B))\big) + \tfrac12

    Two sources get (G, 1 - G). More than two is our extension: each is compared with the mean
    entropy of the others, and the terms need not sum to 1. One source gets 1/2.

    Returns:
        ``(K,)`` float64, between ``(1 - a) / 2`` and ``(1 + a) / 2``.

    Raises:
        ValueError: ``a`` is not in [0, 1], or ``entropy`` refuses a tensor.

    Reference:
        CKI (arXiv 2501.07596), global assessment, as in the released recommendation code.

    Differs:
        The form for more than two sources is ours; the paper only names the case.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a must be between 0 and 1, not {a}")
    entropies = [entropy(tensor, bins) for tensor in tensors]
    num_sources = len(entropies)
    if num_sources == 1:
        terms = [0.5]
    elif num_sources == 2:
        term = _global_term(entropies[0] - entropies[1], a, c)
        terms = [term, 1 - term]
    else:
        total = math.fsum(entropies)
        others = [(total - own) / (num_sources - 1) for own in entropies]
        differences = [own - other for own, other in zip(entropies, others, strict=True)]
        terms = [_global_term(difference, a, c) for difference in differences]
    return torch.tensor(terms, dtype=torch.float64, device=tensors[0].device)


def compute_global_terms(
    models: Sequence[Params], a: float = 0.4, c: float = 500.0, bins: int = 10
) -> dict[str, Tensor]:
    """Return ``global_compatibility`` of every parameter; it does not depend on gates.

    Raises:
        ValueError: Models differ, or a tensor has NaN or infinite entries, by name.
    """
    check_same(models)
    terms = {}
    for name in models[0]:
        try:
            terms[name] = global_compatibility([model[name] for model in models], a, c, bins)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return terms


def local_compatibility(tensors: Sequence[Tensor], gate: Tensor | None) -> Tensor:
    r"""Score every entry of one parameter by how the sources differ around it.

    .. math:: L_A = \sigma\big(|W_A - W_B| P^T\big), \quad L_B = 1 - L_A

    More than two sources is our extension: each is compared with the mean of the others through
    the same gate, ``L_k = sigmoid(|W_k - mean of others| P^T)``.

    Args:
        tensors: One tensor per source; fewer than 2 axes count as ``(n, 1)``.
        gate: P: ``(in, in)``, a diagonal ``(in,)``, a scalar ``()``, or None for L = 1/2.

    Returns:
        ``(K, *shape)`` in (0, 1), or ``(K, 1, ..., 1)`` of 1/2 without a gate or with K = 1.

    Reference:
        CKI (arXiv 2501.07596), local assessment, as in the released recommendation code.

    Differs:
        Diagonal and scalar gates and the form for more than two sources are ours.
    """
    first, num_sources = tensors[0], len(tensors)
    dtype = compute_dtype(first)
    if gate is None or num_sources == 1:
        shape = (num_sources, *[1] * first.ndim)
        return torch.full(shape, 0.5, dtype=dtype, device=first.device)
    wide = [tensor.to(dtype) for tensor in tensors]
    if num_sources == 2:
        local = torch.sigmoid(apply_gate((wide[0] - wide[1]).abs(), gate))
        return torch.stack([local, 1 - local])
    scores = []
    for k, own in enumerate(wide):
        others = sum(wide[:k] + wide[k + 1 :], torch.zeros_like(own)) / (num_sources - 1)
        scores.append(torch.sigmoid(apply_gate((own - others).abs(), gate)))
    return torch.stack(scores)


def dual_compatibility(global_K: Tensor, local_K: Tensor) -> Tensor:
    r"""Join both perspectives into one score per source and entry.

    .. math:: K_k = G_k \big(1 - \exp(-G_k L_k)\big)

    Args:
        global_K: ``(K,)``.
        local_K: ``(K, *s)``.

    Returns:
        ``(K, *s)`` in the dtype of ``local_K``.

    Reference:
        CKI (arXiv 2501.07596), dual-perspective assessment, as in the released recommendation
        code.
    """
    terms = global_K.to(local_K).reshape(-1, *[1] * (local_K.ndim - 1))
    return terms * (1 - torch.exp(-terms * local_K))


def _global_term(difference: float, a: float, c: float) -> float:
    return a / math.pi * math.atan(c * difference) + 0.5
