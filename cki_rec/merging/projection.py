"""Projection: tables of one width from the embedding spaces of all sources.

Shape legend: K sources, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.alignment import polar
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MixingWeights, Params
from cki_rec.merging.symmetry import Slice, Symmetry, move_units, set_units, units_of

READERS = 5.0
"""Weight of the first layers' inputs, against the tables' contents, in the choice of a basis. On
validation rows of MovieLens 1M (DeepFM, suite seeds, seed 1) 5, 10 and 20 were alike, 2 worse."""


def project_tables(
    merged: Params,
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    products: Mapping[str, Tensor],
    shares: MixingWeights,
    readers: Collection[str],
) -> Params:
    r"""Return the merged model with embeddings projected from all sources' spaces, not averaged.

    .. math:: E = \sqrt{K} \sum_k \alpha_k E_k R_k, \quad R^T R = 1

    The columns of R are the leading directions of a sum of two second moments: of the concatenated
    tables, and of the first layers that read them. The mean of aligned tables is the case
    :math:`R_k = 1 / \sqrt{K}`. Inner products survive as well as can be; linear readers must be
    fitted anew (``fit_layers``).

    Args:
        merged: The merge of ``models``; its tables are replaced.
        models: Aligned sources.
        symmetries: Symmetries of the network; those of kind rotation are projected.
        products: ``table_products``.
        shares: Mixing weights of all parameters.
        readers: Names of the weights of linear maps. All else that a symmetry moves has
            coordinates of its own.

    Reference:
        Eckart and Young, Psychometrika 1936.
    """
    reduced, num_sources = dict(merged), len(models)
    for symmetry in symmetries:
        if symmetry.kind != "rotation":
            continue
        size = symmetry.size
        wide = num_sources * size
        held, read = (torch.zeros(wide, wide, dtype=torch.float64) for _ in range(2))
        for part in symmetry.slices:
            if part.parameter in products:
                span = slice(part.start, part.start + size)
                block = products[part.parameter][:, :, span, span]
                held += block.permute(0, 2, 1, 3).reshape(wide, wide)
            elif part.parameter in readers:
                views = [units_of(m[part.parameter], part, size).double() for m in models]
                rows = torch.cat([view.reshape(-1, size) for view in views], 1)
                read += rows.T @ rows
        if float(held.trace()) <= 0:
            continue
        metric = held / held.trace()
        if float(read.trace()) > 0:
            metric = metric + READERS * read / read.trace()
        directions = torch.linalg.eigh(metric).eigenvectors[:, -size:]
        mean = torch.eye(size, dtype=torch.float64).repeat(num_sources, 1) / num_sources**0.5
        directions = directions @ polar(directions.T @ mean)  # as near to the mean as can be
        for part in symmetry.slices:
            if part.parameter not in readers:
                _project(reduced, models, part, directions, shares[part.parameter])
    return reduced


def anchor_weights(
    shares: MixingWeights,
    symmetries: Sequence[Symmetry],
    readers: Collection[str],
    copied: Collection[str],
    anchor: int,
) -> MixingWeights:
    """Return the mixing weights of modules that are copied from one source, with their tables.

    Modules that multiply coordinates one by one cannot read a projection (``project_tables``).
    They are copied from the anchor source, and so are the rows of their tables in which that
    source has a share. Linear readers make up for the other sources.

    Args:
        shares: Mixing weights of all parameters.
        symmetries: Symmetries of the network.
        readers: Names of the weights of linear maps that are fitted anew.
        copied: Names of the parameters of such modules.
        anchor: Index of the source.
    """
    moved = [{p.parameter for p in s.slices} for s in symmetries if s.kind != "rotation"]
    tables = [name for names in moved if names & set(copied) for name in sorted(names)]
    weights: MixingWeights = {}
    for name in dict.fromkeys([*sorted(copied), *tables]):
        if name not in readers:
            alone = torch.zeros_like(shares[name])
            alone[anchor] = 1
            has_share = shares[name][anchor] > 0
            weights[name] = torch.where(has_share, alone, shares[name])
    return weights


def _project(
    reduced: Params, models: Sequence[Params], part: Slice, directions: Tensor, share: Tensor
) -> None:
    """Set a slice to the spliced projections of the sources' slices."""
    size, name = directions.shape[1], part.parameter
    projected: list[Params] = []
    for k, model in enumerate(models):
        block = directions[k * size : (k + 1) * size] * len(models) ** 0.5
        moved = model[name].clone()
        move_units(moved, part, block, "rotation")
        projected.append({name: moved})
    spliced = mix(projected, {name: share})[name]
    reduced[name] = reduced[name].clone()
    set_units(reduced[name], part, units_of(spliced, part, size))
