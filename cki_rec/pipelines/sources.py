"""Sources of a merge: models at rest, named by config deltas or by paths, resolved once."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cki_rec import COMMAND_VARIABLE
from cki_rec.checkpoints import EXTERNAL, external_identity, named_folder
from cki_rec.config import Config, UserError, with_delta
from cki_rec.data.encoding import store
from cki_rec.engine import distributed
from cki_rec.engine.record import Run
from cki_rec.merging.options import in_yaml
from cki_rec.pipelines import train

NOT_OF_TRAINING = (
    *("merge.", "merge=", "suite.", "assess", "finetune", "evaluate", "check_only", "name", "-"),
)
"""Prefixes of command-line words that do not affect the training of a source."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One model at rest."""

    name: str
    """Its name in the configuration."""
    identity: str
    """Run id, or a digest of an external checkpoint."""
    folder: Path
    """Folder of its checkpoint."""


@dataclass(frozen=True, slots=True)
class Sources:
    """All models that a merge and its evaluation read."""

    merged: list[Source]
    """``merge.sources``."""
    suite: list[Source]
    """``suite.sources``, with which every method of the suite is compared; empty for a merge
    that is not evaluated."""
    base: Source | None
    """``merge.base``; None if the method needs no base."""


def resolve(config: Config, needs_base: bool, needs_suite: bool) -> Sources:
    """Return the sources that the configuration names, each resolved once; train missing ones.

    Several processes train nothing.

    Raises:
        UserError: A source is no checkpoint, or cannot be trained; on several processes also one
            that is not trained yet, with the command that trains it.
    """
    resolved: dict[str, Source] = {}

    def one(delta: Mapping[str, Any], option: str) -> Source:
        key = json.dumps(delta, sort_keys=True)
        if key not in resolved:
            resolved[key] = _resolve(config, delta, option)
        return resolved[key]

    base = config.merge.base
    return Sources(
        merged=[one(delta, "merge.sources") for delta in config.merge.sources],
        suite=[one(d, "suite.sources") for d in config.suite.sources] if needs_suite else [],
        base=one(base, "merge.base") if needs_base and base is not None else None,
    )


def _resolve(config: Config, delta: Mapping[str, Any], option: str) -> Source:
    if "path" in delta:
        folder = named_folder(delta, option)
        return Source(str(delta["path"]), external_identity(folder), folder)
    if distributed.world_size() > 1:
        folder = find(config, delta, option)
        return Source(str(delta), folder.parent.name, folder)
    run = train.ensure(with_delta(config, dict(delta), option))
    return Source(str(delta), run.path.name, run.checkpoint)


def find(config: Config, delta: Mapping[str, Any], option: str = "merge.sources") -> Path:
    """Return the checkpoint folder of a source that exists; train nothing.

    Raises:
        UserError: It does not exist; the message holds the command that makes it.
    """
    if "path" in delta:
        return named_folder(delta, option)
    changed = with_delta(config, dict(delta), option)
    dataset = store.find(changed.data, changed.runtime.encoded)
    if dataset is not None:
        run = train.run_of(changed, dataset)
        if run.record is not None:
            return run.checkpoint
    raise UserError(f"not trained yet; make it: {_training_command(delta)}")


def is_external(identity: str) -> bool:
    """Return whether a source is a checkpoint that is named by its path."""
    return identity.startswith(EXTERNAL)


def shard_of(source: Source) -> dict[str, Any] | None:
    """Return the shard of the data that a model was trained on; None: all rows, or unknown.

    The record beside the checkpoint holds it (``train.data_identity``). It is unknown for models
    that were merged, fine-tuned or trained on from another model.
    """
    config = (Run(source.folder.parent).record or {}).get("config", {})
    data = config.get("data")
    is_shard = isinstance(data, dict) and data.get("part") is not None and "start" not in config
    return data if is_shard else None


def are_disjoint(shards: Sequence[dict[str, Any] | None]) -> bool:
    """Return whether models were trained on different shards of one data set (``shard_of``)."""
    known = [shard for shard in shards if shard is not None]
    partitions = [{**shard, "part": None} for shard in known]
    return len({shard["part"] for shard in known}) == len(shards) and all(
        partition == partitions[0] for partition in partitions
    )


def _training_command(delta: Mapping[str, Any]) -> str:
    """Return the command that trains a source, made from the present command line."""
    words = shlex.split(os.environ.get(COMMAND_VARIABLE, ""))[2:]
    options = [
        word
        for word in words
        if not word.startswith(NOT_OF_TRAINING) and word.split("=")[0] not in delta
    ]
    changes = [f"{key}={in_yaml(value)}" for key, value in delta.items()]
    return shlex.join(["cki-rec", "train", *options, *changes])
