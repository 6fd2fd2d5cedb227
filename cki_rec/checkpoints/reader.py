"""Reader of untrusted DCP folders: it runs no code of theirs and reads single rows in place."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

TORCH_METADATA_TYPES = frozenset(
    {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"}
    | {"ChunkStorageMetadata", "TensorProperties", "_StorageInfo", "_MEM_FORMAT_ENCODING"}
    | {"Size", "dtype", "layout", "memory_format", "_get_layout"}
)
"""Types in the metadata of tensors."""
SMALL_BYTES = 1 << 20
"""Stored tensors below this size are read whole by torch: that is faster."""


class Reader(dcp.FileSystemReader):
    """Reads untrusted checkpoints: their metadata is a pickle, which may name known types only.

    Tensors are read by torch with ``weights_only``. Rows of large tensors that are contiguous in
    the file are read directly into the target. (Torch reads whole stored tensors, so a process
    that needs a few rows of a table would need memory for all rows.)
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the folder.

        Raises:
            pickle.UnpicklingError: The pickle names a type outside of metadata.
        """
        with self.fs.create_stream(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan."""
        mode = FakeTensorMode()
        others = [item for item in plan.items if not self._read_rows(item, planner, mode)]
        done: Future[None] = super().read_data(LoadPlan(others), planner)
        return done

    def _read_rows(self, item: ReadItem, planner: LoadPlanner, mode: FakeTensorMode) -> bool:
        """Read an item of a plan directly if it is large and contiguous; else return False."""
        place = self.storage_data[item.storage_index]
        if place.length < SMALL_BYTES:
            return False
        target = planner.resolve_tensor(item).detach()
        if place.transform_descriptors or not target.is_contiguous() or target.is_cuda:
            return False
        with self.fs.create_stream(Path(self.path) / place.relative_path, "rb") as file:
            with mode:  # without values
                stored: Tensor = torch.load(self._slice_file(file, place), weights_only=True)
            start = stored.untyped_storage()._checkpoint_offset
            is_rows = stored.is_contiguous() and stored.shape[1:] == target.shape[1:]
            if not is_rows or start is None or stored.ndim == 0 or stored.dtype != target.dtype:
                return False
            first = stored.storage_offset() + item.storage_offsets[0] * stored.stride(0)
            file.seek(place.offset + start + first * stored.element_size())
            _fill(target, file)
        planner.commit_tensor(item, target)
        return True


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_known = package == "torch" and name in TORCH_METADATA_TYPES
        if is_dtype or is_known or (package == "pathlib" and name.endswith("Path")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which may run code")


def _fill(target: Tensor, file: Any) -> None:
    """Read the next bytes of a file into a contiguous tensor."""
    remaining = target.reshape(-1).view(torch.uint8).numpy()
    while len(remaining):
        count = file.readinto(remaining)
        if not count:
            raise EOFError("a file of tensors ends too early")
        remaining = remaining[count:]
