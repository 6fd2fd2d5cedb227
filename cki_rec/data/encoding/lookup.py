"""Codes -> ids of vocabularies, block by block.

Shape legend: N rows, M ids of a field with several ids a row, C columns of ids.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cki_rec.data.columns import RAGGED, ColumnFile, Ids, blocks
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.split import SPLITS, share
from cki_rec.data.encoding.staging import Staging
from cki_rec.data.encoding.vocabulary import Vocabulary
from cki_rec.data.schema import OOV_ID


def look_up(
    columns: Staging, vocabularies: dict[str, Vocabulary]
) -> dict[str, dict[str, float | None]]:
    """Replace codes by ids; return the share of ``OOV_ID`` per field and split."""
    plan, files = columns.plan, columns.files
    totals = np.zeros(3, dtype=np.int64)
    unseen = np.zeros((3, len(plan.ids)), dtype=np.int64)
    for start, stop in blocks(columns.rows):
        split = files["split"].read(start, stop)
        totals += np.bincount(split, minlength=3)
        if not plan.ids:
            continue
        block = files["ids"].read(start, stop)
        for position, column in enumerate(plan.ids):
            if column.hash_size is None:
                id_of_code = vocabularies[column.table].id_of_code
                block[:, position] = id_of_code[block[:, position]]
        files["ids"].write(start, block)
        for code in range(len(SPLITS)):
            unseen[code] += (block[split == code] == OOV_ID).sum(0)
    shares: dict[str, dict[str, float | None]] = {
        column.name: {
            name: share(unseen[code, position], totals[code]) for code, name in enumerate(SPLITS)
        }
        for position, column in enumerate(plan.ids)
    }
    for column in plan.multi:
        shares[column.name] = _look_up_multi(columns, column, vocabularies[column.table])
    return shares


def _look_up_multi(
    columns: Staging, column: Field, vocabulary: Vocabulary
) -> dict[str, float | None]:
    """Replace codes by ids; return the shares of ``OOV_ID``.

    A set keeps one ``OOV_ID``; a history is cut to its ``max_length``.
    """
    name = f"multi.{column.name}"
    unseen, totals = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    types: dict[str, type[np.generic]] = dict(values=np.int32, starts=np.int64, lengths=np.int32)
    pieces = {
        piece: ColumnFile(columns.folder / f"field.{column.name}.{piece}.npy", types[piece])
        for piece in RAGGED
    }
    for start, stop, codes, code_lengths in multi_blocks(columns, column):
        ids = codes if column.hash_size is not None else vocabulary.id_of_code[codes]
        if column.kind == "multi":
            values, lengths = _with_one_oov_id(ids, code_lengths)
        else:
            values, lengths = _cut(ids, code_lengths, column.max_length, column.keep)
        ends = pieces["values"].rows + np.cumsum(lengths, dtype=np.int64)
        pieces["values"].append(values)
        pieces["starts"].append(ends - lengths)
        pieces["lengths"].append(lengths)
        split = np.repeat(columns.files["split"].read(start, stop), lengths)
        totals += np.bincount(split, minlength=3)
        unseen += np.bincount(split[values == OOV_ID], minlength=3)
    for piece in ("values", "lengths"):
        columns.files.pop(f"{name}.{piece}").delete()
    columns.files.update({f"field.{column.name}.{piece}": file for piece, file in pieces.items()})
    return {n: share(unseen[code], totals[code]) for code, n in enumerate(SPLITS)}


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


def multi_blocks(columns: Staging, column: Field) -> Iterator[tuple[int, int, Ids, Ids]]:
    """Yield every block of rows: start, stop, codes and the number of codes per row."""
    name, position = f"multi.{column.name}", 0
    for start, stop in blocks(columns.rows):
        lengths = columns.files[f"{name}.lengths"].read(start, stop)
        end = position + int(lengths.sum(dtype=np.int64))
        yield start, stop, columns.files[f"{name}.values"].read(position, end), lengths
        position = end
