"""Candidates of liked rows: the same row with other items, for ranks among sampled items.

Shape legend: N rows, C cases (liked rows), K candidates of a case, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import Ranking, UserError
from cki_rec.data.columns import Ids, Ints, Ragged, blocks
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.split import SPLITS

BLOCK = 1 << 19
"""Most candidates that are held as rows at a time."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The liked rows of a split, each with its own item first and then the drawn ones."""

    place_C: Ints
    """Places of the cases among the rows of the split."""
    row_C: Ints
    """Row numbers of the cases."""
    item_row_CK: Ints
    """A row of each candidate's item; the case itself comes first."""
    fields: tuple[str, ...]
    """Fields that follow from the item."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """How candidates were drawn, as JSON values."""

    @property
    def width(self) -> int:
        """Return K."""
        return int(self.item_row_CK.shape[1])

    def rows(self, of_items: bool) -> Ints:
        """Return ``(C, K)`` row numbers: rows of the items, or the case for each candidate."""
        if of_items:
            return self.item_row_CK
        return np.broadcast_to(self.row_C[:, None], self.item_row_CK.shape)


class CandidateRows:
    """Rows with the fields of other rows' items, in the form of an encoded data set; no labels.

    Args:
        dataset: The rows.
        row_R: Rows that give all fields but those of the item.
        item_row_R: Rows that give the fields of the item.
        fields: Fields that follow from the item.
    """

    def __init__(
        self, dataset: EncodedDataset, row_R: Ints, item_row_R: Ints, fields: tuple[str, ...]
    ) -> None:
        self.schema, self.id_columns = dataset.schema, dataset.id_columns
        self._dataset, self._row, self._item_row, self._fields = dataset, row_R, item_row_R, fields
        self.ids: NDArray[np.int32] = np.array(dataset.ids[row_R])
        self.numbers: NDArray[np.float32] = np.array(dataset.numbers[row_R])
        numbers = [feature.name for feature in dataset.schema.numbers]
        for stored, names in ((self.ids, self.id_columns), (self.numbers, numbers)):
            places = [place for place, name in enumerate(names) if name in fields]
            source = dataset.ids if stored is self.ids else dataset.numbers
            stored[:, places] = source[item_row_R][:, places]

    def __len__(self) -> int:
        """Return R."""
        return len(self._row)

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field."""
        column = self._dataset.column(name)
        if isinstance(column, Ragged):
            rows = self._item_row if name in self._fields else self._row
            return Ragged(column.values, column.starts[rows], column.lengths[rows])
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        return self.numbers[:, [feature.name for feature in self.schema.numbers].index(name)]

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return NaN: candidates have no labels."""
        return np.full(len(rows), np.nan, np.float32)


def candidate_blocks(dataset: EncodedDataset, candidates: Candidates) -> Iterator[CandidateRows]:
    """Yield the candidates of all cases as rows, case by case."""
    num_cases, width = candidates.item_row_CK.shape
    step = max(1, BLOCK // width)
    for start in range(0, num_cases, step):
        item_row_R = candidates.item_row_CK[start : start + step].reshape(-1)
        row_R = np.repeat(candidates.row_C[start : start + step], width)
        yield CandidateRows(dataset, row_R, item_row_R, candidates.fields)


def draw_candidates(
    dataset: EncodedDataset, split: str, label: NDArray[Any], options: Ranking
) -> Candidates:
    """Draw items for the liked rows of a split that their users did not like.

    A case keeps its row but for the fields of the item (``item_fields``). Items are drawn without
    repeats from all items of the data set. Its user's liked items are left out, in every split
    whose labels are given.

    Args:
        dataset: The rows; they must have users and items.
        split: ``valid`` or ``test``.
        label: ``(N,)`` labels of all rows; NaN: unknown.
        options: Number of items, weights, seed.

    Raises:
        UserError: The rows have no users or no items, or a user has too few items left.
    """
    group, item = dataset.group, dataset.item_index
    if group is None or item is None:
        raise UserError(
            f"evaluate.ranking: {dataset.folder.name} has no users or no items; set data.user and"
            " data.item, or evaluate.ranking=null"
        )
    liked = np.flatnonzero(np.asarray(label) == 1)
    num_items = int(item.max(initial=-1)) + 1
    liked_pairs = np.unique(group[liked].astype(np.int64) * num_items + item[liked])
    weight = np.ones(num_items)
    if options.draw == "popularity":
        is_train = dataset.split[liked] == SPLITS.index("train")
        weight = np.bincount(item[liked[is_train]], minlength=num_items).astype(np.float64)
    rows = np.asarray(dataset.rows(split))
    place_C = np.flatnonzero(np.asarray(label)[rows] == 1)
    row_C = rows[place_C]
    user_C = group[row_C].astype(np.int64)
    _check_enough(user_C, liked_pairs, weight, options.negatives)
    draw = np.random.default_rng([options.seed, SPLITS.index(split)])
    drawn_CN = _drawn(user_C, liked_pairs, weight, options.negatives, draw)
    first_row = _first_rows(item, num_items)
    fields = item_fields(dataset, first_row)
    return Candidates(
        place_C,
        row_C,
        np.concatenate([row_C[:, None], first_row[drawn_CN]], axis=1),
        fields,
        {
            "negatives": options.negatives,
            "draw": options.draw,
            "seed": options.seed,
            "items": num_items,
            "left_out": f"items that the user likes in {_known(dataset, label)} rows",
            "item_fields": list(fields),
            "equal_scores": "expected value over their random order",
            "cases": len(row_C),
            "users": len(np.unique(user_C)),
        },
    )


def item_fields(dataset: EncodedDataset, first_row: Ints) -> tuple[str, ...]:
    """Return the fields that follow from the item: all rows of an item have the same value.

    Histories, and fields that follow from the user too, are not among them.

    Args:
        dataset: The rows.
        first_row: ``(items,)`` a row of every item.
    """
    assert dataset.item_index is not None
    assert dataset.group is not None
    users = _first_rows(dataset.group, int(dataset.group.max(initial=-1)) + 1)
    found = []
    for feature in dataset.schema.features:
        if feature.kind == "history":
            continue
        column = dataset.column(feature.name)
        if _follows(column, dataset.item_index, first_row):
            if not _follows(column, dataset.group, users):
                found.append(feature.name)
    return tuple(found)


def _first_rows(index: Ids, size: int) -> Ints:
    """Return ``(size,)`` the first row of every value of a column; -1: it has none."""
    first = np.full(size, -1, dtype=np.int64)
    values, rows = np.unique(index, return_index=True)
    first[values] = rows
    return first


def _follows(column: NDArray[Any] | Ragged, index: Ids, first_row: Ints) -> bool:
    """Return whether all rows of equal ``index`` have equal values."""
    for start, stop in blocks(len(index)):
        first = first_row[index[start:stop]]
        if isinstance(column, Ragged):
            values, lengths = column.ids(slice(start, stop))
            other, of_first = column.ids(first)
            is_equal = np.array_equal(lengths, of_first) and np.array_equal(values, other)
        else:
            block, expected = column[start:stop], column[first]
            is_equal = np.array_equal(block, expected, equal_nan=block.dtype.kind == "f")
        if not is_equal:
            return False
    return True


def _drawn(
    user_C: Ints,
    liked_pairs: Ints,
    weight: NDArray[np.float64],
    num: int,
    draw: np.random.Generator,
) -> Ints:
    """Return ``(C, num)`` items without repeats in a row, none liked by its user.

    Items that are liked, or drawn already, are drawn anew: so every item comes with its weight
    among those that are left.
    """
    ends = np.cumsum(weight)
    drawn_CN = np.full((len(user_C), num), -1, dtype=np.int64)
    pending = np.ones(drawn_CN.shape, dtype=bool)
    while pending.any():
        places = np.searchsorted(ends, draw.random(int(pending.sum())) * ends[-1], side="right")
        drawn_CN[pending] = np.minimum(places, len(weight) - 1)
        is_liked = _contains(liked_pairs, user_C[:, None] * len(weight) + drawn_CN)
        pending = is_liked | _repeats(drawn_CN)
    return drawn_CN


def _repeats(items_CN: Ints) -> NDArray[np.bool_]:
    """Return where a row holds an item that it also holds further left."""
    order = np.argsort(items_CN, axis=1, kind="stable")
    in_order = np.take_along_axis(items_CN, order, axis=1)
    is_repeat = np.zeros(items_CN.shape, dtype=bool)
    np.put_along_axis(is_repeat, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    return is_repeat


def _contains(ordered: Ints, keys: Ints) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(keys.shape, dtype=bool)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return np.asarray(ordered[places] == keys)


def _check_enough(user_C: Ints, liked_pairs: Ints, weight: NDArray[np.float64], num: int) -> None:
    """Check that every user of a case has ``num`` items left to draw.

    Raises:
        UserError: A user has fewer.
    """
    user, item = np.divmod(liked_pairs, len(weight)) if len(weight) else (liked_pairs, liked_pairs)
    drawable = user[weight[item] > 0]
    users = np.unique(user_C)
    held = np.searchsorted(drawable, users, "right") - np.searchsorted(drawable, users, "left")
    left = int((weight > 0).sum()) - held
    if len(users) and left.min() < num:
        fewest = int(left.min())
        remedy = f"lower it to {fewest}" if fewest > 0 else "use evaluate.ranking=null"
        raise UserError(
            f"evaluate.ranking.negatives={num}: a user has only {fewest} items to draw from;"
            f" {remedy}"
        )


def _known(dataset: EncodedDataset, label: NDArray[Any]) -> str:
    """Return the splits whose labels are given, as words."""
    split = dataset.split[np.flatnonzero(~np.isnan(np.asarray(label, dtype=np.float32)))]
    return " or ".join(SPLITS[code] for code in np.unique(split))
