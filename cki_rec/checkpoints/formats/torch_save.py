"""State dicts in files of ``torch.save``: read with ``weights_only``, row by row."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cki_rec.checkpoints.formats.places import Files
from cki_rec.checkpoints.formats.stored import (
    Blank,
    Entry,
    Place,
    check_range,
    damaged,
    digest_of,
    new_file,
)
from cki_rec.config import UserError
from cki_rec.merging.params import Params

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
MODEL = "model.pt"
"""Name of a written file."""
NETWORKS = ("torch.nn.", "torchrec.")
"""Beginnings of types in the pickle of a module."""


class TorchSave:
    """A state dict, perhaps inside of other dictionaries, and the optimizer beside it.

    Tensors of GPUs are read on the CPU. Opening reads no values, and rows are read alone (but for
    files of torch < 1.6, which are held in memory).

    Args:
        path: The file, or a folder that holds one.

    Raises:
        UserError: The file is damaged, or names types that may run code.
    """

    form, title = "torch", "torch.save"

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, file_of(path)
        content = _load(self._file)
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise UserError(
                f"{self._file}: holds a {kind}; save a state dict (module.state_dict())"
            )
        self._files = Files()
        self._tensors: dict[str, Tensor] = {}
        self._keys: dict[str, tuple[Any, ...]] = {}
        self.groups: list[dict[str, Any]] = []
        for keys, value in _leaves(content, ()):
            name = ".".join(map(str, keys))
            self._tensors[name], self._keys[name] = value.detach(), keys
        self.groups = next(_parameter_groups(content), [])
        self.entries: Mapping[str, Entry] = {n: _entry(x) for n, x in self._tensors.items()}
        first: dict[Any, str] = {}
        for name, tensor in self._tensors.items():
            first.setdefault(_values_of(tensor) if tensor.numel() else name, name)
        self.tied: Mapping[str, str] = {
            name: known
            for name, tensor in self._tensors.items()
            if tensor.numel() and (known := first[_values_of(tensor)]) != name
        }

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor, and read no others if they are contiguous."""
        tensor = self._tensors[name]
        stop = check_range(self.entries[name], first, stop)
        if not tensor.is_meta:
            return tensor[first:stop] if tensor.ndim else tensor
        if tensor.is_contiguous():
            return self._files.read(_place(self._file, tensor), first, stop)
        storage = torch.empty(0, dtype=tensor.dtype, device="meta").set_(tensor.untyped_storage())
        values = self._files.read(_place(self._file, storage))
        whole = values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return whole[first:stop].contiguous()

    def digest(self) -> str:
        """Return a digest of the content."""
        return digest_of([self._file])

    def written(self, params: Params, target: Path) -> Path:
        """Write tensors inside of the same dictionaries as these."""
        return new_file(target / MODEL, lambda path: torch.save(self._nested(params), path))

    def blank(self, entries: Mapping[str, Entry], target: Path, tied: Mapping[str, str]) -> Blank:
        """Write the same dictionaries, with tensors without values."""
        fakes = _without_values(entries, tied)
        return _blank(self._nested(fakes), fakes, target / MODEL)

    def files(self) -> list[Path]:
        """Return the one file."""
        return [self._file]

    def check_unchanged(self) -> None:
        """Check that the file is the one that was opened."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Drop all tensors."""
        self._tensors.clear()
        self._files.close()

    def _nested(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """Return values by name in dictionaries as these."""
        content: dict[Any, Any] = {}
        for name, value in values.items():
            node, keys = content, self._keys[name]
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = value
        return content


def recognizes(path: Path) -> bool:
    """Return whether a path is a file of torch.save, or a folder with such files."""
    if path.is_dir():
        return any(file.suffix in SUFFIXES for file in path.glob("*"))
    return path.suffix in SUFFIXES


def file_of(path: Path) -> Path:
    """Return the file that a path means.

    Raises:
        UserError: A folder has several.
    """
    if not path.is_dir():
        return path
    files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    listed = ", ".join(file.name for file in files[:4])
    raise UserError(f"{path}: holds several checkpoints ({listed}); name one of them")


def write(params: Params, target: Path) -> Path:
    """Write a state dict as one file ``model.pt`` in a folder, whole or not at all."""
    return new_file(target / MODEL, lambda path: torch.save(dict(params), path))


def blank(entries: Mapping[str, Entry], target: Path) -> Blank:
    """Write ``model.pt``, a state dict without values, into a folder."""
    fakes = _without_values(entries, {})
    return _blank(fakes, fakes, target / MODEL)


def blank_tensor(entry: Entry, file: Path) -> Place:
    """Write a file of one tensor without values; return its place."""
    (fake,) = _without_values({"": entry}, {}).values()
    if not file.exists():
        new_file(file, lambda path: _save_blank(fake, path))
    return _place(file, _load(file))


def _blank(content: Any, fakes: Mapping[str, Tensor], file: Path) -> Blank:
    if not file.exists():
        new_file(file, lambda path: _save_blank(content, path))
    leaves = {".".join(map(str, keys)): x for keys, x in _leaves(_load(file), ())}
    return Blank(file, {name: _place(file, leaves[name]) for name in fakes})


def _save_blank(content: Any, path: Path) -> None:
    """Save tensors without values; torch leaves holes in the file for them, and no checksums."""
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, path)


def _without_values(entries: Mapping[str, Entry], tied: Mapping[str, str]) -> Params:
    with FakeTensorMode():
        fakes = {n: torch.empty(e.shape, dtype=e.dtype) for n, e in entries.items()}
    return {name: fakes.get(tied.get(name, name), fake) for name, fake in fakes.items()}


def _entry(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype)


def _place(file: Path, tensor: Tensor) -> Place:
    """Return where the values of a contiguous tensor on ``meta`` lie."""
    start: Any = tensor.untyped_storage()._checkpoint_offset
    return Place(file, start + tensor.storage_offset() * tensor.itemsize, _entry(tensor))


def _values_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return where the values of a tensor are: equal for two names of one tensor."""
    storage = tensor.untyped_storage()
    where = storage._checkpoint_offset if tensor.is_meta else storage.data_ptr()
    form = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    return (where, *form)


def _load(file: Path) -> Any:
    """Return the content of a file, its tensors on ``meta``; nothing in it is executed.

    Raises:
        UserError: It is damaged, or names types that may run code.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    device = "meta" if zipfile.is_zipfile(file) else "cpu"
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(file, error)) from None
    except Exception as error:  # of torch and of zip; many kinds, all about the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise damaged(file, f"cut or no file of torch.save ({reason})") from None


def _refusal(file: Path, error: Exception) -> str:
    """Return why a pickle is not read, and the lines of Python that make it readable."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not even this is readable
        names = []
    if not names:
        reason = " ".join(str(error).split())[:120]
        return f"{file}: unreadable checkpoint, cut or no file of torch.save ({reason})"
    is_module = any(name.startswith(NETWORKS) for name in names)
    kind = "a whole pickled module" if is_module else "a pickle of other types"
    entry = "saved.state_dict()" if is_module else "saved['state_dict']"
    target = file.with_name(f"{file.stem}_state.pt").name
    return (
        f"{file}: {kind} ({', '.join(names[:3])}), which may run code; nothing was executed. If"
        " you trust it, save its state dict, and use that:\n"
        f'    saved = torch.load("{file.name}", weights_only=False)\n'
        f'    torch.save({entry}, "{target}")'
    )


def _leaves(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors inside of dictionaries and lists, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*place, number))


def _parameter_groups(value: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the parameter groups of optimizers."""
    if isinstance(value, Mapping):
        groups = value.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
            yield [dict(group) for group in groups]
        for inner in value.values():
            yield from _parameter_groups(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parameter_groups(inner)
