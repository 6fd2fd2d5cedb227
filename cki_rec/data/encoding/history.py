"""Histories of liked items: windows on the liked rows of each user, by time.

Shape legend: N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import UserError
from cki_rec.data.columns import RAGGED, ColumnFile, Ids, Ints, Ragged, allocate, blocks
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.split import SPLITS, rows_by_user, share
from cki_rec.data.encoding.staging import Staging
from cki_rec.data.schema import OOV_ID


def write_history(
    columns: Staging, name: str, source: Field, length: int, has_earlier: bool = False
) -> dict[str, float | None]:
    """Write the history of every row; return the share of ``OOV_ID`` per split.

    Args:
        columns: Ids, labels, splits, users and times; one block of users is in memory at a time.
        name: Name of the field.
        source: The field whose ids the history holds.
        length: Most ids of a history.
        has_earlier: Include liked rows of every split, not of training alone.

    Raises:
        UserError: The rows have no users or no times.
    """
    files = columns.files
    if "group" not in files or "timestamp" not in files:
        raise UserError(
            f"data.fields: {name}: these rows have no users or no times; remove the field, or set "
            "data.user and data.time"
        )
    group, timestamp, ids, label, split = (
        files[key].mapped() for key in ("group", "timestamp", "ids", "label", "split")
    )
    position = columns.plan.ids.index(source)
    paths = [columns.folder / f"field.{name}.{piece}.npy" for piece in RAGGED]
    values = ColumnFile(paths[0], np.int32)
    starts = allocate(paths[1], np.int64, columns.rows)
    lengths = allocate(paths[2], np.int32, columns.rows)
    for rows in rows_by_user(group, timestamp, columns.folder):
        liked = (label[rows] == 1) & (has_earlier | (split[rows] == 0))
        part = histories(ids[rows, position], liked, group[rows], timestamp[rows], length)
        starts[rows] = part.starts + values.rows
        lengths[rows] = part.lengths
        values.append(part.values)
    ragged = Ragged(values.mapped(), starts, lengths)
    unseen, totals = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for start, stop in blocks(columns.rows):
        values_of_block, sizes = ragged.ids(slice(start, stop))
        code = np.repeat(split[start:stop], sizes)
        totals += np.bincount(code, minlength=3)
        unseen += np.bincount(code[values_of_block == OOV_ID], minlength=3)
    files[f"field.{name}.values"] = values
    return {n: share(unseen[code], totals[code]) for code, n in enumerate(SPLITS)}


def histories(
    items: Ids, is_liked: NDArray[np.bool_], group: Ids, timestamp: Ints, length: int
) -> Ragged:
    """Return the latest items that the user of each row liked at strictly smaller timestamps.

    Args:
        items: ``(N,)`` item ids.
        is_liked: ``(N,)`` whether a row may appear in histories.
        group: ``(N,)`` user index.
        timestamp: ``(N,)`` seconds.
        length: Most items of a history.

    Returns:
        One window per row on the liked rows, which are ordered by user, time and row order.
    """
    rank = np.unique(timestamp, return_inverse=True)[1].astype(np.int64)
    width = int(rank.max(initial=0)) + 1
    user_key = group.astype(np.int64) * width
    key = user_key + rank
    liked = np.flatnonzero(is_liked)
    liked = liked[np.argsort(key[liked], kind="stable")]
    ends = np.searchsorted(key[liked], key, side="left")
    starts = np.maximum(np.searchsorted(key[liked], user_key, side="left"), ends - length)
    return Ragged(items[liked], starts.astype(np.int64), (ends - starts).astype(np.int32))
