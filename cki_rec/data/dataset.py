"""An encoded data set on disk: its manifest, memory-mapped columns, splits and counts of ids.

Shape legend: N rows, C columns of ids, V ids of a table.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from cki_rec.config import Partition, UserError
from cki_rec.data.columns import DOMAINS, RAGGED, Ids, Ints, Ragged
from cki_rec.data.encoding.split import SPLITS
from cki_rec.data.encoding.vocabulary import read_vocabulary
from cki_rec.data.parts import (
    NO_PARTITION,
    Parts,
    folder_name,
    open_parts,
    write_parts,
)
from cki_rec.data.provenance import Provenance, Rows
from cki_rec.data.raw.formats import recorded_format
from cki_rec.data.schema import FeatureSchema
from cki_rec.data.stored import check_file, damaged, open_column, read_json
from cki_rec.files import file_digest

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Version of the encoding; raised whenever equal options and raw files give other columns."""
DIVISION = ("split", "label", "group", "item_index", "timestamp")
"""Columns that identify rows and their splits, whatever the vocabularies."""


class EncodedDataset:
    """Rows of one encoded data set, in the order of their source.

    Args:
        folder: A folder that ``store.prepare`` wrote.
        verify: ``fast`` checks sizes and types of all files, ``full`` their digests too.

    Raises:
        UserError: A file is missing or damaged.
    """

    def __init__(self, folder: Path, verify: str = "fast") -> None:
        self.folder = folder
        self.manifest = read_json(folder / MANIFEST)
        try:
            if self.manifest["format_version"] != FORMAT_VERSION:
                raise ValueError(f"version {self.manifest['format_version']}")
            self.schema = FeatureSchema.from_json(self.manifest["schema"])
            self.hash: str = self.manifest["hash"]
            self.id_columns: list[str] = self.manifest["id_columns"]
            files: dict[str, dict[str, Any]] = self.manifest["files"]
            self.source_rows = _source_rows(self.manifest)
            for facts in files.values():
                check_file(folder, facts, verify)
            columns = {
                name: open_column(folder, facts)
                for name, facts in files.items()
                if "dtype" in facts
            }
            self._label: NDArray[np.uint8] = columns.pop("label")
            self.split: NDArray[np.uint8] = columns["split"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise damaged(folder / MANIFEST, f"unexpected content ({error!r})") from None
        self._columns, self._verify = columns, verify
        self.timestamp: Ints | None = columns.get("timestamp")
        self.group: Ids | None = columns.get("group")
        self.item_index: Ids | None = columns.get("item_index")
        self.domain: Ids | None = columns.get("domain")
        self.ids: Ids = columns.get("ids", np.empty((len(self), 0), np.int32))
        """``(N, C)``, stored row by row."""
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
        """Return the provenance of a model that is trained on these rows."""
        return Provenance(self.hash, (self.source_rows,))

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return the labels of ``rows``; NaN for test rows (see ``cki_rec.data.test_labels``)."""
        is_test = self.split[rows] == SPLITS.index("test")
        return np.where(is_test, np.float32(np.nan), self._label[rows])

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field: ``(N,)``, or ``Ragged`` for several ids a row."""
        if f"field.{name}.values" in self._columns:
            return Ragged(*(self._columns[f"field.{name}.{piece}"] for piece in RAGGED))
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        names = [feature.name for feature in self.schema.numbers]
        return self.numbers[:, names.index(name)]

    def vocabulary(self, table: str) -> list[str]:
        """Return the tokens of a table; the first one has id ``FIRST_ID``.

        Raises:
            UserError: The file is damaged, or ids of the table are hashes.
        """
        path = self.folder / f"vocabulary.{table}.txt"
        facts = self.manifest["files"].get(f"vocabulary.{table}")
        if facts is None:
            raise UserError(
                f"{self.folder}: table {table} has no tokens, its ids are hashes; encode the "
                "field without hash_size"
            )
        if file_digest(path) != facts["sha256"]:
            raise damaged(path, "its hash differs from the manifest")
        return read_vocabulary(path)

    def domain_values(self) -> list[str]:
        """Return the values of the column by which rows are partitioned, in text order."""
        values: list[str] = read_json(self.folder / DOMAINS)
        return values

    def parts(self, partition: Partition) -> Parts:
        """Return the rows and the counts of ids of every part.

        They are computed on first use and stored in the folder of the data set.

        Raises:
            UserError: The partition is impossible for these rows, or the folder is not writable.
        """
        name = folder_name(partition)
        if name not in self._parts:
            folder = self.folder / name
            if not folder.exists():
                try:
                    with FileLock(self.folder / f"{name}.lock"):
                        if not folder.exists():
                            write_parts(self, partition, folder)
                except OSError as error:
                    raise UserError(
                        f"{folder}: cannot be written: {error.strerror or error}; free space or "
                        "set runtime.encoded to a writable folder"
                    ) from None
            self._parts[name] = open_parts(folder, self._verify)
        return self._parts[name]

    def rows(
        self, split: str, partition: Partition | None = None, part: int | str | None = None
    ) -> Ints:
        """Return the row numbers of a split, ascending, memory-mapped.

        Args:
            split: ``train``, ``valid`` or ``test``.
            partition: Required with ``part``.
            part: Return the rows of this part only; None: of all parts.

        Raises:
            UserError: The part does not exist, or it has no rows in this split.
        """
        chosen, number = self._chosen(partition, part)
        rows = self.parts(chosen).rows(SPLITS.index(split), number)
        if not len(rows) and part is None:
            raise UserError(
                f"{self.folder}: has no {split} row, which this command reads; raise its share in"
                " data.split.fractions, e.g. [0,0.1,0.9] for an evaluation"
            )
        if not len(rows):
            fix = "lower data.partition.parts"
            if chosen.named is not None:
                fix = "leave it out of data.partition.parts"
            raise UserError(
                f"data.part={part}: has no {split} row of data.split; {fix}, or choose a "
                "data.partition.by that differs from data.split.by"
            )
        return rows

    def row_counts(
        self,
        schema: FeatureSchema,
        partition: Partition | None = None,
        part: int | str | None = None,
    ) -> dict[str, Ints]:
        """Return the number of lookups of each id by training rows, per table of ``schema``.

        A row counts once per feature that holds the id, so counts of features that share a table
        are added. (``schema.without_histories()`` leaves histories out.) A history counts an item
        as often as it holds it. ``PADDING_ID`` has count 0; ``OOV_ID`` is counted.

        Args:
            schema: The features to count.
            partition: Required with ``part``.
            part: Count the rows of this part only; None: of all parts.

        Returns:
            Table -> ``(V,)``.
        """
        chosen, number = self._chosen(partition, part)
        parts = self.parts(chosen)
        counts: dict[str, Ints] = {}
        for feature in schema.lookups:
            count = parts.counts(feature.name)[number].astype(np.int64)
            if feature.table in counts:
                count += counts[feature.table]
            counts[feature.table] = count
        return counts

    def _chosen(
        self, partition: Partition | None, part: int | str | None
    ) -> tuple[Partition, int]:
        if part is None:
            return NO_PARTITION, 0
        assert partition is not None, "part requires partition"
        number = partition.number(part)
        if number is None:
            choice = "counted from 0; choose one of them or null"
            if partition.named is not None:
                choice = f"choose one of {', '.join(name for name, _ in partition.named)} or null"
            raise UserError(
                f"data.part={part}: data.partition has {partition.size} parts (by={partition.by}),"
                f" {choice}"
            )
        return partition, number


def _source_rows(manifest: dict[str, Any]) -> Rows:
    """Return the raw files whose rows the data set holds, and how they are split."""
    files, options = manifest["files"], manifest["options"]
    digests = [files[name]["sha256"] if name in files else None for name in DIVISION]
    division = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    rule = None
    if options["split"]["by"] == "hash":
        named = {name: options[name] for name in ("format", "user", "item", "time", "time_form")}
        rule = json.dumps([options["split"], named, "timestamp" in files], sort_keys=True)
    descriptions = recorded_format(options["format"]).describes
    sources = [file for file in manifest["source"] if file["name"] not in descriptions]
    return Rows(tuple(file["sha256"] for file in sources), division, rule)
