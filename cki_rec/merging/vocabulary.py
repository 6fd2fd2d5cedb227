"""Join models whose tables have rows for different tokens, and restrict rows to their owners.

A source looks up its row for unseen tokens where it lacks a token. Its joined table has a copy of
that row there. So its scores do not change on the joined vocabulary, and every method works as it
is. The mixing weights of such a row then go to the sources that have the token.

Shape legend: K sources, U rows of a joined table, V rows of a source's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, MixingWeights, Params


def join_tokens(tokens: Sequence[Sequence[str]], reserved: int) -> tuple[list[str], list[Tensor]]:
    """Return all tokens in the order of first appearance, and where each source's rows go.

    Rows of the first source stay where they are.

    Args:
        tokens: Per source, in the order of rows from ``reserved`` on.
        reserved: Number of rows before the first token, equal in all sources.

    Returns:
        The joined tokens, and per source ``(V,)`` int64 rows of the joined table.
    """
    row_of = {
        token: row
        for row, token in enumerate(
            dict.fromkeys(t for source_tokens in tokens for t in source_tokens)
        )
    }
    maps = [
        torch.tensor([*range(reserved), *(reserved + row_of[token] for token in source_tokens)])
        for source_tokens in tokens
    ]
    return list(row_of), maps


def owned(maps: Sequence[Tensor], size: int) -> Tensor:
    """Return ``(K, U)`` bool: which rows of a joined table each source has."""
    has = torch.zeros(len(maps), size, dtype=torch.bool)
    for k, rows in enumerate(maps):
        has[k, rows] = True
    return has


def to_union(
    tensors: Params, maps: Mapping[str, Tensor], sizes: Mapping[str, int], lacking: int | None
) -> Params:
    """Return tables, counts or accumulators with rows where the joined vocabulary has them.

    Args:
        tensors: Of one source; those that ``maps`` does not name are shared with the result.
        maps: Per name ``(V,)`` the joined row of each row.
        sizes: Per name U.
        lacking: The row that stands for tokens without one; None: zero.

    Raises:
        MergeError: A tensor has another number of rows than its vocabulary.
    """
    moved = dict(tensors)
    for name in maps.keys() & tensors.keys():
        tensor, rows = tensors[name], maps[name]
        if tensor.ndim == 0 or len(tensor) != len(rows):
            shape = tuple(tensor.shape)
            raise MergeError(f"{name}: {shape} does not fit a vocabulary of {len(rows)} rows")
        joined = tensor.new_zeros(sizes[name], *tensor.shape[1:])
        if lacking is not None:
            joined += tensor[lacking]
        joined[rows] = tensor
        moved[name] = joined
    return moved


def restrict_weights(weights: MixingWeights, owners: Mapping[str, Tensor]) -> MixingWeights:
    r"""Return weights that take nothing from sources without the row.

    .. math:: \alpha'_k[r] = o_k[r] \alpha_k[r] \big/ \textstyle\sum_j o_j[r] \alpha_j[r]

    Rows that all sources have keep their weights bit for bit; where all weight is with sources
    that lack a row, those that have it share it equally. A row that one source has is taken from
    it whole.

    Args:
        weights: ``(K, *s)`` per parameter.
        owners: Per table ``(K, U)``; each row has an owner.
    """
    restricted = dict(weights)
    for name, has in owners.items():
        weight = weights[name]
        has_row = has.reshape(*has.shape, *[1] * (weight.ndim - 2)).to(weight.device)
        remaining = weight * has_row
        total = remaining.sum(0)
        equal = has_row / has_row.sum(0)
        shares = torch.where(total > 0, remaining / torch.where(total > 0, total, 1), equal)
        is_lone = has_row & (has_row.sum(0) == 1)
        shares = torch.where(is_lone, 1.0, shares).to(weight.dtype)
        restricted[name] = torch.where(has_row.all(0), weight, shares)
    return restricted


def from_owners(merged: Params, models: Sequence[Params], owners: Mapping[str, Tensor]) -> Params:
    """Return merged parameters where rows that a source lacks are the mean of those who have them.

    For methods that give no weights.
    """
    result = dict(merged)
    for name, has in owners.items():
        lacked = ~has.all(0).to(merged[name].device)
        equal = torch.full((len(models), int(lacked.sum()), 1), 1 / len(models))
        weights = restrict_weights({name: equal}, {name: has[:, lacked.to(has.device)]})
        rows = [{name: model[name][lacked]} for model in models]
        result[name] = merged[name].clone()
        result[name][lacked] = mix(rows, weights)[name]
    return result


def shared_rows(models: Sequence[Params], owners: Mapping[str, Tensor]) -> list[Params]:
    """Return models whose joined tables have only rows that all sources have.

    Methods that compare whole tensors use them, since copies of a row must not count.
    """
    rows = {name: has.all(0).nonzero()[:, 0] for name, has in owners.items()}
    return [
        {
            **model,
            **{
                name: model[name][indices.to(model[name].device)] for name, indices in rows.items()
            },
        }
        for model in models
    ]
