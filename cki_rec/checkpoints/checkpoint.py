"""Checkpoints: a folder of DCP tensors, and JSON for everything else.

Tensors come in groups. ``model`` holds the parameters. ``accumulator`` holds the Adagrad state of
every fused table. ``counts`` holds the number of training rows that looked up each table row, the
evidence for merging. An unfinished training adds ``adam``, the moments, and ``average``, its
moving average. The JSON file stores a digest of every file, so damage is detected.

Tensors are stored whole, whichever processes wrote them: any plan on any number of processes can
read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cki_rec.checkpoints.digests import file_digests, file_names
from cki_rec.checkpoints.missing import no_checkpoint
from cki_rec.checkpoints.tensors import empty_tensors, read_tensors, tensor_entries, untrusted
from cki_rec.config import Model as ModelConfig
from cki_rec.config import UserError, model_options
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.merging.params import Params

FORMAT = 2
TENSORS, DESCRIPTION = "tensors", "checkpoint.json"
EXTERNAL = "external-"
"""Prefix of the identity of a checkpoint that is named by its path."""
CHECKPOINT = "checkpoint"
"""Name of the checkpoint folder in a run directory."""


@dataclass(slots=True)
class Checkpoint:
    """A model at rest, as plain tensors."""

    params: Params
    accumulators: Params
    counts: Params
    """Per table ``(rows,)`` int64; empty if unknown."""
    model: ModelConfig
    schema: FeatureSchema
    origin: Provenance


@dataclass(slots=True)
class Description:
    """The JSON part of an undamaged checkpoint."""

    model: ModelConfig
    schema: FeatureSchema
    origin: Provenance
    position: dict[str, Any] | None
    """Loop state of an unfinished training."""


def locate(path: Path) -> Path:
    """Return the checkpoint folder of a run directory; another path is returned unchanged."""
    nested = path / CHECKPOINT
    return nested if nested.is_dir() else path


def named_folder(named: Mapping[str, Any], option: str) -> Path:
    """Return the checkpoint folder of a source that is named ``{path: ...}``.

    Args:
        named: The source. Its path is a run directory or a checkpoint folder.
        option: The option that holds it, for messages.

    Raises:
        UserError: The path is no text, or there are other keys.
    """
    path = named["path"]
    if not isinstance(path, str) or len(named) > 1:
        raise UserError(
            f"{option}: {dict(named)} must be {{path: FOLDER}}, a text and no other key"
        )
    return locate(Path(path))


def external_identity(folder: Path) -> str:
    """Return the identity of an external checkpoint: its description holds file digests.

    Raises:
        UserError: There is no checkpoint.
    """
    description = folder / DESCRIPTION
    if not description.is_file():
        raise UserError(no_checkpoint(folder, description.name))
    return f"{EXTERNAL}{hashlib.sha256(description.read_bytes()).hexdigest()[:16]}"


def content_digest(folder: Path) -> str:
    """Return a digest of a checkpoint: of its description, which holds those of its tensors.

    It is equal for copies, and for equal trainings in two folders.

    Raises:
        UserError: There is no checkpoint, or its description is damaged.
    """
    content = _description(folder)
    content["files"].pop(".metadata", None)  # torch writes a random number into it
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint of a run directory or a checkpoint folder, as plain tensors.

    Raises:
        UserError: There is no checkpoint, or it is damaged or of another format.
    """
    return load(locate(path))


def load(folder: Path) -> Checkpoint:
    """Return a checkpoint as plain tensors, in any process, whichever plan wrote it.

    Raises:
        UserError: There is no checkpoint, or it is damaged or of another format.
    """
    return _checkpoint(describe(folder), read_tensors(folder / TENSORS))


def outline(folder: Path, share: tuple[int, int] | None = (0, 1)) -> Checkpoint:
    """Return a checkpoint with tensors on ``meta``: shapes and dtypes without values.

    Args:
        folder: The checkpoint.
        share: The files to check, as for ``check_files``; None: the caller checks them.

    Raises:
        UserError: As for ``load``.
    """
    return _checkpoint(describe(folder, share), empty_tensors(folder / TENSORS, "", "meta"))


def describe(folder: Path, share: tuple[int, int] | None = (0, 1)) -> Description:
    """Return the description of a checkpoint after checking its files.

    Args:
        folder: The checkpoint.
        share: The files to check, as for ``check_files``; None: the caller checks them.

    Raises:
        UserError: There is no checkpoint, or it is damaged or of another format.
    """
    path, content = folder / DESCRIPTION, _description(folder)
    try:
        description = Description(
            model_options(content["model"]),
            FeatureSchema.from_json(content["schema"]),
            Provenance.from_json(content),
            content["position"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error!r}); write it again") from None
    if share is not None:
        check_files(folder, share)
    return description


def check_files(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that the files of a checkpoint are those of its description.

    Args:
        folder: The checkpoint.
        share: ``(first, step)``: only every ``step``-th file is read, so that processes can share
            the work.

    Raises:
        UserError: There is no checkpoint, or it is damaged or of another format.
    """
    expected: dict[str, str] = _description(folder)["files"]
    missing = expected.keys() - set(file_names(folder / TENSORS))
    if missing:
        file = folder / TENSORS / min(missing)
        raise UserError(f"{file}: damaged checkpoint, the file is gone")
    for name, digest in file_digests(folder / TENSORS, share).items():
        if expected.get(name, digest) != digest:
            raise UserError(f"{folder / TENSORS / name}: damaged checkpoint, the file has changed")


def _description(folder: Path) -> dict[str, Any]:
    """Return the JSON content of a description.

    Raises:
        UserError: There is none, or it is damaged or of another format.
    """
    path = folder / DESCRIPTION
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: format {content['format']}, this release reads {FORMAT}; make it"
                " again with this release"
            )
        content["files"] = dict(content["files"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(no_checkpoint(folder, DESCRIPTION)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error!r}); write it again") from None
    return content


def row_counts(folder: Path) -> Params:
    """Return the row counts of an undamaged checkpoint per table; empty without counts."""
    counts = read_tensors(folder / TENSORS, "counts.")
    return {name.removeprefix("counts."): values for name, values in counts.items()}


def accumulator_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Adagrad accumulators of an undamaged checkpoint, by name."""
    with untrusted(folder):
        return {
            name.removeprefix("accumulator."): tuple(entry.size)
            for name, entry in tensor_entries(folder / TENSORS).items()
            if name.startswith("accumulator.")
        }


def _checkpoint(description: Description, tensors: Params) -> Checkpoint:
    groups: dict[str, Params] = {"model": {}, "accumulator": {}, "counts": {}}
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        if group in groups:
            groups[group][name] = value
    params, accumulators, counts = groups.values()
    return Checkpoint(
        params,
        accumulators,
        counts,
        description.model,
        description.schema,
        description.origin,
    )
