"""Checkpoints: a folder of torch.distributed.checkpoint tensors, and JSON for everything else.

``model`` holds the parameters, ``accumulator`` the Adagrad state of every fused table, and
``counts`` the training rows that looked each table row up: the evidence that integration needs
travels with the model. An unfinished training also keeps ``adam``, the moments, and ``average``,
its moving average. A digest of every file is kept, so damage is noticed.

Tensors are stored whole, whoever held which part: any plan on any number of processes reads them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cki_rec.checkpoints.reader import Reader
from cki_rec.config import Model as ModelConfig
from cki_rec.config import RankLost, UserError, model_options, section
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.merging.params import Params
from cki_rec.models.comparison import decides, differences

FORMAT = 2
TEMPORARY, REPLACED = ".tmp", ".tmp-replaced"
"""Suffixes of a folder while it is written, and of the one whose place it takes."""
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
    origin: Provenance


def save(
    folder: Path,
    tensors: dict[str, dict[str, Any]],
    model: ModelConfig,
    schema: FeatureSchema,
    origin: Provenance,
    position: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all, replacing one that is there.

    All processes call this; each writes the parts it holds into the one folder.

    Args:
        folder: Where.
        tensors: Groups (``model``, ``accumulator``, ...) of plain or sharded tensors by name.
        model: Configuration of the network.
        schema: Its features and vocabularies.
        origin: What it was trained on.
        position: Where an unfinished training stands; plain JSON values.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    is_first = distributed.rank() == 0
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        try:
            with distributed.detect_lost_ranks(), _quiet():
                dcp.save(tensors, checkpoint_id=temporary / TENSORS, no_dist=_is_alone())
        except (CheckpointException, RuntimeError) as error:
            # the former is a BaseException: it would pass by `except OSError`; the latter is how
            # torch's writer reports a full disk
            raise _as_os_error(error, folder) from None
        digests = _digests_by_all(temporary / TENSORS)
        if is_first:
            description: dict[str, Any] = {
                "format": FORMAT,
                "model": section(model),
                "schema": schema.to_json(),
                **origin.to_json(),
                "position": position,
                "files": digests,
            }
            (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
            replaced = folder.with_name(folder.name + REPLACED)
            if folder.exists():
                folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        distributed.barrier()
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Bring in order what processes left below ``folder`` that were killed as they wrote."""
    for left in list(folder.rglob(f"*{REPLACED}")):
        whole = left.with_name(left.name.removesuffix(REPLACED))
        if not whole.exists():
            left.rename(whole)
    for left in list(folder.rglob(f"*{TEMPORARY}*")):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(slots=True)
class Description:
    """What a checkpoint says of itself, its files being whole."""

    model: ModelConfig
    schema: FeatureSchema
    origin: Provenance
    position: dict[str, Any] | None


def describe(folder: Path, is_shared: bool = False) -> Description:
    """Return the description of a checkpoint whose files are all there and unchanged.

    Args:
        folder: Of the checkpoint.
        is_shared: Of several processes each looks at a part of the files, so that none reads all;
            what one finds the others learn by ``distributed.propagate_errors``.

    Raises:
        UserError: Nothing there, a damaged or a newer checkpoint; names the file.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise UserError(
                f"{path}: format {description['format']}, this release reads {FORMAT}; make it"
                " again with this release"
            )
        found = Description(
            model_options(description["model"]),
            FeatureSchema.from_json(description["schema"]),
            Provenance.from_json(description),
            description["position"],
        )
        digests: dict[str, str] = description["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint here ({DESCRIPTION} is missing)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error!r}); write it again") from None
    gone = digests.keys() - set(_names(folder / TENSORS))
    if gone:
        raise UserError(f"{folder / TENSORS / min(gone)}: damaged checkpoint, the file is gone")
    for name, digest in _digests(folder / TENSORS, is_shared).items():
        if digests.get(name, digest) != digest:
            raise UserError(f"{folder / TENSORS / name}: damaged checkpoint, the file has changed")
    return found


def load_into(tensors: dict[str, dict[str, Any]], folder: Path) -> None:
    """Fill tensors, plain or sharded by any plan, from a checkpoint; all processes call this.

    Each process reads what it holds, so no memory for whole tables is needed.

    Args:
        tensors: Groups of tensors by name, as for ``save``; changed in place.
        folder: Of a checkpoint that ``describe`` found whole.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    reader = Reader(folder / TENSORS)
    try:
        with distributed.detect_lost_ranks(), _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=_is_alone())
    except RankLost:
        raise
    except (CheckpointException, Exception) as error:
        raise UserError(f"{folder}: unreadable checkpoint ({_reason(error)})") from None


def accumulator_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Adagrad accumulators of a checkpoint that is whole, by name."""
    entries = Reader(folder / TENSORS).read_metadata().state_dict_metadata
    return {
        name.removeprefix("accumulator."): tuple(entry.size)
        for name, entry in entries.items()
        if name.startswith("accumulator.") and isinstance(entry, TensorStorageMetadata)
    }


def row_counts(folder: Path) -> Params:
    """Return the row counts of a checkpoint that is whole, per table; none where it has none."""
    counts = _read(folder / TENSORS, "counts.")
    return {name.removeprefix("counts."): values for name, values in counts.items()}


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint as plain tensors, in any process, whatever plan wrote it.

    Raises:
        UserError: Nothing there, a damaged or a newer checkpoint; names the file.
    """
    return _as_checkpoint(describe(folder), _read(folder / TENSORS))


def outline(folder: Path) -> Checkpoint:
    """Return a checkpoint without its numbers, as tensors on ``meta``; its files are checked.

    Several processes check them together (``describe``).

    Raises:
        UserError: As ``load``.
    """
    return _as_checkpoint(describe(folder, is_shared=True), _empty(folder / TENSORS, "", "meta"))


def fill(state: Mapping[str, Any], folder: Path) -> None:
    """Read what tensors, plain or sharded, hold of a folder of tensors; waits for no process.

    Args:
        state: Tensors by group and name, as ``model.bias``.
        folder: ``TENSORS`` of a checkpoint that is whole.

    Raises:
        UserError: The folder is not readable.
    """
    with _readable(folder), _quiet():
        dcp.load(dict(state), storage_reader=Reader(folder), no_dist=True)


def _as_checkpoint(found: Description, tensors: Params) -> Checkpoint:
    groups: dict[str, Params] = {"model": {}, "accumulator": {}, "counts": {}}
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        if group in groups:
            groups[group][name] = value
    params, accumulators, counts = groups.values()
    return Checkpoint(params, accumulators, counts, found.model, found.schema, found.origin)


def _read(folder: Path, prefix: str = "") -> Params:
    """Return the tensors of a torch.distributed.checkpoint folder whose names begin so."""
    state = _empty(folder, prefix, "cpu")
    fill(state, folder)
    return state


def _empty(folder: Path, prefix: str, device: str) -> Params:
    """Return tensors without numbers, of the names, shapes and dtypes of a folder."""
    with _readable(folder):
        metadata = Reader(folder).read_metadata().state_dict_metadata
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn whatever the bytes of a stranger cause into one line."""
    try:
        yield
    except (CheckpointException, Exception) as error:
        raise UserError(f"{folder}: unreadable checkpoint ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong, in whichever process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_alone() -> bool:
    return distributed.world_size() == 1


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _digests(folder: Path, is_shared: bool) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by name; of a share of them if others help."""
    names, digests = _names(folder), {}
    if is_shared:
        names = names[distributed.rank() :: distributed.world_size()]
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        digests[name] = digest.hexdigest()
    return digests


def _digests_by_all(folder: Path) -> dict[str, str]:
    """Return the digests of all files, to which every process contributes."""
    shares = distributed.exchange(_digests(folder, is_shared=True))
    return dict(sorted(entry for share in shares for entry in share.items()))


def _as_os_error(error: CheckpointException | RuntimeError, folder: Path) -> OSError:
    """Return the operating system's error behind a failed write."""
    causes: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            cause.filename = cause.filename or str(folder)
            return cause
    return OSError(
        errno.ENOSPC, f"torch could not write the checkpoint ({causes[0]})", str(folder)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning that this process reads and writes alone: it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its sharded tensors
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
                    " things; train both on one encoded data set, or join them by token:"
                    " merge.vocabularies=[null,...], one per source"
                )
        for key in [*first.params, *other.params]:
            shapes = [
                tuple(c.params[key].shape) if key in c.params else None for c in (other, first)
            ]
            if shapes[0] != shapes[1]:
                raise UserError(f"{pair}: tensor {key} is {shapes[0]} against {shapes[1]}")
            dtypes = [c.params[key].dtype for c in (other, first)]
            if dtypes[0] != dtypes[1]:
                raise UserError(f"{pair}: tensor {key} is {dtypes[0]} against {dtypes[1]}")
        for key in first.accumulators.keys() & other.accumulators.keys():
            shapes = [tuple(c.accumulators[key].shape) for c in (other, first)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{pair}: the accumulator of {key} is {shapes[0]} against {shapes[1]}; train"
                    " both with the same train.table_optimizer"
                )
        for key, values in differences(other.model, first.model).items():
            if decides(key, first.model):
                raise UserError(
                    f"{pair}: model.{key} is {values[0]} against {values[1]}, so equal parameters"
                    " compute other scores; train both with the same"
                )
