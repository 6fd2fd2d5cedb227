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
from cki_rec.engine.plans import Sharder, describe, make_plan
from cki_rec.merging.params import generator
from cki_rec.models import build_model
from cki_rec.models.embeddings import FIRST_ORDER, NUMBERS, FieldEmbeddings

ADAGRAD_EPS = 1e-8
INITIAL_BLOCK = 4096
"""Rows drawn from one generator, so that any shard can draw its rows alone."""
TABLE_OPTIMIZERS = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad}


@dataclass(slots=True)
class ShardedModel:
    """A network on the devices of all processes, its tables looked up through TorchRec.

    ``fused`` tables are sharded and updated during backward; ``dense`` ones are a copy per
    process, trained like the rest of the network.
    """

    module: DistributedModelParallel
    network: nn.Module
    """The same without the wrapping."""
    tables: set[str]
    """Names of the parameters that are tables."""
    is_fused: bool
    plan: dict[str, dict[str, Any]]
    """Per table: sharding, kernel, shards; empty where tables are dense."""
    device: torch.device

    @property
    def sparse(self) -> FieldEmbeddings:
        """Return the module that looks embeddings up."""
        found = self.network.sparse
        assert isinstance(found, FieldEmbeddings)
        return found

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name the parameters that no fused optimizer trains."""
        fused = self.tables if self.is_fused else set()
        return {n: p for n, p in self.module.named_parameters() if n not in fused}

    def accumulators(self) -> dict[str, ShardedTensor]:
        """Return the Adagrad accumulator of every fused table, by parameter name."""
        if not self.is_fused:
            return {}
        state = self.module.fused_optimizer.state_dict()["state"]
        return {name: next(iter(state[name].values())) for name in self.tables if name in state}

    def set_table_learning_rate(self, value: float) -> None:
        """Set the fused optimizer's learning rate, effective at the next backward pass."""
        for group in self.module.fused_optimizer.param_groups:
            group["lr"] = value
        self.module.fused_optimizer.step()  # hands the rate to the kernels; moves no weight


def build(schema: FeatureSchema, model: Model, train: Train, runtime: Runtime) -> ShardedModel:
    """Return a network on its devices, tables unset; every process calls this.

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
        warnings.simplefilter("ignore", FutureWarning)  # torchrec's own use of torch
        module = DistributedModelParallel(
            network,
            device=device,
            plan=plan,
            sharders=[Sharder()],
            init_data_parallel=distributed.world_size() > 1,
        )
    built = ShardedModel(module, network, tables, is_fused, describe(plan), device)
    if is_fused:
        owned = {n for n in tables if isinstance(module.state_dict()[n], ShardedTensor)}
        assert owned == tables, f"tables without a fused optimizer: {tables - owned}"
    return built


def local_tensors(value: Tensor | ShardedTensor) -> list[Tensor]:
    """Return the parts of a tensor that this process holds."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value]


def clone(value: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
    """Return a copy, sharded the same way."""
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = [Shard(s.tensor.detach().clone(), s.metadata) for s in value.local_shards()]
    create = ShardedTensor._init_from_local_shards_and_global_metadata
    return create(shards, value.metadata(), process_group=value._process_group)


def table_of(name: str) -> str | None:
    """Return the vocabulary that indexes the rows of a parameter; None if it is no table."""
    _, marker, table = name.partition(".embedding_bags.")
    return table.removesuffix(".weight").removesuffix(FIRST_ORDER) if marker else None


@torch.no_grad()
def initialize(
    model: ShardedModel, seed: int, init_std: float, matrix_std: float | None = None
) -> None:
    """Set every parameter from (seed, name, row): equal for every plan and world size.

    Embeddings, those of numeric fields too: normal with ``init_std``; first-order weights, biases
    and unused columns: zero; matrices, stacked ones too: normal with ``matrix_std``, or Xavier
    uniform where that is None or they have one output. Hidden layers whose matrix is drawn with
    ``matrix_std`` get biases too, uniform within 1 / sqrt(inputs): with narrow matrices and zero
    biases many ReLU would never fire. What else a network has (scales of batch norms, slopes of
    activations) stays as it was built.
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
        elif last_word in NUMBERS:
            drawn = torch.randn(value.shape, generator=generator(seed, name))
            value.copy_(drawn * (init_std if last_word == NUMBERS[0] else 0.0))
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
    """Draw what this process holds of a table, a block of rows at a time."""
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
