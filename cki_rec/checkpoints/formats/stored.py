"""The seam over formats: named tensors at rest, any of whose rows can be read."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from cki_rec.checkpoints.digests import one_digest
from cki_rec.config import UserError
from cki_rec.merging.params import Params

COPIED_BYTES = 1 << 24
"""Bytes that are copied at a time from file to file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Return the size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where the values of one tensor lie, row after row."""

    file: Path
    start: int
    """Byte of the first entry."""
    entry: Entry

    def row_bytes(self) -> int:
        """Return the size of one row; of a scalar, its size."""
        return self.entry.dtype.itemsize * math.prod(self.entry.shape[1:])


@dataclass(frozen=True, slots=True)
class Blank:
    """The files of a checkpoint before their values."""

    path: Path
    """The file or folder that other programs open."""
    places: dict[str, Place]


class Stored(Protocol):
    """A checkpoint of any format. Opening it reads names, shapes and types, and no values."""

    path: Path
    """As the user named it."""
    form: str
    """Its format, a key of ``WRITERS``, or ``own``."""
    title: str
    """Its format in words."""
    entries: Mapping[str, Entry]
    """All tensors, by their full names; those of optimizers too."""
    groups: list[dict[str, Any]]
    """Parameter groups of the optimizer, if the format holds them: options, and numbers of
    parameters under ``params``."""

    tied: Mapping[str, str]
    """Tensors that are another one under a second name -> that name."""

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor, all of it without ``stop``; read no others if possible."""

    def digest(self) -> str:
        """Return a digest of the content, which copies share."""

    def written(self, params: Params, target: Path) -> Path:
        """Write tensors, by full names, in this form; return the file or folder.

        Args:
            params: The tensors.
            target: The folder that takes them.
        """

    def blank(self, entries: Mapping[str, Entry], target: Path, tied: Mapping[str, str]) -> Blank:
        """Write the files of tensors in this form without values; files that are there stay.

        Args:
            entries: Shapes and types, by full names.
            target: The folder that takes them.
            tied: Second names of tensors -> first ones, for formats that store these once.
        """

    def files(self) -> list[Path]:
        """Return the files of the tensors."""

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened.

        Raises:
            UserError: One has changed.
        """

    def close(self) -> None:
        """Close all files."""


def digest_of(files: Iterable[Path]) -> str:
    """Return the digest of the contents of some files, whatever their names are."""
    digests = sorted(one_digest(path) for path in files)
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the values of a tensor in order, as bytes."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.numel() and flat.stride(0) != 1:  # of one entry too, which counts as contiguous
        flat = torch.empty(len(flat), dtype=flat.dtype).copy_(flat)
    return memoryview(flat.view(torch.uint8).numpy().data)


def write_values(file: BinaryIO, tensor: Tensor) -> None:
    """Write the values of a tensor in order.

    Those of a tensor that is mapped from a file are copied from file to file, so that they do not
    count as memory of the process.
    """
    storage = tensor.untyped_storage()
    if storage.filename is None or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
        file.write(bytes_of(tensor))
        return
    with open(storage.filename, "rb") as mapped:
        shutil.copyfileobj(mapped, file, COPIED_BYTES)


def damaged(path: Path, reason: str) -> UserError:
    """Return the error about a file that is no whole checkpoint."""
    return UserError(f"{path}: unreadable checkpoint, {reason}")


def check_range(entry: Entry, first: int, stop: int | None) -> int:
    """Return the end of a range of rows, within the tensor."""
    size = entry.shape[0] if entry.shape else 1
    stop = size if stop is None else min(stop, size)
    assert 0 <= first <= stop
    return stop


def new_file(target: Path, write: Any) -> Path:
    """Return a file that ``write(temporary path)`` has written, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        write(temporary)
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target
