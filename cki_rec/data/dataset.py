"""An encoded data set opened from its folder: manifest, memory-mapped columns, counts.

Shape legend: N rows, V ids of a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import Partition, UserError
from cki_rec.data.encode import SPLITS, Ids, Ints, Ragged, vocabulary_hash
from cki_rec.data.partition import part_of_rows
from cki_rec.data.schema import UNSEEN_ID, FeatureSchema

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
"""Raised whenever the same options and raw files would give different columns."""
RAGGED = ("values", "starts", "lengths")


class EncodedDataset:
    """Rows of one encoded data set, in the order of its source.

    Args:
        folder: What ``store.prepare`` wrote.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_json(folder / MANIFEST)
        try:
            if self.manifest["format_version"] != FORMAT_VERSION:
                raise ValueError(f"version {self.manifest['format_version']}")
            self.schema = FeatureSchema.from_json(self.manifest["schema"])
            self.hash: str = self.manifest["hash"]
            stored: dict[str, dict[str, Any]] = self.manifest["columns"]
            self._columns = {name: _open_column(folder, stored[name]) for name in stored}
            self.label: NDArray[np.uint8] = self._columns["label"]
            self.split: NDArray[np.uint8] = self._columns["split"]
            self.timestamp: Ints = self._columns["timestamp"]
            self.group: Ids = self._columns["group"]
            self.item_index: Ids = self._columns["item_index"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"found {error!r}") from None
        self._parts: dict[tuple[str, int, int], Ints] = {}
        self.cache: dict[Any, object] = {}
        """Of the loader: columns in memory."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.label)

    def column(self, name: str) -> Ids | Ragged:
        """Return the ids of a field: ``(N,)``, or ``Ragged`` for several ids a row."""
        if f"field.{name}.values" in self._columns:
            return Ragged(*(self._columns[f"field.{name}.{piece}"] for piece in RAGGED))
        ids: Ids = self._columns[f"field.{name}"]
        return ids

    def vocabulary(self, table: str) -> list[str]:
        """Return the tokens of a table; the first has id ``FIRST_ID``."""
        path = self.folder / f"vocabulary.{table}.json"
        tokens: list[str] = _read_json(path)
        if vocabulary_hash(tokens) != self.schema.vocabulary_hashes[table]:
            raise damaged(path, "its hash differs from the manifest")
        return tokens

    def parts(self, partition: Partition) -> Ints:
        """Return ``(N,)`` the part of each row (of any split)."""
        key = (partition.by, partition.parts, partition.seed)
        if key not in self._parts:
            self._parts[key] = part_of_rows(
                partition,
                group=self.group,
                item_index=self.item_index,
                timestamp=self.timestamp,
            )
        return self._parts[key]

    def rows(
        self, split: str, partition: Partition | None = None, part: int | None = None
    ) -> Ints:
        """Return the row numbers of ``train``, ``valid`` or ``test``, ascending.

        Args:
            split: Which.
            partition: With ``part``: keep the rows of that part only.
            part: None: rows of all parts.

        Raises:
            UserError: No such part, or it has no row in this split.
        """
        is_chosen = self.split == SPLITS.index(split)
        if part is not None:
            assert partition is not None, "a part of what?"
            parts = 1 if partition.by == "none" else partition.parts
            if not 0 <= part < parts:
                raise UserError(
                    f"data.part={part}: data.partition has {parts} (by={partition.by}), "
                    f"counted from 0; choose 0 to {parts - 1} or null"
                )
            is_chosen = is_chosen & (self.parts(partition) == part)
        rows = np.flatnonzero(is_chosen)
        if not len(rows):
            raise UserError(
                f"data.part={part}: holds no {split} row of data.split; lower "
                "data.partition.parts, or divide by something else than data.split does"
            )
        return rows

    def row_counts(self, rows: Ints, schema: FeatureSchema) -> dict[str, Ints]:
        """Return how often ``rows`` look each id up, per table of ``schema``.

        A row counts once per feature that holds the id, so a table that two features share adds
        both up (pass ``schema.without_histories()`` to leave histories out), and a history counts
        an item as often as it holds it. ``PADDING_ID`` is never held, ``UNSEEN_ID`` counts.

        Returns:
            Table -> ``(V,)``.
        """
        counts: dict[str, Ints] = {
            feature.table: np.zeros(schema.table_sizes[feature.table], dtype=np.int64)
            for feature in schema.features
        }
        for feature in schema.features:
            size = len(counts[feature.table])
            counts[feature.table] += id_counts(self.column(feature.name), rows, size)
        return counts


def summary_lines(dataset: EncodedDataset) -> list[str]:
    """Return what a person wants to know about the data set, line by line."""
    manifest, schema = dataset.manifest, dataset.schema
    lines = [f"{dataset.folder}: {len(dataset):,} rows, {len(schema.features)} fields"]
    for source in manifest["source"]:
        lines.append(f"  from {source['name']} ({source['size']:,} bytes)")
    for name, split in manifest["splits"].items():
        lines.append(
            f"  {name:<5} {split['rows']:>11,} rows, {split['positive_rate']:.1%} positive"
        )
    for feature in schema.features:
        unseen = ", ".join(
            f"{name} {'none' if share is None else format(share, '.2%')}"
            for name, share in manifest["unseen_share"][feature.name].items()
        )
        lines.append(
            f"  {feature.name:<10} {feature.kind:<11} table {feature.table} of "
            f"{schema.table_sizes[feature.table]:,} ids, unseen: {unseen}"
        )
    skipped = manifest["skipped"]
    lines.append(f"  skipped rows: {sum(entry['count'] for entry in skipped.values()):,}")
    for reason, entry in skipped.items():
        lines.append(f"    {reason}: {entry['count']:,}, e.g. {entry['examples'][0]}")
    return lines


def id_counts(column: Ids | Ragged, rows: Ints, size: int) -> Ints:
    """Return ``(size,)`` how many times ``rows`` hold each id."""
    if not isinstance(column, Ragged):
        return np.bincount(column[rows], minlength=size)
    weights = column.lookups(rows)
    # exact: a float64 sum of integers below 2 ** 53
    return np.bincount(column.values, weights=weights, minlength=size).astype(np.int64)


def unseen_share(column: Ids | Ragged, rows: Ints, size: int) -> float | None:
    """Return the share of unseen ids among those that ``rows`` hold; None if they hold none."""
    counts = id_counts(column, rows, size)
    total = int(counts.sum())
    return int(counts[UNSEEN_ID]) / total if total else None


def damaged(path: Path, what: str) -> UserError:
    """Return the error for a file of an encoded data set that is not as it was written."""
    return UserError(
        f"{path}: damaged: {what}; delete the folder {path.parent} and it is prepared again"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except ValueError as error:
        raise damaged(path, f"not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _open_column(folder: Path, entry: dict[str, Any]) -> NDArray[Any]:
    """Return one column, memory-mapped, after checking that it is as the manifest says."""
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise damaged(path, f"{size:,} bytes, expected {entry['bytes']:,}")
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if list(array.shape) != entry["shape"] or str(array.dtype) != entry["dtype"]:
        expected = f"{entry['dtype']} {entry['shape']}"
        raise damaged(path, f"{array.dtype} {list(array.shape)}, expected {expected}")
    return array
