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
from cki_rec.checkpoints import (
    EXTERNAL,
    content_digest,
    external_identity,
    named_folder,
    outline,
)
from cki_rec.config import Config, Partition, UserError, section, with_delta
from cki_rec.engine import distributed
from cki_rec.engine.record import Run
from cki_rec.merging.options import in_yaml
from cki_rec.pipelines import compatibility, starts, train
from cki_rec.pipelines.names import NAMES

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

    Raises:
        UserError: A source is no checkpoint, or cannot be trained.
    """
    resolved: dict[str, Source] = {}

    def one(delta: Mapping[str, Any], option: str) -> Source:
        key = json.dumps(delta, sort_keys=True)
        if key not in resolved:
            resolved[key] = _resolve(config, delta, option)
        return resolved[key]

    base = config.merge.base if needs_base else None
    lists = {"merge.sources": config.merge.sources}
    if needs_suite:
        lists["suite.sources"] = config.suite.sources
    for option, deltas in lists.items():
        contents = [_content(config, delta, option) for delta in deltas]
        check_distinct(contents, [title(delta) for delta in deltas], option)
    _check_before_training(config, base)
    found = {option: [one(d, option) for d in deltas] for option, deltas in lists.items()}
    for option, sources in found.items():
        digests = [content_digest(source.folder) for source in sources]
        check_distinct(digests, [source.name for source in sources], option)
    models = Sources(
        merged=found["merge.sources"],
        suite=found.get("suite.sources", []),
        base=None if base is None else one(base, "merge.base"),
    )
    if models.base is not None:
        folders = [source.folder for source in models.merged]
        if (warning := base_warning(models.base.folder, folders)) and distributed.rank() == 0:
            log.warning("  %s", warning)
    return models


def check_distinct(contents: Sequence[str], names: Sequence[object], option: str) -> None:
    """Check that no two sources are the same.

    Raises:
        UserError: Two are: the model would be counted twice.
    """
    first: dict[str, int] = {}
    for place, content in enumerate(contents):
        if content in first:
            k = first[content]
            raise UserError(
                f"{option}: sources {k + 1} and {place + 1} are the same checkpoint ({names[k]},"
                f" {names[place]}); name every model once (merge=weighted_average weighs them)"
            )
        first[content] = place


def base_warning(base: Path, sources: Sequence[Path]) -> str:
    """Return a warning if the base of a merge is one of its sources; "": it is not."""
    digest = content_digest(base)
    for place, folder in enumerate(sources):
        if content_digest(folder) == digest:
            return (
                f"merge.base is the same checkpoint as source {place + 1}, so this source adds"
                " nothing to the result; name the model that all sources started from"
            )
    return ""


def _content(config: Config, delta: Mapping[str, Any], option: str) -> str:
    """Return a text that is equal for equal sources, before they are trained."""
    if "path" in delta:
        return content_digest(named_folder(delta, option))
    changed = with_delta(config, dict(delta), option)
    parts = [section(part) for part in (changed.data, changed.model, changed.train)]
    return json.dumps([*parts, changed.seed], sort_keys=True)


def _check_before_training(config: Config, base: Mapping[str, Any] | None) -> None:
    """Check that sources will fit together, if one of them is still to be trained.

    Raises:
        UserError: Their networks, features, tables or optimizers differ.
    """
    deltas = [*config.merge.sources, *([] if base is None else [base])]
    options = ["merge.sources"] * len(config.merge.sources) + ["merge.base"] * (base is not None)
    planned = [
        None if "path" in delta else train.outline_of(with_delta(config, dict(delta), option))
        for delta, option in zip(deltas, options, strict=True)
    ]
    if all(each is None or each[1] for each in planned):
        return
    outlines = [
        outline(named_folder(delta, option)) if each is None else each[0]
        for delta, option, each in zip(deltas, options, planned, strict=True)
    ]
    names, is_joined = [title(delta) for delta in deltas], bool(config.merge.vocabularies)
    compatibility.require(compatibility.compare(outlines, names, is_joined))


def _resolve(config: Config, delta: Mapping[str, Any], option: str) -> Source:
    if "path" in delta:
        folder = named_folder(delta, option)
        return Source(title(delta), external_identity(folder), folder)
    run = train.ensure(with_delta(config, dict(delta), option))
    return Source(title(delta), run.path.name, run.checkpoint)


def title(delta: Mapping[str, Any]) -> str:
    """Return a source in words: its name or path, or ``seed=1, data.part=0``."""
    if "path" in delta:
        path = Path(str(delta["path"]))
        return path.name if path.parent.name == NAMES else str(delta["path"])
    return ", ".join(f"{key}={value}" for key, value in delta.items()) or "as configured"


def find(config: Config, delta: Mapping[str, Any], option: str = "merge.sources") -> Path:
    """Return the checkpoint folder of a source that exists; train nothing.

    Raises:
        UserError: It does not exist; the message holds the command that makes it.
    """
    if "path" in delta:
        return named_folder(delta, option)
    changed = with_delta(config, dict(delta), option)
    dataset = starts.find(changed)
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
    """Return whether models were trained on different shards of one data set (``shard_of``).

    Shards that overlap are not disjoint.
    """
    known = [shard for shard in shards if shard is not None]
    if any(Partition(**shard["partition"]).overlaps for shard in known):
        return False
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
