"""Dumps of dynamicemb (NVIDIA recsys-examples), which TorchEasyRec writes too.

A folder per embedding collection holds plain binary files per table and rank: keys (int64) and
values (float32). There may be scores (int64, one word or more per key) and optimizer state
(float32) too. The number of columns is in no file; it follows from the sizes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from cki_rec.checkpoints.formats.keyed import (
    KEYS,
    SCORES,
    STATE,
    VALUES,
    Array,
    Column,
    KeyedRows,
    mixed,
)
from cki_rec.checkpoints.formats.stored import damaged
from cki_rec.config import UserError

ROOT = "dynamicemb"
"""Folder of the collections in a checkpoint of TorchEasyRec."""
KEY_FILE = re.compile(r"(.+)_emb_keys\.rank_(\d+)\.world_size_(\d+)")
NAMES = {KEYS: "emb_keys", VALUES: "emb_values", SCORES: "emb_scores", STATE: "emb_opt_values"}
OLD_STATE = "opt_values"
"""Name of optimizer state in older releases."""
DTYPES: dict[str, np.dtype[Any]] = {
    KEYS: np.dtype("<i8"),
    VALUES: np.dtype("<f4"),
    SCORES: np.dtype("<i8"),
    STATE: np.dtype("<f4"),
}
LOOKED_AT = 1 << 16
"""Keys of each rank that show the rule of ranks."""
RULES = ("roundrobin", "hash_roundrobin")


@dataclass(frozen=True, slots=True)
class Shard:
    """The files of one rank."""

    files: Mapping[str, Path]
    rows: int


class DynamicembTable:
    """One table of a dump.

    Args:
        path: The dump, as the user named it.
        folder: The folder of its collection.
        table: Its name there.
        name: Its name in the dump.
        ranks: Rank -> its file of keys.
        world_size: Number of ranks.

    Raises:
        UserError: A file is missing or cut, or files do not belong together.
    """

    title, is_text, dtype = "dynamicemb", False, torch.float32

    def __init__(
        self, path: str, folder: Path, table: str, name: str, ranks: Sequence[int], world_size: int
    ) -> None:
        self.path, self.name, self.world_size = path, name, world_size
        self.folder, self.table = folder, table
        self.root = ROOT if folder_of(Path(path)) != Path(path) else ""
        if absent := sorted(set(range(world_size)) - set(ranks)):
            raise damaged(folder / self._file(KEYS, absent[0]), "this rank is missing; copy it")
        old = any(self._file(OLD_STATE, r).is_file() for r in ranks)
        self.state_name = OLD_STATE if old else NAMES[STATE]
        self.shards = [self._shard(rank) for rank in sorted(ranks)]
        self.num_rows = sum(shard.rows for shard in self.shards)
        self.columns = {name: Column(DTYPES[name], width) for name, width in self._widths()}

    def blocks(self, size: int) -> Iterator[KeyedRows]:
        """Yield all rows, rank by rank."""
        for shard in self.shards:
            with ExitStack() as stack:
                files = {n: stack.enter_context(p.open("rb")) for n, p in shard.files.items()}
                for first in range(0, shard.rows, size):
                    rows = min(size, shard.rows - first)
                    block = {KEYS: _read(files[KEYS], shard.files[KEYS], DTYPES[KEYS], (rows,))}
                    for name, column in self.columns.items():
                        shape = (rows, column.width)
                        block[name] = _read(files[name], shard.files[name], column.dtype, shape)
                    yield block

    def files(self) -> list[Path]:
        """Return all files."""
        return [path for shard in self.shards for path in shard.files.values()]

    def rule(self) -> str:
        """Return the rule by which keys belong to ranks.

        Raises:
            UserError: It is none of ``RULES``.
        """
        fitting = list(RULES)
        for rank, shard in enumerate(self.shards):
            with shard.files[KEYS].open("rb") as file:
                keys = np.fromfile(file, DTYPES[KEYS], LOOKED_AT)
            fitting = [r for r in fitting if (ranks_of(keys, self.world_size, r) == rank).all()]
        if not fitting:
            raise UserError(
                f"{self.path}: keys of {self.name} belong to ranks neither by key % world_size nor"
                " by its hash; dump it with one of these rules, or name another source first"
            )
        return fitting[0]

    def _file(self, column: str, rank: int) -> Path:
        name = NAMES.get(column, column)
        return self.folder / f"{self.table}_{name}.rank_{rank}.world_size_{self.world_size}"

    def _shard(self, rank: int) -> Shard:
        files = {KEYS: self._file(KEYS, rank), VALUES: self._file(VALUES, rank)}
        if not files[VALUES].is_file():
            raise damaged(files[VALUES], "this file of values is missing; copy it")
        others = {SCORES: self._file(SCORES, rank), STATE: self._file(self.state_name, rank)}
        files |= {name: path for name, path in others.items() if path.is_file()}
        size = files[KEYS].stat().st_size
        if size % 8:
            raise damaged(files[KEYS], f"cut, {size:,} bytes are no whole number of int64 keys")
        return Shard(files, size // 8)

    def _widths(self) -> Iterator[tuple[str, int]]:
        """Yield the columns of all ranks, and how many numbers each has per key."""
        for name in (VALUES, SCORES, STATE):
            held = [shard for shard in self.shards if name in shard.files]
            filled = [shard for shard in held if shard.rows]
            if len(held) < len(self.shards):
                if held:
                    absent = next(r for r, s in enumerate(self.shards) if name not in s.files)
                    raise damaged(self._file(name, absent), "missing; other ranks have it")
                continue
            item = DTYPES[name].itemsize
            sizes = [shard.files[name].stat().st_size for shard in filled]
            per_key = [size / (item * s.rows) for size, s in zip(sizes, filled, strict=True)]
            usual = Counter(n for n in per_key if n >= 1 and n == int(n)).most_common(1)
            width = int(usual[0][0]) if usual else 0
            for shard in held:
                size, expected = shard.files[name].stat().st_size, shard.rows * width * item
                if size != expected or (shard.rows and not width):
                    whole = f"{expected:,} bytes" if width else "whole rows"
                    raise damaged(
                        shard.files[name],
                        f"cut, {size:,} bytes in place of {whole} for {shard.rows:,} keys; copy it"
                        " again",
                    )
            yield name, width


def folder_of(path: Path) -> Path:
    """Return the folder that holds the collections."""
    return path / ROOT if (path / ROOT).is_dir() else path


def recognizes(path: Path) -> bool:
    """Return whether a path is a folder with files of keys."""
    return path.is_dir() and any(True for _ in _key_files(folder_of(path)))


def tables_of(path: str) -> dict[str, DynamicembTable]:
    """Return the tables of a dump.

    Raises:
        UserError: A file is missing or cut, or files do not belong together.
    """
    root = folder_of(Path(path))
    found: dict[tuple[Path, str], dict[int, list[int]]] = {}
    for file in _key_files(root):
        match = KEY_FILE.fullmatch(file.name)
        assert match is not None
        worlds = found.setdefault((file.parent, match[1]), {})
        worlds.setdefault(int(match[3]), []).append(int(match[2]))
    tables = {}
    for (folder, table), worlds in sorted(found.items()):
        name = str((folder / table).relative_to(root).as_posix())
        if len(worlds) > 1:
            sizes = " and ".join(map(str, sorted(worlds)))
            raise UserError(f"{path}: {name} has files of world sizes {sizes}; keep those of one")
        ((world_size, ranks),) = worlds.items()
        tables[name] = DynamicembTable(path, folder, table, name, ranks, world_size)
    return tables


def ranks_of(keys: Array, world_size: int, rule: str) -> Array:
    """Return ``(V,)`` the rank that each key belongs to.

    Keys are read as unsigned numbers, so that negative ones have a rank too.
    """
    numbers = mixed(keys) if rule == "hash_roundrobin" else keys.view(np.uint64)
    return (numbers % np.uint64(world_size)).astype(np.int64)


class DynamicembWriter:
    """Writes a table as a dump, some rows at a time.

    Args:
        folder: Takes the folder of the collection.
        name: Of the table.
        columns: Those that are written beside keys.
        like: The table whose ranks, rule and options of the optimizer are kept; None: one rank.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        columns: Mapping[str, Column],
        like: DynamicembTable | None = None,
    ) -> None:
        self._world_size = like.world_size if like else 1
        self._rule = like.rule() if like else RULES[0]
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        names = {name: NAMES[name] for name in NAMES if name == KEYS or name in columns}
        if STATE in names and like:
            names[STATE] = like.state_name
        self._open = ExitStack()
        self._files: list[dict[str, BinaryIO]] = []
        for rank in range(self._world_size):
            end = f"rank_{rank}.world_size_{self._world_size}"
            paths = {n: place.with_name(f"{place.name}_{word}.{end}") for n, word in names.items()}
            self._files.append(
                {n: self._open.enter_context(path.open("wb")) for n, path in paths.items()}
            )
        options = _options(like)
        if options is not None:
            place.with_name(f"{place.name}_opt_args.json").write_text(options)

    def add(self, rows: KeyedRows) -> None:
        """Append rows."""
        ranks = ranks_of(rows[KEYS], self._world_size, self._rule)
        order = np.argsort(ranks.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(ranks, minlength=self._world_size))
        starts = np.concatenate([[0], ends[:-1]])
        for name in self._files[0]:
            column = np.ascontiguousarray(rows[name], DTYPES[name])
            column = column if self._world_size == 1 else column[order]
            for files, start, end in zip(self._files, starts, ends, strict=True):
                files[name].write(column[start:end].tobytes())

    def close(self) -> None:
        """Close all files."""
        self._open.close()


def _options(like: DynamicembTable | None) -> str | None:
    """Return the options of the optimizer, as the first source has them."""
    file = like.folder / f"{like.table}_opt_args.json" if like else None
    if file is None or not file.is_file():
        return None
    text = file.read_text()
    try:
        json.loads(text)
    except ValueError as error:
        raise damaged(file, f"no JSON ({error})") from None
    return text


def _key_files(root: Path) -> Iterator[Path]:
    for pattern in ("*_emb_keys.rank_*", "*/*_emb_keys.rank_*"):
        yield from (file for file in root.glob(pattern) if KEY_FILE.fullmatch(file.name))


def _read(file: BinaryIO, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    array = np.empty(shape, dtype)
    if file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
        raise UserError(f"{path}: ends too early; has it changed while it was read?")
    return array
