"""Sharded tables: plan, fused optimizer, initial weights, and the parameters as plain tensors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cki_rec.integration.params import Params, generator
from cki_rec.models.layers import FIRST_ORDER, NUMBERS

ADAGRAD_EPS = 1e-8
INITIAL_BLOCK = 4096
"""Rows drawn from one generator, so that any shard can draw its rows alone."""


@dataclass(slots=True)
class ShardedModel:
    """A model whose tables TorchRec looks up and updates during backward."""

    module: DistributedModelParallel
    tables: set[str]
    """Names of the parameters that are tables."""
    device: torch.device

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the fused optimizer does not train."""
        return [p for name, p in self.module.named_parameters() if name not in self.tables]

    def accumulators(self) -> dict[str, ShardedTensor]:
        """Return the row-wise Adagrad accumulator of every table, by parameter name."""
        state = self.module.fused_optimizer.state_dict()["state"]
        return {name: next(iter(state[name].values())) for name in self.tables}

    def set_table_learning_rate(self, value: float) -> None:
        """Set the fused optimizer's learning rate, effective at the next backward pass."""
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = value
        self.module.fused_optimizer.step()  # hands the rate to the kernels; moves no weight


def shard(model: nn.Module, device: torch.device, table_learning_rate: float) -> ShardedModel:
    """Return ``model``, tables on ``meta``, with tables sharded and trained in the backward pass.

    The plan is explicit and of fused kernels only: TorchRec's default plan may choose kernels that
    the fused optimizer silently does not train.
    """
    collections = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, EmbeddingBagCollection)
    }
    sharder = EmbeddingBagCollectionSharder()
    modules = {}
    for name, collection in collections.items():
        options = {"lr": table_learning_rate, "eps": ADAGRAD_EPS}
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), options)
        plan = {
            config.name: table_wise(rank=0, compute_kernel="fused")
            for config in collection.embedding_bag_configs()
        }
        modules[name] = construct_module_sharding_plan(
            collection, plan, sharder=sharder, world_size=1, local_size=1, device_type=device.type
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchrec's own use of torch
        module = DistributedModelParallel(
            model,
            device=device,
            plan=ShardingPlan(modules),
            sharders=[sharder],
            init_data_parallel=False,
        )
    tables = {name for name in model.state_dict() if table_of(name)}
    trained = set(module.fused_optimizer.state_dict()["state"])
    assert trained == tables, f"tables without a fused optimizer: {tables ^ trained}"
    return ShardedModel(module, tables, device)


def table_of(name: str) -> str | None:
    """Return the vocabulary that indexes the rows of a parameter; None if it is no table."""
    _, marker, table = name.partition(".embedding_bags.")
    return table.removesuffix(".weight").removesuffix(FIRST_ORDER) if marker else None


@torch.no_grad()
def initialize(model: ShardedModel, seed: int, init_std: float) -> None:
    """Set every parameter from (seed, name, row): equal for every plan and world size.

    Tables, and the vectors of numeric fields: normal with ``init_std``, first-order weights zero;
    matrices: Xavier uniform; biases: zero.
    """
    for name, value in model.module.state_dict().items():
        if name in model.tables:
            first_order = name.endswith(f"{FIRST_ORDER}.weight")
            for local in value.local_shards():
                start, column = local.metadata.shard_offsets
                rows, columns = local.tensor.shape
                if first_order:
                    local.tensor.zero_()
                else:
                    full = initial_rows(seed, name, start, start + rows, value.metadata().size[1])
                    local.tensor.copy_(full[:, column : column + columns] * init_std)
        elif name.rpartition(".")[2] in NUMBERS:
            is_embedding = name.endswith(NUMBERS[0])
            drawn = torch.randn(value.shape, generator=generator(seed, name))
            value.copy_(drawn * (init_std if is_embedding else 0.0))
        elif value.dim() == 2:
            bound = math.sqrt(6 / sum(value.shape))
            value.copy_((torch.rand(value.shape, generator=generator(seed, name)) * 2 - 1) * bound)
        else:
            value.zero_()


def initial_rows(seed: int, name: str, start: int, stop: int, dim: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of the standard normal table ``(stop - start, dim)``."""
    first = start // INITIAL_BLOCK
    blocks = [
        torch.randn(INITIAL_BLOCK, dim, generator=generator(seed, f"{name}/{block}"))
        for block in range(first, -(-stop // INITIAL_BLOCK))
    ]
    offset = start - first * INITIAL_BLOCK
    return torch.cat(blocks)[offset : offset + stop - start]


@torch.no_grad()
def load_params(model: ShardedModel, params: Params, accumulators: Params | None = None) -> None:
    """Copy plain tensors into a sharded model (and into its fused optimizer)."""
    state = model.module.state_dict()
    targets = {**state, **{f"accumulator {k}": v for k, v in model.accumulators().items()}}
    sources = dict(params)
    if accumulators is not None:
        sources.update({f"accumulator {k}": v for k, v in accumulators.items()})
    for name, source in sources.items():
        target = targets[name]
        if isinstance(target, ShardedTensor):
            for local in target.local_shards():
                region = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(
                        local.metadata.shard_offsets, local.metadata.shard_sizes, strict=True
                    )
                )
                local.tensor.copy_(source[region])
        else:
            target.copy_(source)
