"""Activations as tables: coordinates of layers, observed on the same rows in every source.

Activations of two sources on the same rows are compared like two tables: by products of their
columns. So alignment treats them as one more parameter of a symmetry.

Shape legend: K sources, I inputs of a layer, D columns, S size of a symmetry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cki_rec.merging.nesting import Nest, is_same_place, slice_around, starts_of
from cki_rec.merging.symmetry import Slice, Symmetry

Second = Mapping[tuple[str, int], Tensor]
"""Second moments ``(K, D + 1, K, D + 1)`` float64 of the coordinates that a parameter has on an
axis; the last coordinate is the constant 1."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Symmetries that move activations too."""

    symmetries: list[Symmetry]
    products: dict[str, Tensor]
    """Per name of activations ``(K, K, D, D)``."""
    places: frozenset[int]
    """Places of the symmetries that activations decide."""


def observe(symmetries: Sequence[Symmetry], nests: Mapping[int, Nest], second: Second) -> Observed:
    """Return the symmetries with slices of the activations that they move.

    Units of a permutation are compared by correlations, units that rotate inside by covariances.
    Rotations of whole layers are left to weights: they move tables, whose rows correspond.
    """
    moved = list(symmetries)
    products: dict[str, Tensor] = {}
    places: set[int] = set()
    for place, symmetry in enumerate(symmetries):
        if symmetry.kind not in ("permutation", "signed_permutation"):
            continue
        nest = nests.get(place, Nest())
        seen = [part for part in symmetry.slices if (part.parameter, part.axis) in second]
        readers = [part for part in seen if part.axis == 1]
        seen = seen if nest.inside else readers or seen
        tables = {f"activations {place}.{n}": part for n, part in enumerate(seen)}
        blocks = {n: _products(second, p, symmetry.size, nest) for n, p in tables.items()}
        if not any(bool(block.any()) for block in blocks.values()):
            continue  # no unit varies, and weights decide
        products |= blocks
        places.add(place)
        for name, part in tables.items():
            whole = Slice(name, 1, 0, part.width, part.signed)
            moved[place] = _with(moved[place], whole)
            for sign in nest.signs:
                if any(is_same_place(part, p, symmetry.size) for p in symmetries[sign].slices):
                    moved[sign] = _with(moved[sign], replace(whole, signed=True))
            for inner in (member for family in nest.inside for member in family):
                for other in symmetries[inner].slices:
                    around = slice_around(symmetry, symmetries[inner], other)
                    is_here = around is not None and symmetry.slices[around[0]] is part
                    if around is not None and is_here and other.axis == part.axis:
                        unit, size = around[1], symmetries[inner].size
                        begin = starts_of(part, symmetry.size)[unit] - unit * part.width
                        starts = tuple(start - begin for start in starts_of(other, size))
                        copy = replace(other, parameter=name, axis=1, starts=starts, within=())
                        moved[inner] = _with(moved[inner], copy)
                        places.add(inner)
    return Observed(moved, products, frozenset(places))


def _products(second: Second, part: Slice, size: int, nest: Nest) -> Tensor:
    """Return ``(K, K, D, D)`` correlations of coordinates, or covariances of trace 1."""
    moments = second[part.parameter, part.axis]
    entries = torch.tensor([s + w for s in starts_of(part, size) for w in range(part.width)])
    mean = moments[:, entries, 0, -1]
    covariance = moments[:, entries][:, :, :, entries] - torch.einsum("ki,jm->kijm", mean, mean)
    variance = torch.einsum("kiki->ki", covariance).clamp_min(0)
    if nest.inside:
        variance = variance.sum(1, keepdim=True).expand_as(variance)
    deviation = variance.sqrt()
    inverse = torch.where(deviation > 1e-12, 1 / deviation.clamp_min(1e-12), 0.0)
    return torch.einsum("ki,kijm,jm->kjim", inverse, covariance, inverse)


def _with(symmetry: Symmetry, part: Slice) -> Symmetry:
    return replace(symmetry, slices=(*symmetry.slices, part))
