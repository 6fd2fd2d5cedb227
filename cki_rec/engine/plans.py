"""Sharding plans: the assignment of table shards to processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cki_rec.config import UserError
from cki_rec.engine import distributed
from cki_rec.models.embeddings import LANES

FUSED = "fused"
"""The only kernel of a plan: the fused optimizer silently skips tables of other kernels."""


class Sharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Sharder with row-wise sharding on CPU, which works but is missing in torchrec's list."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the sharding types for a planner."""
        types: list[str] = super().sharding_types(compute_device_type)
        return list(dict.fromkeys([*types, "row_wise"]))


def make_plan(
    network: nn.Module, device: torch.device, sharding: str, table_optimizer: str
) -> ShardingPlan:
    """Return a plan for every table of ``network``, equal on all processes.

    Raises:
        UserError: The plan divides columns, but the table optimizer needs whole rows; or the
            planner does not find a plan.
    """
    collections = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, EmbeddingBagCollection)
    }
    num, is_row_a_unit = distributed.world_size(), table_optimizer == "rowwise_adagrad"
    if sharding == "column_wise" and is_row_a_unit and num > 1:
        raise UserError(
            "runtime.sharding=column_wise: row-wise Adagrad needs whole rows, so results would"
            " depend on the plan; use another plan, or train.table_optimizer=adagrad"
        )
    if sharding == "planner" and num > 1:
        return _planned(network, collections.values(), device.type, is_row_a_unit)
    configs = [c for module in collections.values() for c in module.embedding_bag_configs()]
    owners = _owners(configs, num)

    def choose(config: EmbeddingBagConfig) -> Any:
        owner = owners[config.name]
        if sharding == "row_wise":
            return row_wise(compute_kernel=FUSED)
        if sharding == "column_wise":
            return column_wise(_ranks(config, owner, num), compute_kernel=FUSED)
        return table_wise(owner, compute_kernel=FUSED)

    return ShardingPlan(
        {
            name: construct_module_sharding_plan(
                module,
                {c.name: choose(c) for c in module.embedding_bag_configs()},
                sharder=Sharder(),
                world_size=num,
                local_size=distributed.local_position()[1],
                device_type=device.type,
            )
            for name, module in collections.items()
        }
    )


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """Return the sharding type and the shards of every table as plain JSON values."""
    return {
        table: {
            "sharding": parameter.sharding_type,
            "kernel": parameter.compute_kernel,
            "shards": [
                {
                    "rank": shard.placement.rank(),
                    "offset": list(shard.shard_offsets),
                    "size": list(shard.shard_sizes),
                }
                for shard in parameter.sharding_spec.shards
            ],
        }
        for module in plan.plan.values()
        for table, parameter in module.items()
    }


def summarize(plan: dict[str, dict[str, Any]], num_processes: int) -> list[str]:
    """Return one line of text per process about its shards."""
    lines = []
    for rank in range(num_processes):
        held = [
            (table, shard)
            for table, entry in plan.items()
            for shard in entry["shards"]
            if shard["rank"] == rank
        ]
        values = sum(shard["size"][0] * shard["size"][1] for _, shard in held)
        kinds = sorted({plan[table]["sharding"] for table, _ in held})
        names = ", ".join(sorted({table for table, _ in held}))
        lines.append(
            f"rank {rank}: {values:,} values, {' and '.join(kinds) or 'no table'}: {names}"
        )
    return lines


def _owners(configs: Iterable[EmbeddingBagConfig], num: int) -> dict[str, int]:
    """Return a process per table: largest table first, to the process with the least load."""
    load, owners = [0] * num, {}
    for config in sorted(configs, key=lambda c: (-c.num_embeddings * c.embedding_dim, c.name)):
        owner = load.index(min(load))
        owners[config.name] = owner
        load[owner] += config.num_embeddings * config.embedding_dim
    return owners


def _ranks(config: EmbeddingBagConfig, owner: int, num: int) -> list[int]:
    """Return the processes that hold the columns of a table: equal shares of whole lanes."""
    lanes = config.embedding_dim // LANES
    shares = max(n for n in range(1, num + 1) if lanes % n == 0)
    return [(owner + place) % num for place in range(shares)]


def _planned(
    network: nn.Module,
    collections: Iterable[EmbeddingBagCollection],
    device_type: str,
    is_row_a_unit: bool,
) -> ShardingPlan:
    types = ["table_wise", "row_wise", *([] if is_row_a_unit else ["column_wise"])]
    constraints = {
        config.name: ParameterConstraints(sharding_types=types, compute_kernels=[FUSED])
        for module in collections
        for config in module.embedding_bag_configs()
    }
    topology = Topology(
        world_size=distributed.world_size(),
        local_world_size=distributed.local_position()[1],
        compute_device=device_type,
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, debug=False)
    sharder: ModuleSharder[nn.Module] = Sharder()
    try:
        return planner.collective_plan(network, [sharder], dist.group.WORLD)
    except PlannerError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"runtime.sharding=planner: torchrec finds no plan ({reason})") from None
