"""Options of tiny trainings, and the state of models, as several tests use them."""

from __future__ import annotations

from functools import lru_cache

import torch
import yaml
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.functional import embedding_bag

from cki_rec.config import Config, Train, parse, register_resolvers, with_delta
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine.embeddings import ShardedModel, build, initialize
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.trainer import Stepper
from cki_rec.merging.params import Params

TINY = (
    *("model.embedding_dim=8", "model.hidden=[6]", "model.dropout=0.0", "model.init_std=0.1"),
    *("model.histories=true", "train.batch_size=16", "train.learning_rate=0.01"),
    *("train.table_learning_rate=0.05", "train.table_l2=0.0"),
    *("runtime.device=cpu", "runtime.threads=1"),
)
"""A small network and its training."""
TABLES = "sparse.collection.embedding_bags."
"""Begins the names of its tables."""


@lru_cache
def composed(*choices: str) -> Config:
    """Return the real configuration as the command line composes it, tiny."""
    from cki_rec.cli import compose_config

    register_resolvers()
    return parse(compose_config([*TINY, *choices]))


@lru_cache
def options(*overrides: str) -> Config:
    """Return the real configuration, tiny, with ``overrides``: choices of groups, then values.

    (Values are put in one by one: to compose anew takes a quarter of a second.)
    """
    choices = tuple(word for word in overrides if "." not in word.partition("=")[0])
    values = [word.partition("=") for word in overrides if word not in choices]
    return with_delta(composed(*choices), {key: yaml.safe_load(v) for key, _, v in values})


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


def reference_logit(
    params: dict[str, Tensor], schema: FeatureSchema, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return logits and pooled embeddings of DeepFM, differentiable and in plain torch."""
    lengths_FB = batch.lengths.view(len(schema.features), -1)
    bags = batch.values.split(lengths_FB.sum(1).tolist())
    emb, first = {}, 0
    for feature, ids, lengths in zip(schema.features, bags, lengths_FB, strict=True):
        starts = (lengths.cumsum(0) - lengths).long()
        emb[feature.name] = embedding_bag(ids, params[f"{TABLES}{feature.table}.weight"], starts)
        weight = params[f"{TABLES}{feature.table}_first_order.weight"]
        first = first + embedding_bag(ids, weight, starts)[:, 0]
    emb_BFD = torch.stack([emb[n] for n in ("user", "item", "history", "genres", "hour")], dim=1)
    fm = 0.5 * (emb_BFD.sum(1) ** 2 - (emb_BFD**2).sum(1)).sum(1)
    x = emb_BFD.flatten(1) @ params["mlp.layers.0.weight"].T + params["mlp.layers.0.bias"]
    x = x.relu() @ params["mlp.layers.1.weight"].T + params["mlp.layers.1.bias"]
    return params["bias"] + first + fm + x[:, 0], emb_BFD


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
