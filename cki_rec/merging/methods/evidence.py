"""Mixing weights from evidence: how often each source has seen a table row in training.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import (
    BLOCK,
    MergeError,
    MixingWeights,
    Params,
    check_same,
    compute_dtype,
    equal_weights,
)
from cki_rec.merging.registry import method


def row_weights(
    counts_KV: Sequence[Tensor] | Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""Return each source's share of a row's observations.

    .. math:: \alpha_k[r] = n_k[r] \big/ \textstyle\sum_j n_j[r]

    For a table this is the least-squares solution: its input is one-hot, so the Gram matrix of
    RegMean is the diagonal of the counts.

    Args:
        counts_KV: Counts of any dtype, or another measure of evidence such as the row-wise
            Adagrad state. They are read ``BLOCK`` rows at a time.
        dtype: Type of the result; the division is done in float64.

    Returns:
        ``(K, V)``. A row seen by one source only has exactly 1 there and 0 elsewhere; a
        row nobody saw has 1/K everywhere.

    Raises:
        MergeError: A count is negative, NaN or infinite.

    Reference:
        RegMean (Jin et al., ICLR 2023), Eq. 2, for one-hot inputs.

    Differs:
        Our extension of CKI; the paper has no counts.
    """
    num_sources, num_rows = len(counts_KV), len(counts_KV[0])
    shares = torch.empty(num_sources, num_rows, dtype=dtype, device=counts_KV[0].device)
    for start in range(0, num_rows, BLOCK):
        rows = slice(start, start + BLOCK)
        counts = torch.stack([count[rows].to(torch.float64) for count in counts_KV])
        if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
            raise MergeError("counts must be finite and not negative")
        total = counts.sum(dim=0)
        known = total > 0
        shares[:, rows] = torch.where(
            known, counts / torch.where(known, total, 1), 1 / num_sources
        )
    return shares


def evidence_shares(models: Sequence[Params], counts: Sequence[Params]) -> MixingWeights:
    """Return ``(K, V, 1)`` row weights of the tables named in ``counts``, and of no others.

    Raises:
        MergeError: Counts name an unknown parameter, or do not fit its rows or the sources.
    """
    check_same(models)
    if len(counts) != len(models):
        raise MergeError(f"counts of {len(counts)} sources for {len(models)} models")
    shares = {}
    for name in dict.fromkeys(name for source in counts for name in source):
        if name not in models[0]:
            raise MergeError(f"{name}: has counts but is no parameter")
        table = models[0][name]
        for k, source in enumerate(counts):
            if name not in source:
                raise MergeError(f"{name}: source {k} has no counts")
            if table.ndim == 0 or source[name].shape != table.shape[:1]:
                shape, rows = tuple(source[name].shape), tuple(table.shape)
                raise MergeError(f"{name}: counts {shape} of source {k} do not fit {rows}")
        try:
            share = row_weights([source[name] for source in counts], compute_dtype(table))
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from None
        share = share.to(table.device)
        shares[name] = share.reshape(*share.shape, *[1] * (table.ndim - 1))
    return shares


@method(
    needs=("counts",),
    row_wise=True,
    reads_values=False,
    averages_dense=True,
    reference="RegMean (Jin et al., ICLR 2023) for one-hot inputs",
)
def evidence(models: Sequence[Params], counts: Sequence[Params]) -> MixingWeights:
    """Weigh table rows by how often each source saw them, and average the rest.

    Args:
        models: One per source.
        counts: Per source, ``(V,)`` counts under the name of each ``(V, D)`` table.

    Returns:
        ``(K, V, 1)`` for tables, ``(K, 1, ..., 1)`` of 1/K for the rest.

    Raises:
        MergeError: As ``evidence_shares``.

    Reference:
        ``row_weights``.
    """
    shares = evidence_shares(models, counts)
    rest = {name: equal_weights(tensor, len(models)) for name, tensor in models[0].items()}
    return rest | shares
