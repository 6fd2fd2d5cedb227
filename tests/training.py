"""Options of tiny trainings, and the state of models, as several tests use them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cki_rec.config import Config, Train, parse, register_resolvers
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine.embeddings import ShardedModel, build, initialize
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.trainer import Stepper

TINY = (
    *("model.embedding_dim=8", "model.hidden=[6]", "model.dropout=0.0", "model.init_std=0.1"),
    *("model.histories=true", "train.batch_size=16", "train.learning_rate=0.01"),
    *("train.table_learning_rate=0.05", "train.table_l2=0.0"),
    *("runtime.device=cpu", "runtime.threads=1"),
)
"""A small network and its training."""


@lru_cache
def options(*overrides: str) -> Config:
    """Return the real configuration as the command line composes it, tiny, with ``overrides``."""
    from cki_rec.cli import _compose

    register_resolvers()
    return parse(_compose([*TINY, *overrides]))


def sharded_model(schema: FeatureSchema, *overrides: str, seed: int = 1) -> ShardedModel:
    """Return an initialized tiny DeepFM, or what ``overrides`` make of it."""
    config = options(*overrides)
    built = build(schema, config.model, config.train, config.runtime)
    initialize(built, seed, config.model.init_std)
    return built


def plain(value) -> Tensor:
    """Return a tensor that one process holds, sharded or not, as it is now."""
    value = value.local_tensor() if hasattr(value, "local_shards") else value
    return value.detach().clone()


def state_of(model: ShardedModel) -> dict[str, Tensor]:
    return {name: plain(value) for name, value in model.module.state_dict().items()}


def accumulators_of(model: ShardedModel) -> dict[str, Tensor]:
    return {name: plain(value) for name, value in model.accumulators().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def step(
    model: ShardedModel, batch: Batch, schedule: Train, adam: torch.optim.Adam | None = None
) -> float:
    """Take one step; return the loss before it."""
    with Stepper(model, adam or initialized_adam(model, schedule.learning_rate), schedule) as take:
        return take(batch)
