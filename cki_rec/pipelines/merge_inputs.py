"""Inputs of the library's merge that need data, devices or training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cki_rec.checkpoints import Checkpoint
from cki_rec.config import Config, Merge, UserError, with_delta
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.schema import Batch
from cki_rec.engine import distributed
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.fisher import fisher_diagonal
from cki_rec.engine.gating import train_gates
from cki_rec.engine.lookups import shuffle_divided
from cki_rec.engine.networks import declared
from cki_rec.engine.sampling import sample_statistics
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.extras import Gates, Learn, Learned, Rule, Weigh
from cki_rec.merging.params import Params
from cki_rec.merging.perturbation import permute
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.models import build_model
from cki_rec.pipelines.evidence import counts_of
from cki_rec.pipelines.vocabularies import Joined

HEAD = re.compile(r"mlp\.(?:layers\.(\d+)\.)?")
"""Start of the names of the MLP's parameters, with the number of their layer."""


def fixed_rules(options: Merge, params: Params) -> dict[str, Rule]:
    """Return the parameters whose mixing weights options decide, not the method.

    Raises:
        UserError: The scope holds no parameter, as in a model without an MLP.
    """
    rules: dict[str, Rule] = {}
    if options.tables != "same":
        rule: Rule = "evidence" if options.tables == "evidence" else "first"
        rules |= {name: rule for name in params if table_of(name)}
    if options.biases == "first":
        rules |= {name: "first" for name, tensor in params.items() if tensor.ndim == 1}
    return rules | {name: "first" for name in out_of_scope(options, params)}


def out_of_scope(options: Merge, params: Params) -> list[str]:
    """Return the parameters that stay the first source's (``merge.scope``).

    Raises:
        UserError: The scope holds no parameter.
    """
    if options.scope == "all":
        return []
    head = {name: match.group(1) for name in params if (match := HEAD.match(name))}
    last = max((int(layer) for layer in head.values() if layer), default=None)
    output = {name for name, layer in head.items() if layer and int(layer) == last}
    inside = {"head": set(head), "output": output, "hidden": set(head) - output}[options.scope]
    if not inside:
        raise UserError(
            f"merge.scope={options.scope}: the model has no such layers; merge.scope=all merges"
            " all parameters"
        )
    return [name for name in params if name not in inside]


def ablated(config: Config, source: Checkpoint) -> Params:
    """Return the parameters of a source after the first, changed by ``merge.ablation``."""
    if config.merge.ablation == "none":
        return source.params
    if config.merge.ablation == "shuffled":
        return shuffle_divided(source.params, source.schema, config.seed)
    return permute(source.params, declared(source).symmetries, config.seed)


def fisher(
    config: Config,
    first: Checkpoint,
    dataset: EncodedDataset | None,
    activations: ActivationStatistics | None,
) -> Callable[[Sequence[Params]], Sequence[Params]] | None:
    """Return a function (models) -> Fisher information of each, on rows it was trained on.

    A source whose shard is known (``data.part``) has it on rows of that shard, others on the
    sample of all training rows.
    """
    if dataset is None or activations is None:
        return None

    def rows_of(delta: Mapping[str, Any]) -> Sequence[Batch]:
        if "path" in delta:
            return activations.batches
        shard = with_delta(config, dict(delta))
        if shard.data.part is None or shard.train.start is not None:
            return activations.batches
        rows = dataset.rows("train", shard.data.partition, shard.data.part)
        size, seed = config.merge.sample, config.seed
        return sample_statistics(
            activations.network, dataset, first.schema, size, seed, rows
        ).batches

    return lambda models: [
        fisher_diagonal(activations.network, model, rows_of(delta))
        for model, delta in zip(models, config.merge.sources, strict=True)
    ]


def learning(
    config: Config,
    checkpoints: Sequence[Checkpoint],
    dataset: EncodedDataset | None,
    joined: Joined,
) -> Learn | None:
    """Return the training of gates, and of parameters out of scope, that is configured."""
    options, first = config.merge, checkpoints[0]
    is_alone = options.learn.what == "gates" and len(checkpoints) == 1
    if dataset is None or options.learn.what == "none" or is_alone:
        return None

    def learn(models: Sequence[Params], gates: Gates, weigh: Weigh) -> Learned:
        distributed.start(config.runtime)
        trunk = out_of_scope(options, first.params) if options.learn.what == "trunk" else []
        return train_gates(
            build_model(first.schema, first.model, torch.device("meta")),
            models,
            gates,
            weigh,
            trunk,
            dataset,
            first.schema,
            dataset.rows("train"),
            dataset.rows("valid"),
            options.learn.epochs,
            options.learn.learning_rate,
            config.train.batch_size,
            config.seed,
            auc,
            f"gates of {_title(config)}",
            counts_of(checkpoints, is_needed=False, kind=options.evidence),
            joined.owners,
        )

    return learn


def _title(config: Config) -> str:
    return f"{config.merge.label}, {config.suite.name}, seed {config.seed}"
