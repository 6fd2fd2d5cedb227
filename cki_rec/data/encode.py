"""Rows in the common form -> splits, vocabularies, integer columns.

Whatever an encoded row says about other rows (which tokens exist and how their ids are ordered,
what the user liked before) is learnt from training rows only.

Shape legend: N rows, M ids of a field with several ids a row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, Split, UserError
from cki_rec.data.raw import RawRows
from cki_rec.data.schema import FIRST_ID, UNSEEN_ID, Feature, FeatureSchema

SPLITS = ("train", "valid", "test")
"""Names of split codes 0, 1, 2."""
SPLIT_KINDS = ("random", "time", "leave_last_out")
HISTORY = "history"
"""The derived field: ids of table ``item``."""

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Several ids a row: row ``r`` holds ``values[starts[r] : starts[r] + lengths[r]]``.

    Rows may overlap: the histories of a user are windows on one list of liked items.
    """

    values: Ids
    """``(M,)``."""
    starts: Ints
    """``(N,)``."""
    lengths: Ids
    """``(N,)``."""

    def positions(self, rows: Ints) -> Ints:
        """Return where in ``values`` the ids of ``rows`` lie, row after row."""
        lengths = self.lengths[rows].astype(np.int64)
        ends = np.cumsum(lengths)
        shift = self.starts[rows] - (ends - lengths)
        positions: Ints = np.repeat(shift, lengths)
        positions += np.arange(len(positions), dtype=np.int64)
        return positions

    def lookups(self, rows: Ints) -> Ints:
        """Return ``(M,)`` how many of ``rows`` hold each position of ``values``."""
        width = len(self.values) + 1
        starts = self.starts[rows]
        change = np.bincount(starts, minlength=width)
        change -= np.bincount(starts + self.lengths[rows], minlength=width)
        counts: Ints = np.cumsum(change[:-1], dtype=np.int64)
        return counts


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded data set in memory, rows in the order of the source."""

    schema: FeatureSchema
    vocabularies: dict[str, list[str]]
    """Table -> tokens; the first has id ``FIRST_ID``."""
    fields: dict[str, Ids | Ragged]
    label: NDArray[np.uint8]
    split: NDArray[np.uint8]
    """Position in ``SPLITS``."""
    timestamp: Ints
    group: Ids
    """Raw user index, in token order: distinct for users no training row holds."""
    item_index: Ids
    """Raw item index, in token order."""


def encode(raw: RawRows, data: Data) -> Encoded:
    """Return the data set that ``data`` asks for.

    Vocabularies hold the tokens of at least ``data.min_count`` training rows, by (-count, token);
    all other tokens share ``UNSEEN_ID``. A missing value is the token ``""``.

    The field ``history`` holds, by time, the latest ``data.history_length`` items that the user
    liked (label 1) in TRAINING rows with a strictly smaller timestamp. No label of a validation
    or test row enters any input.

    Raises:
        UserError: An option is impossible for these rows.
    """
    check_options(data)
    frame = raw.frame
    label = (frame["rating"] >= data.label_threshold).to_numpy().astype(np.uint8)
    timestamp = frame["timestamp"].to_numpy().astype(np.int64)
    group = _index(frame["user"])
    item_index = _index(frame["item"])
    split = split_rows(data.split, group=group, timestamp=timestamp)
    is_train = split == 0
    if len(np.unique(label[is_train])) < 2:
        raise UserError(
            f"data.label_threshold={data.label_threshold}: all training rows have label "
            f"{label[is_train][0]}; choose a threshold inside the range of ratings"
        )

    features = [_feature(frame, name) for name in data.fields]
    columns = dict.fromkeys("item" if name == HISTORY else name for name in data.fields)
    vocabularies: dict[str, list[str]] = {}
    ids: dict[str, Ids | Ragged] = {}
    for name in columns:
        vocabularies[name], ids[name] = _encode_column(frame[name], is_train, data.min_count)
    if HISTORY in data.fields:
        items = ids["item"]
        assert isinstance(items, np.ndarray)
        liked = is_train & (label == 1)
        ids[HISTORY] = histories(items, liked, group, timestamp, data.history_length)
    schema = FeatureSchema(
        features=tuple(features),
        table_sizes={table: FIRST_ID + len(v) for table, v in vocabularies.items()},
        vocabulary_hashes={table: vocabulary_hash(v) for table, v in vocabularies.items()},
    )
    fields = {feature.name: ids[feature.name] for feature in features}
    return Encoded(
        schema=schema,
        vocabularies=vocabularies,
        fields=fields,
        label=label,
        split=split,
        timestamp=timestamp,
        group=group,
        item_index=item_index,
    )


def check_options(data: Data) -> None:
    """Refuse options that no data set could satisfy, before anything is read."""
    if not data.fields:
        raise UserError("data.fields: empty, expected at least one field")
    repeated = sorted({name for name in data.fields if data.fields.count(name) > 1})
    if repeated:
        raise UserError(f"data.fields: {', '.join(repeated)} named twice; name each field once")
    if data.min_count < 1:
        raise UserError(f"data.min_count={data.min_count}: expected 1 or more")
    if data.history_length < 1 and HISTORY in data.fields:
        raise UserError(f"data.history_length={data.history_length}: expected 1 or more")
    if data.on_bad_row not in ("error", "skip"):
        raise UserError(f"data.on_bad_row={data.on_bad_row}: expected error or skip")
    split = data.split
    if split.by not in SPLIT_KINDS:
        raise UserError(f"data.split.by={split.by}: expected one of {', '.join(SPLIT_KINDS)}")
    shares = split.fractions
    is_valid = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
    if split.by != "leave_last_out" and not is_valid:
        raise UserError(
            f"data.split.fractions={list(shares)}: expected shares of training, validation and "
            "test rows, each 0 or more, with sum 1"
        )


def split_rows(split: Split, *, group: Ids, timestamp: Ints) -> NDArray[np.uint8]:
    """Return the position in ``SPLITS`` of each row.

    ``random`` deals rows in an order drawn from the seed; ``time`` gives the oldest rows to
    training and the newest to test. ``leave_last_out`` gives each user's last row to test and the
    one before to validation; users with fewer than 3 rows only train. Ties go by row order.

    Raises:
        UserError: A split would be empty.
    """
    rows = len(group)
    code = np.zeros(rows, dtype=np.uint8)
    if split.by == "leave_last_out":
        order = np.lexsort((timestamp, group))
        sizes = np.bincount(group)
        ends = np.cumsum(sizes)[sizes >= 3]
        code[order[ends - 1]] = 2
        code[order[ends - 2]] = 1
        mend = "it takes users with 3 rows or more; choose another data.split.by"
    else:
        if split.by == "time":
            order = np.argsort(timestamp, kind="stable")
        else:
            order = np.random.Generator(np.random.PCG64(split.seed)).permutation(rows)
        first, second, _ = split.fractions
        train_end, valid_end = round(rows * first), round(rows * (first + second))
        code[order[train_end:valid_end]] = 1
        code[order[valid_end:]] = 2
        mend = f"raise its share in data.split.fractions={list(split.fractions)}"
    for name, count in zip(SPLITS, np.bincount(code, minlength=3), strict=True):
        if count == 0:
            raise UserError(f"data.split.by={split.by}: no {name} row of {rows}; {mend}")
    return code


def histories(
    items: Ids, is_liked: NDArray[np.bool_], group: Ids, timestamp: Ints, length: int
) -> Ragged:
    """Return the latest liked items of the row's user at strictly smaller timestamps.

    Args:
        items: ``(N,)`` item ids.
        is_liked: ``(N,)`` rows that may appear in histories.
        group: ``(N,)`` raw user index.
        timestamp: ``(N,)`` seconds.
        length: Most items kept.

    Returns:
        One window a row on the liked rows, ordered by user, time and row order.
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


def vocabulary_hash(tokens: list[str]) -> str:
    """Return a sha256 over tokens in id order."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _feature(frame: pl.DataFrame, name: str) -> Feature:
    if name == HISTORY:
        return Feature(name, "item", "history")
    return Feature(name, name, "multi" if frame.schema[name] == pl.List else "categorical")


def _index(column: pl.Series) -> Ids:
    """Return the position of each token among the sorted distinct tokens."""
    return (column.rank("dense") - 1).to_numpy().astype(np.int32)


def _encode_column(
    column: pl.Series, is_train: NDArray[np.bool_], min_count: int
) -> tuple[list[str], Ids | Ragged]:
    """Return the vocabulary of the training rows and the ids of all rows."""
    name = column.name
    is_multi = column.dtype == pl.List
    column = column.list.unique(maintain_order=True) if is_multi else column.fill_null("")
    train = column.filter(pl.Series(is_train))
    if is_multi:
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int32)
        column = column.filter(column.list.len() > 0).explode()
        train = train.filter(train.list.len() > 0).explode()
    counts = train.value_counts(name="count").filter(pl.col("count") >= min_count)
    counts = counts.sort(["count", name], descending=[True, False])
    tokens: list[str] = counts[name].to_list()
    ids = _look_up(column, counts[name])
    if not is_multi:
        return tokens, ids
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return tokens, _one_unseen_a_row(Ragged(ids, starts, lengths))


def _look_up(column: pl.Series, tokens: pl.Series) -> Ids:
    if not len(tokens):
        return np.full(len(column), UNSEEN_ID, dtype=np.int32)
    new = pl.Series(np.arange(FIRST_ID, FIRST_ID + len(tokens), dtype=np.int32))
    ids = column.replace_strict(tokens, new, default=UNSEEN_ID, return_dtype=pl.Int32)
    return ids.to_numpy().astype(np.int32)


def _one_unseen_a_row(ragged: Ragged) -> Ragged:
    """Return the rows with all but the first unseen id of each row dropped."""
    row = np.repeat(np.arange(len(ragged.lengths)), ragged.lengths)
    unseen = np.flatnonzero(ragged.values == UNSEEN_ID)
    is_kept = np.ones(len(ragged.values), dtype=np.bool_)
    is_kept[unseen[1:][row[unseen[1:]] == row[unseen[:-1]]]] = False
    lengths = np.bincount(row[is_kept], minlength=len(ragged.lengths)).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return Ragged(ragged.values[is_kept], starts, lengths)
