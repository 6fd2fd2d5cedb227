"""Checkpoints: a folder of torch.distributed.checkpoint tensors, and JSON for everything else.

``model`` holds the parameters, ``accumulator`` the row-wise Adagrad state of every table, and
``counts`` the training rows that looked each table row up: the evidence that integration needs
travels with the model.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cki_rec.config import Model as ModelConfig
from cki_rec.config import UserError, section
from cki_rec.data.schema import FeatureSchema
from cki_rec.integration.params import Params

FORMAT = 1
TENSORS, DESCRIPTION = "tensors", "checkpoint.json"


@dataclass(slots=True)
class Checkpoint:
    """A model at rest, as plain tensors."""

    params: Params
    accumulators: Params
    counts: Params
    """Per table ``(rows,)`` int64; empty when unknown."""
    model: ModelConfig
    schema: FeatureSchema
    data_hash: str


def save(
    folder: Path,
    tensors: dict[str, dict[str, Any]],
    model: ModelConfig,
    schema: FeatureSchema,
    data_hash: str,
) -> None:
    """Write a checkpoint whole or not at all, replacing one that is there.

    Args:
        folder: Where.
        tensors: ``model``, ``accumulator`` and ``counts``, plain or sharded tensors by name.
        model: Configuration of the network.
        schema: Its features and vocabularies.
        data_hash: Content of the data set it was trained on.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    description = {
        "format": FORMAT,
        "model": section(model),
        "schema": schema.to_json(),
        "data_hash": data_hash,
    }
    try:
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
        try:
            with _one_process():
                dcp.save(tensors, checkpoint_id=temporary / TENSORS, no_dist=True)
        except CheckpointException as error:  # a BaseException: it would pass by `except OSError`
            causes = [cause for cause, _ in error.failures.values()]
            known = [cause for cause in causes if isinstance(cause, OSError)]
            raise (known or [OSError(str(error))])[0] from None
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint as plain tensors, in any process, whatever plan wrote it.

    Raises:
        UserError: Nothing there, a damaged or a newer checkpoint; names the file.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        model = ModelConfig(**description["model"])
        schema = FeatureSchema.from_json(description["schema"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint here ({DESCRIPTION} is missing)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); write it again") from None
    if description["format"] != FORMAT:
        raise UserError(f"{path}: format {description['format']}, this release reads {FORMAT}")
    groups: dict[str, Params] = {"model": {}, "accumulator": {}, "counts": {}}
    flat = _read(folder / TENSORS)
    for key, value in flat.items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    return Checkpoint(
        groups["model"],
        groups["accumulator"],
        groups["counts"],
        model,
        schema,
        description["data_hash"],
    )


def _read(folder: Path) -> Params:
    """Return every tensor of a torch.distributed.checkpoint folder."""
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        state: Params = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _one_process():
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder}: damaged checkpoint ({reason}); write it again") from None
    return state


@contextmanager
def _one_process() -> Iterator[None]:
    """Silence the warning that this process reads and writes alone: it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def check_compatible(checkpoints: list[Checkpoint], names: list[str]) -> None:
    """Check that the checkpoints hold the same network on the same vocabularies.

    Raises:
        UserError: The first difference: feature, table or tensor, and what to do.
    """
    first = checkpoints[0]
    for other, name in zip(checkpoints[1:], names[1:], strict=True):
        pair = f"{name} does not fit {names[0]}"
        if other.model.name != first.model.name:
            raise UserError(f"{pair}: model {other.model.name} against {first.model.name}")
        if other.schema.features != first.schema.features:
            fields = [", ".join(f.name for f in c.schema.features) for c in (other, first)]
            raise UserError(f"{pair}: fields {fields[0]} against {fields[1]}")
        for table, digest in first.schema.vocabulary_hashes.items():
            if other.schema.vocabulary_hashes[table] != digest:
                raise UserError(
                    f"{pair}: table '{table}' has another vocabulary, so its rows mean other"
                    " things; train both on one encoded data set"
                )
        for key in [*first.params, *other.params]:
            shapes = [
                tuple(c.params[key].shape) if key in c.params else None for c in (other, first)
            ]
            if shapes[0] != shapes[1]:
                raise UserError(f"{pair}: tensor {key} is {shapes[0]} against {shapes[1]}")
