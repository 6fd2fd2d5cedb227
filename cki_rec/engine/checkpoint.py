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
import pickle
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from cki_rec.config import LostProcess, UserError, model_options, section
from cki_rec.config import Model as ModelConfig
from cki_rec.data.origin import Origin
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.integration.params import Params
from cki_rec.models.comparison import decides, differences

FORMAT = 2
TEMPORARY, REPLACED = ".tmp", ".tmp-replaced"
"""Suffixes of a folder while it is written, and of the one whose place it takes."""
TENSORS, DESCRIPTION = "tensors", "checkpoint.json"
TORCH_METADATA_TYPES = frozenset(
    {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"}
    | {"ChunkStorageMetadata", "TensorProperties", "_StorageInfo", "_MEM_FORMAT_ENCODING"}
    | {"Size", "dtype", "layout", "memory_format", "_get_layout"}
)
"""What the metadata of tensors consists of."""


@dataclass(slots=True)
class Checkpoint:
    """A model at rest, as plain tensors."""

    params: Params
    accumulators: Params
    counts: Params
    """Per table ``(rows,)`` int64; empty when unknown."""
    model: ModelConfig
    schema: FeatureSchema
    origin: Origin


def save(
    folder: Path,
    tensors: dict[str, dict[str, Any]],
    model: ModelConfig,
    schema: FeatureSchema,
    origin: Origin,
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
            with distributed.others(), _quiet():
                dcp.save(tensors, checkpoint_id=temporary / TENSORS, no_dist=_is_alone())
        except (CheckpointException, RuntimeError) as error:
            # the former is a BaseException: it would pass by `except OSError`; the latter is how
            # torch's writer reports a full disk
            raise _as_os_error(error, folder) from None
        if is_first:
            description: dict[str, Any] = {
                "format": FORMAT,
                "model": section(model),
                "schema": schema.to_json(),
                **origin.to_json(),
                "position": position,
                "files": _digests(temporary / TENSORS),
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
    origin: Origin
    position: dict[str, Any] | None


def describe(folder: Path) -> Description:
    """Return the description of a checkpoint whose files are all there and unchanged.

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
            Origin.from_json(description),
            description["position"],
        )
        digests: dict[str, str] = description["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no checkpoint here ({DESCRIPTION} is missing)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error!r}); write it again") from None
    for name, digest in _digests(folder / TENSORS).items():
        if digests.pop(name, digest) != digest:
            raise UserError(f"{folder / TENSORS / name}: damaged checkpoint, the file has changed")
    if digests:
        raise UserError(f"{folder / TENSORS / min(digests)}: damaged checkpoint, the file is gone")
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
    reader = _Reader(folder / TENSORS)
    try:
        with distributed.others(), _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=_is_alone())
    except LostProcess:
        raise
    except (CheckpointException, Exception) as error:
        raise UserError(f"{folder}: unreadable checkpoint ({_reason(error)})") from None


def accumulator_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Adagrad accumulators of a checkpoint that is whole, by name."""
    entries = _Reader(folder / TENSORS).read_metadata().state_dict_metadata
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
    found = describe(folder)
    groups: dict[str, Params] = {"model": {}, "accumulator": {}, "counts": {}}
    for key, value in _read(folder / TENSORS).items():
        group, name = key.split(".", 1)
        if group in groups:
            groups[group][name] = value
    return Checkpoint(
        groups["model"],
        groups["accumulator"],
        groups["counts"],
        found.model,
        found.schema,
        found.origin,
    )


def _read(folder: Path, prefix: str = "") -> Params:
    """Return the tensors of a torch.distributed.checkpoint folder whose names begin so."""
    reader = _Reader(folder)
    try:
        metadata = reader.read_metadata().state_dict_metadata
        state: Params = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
        }
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, Exception) as error:  # whatever bytes of a stranger cause
        raise UserError(f"{folder}: unreadable checkpoint ({_reason(error)})") from None
    return state


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong, in whichever process."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_alone() -> bool:
    return distributed.world_size() == 1


class _Reader(dcp.FileSystemReader):
    """Reads checkpoints of strangers: their metadata is a pickle, so it may name known types only.

    Tensors are read by torch with ``weights_only``.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the folder.

        Raises:
            pickle.UnpicklingError: It names a type that no metadata needs.
        """
        with self.fs.create_stream(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_known = package == "torch" and name in TORCH_METADATA_TYPES
        if is_dtype or is_known or (package == "pathlib" and name.endswith("Path")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which may run code")


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by name."""
    digests = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        digests[path.name] = digest.hexdigest()
    return digests


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
                    " integrate.vocabularies=[null,...], one per source"
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
