"""Checkpoints that all processes write, or read into sharded tensors, together."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cki_rec.checkpoints import DESCRIPTION, FORMAT, TENSORS, file_digests, untrusted
from cki_rec.checkpoints.reader import Reader
from cki_rec.checkpoints.tensors import ignore_dcp_warnings, raise_interruption
from cki_rec.config import Model, section
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed

TEMPORARY, REPLACED = ".tmp", ".tmp-replaced"
"""Suffixes of a new folder while it is written, and of the folder that it replaces."""


def save(
    folder: Path,
    tensors: dict[str, dict[str, Any]],
    model: Model,
    schema: FeatureSchema,
    origin: Provenance,
    position: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all, and replace an existing one.

    All processes call this. Each writes its parts into the one folder.

    Args:
        folder: The checkpoint.
        tensors: Groups (``model``, ``accumulator``, ...) of plain or sharded tensors by name.
        model: Configuration of the network.
        schema: Features and vocabularies of the network.
        origin: Training data of the model.
        position: Loop state of an unfinished training; plain JSON values.

    Raises:
        OSError: The checkpoint cannot be written; ``filename`` is set.
    """
    temporary = folder.with_name(folder.name + TEMPORARY)
    is_first = distributed.rank() == 0
    try:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        try:
            with distributed.detect_lost_ranks(), ignore_dcp_warnings():
                dcp.save(tensors, checkpoint_id=temporary / TENSORS, no_dist=_is_alone())
        except (CheckpointException, RuntimeError) as error:
            # CheckpointException is a BaseException, so `except OSError` would miss it;
            # torch's writer raises RuntimeError when the disk is full
            raise_interruption(error)
            raise _as_os_error(error, folder) from None
        files = _digests_of_all(temporary / TENSORS)
        if is_first:
            description: dict[str, Any] = {
                "format": FORMAT,
                "model": section(model),
                "schema": schema.to_json(),
                **origin.to_json(),
                "position": position,
                "files": files,
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


def load_into(tensors: dict[str, dict[str, Any]], folder: Path) -> None:
    """Fill plain or sharded tensors from a checkpoint; all processes call this.

    Each process reads its own parts, so no process needs memory for whole tables.

    Args:
        tensors: Groups of tensors by name, as for ``save``; changed in place.
        folder: An undamaged checkpoint.

    Raises:
        UserError: A tensor is missing or has another shape.
        RankLost: Another process has ended.
    """
    reader = Reader(folder / TENSORS)
    with untrusted(folder), distributed.detect_lost_ranks(), ignore_dcp_warnings():
        dcp.load(tensors, storage_reader=reader, no_dist=_is_alone())


def tidy(folder: Path) -> None:
    """Remove the temporary folders that killed processes left below ``folder``.

    A folder that was about to be replaced is restored if its replacement is missing.
    """
    for replaced in list(folder.rglob(f"*{REPLACED}")):
        target = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not target.exists():
            replaced.rename(target)
    for leftover in list(folder.rglob(f"*{TEMPORARY}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_alone() -> bool:
    return distributed.world_size() == 1


def _digests_of_all(folder: Path) -> dict[str, str]:
    """Return the digests of all files; every process reads its share of them."""
    shares = distributed.exchange(file_digests(folder, distributed.share()))
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
