"""The coordinates of embeddings: move a model in them, compare and join those of several models.

Shape legend: K sources, V rows and D columns of a table, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.mixing import mix
from cki_rec.merging.params import BLOCK, MixingWeights, Params, compute_dtype
from cki_rec.merging.symmetry import Slice, Symmetry

READERS = 5.0
"""Weight of what the first layers read, against what tables hold, in the choice of a frame. On
validation rows of MovieLens 1M (DeepFM, suite seeds, seed 1) 5, 10 and 20 were alike, 2 worse."""


def transform(
    params: Params,
    symmetries: Sequence[Symmetry],
    elements: Sequence[Tensor],
    in_place: bool = False,
) -> Params:
    """Return a model with a group element of every symmetry applied; its outputs do not change.

    Parameters that nothing moves are shared with ``params``. Permutations move numbers bit for
    bit; rotations are computed in float64, ``BLOCK`` rows at a time.

    Args:
        params: One model.
        symmetries: Of its network.
        elements: Per symmetry ``(S, S)``.
        in_place: Move the tensors of ``params`` themselves: no memory for a second model.
    """
    moved = dict(params)
    for symmetry, element in zip(symmetries, elements, strict=True):
        if bool((element.diagonal() == 1).all()):  # of an orthogonal matrix: the identity
            continue
        for part in symmetry.slices:
            tensor = moved[part.parameter]
            if tensor is params[part.parameter] and not in_place:
                tensor = moved[part.parameter] = tensor.clone()
            matrix = element if part.signed else element.abs()
            _act(units_of(tensor, part, symmetry.size), matrix, symmetry.kind)
    return moved


def table_products(
    models: Sequence[Params], tables: Sequence[str], counts: Sequence[Params] = ()
) -> dict[str, Tensor]:
    r"""Return the products of every two sources' tables, weighted by what both have seen.

    .. math:: G_{kj} = \sum_r w_{kj}[r] E_k[r]^T E_j[r], \quad w_{kj}[r] = \min(n_k[r], n_j[r])

    Rows that one of two sources never saw have no weight: their initial values are noise. Products
    of shards of rows add up to those of the whole table.

    Args:
        models: One per source.
        tables: Names of ``(V, D)`` parameters.
        counts: Per source and table ``(V,)``; empty: every row weighs the same.

    Returns:
        ``(K, K, D, D)`` float64 per table.
    """
    return {
        name: _products([m[name] for m in models], [c[name] for c in counts]) for name in tables
    }


def reduce_frames(
    merged: Params,
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    products: Mapping[str, Tensor],
    shares: MixingWeights,
    readers: Collection[str],
) -> Params:
    r"""Return the merged model with embeddings projected from all sources' frames, not averaged.

    .. math:: E = \sqrt{K} \sum_k \alpha_k E_k R_k, \quad R^T R = 1

    The columns of R are the leading directions of the concatenated tables' second moment plus that
    of the first layers that read them; the mean of aligned tables is the case
    :math:`R_k = 1 / \sqrt{K}`. Inner products survive as well as can be; linear readers must be
    fitted anew (``fit_layers``).

    Args:
        merged: What it is to replace frames of.
        models: Aligned sources.
        symmetries: Those of kind rotation are reduced.
        products: ``table_products``.
        shares: Mixing weights of all parameters.
        readers: MixingWeights of linear maps; whatever else a symmetry moves has coordinates of its own.

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


def whole_weights(
    shares: MixingWeights,
    symmetries: Sequence[Symmetry],
    readers: Collection[str],
    whole: Collection[str],
    lead: int,
) -> MixingWeights:
    """Return the mixing weights of what comes from one source, with the tables it reads.

    What multiplies coordinates one by one, as attention to a history or DCNv2's cross network
    does, cannot read a projection (``reduce_frames``). It is the leading source's, and so are the
    rows of its tables in which that has a share; linear readers make up for the others.

    Args:
        shares: Mixing weights of all parameters.
        symmetries: Of the network.
        readers: MixingWeights of linear maps that are fitted anew.
        whole: Parameters that multiply coordinates.
        lead: The source.
    """
    moved = [{p.parameter for p in s.slices} for s in symmetries if s.kind != "rotation"]
    read = [name for names in moved if names & set(whole) for name in sorted(names)]
    found: MixingWeights = {}
    for name in dict.fromkeys([*sorted(whole), *read]):
        if name not in readers:
            alone = torch.zeros_like(shares[name])
            alone[lead] = 1
            has_share = shares[name][lead] > 0
            found[name] = torch.where(has_share, alone, shares[name])
    return found


def polar(product: Tensor) -> Tensor:
    r"""Return the orthogonal matrix Q that maximizes :math:`\langle Q, M \rangle`.

    Reference:
        Schönemann, Psychometrika 1966.
    """
    left, _, right = torch.linalg.svd(product)
    found: Tensor = left @ right
    return found


def units_of(tensor: Tensor, part: Slice, size: int) -> Tensor:
    """Return a view ``(..., width, S)`` of a slice of a parameter."""
    for axis, start, stop in part.within:
        tensor = tensor.narrow(axis, start, stop - start)
    tensor = tensor.narrow(part.axis, part.start, size * part.width)
    units = tensor.unflatten(part.axis, (size, part.width))
    moved: Tensor = units.movedim((part.axis + 1, part.axis), (-2, -1))
    return moved


def _act(units: Tensor, element: Tensor, kind: str) -> None:
    """Replace ``units`` ``(..., S)`` by ``units @ element``, in place, a block at a time."""
    is_permuted = kind != "rotation"
    order, signs = element.abs().argmax(0), element.sum(0)  # of a permutation
    is_signed = is_permuted and bool((signs < 0).any())
    views = units if units.ndim > 1 else units[None]
    for start in range(0, len(views), BLOCK):
        block = views[start : start + BLOCK]
        if is_permuted:
            moved = block[..., order]
            block.copy_(torch.where(signs < 0, -moved, moved) if is_signed else moved)
        else:
            block.copy_((block.double() @ element).to(block.dtype))


def _products(tables: list[Tensor], counts: list[Tensor]) -> Tensor:
    num_sources, columns = len(tables), tables[0].shape[1]
    total = torch.zeros(num_sources, num_sources, columns, columns, dtype=torch.float64)
    dtype, size = (
        compute_dtype(tables[0]),
        BLOCK // 4,
    )  # so that sums in float32 stay exact to 1e-6
    for start in range(0, len(tables[0]), size):
        blocks = [table[start : start + size].to(dtype) for table in tables]
        seen = [count[start : start + size] for count in counts]
        for k in range(num_sources):
            for j in range(k + 1):
                left = blocks[k]
                if seen:
                    left = left * torch.minimum(seen[k], seen[j]).to(dtype)[:, None]
                total[k, j] += (left.T @ blocks[j]).double().cpu()
    for k in range(num_sources):
        for j in range(k):
            total[j, k] = total[k, j].T
    return total


def _project(
    reduced: Params, models: Sequence[Params], part: Slice, directions: Tensor, share: Tensor
) -> None:
    """Set a slice to the spliced projections of the sources' slices."""
    size, name = directions.shape[1], part.parameter
    projected: list[Params] = []
    for k, model in enumerate(models):
        own = directions[k * size : (k + 1) * size] * len(models) ** 0.5
        moved = model[name].clone()
        _act(units_of(moved, part, size), own, "rotation")
        projected.append({name: moved})
    spliced = mix(projected, {name: share})[name]
    reduced[name] = reduced[name].clone()
    units_of(reduced[name], part, size).copy_(units_of(spliced, part, size))
