"""Lookups in fused tables on CPU by operations of torch, in place of FBGEMM's CPU kernels.

TorchRec's modules stay as they are, and weights and accumulators stay FBGEMM's tensors, so plans,
checkpoints and learning rates are not affected. A lookup gathers rows, with ``embedding_bag`` even
if bags have one id, because it fetches ahead. Its backward pass sums the gradients of every row
that was read, then updates each of these rows once.

Shape legend: B bags per feature, C columns of all features, D columns of one, F features, N ids,
R rows of several tables, U different rows that were read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from cki_rec.config import UserError

OPTIMIZERS = (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD)
POOLINGS = (PoolingMode.SUM, PoolingMode.MEAN)


def replace_host_kernels(module: nn.Module) -> None:
    """Replace FBGEMM's CPU kernels of all sharded tables of ``module`` on this process."""
    for collection in module.modules():
        if isinstance(collection, ShardedEmbeddingBagCollection):
            for lookup in collection._lookups:
                for kernel in lookup._emb_modules:
                    features = [  # shards of tables of other sizes may have other ids
                        [(name, table.num_embeddings) for name in table.feature_names]
                        for table in kernel._config.embedding_tables
                    ]
                    kernel.emb_module.forward = HostLookup(kernel.emb_module, features)


class HostLookup:
    """The forward pass of FBGEMM's module of several tables.

    Args:
        module: FBGEMM's module: shapes, weights, accumulators and options of the tables.
        features: Keys of the features of each table; features of equal keys have equal ids.

    Differs:
        FBGEMM's gradients of means of weighted ids leave out the number of ids of a bag.
    """

    def __init__(self, module: Any, features: Sequence[Sequence[Hashable]]) -> None:
        assert module.optimizer in OPTIMIZERS, module.optimizer
        assert module.pooling_mode in POOLINGS, module.pooling_mode
        self._module, self._num_features = module, sum(map(len, features))
        self._groups = []
        shapes = [spec[:2] for spec in module.embedding_specs]
        for _, members in groupby(range(len(shapes)), key=lambda table: shapes[table][1]):
            self._groups.append(Group(module, list(members), features))

    def __call__(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Return ``(B, all columns)``: the pooled embeddings of every feature, side by side.

        Args:
            indices: ``(N,)`` ids by feature, then bag.
            offsets: ``(F B + 1,)`` place of the first id of every bag, and N.
            per_sample_weights: ``(N,)`` factor of each id.
            others: Options of FBGEMM, all None.

        Raises:
            UserError: An id is not a row of its table.
        """
        assert not any(value is not None for value in others.values()), list(others)
        lengths_FB = offsets.diff().view(self._num_features, -1)
        factors_N, longest = per_sample_weights, int(lengths_FB.max()) if len(indices) else 0
        if self._module.pooling_mode == PoolingMode.MEAN and longest > 1:
            shares_N = (1 / lengths_FB).flatten().repeat_interleave(lengths_FB.flatten())
            factors_N = shares_N if factors_N is None else factors_N * shares_N
        is_full = factors_N is None and longest == 1 and len(indices) == lengths_FB.numel()
        known: dict[Any, Reads] = {}
        num_bags, reads = lengths_FB.shape[1], []
        for group in self._groups:
            if group.key not in known or per_sample_weights is not None:
                first, last = group.features.start, group.features.stop
                ids = slice(*offsets[[first * num_bags, last * num_bags]].tolist())
                known[group.key] = group.reads(
                    indices[ids],
                    None if is_full else lengths_FB[first:last],
                    None if factors_N is None else factors_N[ids],
                )
            reads.append(known[group.key])
        factors = [read.factors_N for read in reads]
        anchor = self._module.placeholder_autograd_tensor
        return _Lookup.apply(anchor, self._groups, reads, *factors)  # type: ignore[no-any-return, no-untyped-call]


class Group:
    """Neighbouring tables of one width, as one table of R rows.

    Args:
        module: FBGEMM's module.
        tables: Positions of the tables in it.
        features: Keys of the features of each table of the module.

    Attributes:
        features: Places of their features among those of the module.
        key: Groups of equal keys read the same rows.
    """

    def __init__(
        self, module: Any, tables: Sequence[int], features: Sequence[Sequence[Hashable]]
    ) -> None:
        sizes = [module.embedding_specs[table][0] for table in tables]
        self.module, self.width = module, module.embedding_specs[tables[0]][1]
        self.num_rows = sum(sizes)
        self.first_weight = module.weights_physical_offsets[tables[0]]
        self.first_moment = module.momentum1_physical_offsets[tables[0]]
        first_feature = sum(map(len, features[: tables[0]]))
        last_feature = sum(map(len, features[: tables[-1] + 1]))
        self.features = slice(first_feature, last_feature)
        self.key = tuple((size, *features[t]) for size, t in zip(sizes, tables, strict=True))
        self.names = [module.table_names[table] for table in tables for _ in features[table]]
        first_rows = accumulate(sizes[:-1], initial=0)
        rows = [
            (first, size)
            for first, size, table in zip(first_rows, sizes, tables, strict=True)
            for _ in features[table]
        ]
        self.first_row_F, self.size_F = torch.tensor(rows).view(-1, 2).unbind(1)

    def reads(self, ids_N: Tensor, lengths_FB: Tensor | None, factors_N: Tensor | None) -> Reads:
        """Return which rows the bags read; ``lengths_FB`` None: one row each."""
        num_features = len(self.names)
        feature_F = torch.arange(num_features)
        if lengths_FB is None:
            rows_FB = self._rows(ids_N.view(num_features, -1), feature_F.unsqueeze(1))
            starts = torch.arange(len(ids_N) + 1, dtype=rows_FB.dtype)
            return Reads(rows_FB.t().flatten(), starts)
        lengths, num_bags = lengths_FB.flatten(), lengths_FB.shape[1]
        rows_N = self._rows(ids_N, feature_F.repeat_interleave(lengths_FB.sum(1)))
        places_BF = torch.arange(num_bags * num_features).view(num_bags, num_features)
        sources_N = places_BF.t().flatten().repeat_interleave(lengths)
        starts = nn.functional.pad(lengths.cumsum(0, dtype=rows_N.dtype), (1, 0))
        return Reads(rows_N, starts, sources_N, factors_N)

    def _rows(self, ids: Tensor, features: Tensor) -> Tensor:
        """Return the rows of ``ids`` of ``features`` (of a shape that broadcasts).

        They are int32 where that is enough: half the bytes, and half the passes of a radix sort.
        """
        is_wrong = (ids < 0) | (ids >= self.size_F[features])
        if is_wrong.any():
            feature = int(features.expand_as(ids)[is_wrong][0])
            raise UserError(
                f"table {self.names[feature]}: a batch reads row {int(ids[is_wrong][0])}, and"
                f" there are {int(self.size_F[feature])} rows; encode the data set of this model"
            )
        is_small = self.num_rows <= torch.iinfo(torch.int32).max
        return (ids + self.first_row_F[features]).to(torch.int32 if is_small else ids.dtype)

    @property
    def weight_RD(self) -> Tensor:
        """Return the weights, without a copy."""
        stop = self.first_weight + self.num_rows * self.width
        weights: Tensor = self.module.weights_host.detach()
        return weights[self.first_weight : stop].view(-1, self.width)

    @property
    def moment_RD(self) -> Tensor:
        """Return the accumulators, without a copy; one column if rows have one accumulator."""
        width = 1 if self.module.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD else self.width
        stop = self.first_moment + self.num_rows * width
        moments: Tensor = self.module.momentum1_host.detach()
        return moments[self.first_moment : stop].view(-1, width)

    def pool(self, reads: Reads) -> Tensor:
        """Return ``(B, C)``: the pooled embeddings of all features side by side."""
        bags_SD = embedding_bag(
            reads.rows_N, self.weight_RD, reads.starts, mode="sum",
            per_sample_weights=reads.factors_N, include_last_offset=True,
        )  # fmt: skip
        num_features = len(self.names)
        if reads.sources_N is None:
            return bags_SD.view(-1, num_features * self.width)
        return bags_SD.view(num_features, -1, self.width).transpose(0, 1).flatten(1)

    def train(self, reads: Reads, gradient_BC: Tensor) -> None:
        r"""Update the rows that were read with Adagrad.

        .. math:: m \leftarrow m + g^2, \quad w \leftarrow w - \eta\, g / (\sqrt m + \epsilon)

        The gradient :math:`g` of a row is the sum over all its ids. With row-wise Adagrad the mean
        of its squares over columns takes the place of each.
        """
        order_N, rows_U, starts_U = reads.order
        factors_N = None if reads.factors_N is None else reads.factors_N.detach()[order_N]
        gradient_UD = embedding_bag(
            order_N if reads.sources_N is None else reads.sources_N[order_N],
            gradient_BC.reshape(-1, self.width), starts_U, mode="sum",
            per_sample_weights=factors_N,
        )  # fmt: skip
        moment_RD, squares = self.moment_RD, gradient_UD.square()
        if moment_RD.shape[1] < self.width:
            squares = squares.mean(1, keepdim=True)
        moment = embedding(rows_U, moment_RD).add_(squares)
        moment_RD.index_copy_(0, rows_U, moment)
        factor = moment.sqrt_().add_(self.module.optimizer_args.eps).reciprocal_()
        factor.mul_(-self.module.learning_rate_tensor.item())
        rows_UD = embedding(rows_U, self.weight_RD).addcmul_(gradient_UD, factor)
        self.weight_RD.index_copy_(0, rows_U, rows_UD)

    def gradient_of_factors(self, reads: Reads, gradient_BC: Tensor) -> Tensor:
        """Return ``(N,)``, the gradient of the factors of ids."""
        assert reads.sources_N is not None
        gradient_ND = embedding(reads.sources_N, gradient_BC.reshape(-1, self.width))
        return (gradient_ND * embedding(reads.rows_N, self.weight_RD)).sum(1)


@dataclass
class Reads:
    """The rows that the bags of a batch read."""

    rows_N: Tensor
    """By bag, then feature if every bag has one id; else by feature, then bag."""
    starts: Tensor
    """``(F B + 1,)`` first id of each bag, and N."""
    sources_N: Tensor | None = None
    """Bag of each id, counted by bag, then feature; None: the ids are in this order."""
    factors_N: Tensor | None = None
    """Factor of each id; None: 1."""

    @cached_property
    def order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids sorted by row ``(N,)``, different rows ``(U,)`` and the first id of each."""
        keys_N, order_N = torch.sort(self.rows_N, stable=True)
        rows_U, counts_U = torch.unique_consecutive(keys_N, return_counts=True)
        return order_N, rows_U.long(), counts_U.cumsum(0) - counts_U


class _Lookup(torch.autograd.Function):
    """Pool rows; in backward, update the rows that were read."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, groups: Sequence[Group], reads: Sequence[Reads], *__: Tensor | None
    ) -> Tensor:
        ctx.groups, ctx.reads = groups, reads
        pooled = [group.pool(read) for group, read in zip(groups, reads, strict=True)]
        ctx.columns = [part.shape[1] for part in pooled]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)

    @staticmethod
    def backward(ctx: Any, gradient_BC: Tensor) -> tuple[Tensor | None, ...]:
        of_factors: list[Tensor | None] = []
        parts = gradient_BC.split(ctx.columns, 1)
        for group, read, part, is_needed in zip(
            ctx.groups, ctx.reads, parts, ctx.needs_input_grad[3:], strict=True
        ):
            of_factors.append(group.gradient_of_factors(read, part) if is_needed else None)
            if len(read.rows_N):
                group.train(read, part)
        return None, None, None, *of_factors
