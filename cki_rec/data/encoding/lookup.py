"""Codes -> counts, and codes -> ids of vocabularies, chunk by chunk.

Shape legend: N rows, C columns of ids, K codes of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cki_rec.data.columns import OOV_ID, RAGGED, ColumnFile, Ids, Ints
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.split import SPLITS, share
from cki_rec.data.encoding.staging import Plan, Span, Staging
from cki_rec.data.encoding.vocabulary import Vocabulary
from cki_rec.data.prefetch import Run, one_by_one


def look_up(
    columns: Staging, vocabularies: dict[str, Vocabulary], run: Run = one_by_one
) -> dict[str, dict[str, float | None]]:
    """Replace codes by ids; return the share of ``OOV_ID`` per field and split."""
    plan, files = columns.plan, columns.files
    totals = np.zeros(3, dtype=np.int64)
    unseen = np.zeros((len(plan.ids), 3), dtype=np.int64)
    multi = {f.name: _Multi(columns, f.name) for f in plan.multi}
    task = partial(_look_up_chunk, read_by_chunks(columns), plan)
    for found in run(task, _with_ids(columns, vocabularies)):
        totals += found.totals
        unseen += found.unseen
        for name, values in found.multi.items():
            multi[name].append(*values)
    if "codes" in files:
        files.pop("codes").delete()
    shares: dict[str, dict[str, float | None]] = {
        column.name: {
            name: share(unseen[position, code], totals[code]) for code, name in enumerate(SPLITS)
        }
        for position, column in enumerate(plan.ids)
    }
    for name, column in multi.items():
        for piece in ("values", "lengths"):
            files.pop(f"multi.{name}.{piece}").delete()
        files.update({f"field.{name}.{piece}": file for piece, file in column.files.items()})
        shares[name] = {
            n: share(column.unseen[code], column.totals[code]) for code, n in enumerate(SPLITS)
        }
    return shares


def count_chunk(
    files: dict[str, ColumnFile], multi: list[Field], span: Span
) -> dict[str | None, Ints]:
    """Return ``(K,)`` counts of the codes of a chunk in training rows.

    Returns:
        Listed history -> its counts; None -> those of all other fields together.
    """
    is_train = files["split"].read(*span.rows) == 0
    counts: dict[str | None, Ints] = {None: np.zeros(span.num_codes, dtype=np.int64)}
    if "ids" in files:
        codes = files["ids"].read(*span.rows)[is_train]
        counts[None] += np.bincount(codes.reshape(-1), minlength=span.num_codes)
    for column in multi:
        codes, lengths = _codes_of(files, column, span)
        count = np.bincount(codes[np.repeat(is_train, lengths)], minlength=span.num_codes)
        if column.kind == "history":
            counts[column.name] = count
        else:
            counts[None] += count
    return counts


def read_by_chunks(columns: Staging) -> dict[str, ColumnFile]:
    """Return the files that ``count_chunk`` and ``_look_up_chunk`` read."""
    names = ("ids", "split")
    return {
        name: file
        for name, file in columns.files.items()
        if name in names or name.startswith("multi.")
    }


def _with_ids(columns: Staging, vocabularies: dict[str, Vocabulary]) -> Iterator[tuple[Span, Ids]]:
    """Yield every chunk with the ``(K,)`` ids of its codes."""
    hashed = {f.table for f in [*columns.plan.ids, *columns.plan.multi] if f.hash_size is not None}
    for span in columns.spans:
        ids = columns.meanings(span) if span.tables else np.zeros(0, np.int32)
        for table, (start, stop) in span.tables.items():
            if table not in hashed:
                ids[start:stop] = vocabularies[table].id_of_code[ids[start:stop]]
        yield span, ids


@dataclass(frozen=True, slots=True)
class _Found:
    """Facts about one chunk with ids in place of codes."""

    totals: Ints
    """``(3,)`` rows per split."""
    unseen: Ints
    """``(C, 3)`` rows with ``OOV_ID`` per column and split."""
    multi: dict[str, tuple[Ids, Ids, NDArray[np.uint8]]]
    """Field with several ids a row -> ids, ids per row, and split of each id."""


def _look_up_chunk(files: dict[str, ColumnFile], plan: Plan, chunk: tuple[Span, Ids]) -> _Found:
    """Write the ids of one chunk, in place of its codes."""
    span, ids = chunk
    split = files["split"].read(*span.rows)
    num_columns = len(plan.ids)
    unseen = np.zeros(3 * num_columns, dtype=np.int64)
    if plan.ids:
        block = ids[files["ids"].read(*span.rows)]
        files["ids"].write(span.rows[0], block)
        row, column = np.nonzero(block == OOV_ID)
        unseen += np.bincount(3 * column + split[row], minlength=len(unseen))
    multi = {}
    for f in plan.multi:
        codes, lengths = _codes_of(files, f, span)
        if f.kind == "multi":
            values, lengths = _with_one_oov_id(ids[codes], lengths)
        else:
            values, lengths = _cut(ids[codes], lengths, f.max_length, f.keep)
        multi[f.name] = values, lengths, np.repeat(split, lengths)
    totals = np.bincount(split, minlength=3)
    return _Found(totals, unseen.reshape(num_columns, 3), multi)


class _Multi:
    """The files of a field with several ids a row, and its shares of ``OOV_ID``."""

    def __init__(self, columns: Staging, name: str) -> None:
        types: tuple[type[np.generic], ...] = (np.int32, np.int64, np.int32)
        self.files = {
            piece: ColumnFile(columns.folder / f"field.{name}.{piece}.npy", dtype)
            for piece, dtype in zip(RAGGED, types, strict=True)
        }
        self.unseen, self.totals = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)

    def append(self, values: Ids, lengths: Ids, split: NDArray[np.uint8]) -> None:
        """Append the rows of a chunk."""
        ends = self.files["values"].rows + np.cumsum(lengths, dtype=np.int64)
        self.files["values"].append(values)
        self.files["starts"].append(ends - lengths)
        self.files["lengths"].append(lengths)
        self.totals += np.bincount(split, minlength=3)
        self.unseen += np.bincount(split[values == OOV_ID], minlength=3)


def _with_one_oov_id(ids: Ids, lengths: Ids) -> tuple[Ids, Ids]:
    """Return the rows without repetitions of ``OOV_ID``."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    unseen = np.flatnonzero(ids == OOV_ID)
    is_kept = np.ones(len(ids), dtype=np.bool_)
    is_kept[unseen[1:][row[unseen[1:]] == row[unseen[:-1]]]] = False
    return ids[is_kept], np.bincount(row[is_kept], minlength=len(lengths)).astype(np.int32)


def _cut(ids: Ids, lengths: Ids, most: int | None, keep: str | None) -> tuple[Ids, Ids]:
    """Return the ``latest`` or the ``first`` ids of each row, at most ``most``."""
    if most is None:
        return ids, lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    limits = ends if keep == "latest" else ends - lengths
    place = np.arange(len(ids)) - np.repeat(limits, lengths)
    is_kept = place >= -most if keep == "latest" else place < most
    return ids[is_kept], np.minimum(lengths, most)


def _codes_of(files: dict[str, ColumnFile], column: Field, span: Span) -> tuple[Ids, Ids]:
    """Return the codes of a field with several ids a row, and the number of codes per row."""
    values = files[f"multi.{column.name}.values"].read(*span.multi[column.name])
    return values, files[f"multi.{column.name}.lengths"].read(*span.rows)
