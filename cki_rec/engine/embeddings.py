"""Models on their devices: sharded tables, initial weights, and parameters as plain tensors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.optim import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from cki_rec.config import Model, Runtime, Train
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.host_lookup import replace_host_kernels
from cki_rec.engine.host_memory import keep_freed_memory
from cki_rec.engine.plans import Sharder, describe_plan, make_plan
from cki_rec.merging.params import generator
from cki_rec.models import build_model
from cki_rec.models.embeddings import FIRST_ORDER, NUMBERS, POSITIONS, FieldEmbeddings

ADAGRAD_EPS = 1e-8
INITIAL_BLOCK = 4096
"""Rows per random generator, so that a shard can draw its rows alone."""
TABLE_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}


@dataclass(slots=True)
class ShardedModel:
    """A network on the devices of all processes, with table lookups by TorchRec.

    ``fused`` tables are sharded and updated during the backward pass. ``dense`` tables are
    replicated on every process and trained like the rest of the network.
    """

    module: DistributedModelParallel
    network: nn.Module
    """The network without its wrapper."""
    tables: set[str]
    """Names of the parameters that are tables."""
    is_fused: bool
    plan: dict[str, dict[str, Any]]
    """Sharding, kernel and shards per table; empty for dense tables."""
    device: torch.device

    @property
    def sparse(self) -> FieldEmbeddings:
        """Return the module of the embeddings."""
        sparse = self.network.sparse
        assert isinstance(sparse, FieldEmbeddings)
        return sparse

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters without a fused optimizer, by name."""
        fused = self.tables if self.is_fused else set()
        return {n: p for n, p in self.module.named_parameters() if n not in fused}

    def accumulators(self) -> dict[str, ShardedTensor]:
        """Return the Adagrad accumulator of every fused table, by parameter name."""
        if not self.is_fused:
            return {}
        state = self.module.fused_optimizer.state_dict()["state"]
        return {name: next(iter(state[name].values())) for name in self.tables if name in state}

    def set_table_learning_rate(self, value: float) -> None:
        """Set the learning rate of the fused optimizer from the next backward pass on."""
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = value
        self.module.fused_optimizer.step()  # passes the rate to the kernels; changes no weight


def build(schema: FeatureSchema, model: Model, train: Train, runtime: Runtime) -> ShardedModel:
    """Return a network on its devices with uninitialized tables; every process calls this.

    Raises:
        UserError: See ``distributed.start``, ``build_model`` and ``make_plan``.
    """
    device = distributed.start(runtime)
    is_fused = train.embeddings == "fused"
    with device:
        network = build_model(schema, model, torch.device("meta") if is_fused else device)
    distributed.synchronize_batch_norms(network)
    if train.compile:
        network.interact = torch.compile(network.interact)  # type: ignore[arg-type, assignment]
    tables = {name for name in network.state_dict() if table_of(name)}
    plan = ShardingPlan({})
    if is_fused:
        options = {"lr": train.table_learning_rate, "eps": ADAGRAD_EPS}
        fused = [p for name, p in network.named_parameters() if name in tables]
        apply_optimizer_in_backward(TABLE_OPTIMIZERS[train.table_optimizer], fused, dict(options))
        plan = make_plan(network, device, runtime.sharding, train.table_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchrec
        module = DistributedModelParallel(
            network,
            device=device,
            plan=plan,
            sharders=[Sharder()],
            init_data_parallel=distributed.world_size() > 1,
        )
    if device.type == "cpu":
        keep_freed_memory()
        if runtime.kernels == "torch":
            replace_host_kernels(module)
    built = ShardedModel(module, network, tables, is_fused, describe_plan(plan), device)
    if is_fused:
        owned = {n for n in tables if isinstance(module.state_dict()[n], ShardedTensor)}
        assert owned == tables, f"tables without a fused optimizer: {tables - owned}"
    return built


def local_tensors(value: Tensor | ShardedTensor) -> list[Tensor]:
    """Return the shards of a tensor on this process."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value]


def clone(value: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    """Return a copy with the same sharding."""
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = [Shard(s.tensor.detach().clone(), s.metadata) for s in value.local_shards()]
    create = ShardedTensor._init_from_local_shards_and_global_metadata
    return create(shards, value.metadata(), process_group=value._process_group)


def table_of(name: str) -> str | None:
    """Return the table name of a parameter; None for parameters that are no table."""
    _, marker, table = name.partition(".embedding_bags.")
    return table.removesuffix(".weight").removesuffix(FIRST_ORDER) if marker else None


@torch.no_grad()
def initialize(
    model: ShardedModel, seed: int, init_std: float, matrix_std: float | None = None
) -> None:
    """Initialize every parameter from (seed, name, row), equally for every plan and world size.

    - Embeddings, also of numeric fields and positions: normal with ``init_std``.
    - First-order weights and unused columns: zero.
    - Matrices, also stacked ones: normal with ``matrix_std``. Without ``matrix_std``, and for a
      single output: Xavier uniform.
    - Biases: zero. With ``matrix_std`` the biases of hidden layers are uniform within
      1 / sqrt(inputs), because with narrow matrices and zero biases many ReLU would never fire.
    - Other parameters (scales of batch norms, slopes of activations) are not changed.
    """
    parameters = set(dict(model.module.named_parameters())) | model.tables
    bias_bounds = {
        f"{name}.bias": layer.in_features**-0.5
        for name, layer in model.network.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features > 1 and matrix_std is not None
    }
    for name, value in model.module.state_dict().items():
        if name not in parameters:
            continue
        last_word = name.rpartition(".")[2]
        if name in model.tables:
            if name.endswith(f"{FIRST_ORDER}.weight"):
                for part in local_tensors(value):
                    part.zero_()
            else:
                _initialize_table(value, seed, name, init_std, model.sparse.embedding_dim)
        elif last_word in (*NUMBERS, POSITIONS):
            drawn = torch.randn(value.shape, generator=generator(seed, name))
            value.copy_(drawn * (0.0 if last_word == NUMBERS[1] else init_std))
        elif value.dim() >= 2:
            value.copy_(_initial_matrix(value.shape, generator(seed, name), matrix_std))
        elif last_word == "bias":
            drawn = torch.rand(value.shape, generator=generator(seed, name)) * 2 - 1
            value.copy_(drawn * bias_bounds.get(name, 0.0))


def _initial_matrix(
    shape: torch.Size, drawing: torch.Generator, matrix_std: float | None
) -> Tensor:
    if matrix_std is not None and shape[-2] > 1:
        return torch.randn(shape, generator=drawing) * matrix_std
    bound = math.sqrt(6 / sum(shape[-2:]))
    return (torch.rand(shape, generator=drawing) * 2 - 1) * bound


def _initialize_table(
    value: Tensor | ShardedTensor, seed: int, name: str, init_std: float, dim: int
) -> None:
    """Initialize the shards of a table on this process, one block of rows at a time."""
    offsets = [[0, 0]]
    if isinstance(value, ShardedTensor):
        offsets = [shard.metadata.shard_offsets for shard in value.local_shards()]
    for tensor, (first_row, first_column) in zip(local_tensors(value), offsets, strict=True):
        num_rows, columns = tensor.shape
        tensor.zero_()
        used = max(0, min(columns, dim - first_column))
        row = first_row
        while row < first_row + num_rows:
            stop = min((row // INITIAL_BLOCK + 1) * INITIAL_BLOCK, first_row + num_rows)
            drawn = initial_rows(seed, name, row, stop, dim)[:, first_column : first_column + used]
            tensor[row - first_row : stop - first_row, :used] = drawn * init_std
            row = stop


def initial_rows(seed: int, name: str, start: int, stop: int, dim: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of the standard normal table ``(stop - start, dim)``."""
    first = start // INITIAL_BLOCK
    blocks = [
        torch.randn(INITIAL_BLOCK, dim, generator=generator(seed, f"{name}/{block}"))
        for block in range(first, -(-stop // INITIAL_BLOCK))
    ]
    offset = start - first * INITIAL_BLOCK
    return torch.cat(blocks)[offset : offset + stop - start]
