"""Parts of an encoded data set: which rows each source trains on, and its counts of ids.

Shape legend: N rows, P parts, V ids of a table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import Partition
from cki_rec.data.columns import ColumnFile, Ids, Ints, Ragged, add_counts, blocks
from cki_rec.data.encoding.engines import NUM_THREADS
from cki_rec.data.encoding.partition import MOST_PARTS, Groups, groups_of, part_of_rows
from cki_rec.data.encoding.split import Blocks, sort_rows
from cki_rec.data.prefetch import threads
from cki_rec.data.schema import FeatureSchema
from cki_rec.data.stored import check_file, file_facts, load_array, read_json
from cki_rec.files import new_folder

PARTS = "parts.json"
"""File in the folder of a partition: where parts end, and facts about its other files."""
NO_PARTITION = Partition(by="none", parts=1, seed=0)


class Columns(Protocol):
    """The rows of an encoded data set (``EncodedDataset``)."""

    folder: Path
    manifest: dict[str, Any]
    schema: FeatureSchema
    split: NDArray[np.uint8]
    ids: Ids
    id_columns: list[str]
    group: Ids | None
    item_index: Ids | None
    domain: Ids | None
    timestamp: Ints | None

    def __len__(self) -> int:
        """Return N."""

    def domain_values(self) -> list[str]:
        """Return the values of the column by which rows are partitioned."""

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The rows of each split and part."""

    folder: Path
    part: NDArray[np.uint16]
    """``(N,)`` part of each row; of a column its group, which may be in several parts."""
    order: Ints
    """``(N,)`` row numbers by split, part and row order; more if parts overlap."""
    ends: list[list[int]]
    """Where the rows of each split and part end in ``order``."""
    names: list[str] | None = None
    """Names of the groups of a column; None: parts are numbers."""
    groups: list[list[int]] | None = None
    """Parts of each group of a column."""

    def rows(self, split: int, part: int) -> Ints:
        """Return the row numbers of a split and part, ascending, memory-mapped."""
        flat = [0, *(end for ends in self.ends for end in ends)]
        position = split * len(self.ends[0]) + part
        return self.order[flat[position] : flat[position + 1]]

    def counts(self, feature: str) -> NDArray[np.integer]:
        """Return ``(P, V)`` occurrences of each id in the training rows of each part."""
        return load_array(self.folder / f"counts.{feature}.npy")


def folder_name(partition: Partition) -> str:
    """Return the name of the folder of a partition, inside that of the data set."""
    if partition.by == "none":
        return "parts-none"
    if partition.column is not None:
        text = json.dumps([partition.by, partition.parts])
        return f"parts-column-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    seed = "" if partition.by == "time" else f"-{partition.seed}"
    return f"parts-{partition.by}-{partition.parts}{seed}"


def open_parts(folder: Path, verify: str) -> Parts:
    """Return the parts that ``write_parts`` wrote.

    Raises:
        UserError: A file is missing or damaged.
    """
    facts = read_json(folder / PARTS)
    for entry in facts["files"]:
        check_file(folder, entry, verify)
    part, order = load_array(folder / "part.npy"), load_array(folder / "order.npy")
    return Parts(folder, part, order, facts["ends"], facts.get("names"), facts.get("groups"))


def write_parts(dataset: Columns, partition: Partition, folder: Path) -> None:
    """Partition the rows of a data set and count ids per part; the caller holds the lock.

    Raises:
        UserError: The partition is impossible for these rows.
    """
    groups = None if partition.column is None else _groups(dataset, partition)
    parts = partition.size if groups is None else len(groups.parts)
    with new_folder(folder) as temporary:
        with closing(ColumnFile(temporary / "part.npy", np.uint16)) as part:
            for block in part_of_rows(
                partition,
                len(dataset),
                group=dataset.group,
                item_index=dataset.item_index,
                timestamp=dataset.timestamp,
                is_chronological=dataset.manifest["is_chronological"],
                domain=dataset.domain,
                group_of_value=None if groups is None else groups.of_value,
            ):
                part.append(block)
        mapped = load_array(part.path)
        keys = _SplitAndPart(dataset.split, mapped, parts)
        sizes = sort_rows(keys, temporary / "order.npy", len(dataset))
        ends = np.cumsum(np.pad(sizes, (0, 3 * parts - len(sizes)))).reshape(3, -1)
        counts = _counts_of(dataset, partition, mapped, parts)
        if groups is not None and partition.overlaps:
            counts = {name: _by_part(count, groups) for name, count in counts.items()}
            ends = _repeat_rows(temporary / "order.npy", ends, groups)
        for name, count in counts.items():
            is_small = count.max(initial=0) < 2**31
            small = count.astype(np.int32) if is_small else count
            np.save(temporary / f"counts.{name}.npy", small)
        files = [file_facts(path) for path in sorted(temporary.iterdir())]
        facts: dict[str, Any] = {"ends": ends.tolist(), "files": files}
        if groups is not None:
            facts |= {"names": groups.names, "groups": groups.parts}
        (temporary / PARTS).write_text(json.dumps(facts))


def _groups(dataset: Columns, partition: Partition) -> Groups:
    """Return the groups of the values of the column of a partition."""
    assert dataset.domain is not None, "the data set was encoded for another partition"
    values = dataset.domain_values()
    counts = np.zeros(len(values), np.int64)
    for start, stop in blocks(len(dataset)):
        add_counts(counts, dataset.domain[start:stop])
    return groups_of(partition, values, counts)


def _by_part(count: Ints, groups: Groups) -> Ints:
    """Return ``(P, V)`` counts of parts from ``(groups, V)`` counts of groups."""
    parts = range(max(map(max, groups.parts)) + 1)
    of_part = [[g for g, own in enumerate(groups.parts) if part in own] for part in parts]
    return np.stack([count[own].sum(0) for own in of_part])


def _repeat_rows(path: Path, ends: Ints, groups: Groups) -> Ints:
    """Write the rows of parts that overlap in place of those of groups; return their ends."""
    order = np.load(path)
    starts = np.concatenate([[0], ends.ravel()[:-1]]).reshape(ends.shape)
    listed, parts = [], range(max(map(max, groups.parts)) + 1)
    for split in range(len(ends)):
        for part in parts:
            own = [g for g, of in enumerate(groups.parts) if part in of]
            rows = [order[starts[split, g] : ends[split, g]] for g in own]
            listed.append(np.sort(np.concatenate(rows)))
    np.save(path, np.concatenate(listed))
    return np.cumsum([len(rows) for rows in listed]).reshape(len(ends), -1)


def _counts_of(
    dataset: Columns, partition: Partition, part: NDArray[np.uint16], parts: int
) -> dict[str, Ints]:
    """Return feature -> ``(P, V)`` occurrences; those of all rows from those of other parts."""
    if partition.by == "none":
        for path in dataset.folder.glob(f"parts-*/{PARTS}"):
            groups = read_json(path).get("groups", [])
            if all(len(own) == 1 for own in groups):
                return _summed_counts(dataset, path.parent)
    return _counts(dataset, part, parts)


def _counts(dataset: Columns, part: NDArray[np.uint16], parts: int) -> dict[str, Ints]:
    """Return feature -> ``(P, V)`` occurrences of each id in the training rows of each part."""
    sizes = {f.name: dataset.schema.table_sizes[f.table] for f in dataset.schema.lookups}
    counts = {name: np.zeros(parts * size, np.int64) for name, size in sizes.items()}
    columns = {name: dataset.column(name) for name in sizes}

    fixed = [name for name in dataset.id_columns if name in sizes]

    def count(names: list[str]) -> None:
        """Count ids of neighbouring columns."""
        places = [dataset.id_columns.index(name) for name in names if name in fixed]
        for start, stop in blocks(len(dataset)):
            rows = start + np.flatnonzero(dataset.split[start:stop] == 0)
            offset = part[rows].astype(np.int64)
            block = dataset.ids[start:stop, min(places, default=0) : max(places, default=-1) + 1]
            block = np.asarray(block)[rows - start]
            for name in names:
                column = columns[name]
                if isinstance(column, Ragged):
                    ids, lengths = column.ids(rows)
                    add_counts(counts[name], ids + np.repeat(offset, lengths) * sizes[name])
                else:
                    ids = block[:, dataset.id_columns.index(name) - places[0]]
                    add_counts(counts[name], ids + offset * sizes[name])

    every = [*fixed, *(name for name in sizes if name not in fixed)]
    groups = [names.tolist() for names in np.array_split(every, NUM_THREADS) if len(names)]
    with threads(NUM_THREADS) as run:
        list(run(count, groups))
    return {name: flat.reshape(parts, -1) for name, flat in counts.items()}


def _summed_counts(dataset: Columns, folder: Path) -> dict[str, Ints]:
    """Return feature -> ``(1, V)`` sums of the counts of another partition over its parts."""
    parts = open_parts(folder, "fast")
    return {
        f.name: parts.counts(f.name).sum(0, dtype=np.int64, keepdims=True)
        for f in dataset.schema.lookups
    }


class _SplitAndPart(Blocks):
    """Split and part of every row as one number, block by block."""

    def __init__(self, split: NDArray[np.uint8], part: NDArray[np.uint16], parts: int) -> None:
        super().__init__(split)
        self._part, self._parts = part, parts

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield the blocks in order; numbers of 16 bits are sorted fastest."""
        is_small = 3 * self._parts <= MOST_PARTS
        for start, stop in blocks(len(self._array)):
            split = self._array[start:stop].astype(np.int64)
            key = split * self._parts + self._part[start:stop]
            yield key.astype(np.uint16) if is_small else key
