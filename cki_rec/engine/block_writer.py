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
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
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

AHEAD = 2
"""Blocks that wait to be written."""
SYNCED = 1 << 27
"""Bytes after which the disk is waited for."""


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
    checksum: int
    file: str
    shares: list[float] | None
    """Mean mixing weight of each source in these rows."""


class BlockWriter:
    """One file of blocks of tensors, and its journal.

    Args:
        folder: The folder of tensors; the journal lies beside the checkpoint that it is in.
        number: Number of this process.
        resume: Go on after the blocks of the journal; else begin with an empty file.
    """

    def __init__(self, folder: Path, number: int, resume: bool) -> None:
        self.name = f"__{number}_0.distcp"
        self.path = folder / self.name
        self._journal = folder.parents[1] / f"journal-{number}.jsonl"
        self._digest = hashlib.sha256(usedforsecurity=False)
        self.written = _verified(self._journal, self.path, self._digest) if resume else []
        size = sum(block.length for block in self.written)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(size)
        self._file.seek(size)
        lines = "".join(_line(block) for block in self.written)
        write_atomically(self._journal, lines.encode())
        self._lines, self._unsynced = self._journal.open("a"), 0
        self._thread, self._is_broken = ThreadPoolExecutor(1), False
        self._waiting: list[Future[None]] = []
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
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        self._file.close()
        self._lines.close()

    def has(self, key: str, first: int) -> bool:
        """Return whether the block of a tensor that begins at a row is in the journal."""
        return (key, first) in self._done

    def write(
        self, key: str, first: int, block: Tensor, shares: list[float] | None = None
    ) -> None:
        """Append rows of a tensor, in a thread; rows that the journal has are left out.

        Raises:
            OSError: An earlier block could not be written; ``filename`` is set.
        """
        if self.has(key, first):
            return
        offsets = [first, *[0] * (block.ndim - 1)] if block.ndim else []
        while len(self._waiting) >= AHEAD:
            self._waiting.pop(0).result()
        self._waiting.append(self._thread.submit(self._append_next, key, offsets, block, shares))

    def finish(self) -> str:
        """Write the rest, and return the digest of the file as it was read back.

        Raises:
            OSError: Blocks could not be written, or are not read as they were written.
        """
        for waiting in self._waiting:
            waiting.result()
        self._waiting = []
        self._file.flush()
        os.fsync(self._file.fileno())
        if self.path.stat().st_size != sum(block.length for block in self.written):
            raise OSError(errno.EIO, "the file has another size than its blocks", str(self.path))
        return self._digest.hexdigest()

    def _append_next(self, *block: Any) -> None:
        """Append a block, unless one before it failed: their order is that of the file."""
        if not self._is_broken:
            self._is_broken = True
            self._append(*block)
            self._is_broken = False

    def _append(
        self, key: str, offsets: list[int], block: Tensor, shares: list[float] | None
    ) -> None:
        stream = io.BytesIO()
        torch.save(block.contiguous().clone() if _is_view(block) else block, stream)
        content = stream.getvalue()
        start = sum(each.length for each in self.written[-1:]) + (
            self.written[-1].start if self.written else 0
        )
        try:
            self._file.write(content)
            self._file.flush()
            self._unsynced += len(content)
            if self._unsynced > SYNCED:  # else the disk begins at the end
                os.fdatasync(self._file.fileno())
                self._unsynced = 0
            read = os.pread(self._file.fileno(), len(content), start)
            if read != content:
                raise OSError(errno.EIO, "a block is not read as it was written")
            self._digest.update(read)
            entry = Written(
                *(key, offsets, list(block.shape), start, len(content)),
                *(zlib.crc32(content), self.name, shares),
            )
            self._lines.write(_line(entry))
            self._lines.flush()
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self.written.append(entry)


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


def _verified(journal: Path, file: Path, digest: Any) -> list[Written]:
    """Return the blocks of a journal that lie undamaged in their file, up to the first other.

    Args:
        journal: The journal.
        file: The file of its blocks.
        digest: Updated with these blocks.
    """
    blocks: list[Written] = []
    if not journal.exists() or not file.exists():
        return blocks
    with file.open("rb") as content:
        for line in journal.read_text().splitlines():
            try:
                block = Written(**json.loads(line))
            except (ValueError, TypeError):  # the last line, cut
                break
            read = content.read(block.length)
            if len(read) != block.length or zlib.crc32(read) != block.checksum:
                break
            digest.update(read)
            blocks.append(block)
    return blocks


def _line(block: Written) -> str:
    return json.dumps({name: getattr(block, name) for name in Written.__slots__}) + "\n"


def _is_view(tensor: Tensor) -> bool:
    """Return whether torch would save more than the entries of a tensor."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
