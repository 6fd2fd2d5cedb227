"""State dicts in files of ``torch.save``: read with ``weights_only``, and by pages if possible."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints.formats.stored import Entry, check_range, damaged, digest_of, new_file
from cki_rec.config import UserError
from cki_rec.merging.params import Params

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
MODEL = "model.pt"
"""Name of a written file."""
NETWORKS = ("torch.nn.", "torchrec.")
"""Beginnings of types in the pickle of a module."""


class TorchSave:
    """A state dict, perhaps inside of other dictionaries, and the optimizer beside it.

    Tensors of GPUs are read on the CPU. The file is mapped into memory, so rows that are not used
    are not read (but for files of torch < 1.6).

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
        self._tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Any, ...]] = {}
        self.groups: list[dict[str, Any]] = []
        for place, value in _leaves(content, ()):
            name = ".".join(map(str, place))
            self._tensors[name], self._places[name] = value, place
        self.groups = next(_parameter_groups(content), [])
        self.entries: Mapping[str, Entry] = {
            name: Entry(tuple(x.shape), x.dtype) for name, x in self._tensors.items()
        }

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor; names of tied tensors share memory."""
        stop = check_range(self.entries[name], first, stop)
        tensor = self._tensors[name].detach()
        whole = first == 0 and (not tensor.ndim or stop == len(tensor))
        return tensor if whole else tensor[first:stop]

    def digest(self) -> str:
        """Return a digest of the content."""
        return digest_of([self._file])

    def written(self, params: Params, target: Path) -> Path:
        """Write tensors inside of the same dictionaries as these."""
        content: dict[Any, Any] = {}
        for name, tensor in params.items():
            node, place = content, self._places[name]
            for key in place[:-1]:
                node = node.setdefault(key, {})
            node[place[-1]] = tensor
        return _write(content, target)

    def close(self) -> None:
        """Drop all tensors."""
        self._tensors.clear()


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
    return _write(dict(params), target)


def _write(content: Any, target: Path) -> Path:
    return new_file(target / MODEL, lambda path: torch.save(content, path))


def _load(file: Path) -> Any:
    """Return the content of a file; nothing in it is executed.

    Raises:
        UserError: It is damaged, or names types that may run code.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
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
