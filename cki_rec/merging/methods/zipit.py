"""Hidden layers of several models zipped into one: the most correlated units become one unit.

Shape legend: K sources, S units of a layer, N units of two layers side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.hidden_units import Layer, copied, hidden_layers, map_units, unit_covariance
from cki_rec.merging.methods.ot_fusion import averaged
from cki_rec.merging.params import MergeError, Params, check_finite, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.symmetry import Symmetry

DIGITS = 6
"""Digits of correlations; of equal ones the order of units decides."""


@method(
    needs=("moments",),
    row_wise=True,
    is_ordered=True,
    reference="ZipIt! (Stoica et al., ICLR 2024)",
    cost="one pass over sampled rows",
)
def zipit(
    models: Sequence[Params], symmetries: Sequence[Symmetry], moments: Mapping[str, Tensor]
) -> Params:
    r"""Merge the most correlated hidden units, of two sources or of one, and average the rest.

    Each merged unit is the mean of its members (a matrix M). Layers that read a member read the
    merged unit in its place (U, the transposed matching):

    .. math:: W_l = \sum_k M_{l,k} W_{l,k} U_{l-1,k}

    Of two sources every unit of both is in one pair, the most correlated pairs first. With
    more sources, each further one is zipped with the merge of those before it; members weigh the
    same. Equally correlated units pair up across models before they do within one. Layers without
    ``moments`` are averaged, as are all parameters that are not of a hidden layer.

    Args:
        models: One per source.
        symmetries: Of their network; which units it has.
        moments: ``MergeInputs.moments``: second moments of the inputs of the layers that
            read the units.

    Raises:
        MergeError: Models differ, a source has NaN or infinite entries, or moments do not fit.

    Reference:
        Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024,
        section 4.

    Differs:
        All layers are zipped, none stays unmerged, and outputs are averaged: sources have one
        task. No limit to pairs within one model. Units that do not vary on the sample, such as
        dead ones, have no correlation and pair up by place.
    """
    check_same(models)
    check_finite(models)
    layers = hidden_layers(models[0], symmetries)
    moved, num_sources = copied(models, layers), len(models)
    if num_sources == 1:
        return averaged(moved, models[0])
    for layer in layers:
        covariance = _covariance(layer, moments, num_sources)
        if covariance is None:
            continue
        group = zip_units(covariance, num_sources)
        member_KSS = torch.nn.functional.one_hot(group, layer.size).double()
        size_S = member_KSS.sum((0, 1))
        for model, member_SS in zip(moved, member_KSS, strict=True):
            map_units(model, layer.made, num_sources * member_SS / size_S)
            map_units(model, layer.read, member_SS)
    return averaged(moved, models[0])


def zip_units(covariance: Tensor, num_sources: int) -> Tensor:
    """Return ``(K, S)``: for every unit of every source the merged unit that it becomes.

    Args:
        covariance: ``(K S, K S)`` of the units of all sources, source by source.
        num_sources: K.
    """
    size = len(covariance) // num_sources
    group_KS = torch.arange(size).repeat(num_sources, 1)
    for k in range(1, num_sources):
        # the mean of each group so far, beside the units of source k
        members = torch.nn.functional.one_hot(group_KS[:k].flatten(), size).double()
        mean = (members / members.sum(0)).T
        base, span = covariance[: k * size, : k * size], slice(k * size, (k + 1) * size)
        cross = mean @ covariance[: k * size, span]
        both = torch.cat(
            [
                torch.cat([mean @ base @ mean.T, cross], 1),
                torch.cat([cross.T, covariance[span, span]], 1),
            ]
        )
        paired = pair_up(_correlation(both))
        group_KS = torch.cat([paired[:size][group_KS[:k]], paired[size:][None], group_KS[k + 1 :]])
    return group_KS


def pair_up(correlation_NN: Tensor) -> Tensor:
    """Return ``(N,)``: the pair that each unit is in, numbers 0 to N / 2 - 1.

    Pairs are made greedily, the largest correlation first. Of equal ones those of the same place
    in both halves go first, then those across halves. A pair has the number of its first member's
    place where that is free, so that equal halves keep their order.
    """
    num = len(correlation_NN)
    half = num // 2
    left, right = torch.triu_indices(num, num, 1)
    is_across = (left < half) & (right >= half)
    rank = torch.where(is_across, torch.where(right == left + half, 0, 1), 2)
    value = (correlation_NN[left, right] * 10**DIGITS).round()
    order = rank.argsort(stable=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    partner: dict[int, int] = {}
    for a, b in zip(left[order].tolist(), right[order].tolist(), strict=True):
        if a not in partner and b not in partner:
            partner[a], partner[b] = b, a
            if len(partner) == num:
                break
    pairs = sorted((a, b) for a, b in partner.items() if a < b)
    pair_of, free = torch.zeros(num, dtype=torch.int64), set(range(half))
    late = []
    for a, b in pairs:
        if a < half:
            free.discard(a)
            pair_of[a] = pair_of[b] = a
        else:
            late.append((a, b))
    for (a, b), place in zip(late, sorted(free), strict=True):
        pair_of[a] = pair_of[b] = place
    return pair_of


def _covariance(layer: Layer, moments: Mapping[str, Tensor], num_sources: int) -> Tensor | None:
    """Return ``(K S, K S)`` of the inputs of the first reader with moments, or None."""
    for part in layer.read:
        if part.parameter in moments and part.width == 1:
            second = moments[part.parameter].double()
            if second.shape[0] != num_sources or not bool(second.isfinite().all()):
                raise MergeError(
                    f"{part.parameter}: moments {tuple(second.shape)} do not fit {num_sources}"
                    " models, or are not finite"
                )
            return unit_covariance(second, part.start, layer.size).flatten(2).flatten(0, 1)
    return None


def _correlation(covariance: Tensor) -> Tensor:
    """Return correlations; units that do not vary have none: 0."""
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    is_alive = deviation > 1e-9 * deviation.max()
    inverse = torch.where(is_alive, 1 / torch.where(is_alive, deviation, 1), 0)
    return inverse[:, None] * covariance * inverse
