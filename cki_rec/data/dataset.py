"""An encoded data set opened from its folder: manifest, memory-mapped columns, parts, counts.

Shape legend: N rows, C columns of ids, P parts, V ids of a table.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cki_rec.config import Partition, UserError
from cki_rec.data.columns import RAGGED, ColumnFile, Ids, Ints, Ragged, add_counts, blocks
from cki_rec.data.encoding import vocabulary
from cki_rec.data.encoding.partition import MOST_PARTS, part_of_rows
from cki_rec.data.encoding.split import SPLITS, Blocks, sort_rows
from cki_rec.data.provenance import Provenance, Rows
from cki_rec.data.raw.formats import recorded_format
from cki_rec.data.schema import FeatureSchema
from cki_rec.files import file_digest, new_folder

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Raised whenever the same options and raw files would give different columns."""
PARTS = "parts.json"
"""In the folder of a partition: where parts end, and size and digest of its files."""
DIVISION = ("split", "label", "group", "item_index", "timestamp")
"""Columns that say which row is which, and in which split; no vocabulary enters them."""
NO_PARTITION = Partition(by="none", parts=1, seed=0)


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows of each split and part."""

    folder: Path
    part: NDArray[np.uint16]
    """``(N,)``."""
    order: Ints
    """``(N,)`` row numbers by split, part and row order."""
    ends: list[list[int]]
    """Where the rows of each split and part end in ``order``."""

    def rows(self, split: int, part: int) -> Ints:
        """Return the row numbers of a split and part, ascending, memory-mapped."""
        flat = [0, *(end for ends in self.ends for end in ends)]
        position = split * len(self.ends[0]) + part
        return self.order[flat[position] : flat[position + 1]]

    def counts(self, feature: str) -> NDArray[np.integer]:
        """Return ``(P, V)`` how often the training rows of each part hold each id."""
        return _load(self.folder / f"counts.{feature}.npy")


class EncodedDataset:
    """Rows of one encoded data set, in the order of its source.

    Args:
        folder: What ``store.prepare`` wrote.
        verify: ``fast`` checks sizes and types of all files, ``full`` their digests too.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, folder: Path, verify: str = "fast") -> None:
        self.folder = folder
        self.manifest = _read_json(folder / MANIFEST)
        try:
            if self.manifest["format_version"] != FORMAT_VERSION:
                raise ValueError(f"version {self.manifest['format_version']}")
            self.schema = FeatureSchema.from_json(self.manifest["schema"])
            self.hash: str = self.manifest["hash"]
            self.id_columns: list[str] = self.manifest["id_columns"]
            stored: dict[str, dict[str, Any]] = self.manifest["files"]
            self.source_rows = _source_rows(self.manifest)
            for entry in stored.values():
                _check_file(folder, entry, verify)
            columns = {
                name: _open_column(folder, entry)
                for name, entry in stored.items()
                if "dtype" in entry
            }
            self._label: NDArray[np.uint8] = columns.pop("label")
            self.split: NDArray[np.uint8] = columns["split"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"found {error!r}") from None
        self._columns, self._verify = columns, verify
        self.timestamp: Ints | None = columns.get("timestamp")
        self.group: Ids | None = columns.get("group")
        self.item_index: Ids | None = columns.get("item_index")
        self.ids: Ids = columns.get("ids", np.empty((len(self), 0), np.int32))
        """``(N, C)``, row by row: one row is one piece of memory."""
        self.numbers: NDArray[np.float32] = columns.get(
            "numbers", np.empty((len(self), 0), np.float32)
        )
        """``(N, numeric fields)``."""
        self._parts: dict[str, Parts] = {}

    def __len__(self) -> int:
        """Return N."""
        return len(self._label)

    @property
    def origin(self) -> Provenance:
        """Return the origin of a model that is trained on these rows."""
        return Provenance(self.hash, (self.source_rows,))

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return the labels of ``rows``; NaN for test rows, which ``held_out`` alone gives."""
        is_test = self.split[rows] == SPLITS.index("test")
        return np.where(is_test, np.float32(np.nan), self._label[rows])

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids of a field, or its numbers: ``(N,)``; ``Ragged`` for several a row."""
        if f"field.{name}.values" in self._columns:
            return Ragged(*(self._columns[f"field.{name}.{piece}"] for piece in RAGGED))
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        names = [feature.name for feature in self.schema.numbers]
        return self.numbers[:, names.index(name)]

    def vocabulary(self, table: str) -> list[str]:
        """Return the tokens of a table; the first has id ``FIRST_ID``.

        Raises:
            UserError: The file is damaged, or ids of the table are hashes.
        """
        path = self.folder / f"vocabulary.{table}.txt"
        if f"vocabulary.{table}" not in self.manifest["files"]:
            raise UserError(f"{self.folder}: ids of table {table} are hashes, it has no tokens")
        if file_digest(path) != self.manifest["files"][f"vocabulary.{table}"]["sha256"]:
            raise damaged(path, "its hash differs from the manifest")
        return vocabulary.read_vocabulary(path)

    def parts(self, partition: Partition) -> Parts:
        """Return which rows belong to which part, and how often each part holds each id.

        Made on first use, and kept in the folder of the data set.

        Raises:
            UserError: The rows cannot be divided so.
        """
        key = _parts_key(partition)
        if key not in self._parts:
            folder = self.folder / key
            if not folder.exists():
                try:
                    with FileLock(self.folder / f"{key}.lock"):
                        if not folder.exists():
                            self._write_parts(partition, folder)
                except OSError as error:
                    raise UserError(
                        f"{folder}: cannot be written: {error.strerror or error}; free space or "
                        "set runtime.encoded to a folder that can be written"
                    ) from None
            self._parts[key] = _open_parts(folder, self._verify)
        return self._parts[key]

    def rows(
        self, split: str, partition: Partition | None = None, part: int | None = None
    ) -> Ints:
        """Return the row numbers of ``train``, ``valid`` or ``test``, ascending, memory-mapped.

        Args:
            split: Which.
            partition: With ``part``: keep the rows of that part only.
            part: None: rows of all parts.

        Raises:
            UserError: No such part, or it has no row in this split.
        """
        chosen, number = self._chosen(partition, part)
        rows = self.parts(chosen).rows(SPLITS.index(split), number)
        if not len(rows):
            raise UserError(
                f"data.part={part}: holds no {split} row of data.split; lower "
                "data.partition.parts, or divide by something else than data.split does"
            )
        return rows

    def row_counts(
        self,
        schema: FeatureSchema,
        partition: Partition | None = None,
        part: int | None = None,
    ) -> dict[str, Ints]:
        """Return how often training rows look each id up, per table of ``schema``.

        A row counts once per feature that holds the id, so a table that two features share adds
        both up (pass ``schema.without_histories()`` to leave histories out), and a history counts
        an item as often as it holds it. ``PADDING_ID`` is never held, ``OOV_ID`` counts.

        Args:
            schema: The features that count.
            partition: With ``part``: rows of that part only.
            part: None: rows of all parts.

        Returns:
            Table -> ``(V,)``.
        """
        chosen, number = self._chosen(partition, part)
        parts = self.parts(chosen)
        counts: dict[str, Ints] = {}
        for feature in schema.lookups:
            found = parts.counts(feature.name)[number].astype(np.int64)
            if feature.table in counts:
                found += counts[feature.table]
            counts[feature.table] = found
        return counts

    def _chosen(self, partition: Partition | None, part: int | None) -> tuple[Partition, int]:
        if part is None:
            return NO_PARTITION, 0
        assert partition is not None, "a part of what?"
        parts = 1 if partition.by == "none" else partition.parts
        if not 0 <= part < parts:
            raise UserError(
                f"data.part={part}: data.partition has {parts} (by={partition.by}), "
                f"counted from 0; choose 0 to {parts - 1} or null"
            )
        return partition, part

    def _write_parts(self, partition: Partition, folder: Path) -> None:
        """Write what ``parts`` opens; the lock is held."""
        num_parts = 1 if partition.by == "none" else partition.parts
        with new_folder(folder) as temporary:
            with closing(ColumnFile(temporary / "part.npy", np.uint16)) as part:
                for block in part_of_rows(
                    partition,
                    len(self),
                    group=self.group,
                    item_index=self.item_index,
                    timestamp=self.timestamp,
                    is_chronological=self.manifest["is_chronological"],
                ):
                    part.append(block)
            mapped = _load(part.path)
            keys = _SplitAndPart(self.split, mapped, num_parts)
            sizes = sort_rows(keys, temporary / "order.npy", len(self))
            ends = np.cumsum(np.pad(sizes, (0, 3 * num_parts - len(sizes)))).reshape(3, -1)
            others = [p for p in self.folder.glob(f"parts-*/{PARTS}") if num_parts == 1]
            counts = _summed(self, others[0].parent) if others else self._count(mapped, num_parts)
            for name, count in counts.items():
                is_small = count.max(initial=0) < 2**31
                small = count.astype(np.int32) if is_small else count
                np.save(temporary / f"counts.{name}.npy", small)
            files = [file_facts(path) for path in sorted(temporary.iterdir())]
            facts = {"ends": ends.tolist(), "files": files}
            (temporary / PARTS).write_text(json.dumps(facts))

    def _count(self, part: NDArray[np.uint16], num_parts: int) -> dict[str, Ints]:
        """Return feature -> ``(P, V)`` how often the training rows of each part hold each id."""
        sizes = {f.name: self.schema.table_sizes[f.table] for f in self.schema.lookups}
        counts = {n: np.zeros(num_parts * size, np.int64) for n, size in sizes.items()}
        columns = {name: self.column(name) for name in sizes}
        fixed = [name for name, column in columns.items() if not isinstance(column, Ragged)]
        places = [self.id_columns.index(name) for name in fixed]
        for start, stop in blocks(len(self)):
            rows = start + np.flatnonzero(self.split[start:stop] == 0)
            offset = part[rows].astype(np.int64)
            block = np.asarray(self.ids[start:stop])[rows - start]
            for name, place in zip(fixed, places, strict=True):
                add_counts(counts[name], block[:, place] + offset * sizes[name])
            for name, column in columns.items():
                if isinstance(column, Ragged):
                    ids, lengths = column.ids(rows)
                    add_counts(counts[name], ids + np.repeat(offset, lengths) * sizes[name])
        return {name: found.reshape(num_parts, -1) for name, found in counts.items()}


def _source_rows(manifest: dict[str, Any]) -> Rows:
    """Return which rows of which raw files the data set holds, and how they are divided."""
    stored, options = manifest["files"], manifest["options"]
    digests = [stored[name]["sha256"] if name in stored else None for name in DIVISION]
    division = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    rule = None
    if options["split"]["by"] == "hash":
        named = {name: options[name] for name in ("format", "user", "item", "time", "time_form")}
        rule = json.dumps([options["split"], named, "timestamp" in stored], sort_keys=True)
    about = recorded_format(options["format"]).describes
    files = [file["sha256"] for file in manifest["source"] if file["name"] not in about]
    return Rows(tuple(files), division, rule)


def _summed(dataset: EncodedDataset, folder: Path) -> dict[str, Ints]:
    """Return feature -> ``(1, V)`` counts of all parts together, from those of some partition."""
    parts = _open_parts(folder, "fast")
    return {
        f.name: parts.counts(f.name).sum(0, dtype=np.int64, keepdims=True)
        for f in dataset.schema.lookups
    }


class _SplitAndPart(Blocks):
    """Split and part of every row as one number, block by block."""

    def __init__(self, split: NDArray[np.uint8], part: NDArray[np.uint16], parts: int) -> None:
        super().__init__(split)
        self._part, self._parts = part, parts

    def __iter__(self) -> Any:
        """Yield them in order; numbers of 16 bits are sorted fastest."""
        is_small = 3 * self._parts <= MOST_PARTS
        for start, stop in blocks(len(self._array)):
            split = self._array[start:stop].astype(np.int64)
            key = split * self._parts + self._part[start:stop]
            yield key.astype(np.uint16) if is_small else key


def file_facts(path: Path) -> dict[str, Any]:
    """Return what ``_check_file`` and ``_open_column`` compare a file with."""
    facts: dict[str, Any] = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }
    if path.suffix == ".npy":
        array = _load(path, is_empty=facts["bytes"] <= 128)
        facts.update(dtype=str(array.dtype), shape=list(array.shape))
    return facts


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file of an encoded data set that is not as it was written."""
    return UserError(
        f"{path}: damaged: {what}; delete the folder {path.parent} and it is prepared again"
    )


def _parts_key(partition: Partition) -> str:
    if partition.by == "none":
        return "parts-none"
    seed = "" if partition.by == "time" else f"-{partition.seed}"
    return f"parts-{partition.by}-{partition.parts}{seed}"


def _open_parts(folder: Path, verify: str) -> Parts:
    facts = _read_json(folder / PARTS)
    for entry in facts["files"]:
        _check_file(folder, entry, verify)
    part, order = _load(folder / "part.npy"), _load(folder / "order.npy")
    return Parts(folder, part, order, facts["ends"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except ValueError as error:
        raise damaged(path, f"not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _check_file(folder: Path, entry: dict[str, Any], verify: str) -> None:
    """Check that a file is as the manifest says."""
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise damaged(path, f"{size:,} bytes, expected {entry['bytes']:,}")
        if verify == "full" and file_digest(path) != entry["sha256"]:
            raise damaged(path, "its content differs from what was written")
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _load(path: Path, is_empty: bool = False) -> NDArray[Any]:
    """Return an array, memory-mapped unless there is nothing to map."""
    try:
        array: NDArray[Any] = np.load(
            path, mmap_mode=None if is_empty else "r", allow_pickle=False
        )
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except (ValueError, EOFError) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return array


def _open_column(folder: Path, entry: dict[str, Any]) -> NDArray[Any]:
    """Return one column, memory-mapped."""
    path = folder / entry["file"]
    array = _load(path, is_empty=0 in entry["shape"])
    if list(array.shape) != entry["shape"] or str(array.dtype) != entry["dtype"]:
        expected = f"{entry['dtype']} {entry['shape']}"
        raise damaged(path, f"{array.dtype} {list(array.shape)}, expected {expected}")
    return array
