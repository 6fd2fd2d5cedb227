"""Reading tensors of strangers: no code of theirs runs, and rows go straight to their place."""

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
"""What the metadata of tensors consists of."""


class Reader(dcp.FileSystemReader):
    """Reads checkpoints of strangers: their metadata is a pickle, so it may name known types only.

    Tensors are read by torch with ``weights_only``, but for rows that lie in the file as they are
    wanted in memory: those are read into it. (Torch reads a stored tensor whole before it takes
    what it needs, so a process that wants a few rows of a table would need memory for all.)
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

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan."""
        mode = FakeTensorMode()
        others = [item for item in plan.items if not self._read_rows(item, planner, mode)]
        done: Future[None] = super().read_data(LoadPlan(others), planner)
        return done

    def _read_rows(self, item: ReadItem, planner: LoadPlanner, mode: FakeTensorMode) -> bool:
        """Read what a plan wants of one stored tensor if it is a run of its bytes."""
        place = self.storage_data[item.storage_index]
        target = planner.resolve_tensor(item).detach()
        if place.transform_descriptors or not target.is_contiguous() or target.is_cuda:
            return False
        with self.fs.create_stream(Path(self.path) / place.relative_path, "rb") as file:
            with mode:  # without its numbers
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
    left = target.reshape(-1).view(torch.uint8).numpy()
    while len(left):
        count = file.readinto(left)
        if not count:
            raise EOFError("a file of tensors ends too early")
        left = left[count:]
