"""Measures of one parameter over several sources: the paper's terms, distances, sign conflicts.

All measures are sums over entries, so those of several parameters add up to those of a layer.
Tensors are read a block of rows at a time, so a large table is never copied.

Shape legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from cki_rec.merging.methods.cki.assessment import dual_compatibility, local_compatibility
from cki_rec.merging.mixing import harden, soften
from cki_rec.merging.params import compute_dtype

BLOCK_ENTRIES = 1 << 20
"""Entries that are measured at a time: bounds the temporaries."""

Sums: TypeAlias = dict[str, Tensor]
"""Name of a measure -> its float64 sum over entries."""


def paper_sums(
    tensors: Sequence[Tensor], terms: Sequence[float], gate: Tensor | None, scale: float = 1.0
) -> Sums:
    r"""Return sums of the paper's terms over the entries of one parameter.

    ``global``, ``local``, ``dual``, ``hard`` and ``soft`` are ``(K,)``: the terms, and the mixing
    weights of hard and soft splicing. ``global_ratio``, ``local_ratio`` and ``dual_ratio`` are
    scalars, sums of :math:`\min_k x_k / \max_k x_k`. A ratio of 1 means that no source is
    preferred; equal sources have it everywhere.

    Args:
        tensors: One per source.
        terms: Global term of each source.
        gate: Gate of the local term; None: L = 1/2.
        scale: Factor of the gate's output, before the sigmoid.

    Reference:
        CKI (arXiv 2501.07596), local, global and dual assessment, as in the released
        recommendation code.

    Differs:
        The ratios are ours: the paper compares scores of one entry, not entries of a model.
    """
    entries, num_sources = tensors[0].numel(), len(tensors)
    global_K = torch.tensor(terms, dtype=torch.float64)
    sums = {
        "global": global_K * entries,
        "global_ratio": _ratio(global_K) * entries,
        **{name: torch.zeros(num_sources).double() for name in ("local", "dual", "hard", "soft")},
        **{name: torch.zeros(()).double() for name in ("local_ratio", "dual_ratio")},
    }
    for blocks in _blocks(tensors):
        local = local_compatibility(blocks, gate, scale=scale)
        local = local.expand(num_sources, *blocks[0].shape)
        dual = dual_compatibility(global_K, local)
        for name, values in (
            *(("local", local), ("dual", dual)),
            *(("hard", harden(dual)), ("soft", soften(dual))),
        ):
            sums[name] += values.flatten(1).sum(1).double().cpu()
        for name, scores in (("local_ratio", local), ("dual_ratio", dual)):
            sums[name] += _ratio(scores).sum().double().cpu()
    return sums


def pair_sums(
    tensors: Sequence[Tensor], base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Sums:
    """Return sums over entries from which distances and cosines of every two sources follow.

    ``products`` and ``squares`` are ``(K, K)``: products of two sources, and squares of their
    differences. With a base, ``task_products`` are the products of differences from it, and
    ``conflicts`` counts the entries that two sources move in opposite directions.

    Args:
        tensors: One per source.
        base: The parameter that all sources started from.
        dtype: Type to compute in; None: float32 or wider, and float64 if that overflows.
    """
    num_sources = len(tensors)
    names = ("products", "squares", *(() if base is None else ("task_products",)))
    sums = {name: torch.zeros(num_sources, num_sources, dtype=torch.float64) for name in names}
    if base is not None:
        sums["conflicts"] = torch.zeros((), dtype=torch.float64)
    for blocks in _blocks(tensors if base is None else [*tensors, base], dtype):
        sources = blocks[:num_sources]
        sums["products"] += _products(sources)
        for k, j in combinations(range(num_sources), 2):
            square = (sources[k] - sources[j]).square().sum().double().cpu()
            sums["squares"][k, j] += square
            sums["squares"][j, k] += square
        if base is not None:
            changes = [source - blocks[-1] for source in sources]
            sums["task_products"] += _products(changes)
            signs = torch.stack([change.sign() for change in changes])
            sums["conflicts"] += ((signs.amin(0) < 0) & (signs.amax(0) > 0)).sum().cpu()
    if dtype is None and not all(bool(total.isfinite().all()) for total in sums.values()):
        return pair_sums(tensors, base, torch.float64)
    return sums


def added(parts: Iterable[Sums]) -> Sums:
    """Return the sums of several parameters together; measures of only some are left out."""
    total, *others = parts
    for part in others:
        total = {name: total[name] + part[name] for name in total if name in part}
    return total


def mean_distance(sums: Sums) -> float:
    r"""Return the mean over pairs of :math:`|a - b| / \sqrt{(|a|^2 + |b|^2) / 2}`.

    Equal sources have 0, orthogonal ones of equal length 1.41. Two zero tensors are equal.
    """
    values = []
    for k, j in combinations(range(len(sums["products"])), 2):
        length = (float(sums["products"][k, k]) + float(sums["products"][j, j])) / 2
        values.append(math.sqrt(float(sums["squares"][k, j]) / length) if length > 0 else 0.0)
    return math.fsum(values) / len(values)


def mean_cosine(products_KK: Tensor) -> float | None:
    """Return the mean cosine of two sources; None if one of them is zero in every pair."""
    values = []
    for k, j in combinations(range(len(products_KK)), 2):
        lengths = math.sqrt(float(products_KK[k, k])) * math.sqrt(float(products_KK[j, j]))
        if lengths > 0:
            values.append(min(1.0, max(-1.0, float(products_KK[k, j]) / lengths)))
    return math.fsum(values) / len(values) if values else None


def _products(tensors: Sequence[Tensor]) -> Tensor:
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for k, left in enumerate(tensors):
        for j, right in enumerate(tensors[: k + 1]):
            products[k, j] = (left * right).sum()
            products[j, k] = products[k, j]
    return products


def _ratio(scores_K: Tensor) -> Tensor:
    """Return the smallest score over the largest; 1 if all are 0."""
    return (scores_K.amin(0) / scores_K.amax(0)).nan_to_num(nan=1.0)


def _blocks(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Iterator[list[Tensor]]:
    """Yield blocks of rows of all tensors, in the type to compute in."""
    dtype = dtype or compute_dtype(tensors[0])
    views = [tensor.detach().reshape(-1) if tensor.ndim == 0 else tensor for tensor in tensors]
    if not views[0].numel():
        return
    size = max(1, BLOCK_ENTRIES // (views[0].numel() // len(views[0])))
    for start in range(0, len(views[0]), size):
        yield [view[start : start + size].detach().to(dtype) for view in views]
