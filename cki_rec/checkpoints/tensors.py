"""Folders of tensors in the format of torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cki_rec.checkpoints.reader import Reader
from cki_rec.config import Stopped, UserError
from cki_rec.merging.params import Params


def read_tensors(folder: Path, prefix: str = "") -> Params:
    """Return the tensors of a folder whose names begin with ``prefix``.

    Raises:
        UserError: The folder is not readable.
    """
    state = empty_tensors(folder, prefix, "cpu")
    fill(state, folder)
    return state


def empty_tensors(folder: Path, prefix: str, device: str) -> Params:
    """Return uninitialized tensors with the names, shapes and dtypes of a folder.

    Raises:
        UserError: The folder is not readable.
    """
    with untrusted(folder):
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
            for name, entry in tensor_entries(folder).items()
            if name.startswith(prefix)
        }


def tensor_entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return the metadata of every tensor of a folder, by name."""
    metadata = Reader(folder).read_metadata().state_dict_metadata
    return {n: e for n, e in metadata.items() if isinstance(e, TensorStorageMetadata)}


def fill(state: Mapping[str, Any], folder: Path) -> None:
    """Fill tensors, plain or sharded, from a folder of tensors; without any communication.

    Args:
        state: Tensors by group and name, as ``model.bias``; changed in place.
        folder: The folder of tensors of an undamaged checkpoint.

    Raises:
        UserError: The folder is not readable.
    """
    with untrusted(folder), ignore_dcp_warnings():
        dcp.load(dict(state), storage_reader=Reader(folder), no_dist=True)


@contextmanager
def untrusted(folder: Path) -> Iterator[None]:
    """Convert any error from an untrusted checkpoint into a UserError."""
    try:
        yield
    except (CheckpointException, Exception) as error:  # the former is a BaseException
        raise_interruption(error)
        raise UserError(f"{folder}: unreadable checkpoint ({_reason(error)})") from None


def raise_interruption(error: BaseException) -> None:
    """Raise the interruption by the user or the system that DCP has wrapped in its own error."""
    causes = error.failures.values() if isinstance(error, CheckpointException) else ()
    for cause, _ in causes:
        if isinstance(cause, KeyboardInterrupt | Stopped):
            raise cause from None


@contextmanager
def ignore_dcp_warnings() -> Iterator[None]:
    """Ignore the warnings that DCP emits in one process and about its own sharded tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _reason(error: BaseException) -> str:
    """Return the first line of an error message, of whichever process failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__
