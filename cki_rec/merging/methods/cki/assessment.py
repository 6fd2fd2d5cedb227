"""How much of each source is worth keeping: the global, the local and the dual perspective.

Shapes: K sources of one parameter ``*shape``; results are per source, ``(K, ...)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from cki_rec.merging.methods.cki.gate import apply_gate
from cki_rec.merging.params import MergeError, Params, check_same, compute_dtype
from cki_rec.merging.rows import Block, Rows, in_blocks, in_memory
from cki_rec.merging.sparsification import order_statistics

Histogram: TypeAlias = Literal["own", "shared", "quantile"]
"""Range of a histogram: that of its own tensor (as released), that of all sources, or from the
smallest of their 0.1 % quantiles to the largest of their 99.9 % quantiles."""
TAIL = 0.001

_CHUNK, _COMPARED = 1 << 22, 1 << 16
"""Entries of a table binned at once: bounds the temporaries, and those compared fit a cache."""
MOST_COMPARED = 64
"""Bins below which entries are compared with every edge."""


def entropy(weight: Tensor, bins: int = 10, bounds: tuple[Tensor, Tensor] | None = None) -> float:
    r"""Return the entropy of a tensor's histogram, in nats.

    .. math:: H(W) = -\sum_{h_i > 0} h_i \ln h_i

    :math:`h_i` is the share of entries in ``[min + i s, min + (i + 1) s)``. Entries equal to the
    maximum fall in no bin, unless rounding (in float32 or wider) puts the last edge above it, as
    in the released code. Entries outside of ``bounds`` fall in no bin either. So the shares may
    sum to less than 1. The entropy of a constant tensor is 0.

    Args:
        weight: Of any shape.
        bins: Of the histogram.
        bounds: Where it starts and ends, scalars; None: smallest and largest entry.

    Raises:
        MergeError: ``bins`` is not positive, or an entry is NaN or infinite.

    Reference:
        CKI (arXiv 2501.07596), global assessment, as in the released recommendation code, which
        has it from Filter Grafting (CVPR 2020).
    """
    rows = in_memory([weight])
    return _entropies(rows, bins, bounds_of(rows) if bounds is None else [bounds])[0]


def histogram_bounds(
    tensors: Sequence[Tensor], histogram: Histogram = "own"
) -> list[tuple[Tensor, Tensor]]:
    """Return where the histogram of each source of one parameter starts and ends (``Histogram``).

    Raises:
        MergeError: ``histogram`` is unknown, or an entry is NaN or infinite.
    """
    return bounds_of(in_memory(tensors), histogram)


def bounds_of(rows: Rows, histogram: Histogram = "own") -> list[tuple[Tensor, Tensor]]:
    """Return ``histogram_bounds`` of a parameter; ``quantile`` takes passes over its rows.

    Raises:
        MergeError: As there.
    """
    if histogram not in get_args(Histogram):
        raise MergeError(f"histogram: {histogram!r} is none of {', '.join(get_args(Histogram))}")
    highest_2K = rows.reduce(_extremes, "max").cpu()
    low_K, high_K = -highest_2K[0], highest_2K[1]
    if bool((low_K > high_K).any()):  # no entries
        return [(torch.zeros(()), torch.zeros(()))] * len(low_K)
    if histogram == "own":
        return list(zip(low_K, high_K, strict=True))
    if not bool(torch.isfinite(high_K - low_K).all()):
        raise MergeError("entropy of NaN or infinite entries")
    if histogram == "quantile":
        low_K, high_K = order_statistics(rows, _wide, _tails).T
    return [(low_K.amin(), high_K.amax())] * len(low_K)


def _entropies(rows: Rows, bins: int, bounds: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the entropy of each source of a parameter, in one pass over its rows."""
    if bins < 1:
        raise MergeError(f"bins must be positive, not {bins}")
    edges = []
    for ends in bounds:
        low, high = (bound.cpu().to(compute_dtype(bound)) for bound in ends)
        if not bool(torch.isfinite(high - low)):
            raise MergeError("entropy of NaN or infinite entries")
        step = (high - low) / bins  # on the CPU: a GPU multiplies by the rounded reciprocal
        edges.append(low + torch.arange(bins + 1) * step)

    def count(block: Block) -> Tensor:
        pairs = zip(block.models, edges, strict=True)
        return torch.stack([_bin_counts(tensor, each) for tensor, each in pairs])

    entropies = []
    for counts in rows.reduce(count).tolist():
        shares = [count / max(1, sum(counts)) for count in counts[1:-1]]
        entropies.append(math.fsum(-share * math.log(share) for share in shares if share > 0))
    return entropies


def _bin_counts(tensor: Tensor, edges: Tensor) -> Tensor:
    """Return how many entries lie below, between and above edges.

    On a CPU a comparison with each edge is several times as fast as a search among them. Edges
    outside of the entries need none.
    """
    flat, size = tensor.reshape(-1), len(edges) + 1
    if flat.device.type == "cpu" and size < MOST_COMPARED and bool((edges.diff() >= 0).all()):
        at_least = [flat.numel(), *[0] * len(edges), 0]
        is_above = np.empty(min(_COMPARED, flat.numel()), dtype=bool)
        for chunk in flat.split(_COMPARED) if flat.numel() else ():
            low, high = (end.item() for end in chunk.aminmax())
            entries = chunk.to(edges.dtype).numpy()
            for place, edge in enumerate(edges.tolist(), start=1):
                if edge > high:
                    break
                if edge <= low:
                    at_least[place] += len(entries)
                else:
                    above = np.greater_equal(entries, edge, out=is_above[: len(entries)])
                    at_least[place] += int(np.count_nonzero(above))
        return -torch.tensor(at_least).diff()
    edges = edges.to(flat.device)
    counts = torch.zeros(size, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        places = torch.bucketize(chunk.to(edges.dtype), edges, right=True)
        counts += torch.bincount(places, minlength=size)
    return counts


def _extremes(block: Block) -> Tensor:
    """Return ``(2, K)``: the negated smallest and the largest entry of each source."""
    if block.models[0].numel() == 0:
        return block.models[0].new_full((2, len(block.models)), -math.inf)
    ends = [torch.aminmax(tensor) for tensor in block.models]
    return torch.stack(
        [torch.stack([-low for low, _ in ends]), torch.stack([high for _, high in ends])]
    )


def _wide(block: Block) -> list[Tensor]:
    return [tensor.to(compute_dtype(tensor)) for tensor in block.models]


def _tails(num_entries: int) -> tuple[int, int]:
    """Return the ranks below and above which a share of ``TAIL`` lies."""
    place = round(TAIL * (num_entries - 1))
    return place + 1, num_entries - place


def compare_entropies(entropies: Sequence[float]) -> list[float]:
    """Return how far each source's entropy is above the mean of the others'."""
    total, num_others = math.fsum(entropies), len(entropies) - 1
    if num_others == 0:
        return [0.0]
    if num_others == 1:
        difference = entropies[0] - entropies[1]
        return [difference, -difference]
    return [source - (total - source) / num_others for source in entropies]


def global_compatibility(
    tensors: Sequence[Tensor],
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
) -> Tensor:
    r"""Compare the information content of the sources of one parameter.

    .. math:: G = \tfrac{a}{\pi} \arctan\big(c\,(H(W_A) - H(W_B))\big) + \tfrac12

    Two sources get (G, 1 - G). More than two is our extension: each is compared with the mean
    entropy of the others, and the terms need not sum to 1. One source gets 1/2.

    Returns:
        ``(K,)`` float64, between ``(1 - a) / 2`` and ``(1 + a) / 2``.

    Raises:
        MergeError: ``a`` is not in [0, 1], ``histogram`` is unknown, or a tensor has NaN or
            infinite entries.

    Reference:
        CKI (arXiv 2501.07596), global assessment, as in the released recommendation code.

    Differs:
        The form for more than two sources is ours; the paper only names the case. So are ranges
        other than ``own``: the released histogram mostly measures the two extreme entries.
    """
    return global_terms_of(in_memory(tensors), a, c, bins, histogram).to(tensors[0].device)


def global_terms_of(
    rows: Rows,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
) -> Tensor:
    """Return ``global_compatibility`` of a parameter that is read in blocks, on the CPU.

    Raises:
        MergeError: As there, with the name of the parameter.
    """
    try:
        terms = global_terms(_entropies(rows, bins, bounds_of(rows, histogram)), a, c)
    except MergeError as error:
        raise MergeError(f"{rows.name}: {error}" if rows.name else str(error)) from None
    return torch.tensor(terms, dtype=torch.float64)


def entropies(
    tensors: Sequence[Tensor], bins: int = 10, histogram: Histogram = "own"
) -> list[float]:
    """Return the entropy of each source of one parameter.

    Raises:
        MergeError: As ``entropy`` and ``histogram_bounds``.
    """
    return entropies_of(in_memory(tensors), bins, histogram)


def entropies_of(rows: Rows, bins: int = 10, histogram: Histogram = "own") -> list[float]:
    """Return the entropy of each source of a parameter that is read in blocks.

    Raises:
        MergeError: As ``entropy`` and ``histogram_bounds``.
    """
    return _entropies(rows, bins, bounds_of(rows, histogram))


def global_terms(entropies_K: Sequence[float], a: float = 0.4, c: float = 500.0) -> list[float]:
    """Return the global term of each source (``global_compatibility``) from its entropy.

    Raises:
        MergeError: ``a`` is not in [0, 1].
    """
    if not 0 <= a <= 1:
        raise MergeError(f"a must be between 0 and 1, not {a}")
    terms = [_global_term(difference, a, c) for difference in compare_entropies(entropies_K)]
    if len(terms) == 2:
        terms[1] = 1 - terms[0]
    return terms


def compute_global_terms(
    models: Sequence[Params],
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
) -> dict[str, Tensor]:
    """Return ``global_compatibility`` of every parameter; it does not depend on gates.

    Raises:
        MergeError: Models differ, or a tensor has NaN or infinite entries, by name.
    """
    check_same(models)
    return {
        name: global_terms_of(rows, a, c, bins, histogram)
        for name, rows in in_blocks(models).items()
    }


def local_compatibility(
    tensors: Sequence[Tensor], gate: Tensor | None, signed: bool = False, scale: float = 1.0
) -> Tensor:
    r"""Score every entry of one parameter by how the sources differ around it.

    .. math:: L_A = \sigma\big(s\,|W_A - W_B| P^T\big), \quad L_B = 1 - L_A

    More than two sources is our extension: each is compared with the mean of the others through
    the same gate, ``L_k = sigmoid(|W_k - mean of others| P^T)``.

    Args:
        tensors: One tensor per source; fewer than 2 axes count as ``(n, 1)``.
        gate: P, as ``initialize_gate`` makes it, or None for L = 1/2.
        signed: Compare without taking absolute values.
        scale: s.

    Returns:
        ``(K, *shape)`` in (0, 1), or ``(K, 1, ..., 1)`` of 1/2 without a gate or with K = 1.

    Reference:
        CKI (arXiv 2501.07596), local assessment, as in the released recommendation code;
        ``signed`` as its ``load_param``, ``scale`` as its language code (5 and 10 in v2 and v4).

    Differs:
        Gates of low rank, diagonal and scalar, and the form for more than two sources are ours.
    """
    first, num_sources = tensors[0], len(tensors)
    dtype = compute_dtype(first)
    if gate is None or num_sources == 1:
        shape = (num_sources, *[1] * first.ndim)
        return torch.full(shape, 0.5, dtype=dtype, device=first.device)
    wide = [tensor.to(dtype) for tensor in tensors]

    def score(difference: Tensor) -> Tensor:
        scores = apply_gate(difference if signed else difference.abs_(), gate)
        return torch.sigmoid(scores if scale == 1 else scale * scores)

    if num_sources == 2:
        local = score(wide[0] - wide[1])
        return torch.stack([local, 1 - local])
    scores = []
    for k, source in enumerate(wide):
        others = sum(wide[:k] + wide[k + 1 :], torch.zeros_like(source)) / (num_sources - 1)
        scores.append(score(source - others))
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
    return terms * (1 - (-terms * local_K).exp_())


def signed_compatibility(global_K: Tensor, local_K: Tensor) -> Tensor:
    r"""Join both perspectives by the other rule of the released recommendation code.

    .. math:: K_A = 1 - G \exp(-G L), \quad K_B = 1 - G \exp(G L - 1)

    G and L are those of the first source, L of signed differences. More than two sources is our
    extension: ``K_k = 1 - G_k exp(-G_k L_k)``, the form of the first.

    Args:
        global_K: ``(K,)``.
        local_K: ``(K, *s)``.

    Returns:
        ``(K, *s)`` in the dtype of ``local_K``.

    Reference:
        CKI (arXiv 2501.07596), ``load_param`` of the released recommendation code, which nothing
        there calls.
    """
    terms = global_K.to(local_K).reshape(-1, *[1] * (local_K.ndim - 1))
    if len(terms) != 2:
        return 1 - terms * torch.exp(-terms * local_K)
    both = terms[0] * local_K[0]
    return torch.stack([1 - terms[0] * torch.exp(-both), 1 - terms[0] * torch.exp(both - 1)])


def language_shares(global_K: Tensor, local_K: Tensor) -> Tensor:
    r"""Return the weights of the released language code, which join both perspectives.

    .. math:: \alpha_A = G L + (1 - G), \quad \alpha_B = 1 - \alpha_A

    More information in A lowers its weight, other than in the recommendation code. More than two
    sources is our extension: :math:`\alpha_k = (1 - G_k) L_k / (K - 1)` for all but the first
    source, which gets the rest; for two that is the rule above.

    Args:
        global_K: ``(K,)``.
        local_K: ``(K, *s)``.

    Returns:
        ``(K, *s)``, non-negative, sum 1 over K.

    Reference:
        CKI (arXiv 2501.07596), released language code, v1; v6 takes the larger one whole.
    """
    terms = global_K.to(local_K).reshape(-1, *[1] * (local_K.ndim - 1))
    if len(terms) == 1:
        return torch.ones_like(local_K)
    if len(terms) == 2:
        first = terms[0] * local_K[0] + (1 - terms[0])
        return torch.stack([first, 1 - first])
    others = (1 - terms[1:]) * local_K[1:] / (len(terms) - 1)
    return torch.cat([1 - others.sum(dim=0, keepdim=True), others])


def _global_term(difference: float, a: float, c: float) -> float:
    return a / math.pi * math.atan(c * difference) + 0.5
