"""Folders of torch.distributed.checkpoint: plain ones, and those of TorchRec and TorchEasyRec."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cki_rec.checkpoints.digests import file_names
from cki_rec.checkpoints.formats.stored import Blank, Entry, damaged, digest_of
from cki_rec.checkpoints.formats.torch_save import blank_tensor
from cki_rec.checkpoints.reader import Reader
from cki_rec.checkpoints.rows import RowReader
from cki_rec.checkpoints.tensors import ignore_dcp_warnings, untrusted
from cki_rec.config import UserError
from cki_rec.files import new_folder, write_atomically
from cki_rec.merging.params import Params

METADATA = ".metadata"
SHARD = "*.distcp"
MODEL, OPTIMIZER = "model", "optimizer"
"""Folders of a checkpoint of TorchEasyRec."""


class Dcp:
    """A folder of tensors, written by any number of processes.

    Args:
        path: The folder, or one that holds the folder ``model`` (and ``optimizer``).

    Raises:
        UserError: A file is damaged or missing, or metadata name types that may run code.
    """

    form, title = "dcp", "torch.distributed.checkpoint"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: list[dict[str, Any]] = []
        self.tied: Mapping[str, str] = {}
        folders = {"": path}
        if is_divided := not (path / METADATA).is_file():
            folders = {"": path / MODEL, f"{OPTIMIZER}.": path / OPTIMIZER}
            self.title = f"{self.title}, folders {MODEL}/ and {OPTIMIZER}/"
        self._is_divided = is_divided
        self._readers: dict[str, RowReader] = {}
        entries: dict[str, Entry] = {}
        self._keys: dict[str, tuple[RowReader, str]] = {}
        for prefix, folder in folders.items():
            if prefix and not (folder / METADATA).is_file() and not any(folder.glob(SHARD)):
                continue
            _check_files(folder)
            reader = self._readers[prefix] = RowReader(folder, str(path), "")
            for key, entry in reader.entries.items():
                entries[prefix + key] = Entry(tuple(entry.size), entry.properties.dtype)
                self._keys[prefix + key] = (reader, key)
        self.entries: Mapping[str, Entry] = entries

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor, and read no others."""
        reader, key = self._keys[name]
        return reader.read(key, first, stop)

    def digest(self) -> str:
        """Return a digest of the content; metadata hold a random number and are left out."""
        folders = [reader.folder for reader in self._readers.values()]
        return digest_of(
            folder / name for folder in folders for name in file_names(folder) if name != METADATA
        )

    def written(self, params: Params, target: Path) -> Path:
        """Write tensors as a folder; in one of TorchEasyRec it is the folder ``model`` too."""
        return write(params, target)

    def blank(self, entries: Mapping[str, Entry], target: Path, tied: Mapping[str, str]) -> Blank:
        """Write a folder of tensors without values."""
        return blank(entries, target)

    def files(self) -> list[Path]:
        """Return the files of all folders."""
        return [file for reader in self._readers.values() for file in reader.folder.glob(SHARD)]

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened."""
        for reader in self._readers.values():
            reader.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.__exit__(None, None, None)


def recognizes(path: Path) -> bool:
    """Return whether a path is a folder of DCP, even one without its metadata."""
    folders = (path, path / MODEL)
    return any((f / METADATA).is_file() or any(f.glob(SHARD)) for f in folders if f.is_dir())


def write(params: Params, target: Path) -> Path:
    """Write tensors as the folder ``model`` in a folder, whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    with new_folder(target / MODEL) as folder, ignore_dcp_warnings():
        dcp.save(dict(params), checkpoint_id=folder, no_dist=True)
    return target / MODEL


def blank(entries: Mapping[str, Entry], target: Path) -> Blank:
    """Write the folder ``model`` into a folder, without values: one file per tensor."""
    (folder := target / MODEL).mkdir(parents=True, exist_ok=True)
    places, tensors, stored = {}, dict[str, Any](), dict[MetadataIndex, Any]()
    for number, (name, entry) in enumerate(entries.items()):
        place = places[name] = blank_tensor(entry, folder / f"__0_{number}.distcp")
        size = torch.Size(entry.shape)
        start = torch.Size([0] * len(size))
        properties = TensorProperties(dtype=entry.dtype)
        chunks = [ChunkStorageMetadata(start, size)]
        tensors[name] = TensorStorageMetadata(properties, size, chunks)
        length = place.file.stat().st_size
        stored[MetadataIndex(name, start, 0)] = _StorageInfo(place.file.name, 0, length)
    names = {name: (name,) for name in entries}
    metadata = Metadata(tensors, planner_data=names, storage_data=stored)
    write_atomically(folder / METADATA, pickle.dumps(metadata))
    return Blank(folder, places)


def _check_files(folder: Path) -> None:
    """Check that the files which metadata name are there, and as long as they must be.

    Raises:
        UserError: One is missing or cut; or metadata are, or name types that may run code.
    """
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{folder}: its index is missing ({METADATA}); copy it from where its files come"
            " from (its name begins with a dot, which some programs leave out)"
        )
    with untrusted(folder):
        metadata = Reader(folder).read_metadata()
        tensors = metadata.state_dict_metadata
        places = [
            place
            for index, place in metadata.storage_data.items()
            if isinstance(tensors.get(index.fqn), TensorStorageMetadata)
        ]
    ends: dict[str, int] = {}
    for place in places:
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in ends.items():
        if not (folder / name).is_file():
            raise damaged(folder / name, "this shard is missing; copy it")
        if (size := (folder / name).stat().st_size) < end:
            raise damaged(folder / name, f"cut, {size:,} bytes in place of {end:,}; copy it again")
