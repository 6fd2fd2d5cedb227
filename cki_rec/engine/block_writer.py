"""A checkpoint that is written block by block, and that a killed program goes on with.

Each process writes one file of tensors in the layout of torch.distributed.checkpoint (DCP). A
block is a part of its tensor, and a line of a journal. Every block is read back and compared. A
program that starts again checks the blocks of the journal and goes on after the last. When all
are written, the first process writes the metadata.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cki_rec.files import write_atomically
from cki_rec.merging.params import MergeError, is_finite

SYNCED = 1 << 27
"""Bytes after which the disk begins to write."""
CHECKED = 16
"""Digits of a digest that the journal holds."""


@dataclass(frozen=True, slots=True)
class Written:
    """One block: a line of the journal."""

    key: str
    """Name of its tensor."""
    offsets: list[int]
    sizes: list[int]
    start: int
    """First byte in the file."""
    length: int
    checksum: str
    """Of its bytes; here the first digits of the digest of the file up to its end."""
    file: str
    shares: list[float] | None
    """Mean mixing weight of each source in these rows."""


class BlockWriter:
    """One file of blocks of tensors, and its journal.

    Args:
        folder: The folder of tensors; the journal lies beside the checkpoint that it is in.
        number: Number of this process.
        resume: Go on after the blocks of the journal; else begin with an empty file.
        types: Types of tensors in the file; others are written as they are.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        resume: bool,
        types: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        self._types = types
        self.name = f"__{number}_0.distcp"
        self.path = folder / self.name
        self._journal = folder.parents[1] / f"journal-{number}.jsonl"
        self._digest = hashlib.sha256(usedforsecurity=False)
        self.written: list[Written] = []
        if resume:
            self.written, self._digest = _verified(self._journal, self.path, self._digest)
        self._size = sum(block.length for block in self.written)
        self._read = bytearray()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self._file, self._size)
        lines = "".join(_line(block) for block in self.written)
        write_atomically(self._journal, lines.encode())
        self._lines = self._journal.open("a")
        self._disk, self._synced, self._syncing = ThreadPoolExecutor(1), 0, Future[None]()
        self._syncing.set_result(None)
        self._done = {
            (block.key, block.offsets[0] if block.offsets else 0) for block in self.written
        }

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._disk.shutdown(wait=True)
        os.close(self._file)
        with suppress(OSError):  # the last line may be cut: a resumed merge makes it again
            self._lines.close()

    def has(self, key: str, first: int) -> bool:
        """Return whether the block of a tensor that begins at a row is in the journal."""
        return (key, first) in self._done

    def write(
        self, key: str, first: int, block: Tensor, shares: list[float] | None = None
    ) -> None:
        """Append rows of a tensor; rows that the journal has are left out.

        Raises:
            OSError: The block cannot be written, or is not read as it was written; ``filename``
                is set.
            MergeError: Entries do not fit the type of the tensor.
        """
        if not self.has(key, first):
            offsets = [first, *[0] * (block.ndim - 1)] if block.ndim else []
            block = in_type(key, block, self._types.get(key, block.dtype))
            self._append(key, offsets, block, shares)

    def finish(self) -> str:
        """Wait for the disk, and return the digest of the file as it was read back.

        Raises:
            OSError: The disk reports an error, or the file has another size than its blocks.
        """
        self._syncing.result()
        os.fsync(self._file)
        if self.path.stat().st_size != self._size:
            raise OSError(errno.EIO, "the file has another size than its blocks", str(self.path))
        return self._digest.hexdigest()

    def _append(
        self, key: str, offsets: list[int], block: Tensor, shares: list[float] | None
    ) -> None:
        before, after = _around(tuple(block.shape), block.dtype)
        entries = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            place = self._size
            for part in (before, entries, after):
                if not len(part):
                    continue
                _write(self._file, part, place)
                self._check_written(part, place)
                place += len(part)
            entry = Written(
                *(key, offsets, list(block.shape), self._size, place - self._size),
                *(self._digest.hexdigest()[:CHECKED], self.name, shares),
            )
            self._lines.write(_line(entry))
            self._lines.flush()
            if place - self._synced > SYNCED and self._syncing.done():  # else it begins at the end
                self._syncing.result()
                self._syncing = self._disk.submit(os.fdatasync, self._file)
                self._synced = place
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self._size = place
        self.written.append(entry)

    def _check_written(self, part: bytes | memoryview, place: int) -> None:
        """Read a part of a block back, compare it, and add it to the digest."""
        if len(self._read) < len(part):
            self._read = bytearray(len(part))
        read = memoryview(self._read)[: len(part)]
        size = os.preadv(self._file, [read], place)
        if size != len(part) or not np.array_equal(_numbers(read), _numbers(part)):
            raise OSError(errno.EIO, "a block is not read as it was written")
        self._digest.update(read)


def in_type(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a finite tensor in the type of the result.

    Raises:
        MergeError: An entry is too large for it.
    """
    narrow = tensor.to(dtype)
    if narrow.itemsize < tensor.itemsize and not is_finite(narrow.float()):
        name = key.removeprefix("model.")
        raise MergeError(
            f"{name}: entries of the result do not fit {dtype}; use merge.dtype=float32"
        )
    return narrow


def write_metadata(folder: Path, blocks: Sequence[Written], shapes: dict[str, Any]) -> None:
    """Write the metadata of all files of blocks, as DCP reads them.

    Args:
        folder: The folder of the files.
        blocks: Of all processes.
        shapes: Per tensor its whole shape and dtype.
    """
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for key, (shape, dtype) in shapes.items():
        own = sorted((b for b in blocks if b.key == key), key=lambda block: block.offsets)
        chunks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in own]
        tensors[key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(shape), chunks
        )
        for place, block in enumerate(own):
            index = MetadataIndex(key, torch.Size(block.offsets), place)
            places[index] = _StorageInfo(block.file, block.start, block.length)
    paths = {key: tuple(key.split(".", 1)) for key in shapes}
    metadata = Metadata(tensors, planner_data=paths, storage_data=places)
    write_atomically(folder / ".metadata", pickle.dumps(metadata))


def _verified(journal: Path, file: Path, digest: Any) -> tuple[list[Written], Any]:
    """Return the blocks of a journal that lie undamaged in their file, up to the first other.

    Args:
        journal: The journal.
        file: The file of its blocks.
        digest: That of nothing.

    Returns:
        The blocks, and the digest of all of them.
    """
    blocks: list[Written] = []
    if not journal.exists() or not file.exists():
        return blocks, digest
    with file.open("rb") as content:
        for line in journal.read_text().splitlines():
            try:
                block = Written(**json.loads(line))
            except (ValueError, TypeError):  # the last line, cut
                break
            longer = digest.copy()
            longer.update(content.read(block.length))
            if longer.hexdigest()[:CHECKED] != block.checksum:
                break
            digest = longer
            blocks.append(block)
    return blocks, digest


@lru_cache(maxsize=64)
def _around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that ``torch.save`` writes before and after the entries of a tensor.

    The checksum of the entries in them is that of zeros: torch does not read it.
    """
    stream = io.BytesIO()
    zeros = torch.zeros(shape, dtype=dtype)
    torch.save(zeros, stream)
    content = stream.getbuffer()
    stream.seek(0)
    stored: Tensor = torch.load(stream, map_location="meta", weights_only=True)
    first = stored.untyped_storage()._checkpoint_offset
    assert first is not None
    return bytes(content[:first]), bytes(content[first + zeros.nbytes :])


def _write(file: int, part: bytes | memoryview, place: int) -> None:
    """Write bytes at a place of a file."""
    rest = memoryview(part)
    while len(rest):
        count = os.pwrite(file, rest, place)
        rest, place = rest[count:], place + count


def _numbers(content: bytes | memoryview) -> NDArray[Any]:
    """Return bytes as an array that is compared fast."""
    return np.frombuffer(content, np.uint64 if len(content) % 8 == 0 else np.uint8)


def _line(block: Written) -> str:
    return json.dumps({name: getattr(block, name) for name in Written.__slots__}) + "\n"
