"""Files of safetensors: a JSON header, then the bytes of all tensors; one file, or several shards.

Format: https://huggingface.co/docs/safetensors, read and written here without that package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints.formats.places import Files
from cki_rec.checkpoints.formats.stored import (
    Blank,
    Entry,
    Place,
    damaged,
    digest_of,
    new_file,
    write_values,
)
from cki_rec.config import UserError
from cki_rec.merging.params import Params

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
MODEL = f"model{SUFFIX}"
"""Name of a written file."""
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER_BYTES = 100_000_000
"""Longest header that the format allows."""


class Safetensors:
    """One file of safetensors, or the shards that an index names.

    Args:
        path: The file, its index, or their folder.

    Raises:
        UserError: A file is damaged or missing, or shards do not belong together.
    """

    form, title = "safetensors", "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: list[dict[str, Any]] = []
        self.tied: Mapping[str, str] = {}
        self._files = Files()
        self.weight_map: dict[str, str] | None = None
        """Of a sharded checkpoint: tensor -> its file."""
        file = file_of(path)
        if file.name.endswith(INDEX):
            self.weight_map = _weight_map(file)
            self.title = "safetensors, sharded"
            self._places = _sharded(file, self.weight_map)
        else:
            self._places = _header(file)
        self.index = file
        self.entries: Mapping[str, Entry] = {n: p.entry for n, p in self._places.items()}

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor, and read no others."""
        return self._files.read(self._places[name], first, stop)

    def digest(self) -> str:
        """Return a digest of the content."""
        return digest_of(self.files())

    def written(self, params: Params, target: Path) -> Path:
        """Write tensors in as many files as these; the index comes last."""
        entries = {n: Entry(tuple(x.shape), x.dtype) for n, x in params.items()}
        if self.weight_map is None:
            return write(params, target)
        for file, part in self._shards(params).items():
            new_file(target / file, lambda path, part=part: write_file(part, path))
        return self._index(entries, target)

    def blank(self, entries: Mapping[str, Entry], target: Path, tied: Mapping[str, str]) -> Blank:
        """Write the files of tensors without values, as many as these."""
        if self.weight_map is None:
            return blank(entries, target)
        places: dict[str, Place] = {}
        for file, names in self._shards(entries).items():
            part = {name: entries[name] for name in names}
            places |= _blank(part, target / file)
        return Blank(self._index(entries, target), places)

    def files(self) -> list[Path]:
        """Return the files of the tensors."""
        return list(dict.fromkeys(place.file for place in self._places.values()))

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def _shards(self, names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return file -> its tensors."""
        assert self.weight_map is not None
        shards: dict[str, dict[str, Any]] = {}
        for name, value in names.items():
            shards.setdefault(self.weight_map[name], {})[name] = value
        return shards

    def _index(self, entries: Mapping[str, Entry], target: Path) -> Path:
        assert self.weight_map is not None
        total = sum(entry.bytes for entry in entries.values())
        kept = {name: self.weight_map[name] for name in entries}
        content = {"metadata": {"total_size": total}, "weight_map": kept}
        text = json.dumps(content, indent=2)
        return new_file(target / self.index.name, lambda path: path.write_text(text))


def recognizes(path: Path) -> bool:
    """Return whether a path is a file of safetensors, an index of such files, or their folder."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) or any(path.glob(f"*{INDEX}"))
    return path.name.endswith((SUFFIX, INDEX))


def file_of(path: Path) -> Path:
    """Return the file or the index that a path means.

    Raises:
        UserError: A folder has several, or shards without an index.
    """
    if not path.is_dir():
        return path
    indices = sorted(path.glob(f"*{INDEX}"))
    files = indices or sorted(path.glob(f"*{SUFFIX}"))
    if len(files) == 1 and (indices or "-of-" not in files[0].name):
        return files[0]
    listed = ", ".join(file.name for file in files[:4])
    if not indices and all("-of-" in file.name for file in files):
        raise UserError(
            f"{path}: the index of its shards is missing (model{INDEX}); copy it from where"
            f" {listed} come from"
        )
    raise UserError(f"{path}: holds several checkpoints ({listed}); name one of them")


def write(params: Params, target: Path) -> Path:
    """Write tensors as one file ``model.safetensors`` in a folder, whole or not at all."""
    return new_file(target / MODEL, lambda path: write_file(params, path))


def blank(entries: Mapping[str, Entry], target: Path) -> Blank:
    """Write ``model.safetensors`` into a folder without values."""
    return Blank(target / MODEL, _blank(entries, target / MODEL))


def _blank(entries: Mapping[str, Entry], file: Path) -> dict[str, Place]:
    """Write a file without values, unless it is there; return its places."""
    text = _text(entries)

    def write_header(path: Path) -> None:
        with path.open("wb") as opened:
            opened.write(text)
            opened.truncate(len(text) + sum(entry.bytes for entry in entries.values()))

    if not file.exists():
        new_file(file, write_header)
    return _header(file)


def write_file(params: Params, path: Path) -> None:
    """Write tensors as one file.

    Raises:
        UserError: The format has no such type.
    """
    with path.open("wb") as file:
        file.write(_text({n: Entry(tuple(x.shape), x.dtype) for n, x in params.items()}))
        for tensor in params.values():
            write_values(file, tensor)


def _text(entries: Mapping[str, Entry]) -> bytes:
    """Return the beginning of a file: the length of its header, and the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, entry in entries.items():
        if entry.dtype not in NAMES:
            raise UserError(f"{name}: safetensors holds no {entry.dtype}; set merge.format=torch")
        end = place + entry.bytes
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header(file: Path) -> dict[str, Place]:
    """Return the places of the tensors of one file.

    Raises:
        UserError: It is damaged or cut.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
                raise damaged(file, "no file of safetensors, or cut in its header; copy it again")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        places, end = {}, 8 + length
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise damaged(file, f"{name} is of type {entry['dtype']}, which is not read here")
            read = Entry(tuple(map(int, entry["shape"])), DTYPES[entry["dtype"]])
            begin, stop = entry["data_offsets"]
            if stop - begin != read.bytes or begin < 0:
                raise damaged(file, f"{name} does not fill its place; write it again")
            places[name] = Place(file, 8 + length + begin, read)
            end = max(end, 8 + length + stop)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, f"its header is no JSON of safetensors ({error})") from None
    if size != end:
        reason = f"{size:,} bytes in place of {end:,}; copy it again"
        raise damaged(file, f"{'cut' if size < end else 'too long'}, {reason}")
    return places


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        if not isinstance(names, dict) or not names:
            raise ValueError("no weight_map")
        return {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(index, f"no index of shards ({error})") from None


def _sharded(index: Path, weight_map: Mapping[str, str]) -> dict[str, Place]:
    """Return the places of the tensors of all shards.

    Raises:
        UserError: A shard is missing, or holds other tensors than the index names.
    """
    headers: dict[str, dict[str, Place]] = {}
    for name in dict.fromkeys(weight_map.values()):
        file = index.parent / name
        if Path(name).name != name:
            raise damaged(index, f"names a shard of another folder, {name}")
        if not file.is_file():
            raise damaged(file, f"this shard of {index.name} is missing; copy it")
        headers[name] = _header(file)
        listed = {tensor for tensor, held in weight_map.items() if held == name}
        if wrong := sorted(headers[name].keys() ^ listed):
            where = "is not in" if wrong[0] in listed else "is not in the index, but in"
            raise damaged(
                file, f"shards are of several models: {wrong[0]} {where} it; copy all of them"
            )
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
