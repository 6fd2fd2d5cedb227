"""RegMean: linear layers by least squares on the inputs of all sources.

Shape legend: K sources, I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.methods.average import average
from cki_rec.merging.methods.evidence import evidence_shares
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, Params, check_finite, check_same, compute_dtype
from cki_rec.merging.registry import method
from cki_rec.merging.selection import check_fraction

LEAST = 1e-10
"""Directions with less than this share of the largest eigenvalue are not in the inputs."""


@method(
    needs=("moments", "counts"),
    row_wise=True,
    reference="RegMean (Jin et al., ICLR 2023)",
    cost="one pass over sampled rows; a matrix inverse a layer",
)
def regmean(
    models: Sequence[Params],
    moments: Mapping[str, Tensor],
    counts: Sequence[Params],
    correlation: float = 0.9,
) -> Params:
    r"""Merge linear layers by least squares on their inputs, tables by counts; average the rest.

    .. math:: W^T = \Big(\sum_k G_k\Big)^{-1} \sum_k G_k W_k^T, \quad G_k = E[x_k x_k^T]

    Directions that no row has are those of the average. A table's input is one-hot, so its G is
    the diagonal of the counts and its rows are weighted by them.

    Args:
        models: One per source.
        moments: ``MergeInputs.moments``; Linear layers that are not there are averaged.
        counts: Per source and table ``(V,)``; tables that are not there, or all if
            it is empty, are averaged.
        correlation: Factor of the off-diagonal entries of G: 1 is the least-squares solution, 0
            weighs columns by the mean square of their input.

    Raises:
        MergeError: Models differ, a source has NaN or infinite entries, or moments do not fit;
            names the tensor.

    Reference:
        Jin et al., Dataless Knowledge Fusion by Merging Weights (RegMean), ICLR 2023, Eq. 2 and
        section 3.

    Differs:
        All sources have their G on the same rows, where the paper takes each source's own. Tables
        are merged too, by the rows that each source was trained on.
    """
    check_same(models)
    check_finite(models)
    check_fraction("correlation", correlation)
    weights = average(models)
    if counts:
        weights |= evidence_shares(models, counts)
    merged = mix(models, weights)
    for name, second in moments.items():
        if name in merged and len(models) > 1:
            merged[name] = _solve(
                name, [m[name] for m in models], second, merged[name], correlation
            )
    return merged


def _solve(
    name: str, matrices: Sequence[Tensor], second: Tensor, mean: Tensor, correlation: float
) -> Tensor:
    """Return ``(O, I)``: the mean plus the least-squares mean of the differences from it."""
    inputs = matrices[0].shape[-1] + 1
    if second.shape != (len(matrices), inputs) * 2 or not bool(second.isfinite().all()):
        raise MergeError(f"{name}: moments {tuple(second.shape)} do not fit, or are not finite")
    center = mean.double()
    total = torch.zeros(inputs - 1, inputs - 1, dtype=torch.float64)
    product = torch.zeros_like(center.T)
    for k, matrix in enumerate(matrices):
        gram = second[k, :-1, k, :-1].double()
        gram = torch.lerp(gram.diagonal().diag(), gram, correlation)
        total += gram
        product += gram @ (matrix.double() - center).T
    moved: Tensor = torch.linalg.pinv(total, rtol=LEAST, hermitian=True) @ product
    return (center + moved.T).to(compute_dtype(mean)).to(mean.dtype)
