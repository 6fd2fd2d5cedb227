"""Which split each row belongs to; rows in windows of time; rows user by user. All streaming.

Shape legend: N rows, W boundaries between windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Split, UserError
from cki_rec.data.columns import ColumnFile, Ids, Ints, allocate, blocks
from cki_rec.data.encoding.vocabulary import hash_tokens
from cki_rec.data.permutation import Permutation
from cki_rec.data.raw.reading import TIME, draws_validation

SPLITS = ("train", "valid", "test")
"""Names of split codes 0, 1, 2."""
SPLIT_KINDS = ("random", "hash", "time", "leave_last_out", "files")
SPLIT_STREAM = 1
"""Sets the order of this draw apart from others of the same seed."""
LARGEST_KEY = 2**31
"""Of one token, before keys are mixed."""
_DIGIT_BITS = 8
Keys = NDArray[np.uint64]


def check_split(split: Split) -> None:
    """Refuse options that no data set could satisfy, before anything is read.

    Raises:
        UserError: An unknown kind, or shares that are none.
    """
    if split.by not in SPLIT_KINDS:
        raise UserError(f"data.split.by={split.by}: expected one of {', '.join(SPLIT_KINDS)}")
    shares = split.fractions
    is_valid = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
    has_shares = split.by in ("random", "hash", "time") or draws_validation(split)
    if has_shares and not is_valid:
        raise UserError(
            f"data.split.fractions={list(shares)}: expected shares of training, validation and "
            "test rows, each 0 or more, with sum 1"
        )


def draw_validation(split: Split, codes: ColumnFile) -> None:
    """Make validation rows of a share of the training rows, unless files hold validation rows.

    Args:
        split: Its first two ``fractions`` divide the training rows, in an order drawn from its
            seed.
        codes: ``(N,)`` position in ``SPLITS`` of each row; changed in place.
    """
    sizes = np.zeros(3, dtype=np.int64)
    for start, stop in blocks(codes.rows):
        sizes += np.bincount(codes.read(start, stop), minlength=3)
    if sizes[1] or not sizes[0]:
        return
    order = Permutation(int(sizes[0]), split.seed, SPLIT_STREAM)
    boundary, done = round(int(sizes[0]) * split.fractions[0]), 0
    for start, stop in blocks(codes.rows):
        block = codes.read(start, stop)
        is_train = block == 0
        count = int(is_train.sum())
        block[is_train] = order(np.arange(done, done + count)) >= boundary
        codes.write(start, block)
        done += count


def split_codes(
    split: Split,
    num_rows: int,
    *,
    group: Ids | None,
    timestamp: Ints | None,
    rows_per_step: int = 1,
    scratch: Path,
) -> Iterator[NDArray[np.integer]]:
    """Yield the position in ``SPLITS`` of each row, block by block.

    ``random`` deals rows in an order drawn from the seed; ``time`` gives the oldest rows to
    training and the newest to test, rows without times by their order. ``leave_last_out`` gives
    each user's last step to test and the one before to validation; users with fewer than 3 steps
    only train. Ties go by row order.

    Args:
        split: How to divide; not ``files`` or ``hash``.
        num_rows: N.
        group: ``(N,)`` user index.
        timestamp: ``(N,)`` seconds.
        rows_per_step: Rows of a user that stand together for one step.
        scratch: A folder for temporary files.

    Raises:
        UserError: The rows have no users, and ``leave_last_out`` needs them.
    """
    if split.by == "leave_last_out":
        if group is None or timestamp is None:
            raise UserError(
                "data.split.by=leave_last_out: these rows have no users or no times; choose "
                "random, or name data.user and data.time"
            )
        path = scratch / "split.tmp"
        code = allocate(path, np.uint8, num_rows)
        for rows in rows_by_user(group, timestamp, scratch):
            users = group[rows]
            ends = np.flatnonzero(np.append(users[1:] != users[:-1], True)) + 1
            sizes = np.diff(ends, prepend=0)
            ends = ends[sizes >= 3 * rows_per_step]
            for back in range(rows_per_step):
                code[rows[ends - 1 - back]] = 2
                code[rows[ends - 1 - rows_per_step - back]] = 1
        yield from (code[start:stop] for start, stop in blocks(num_rows))
        path.unlink()
        return
    first, second, _ = split.fractions
    boundaries = [round(num_rows * first), round(num_rows * (first + second))]
    if split.by == "time":
        yield from windows(timestamp, num_rows, boundaries)
        return
    order = Permutation(num_rows, split.seed, SPLIT_STREAM)
    for start, stop in blocks(num_rows):
        place = order(np.arange(start, stop))
        yield np.searchsorted(boundaries, place, side="right")


def row_keys(frame: pl.DataFrame, columns: Sequence[str]) -> Keys:
    """Return ``(rows,)`` a hash of the tokens of some columns, and of the time if there is one."""
    key = np.zeros(len(frame), dtype=np.uint64)
    for column in columns:
        tokens = hash_tokens(frame[column].cast(pl.String).fill_null(""), LARGEST_KEY)
        key = _mixed(key + tokens.to_numpy().astype(np.uint64))
    return _mixed(key + frame[TIME].to_numpy().astype(np.uint64)) if TIME in frame.columns else key


def codes_by_key(split: Split, keys: ColumnFile) -> Iterator[NDArray[np.integer]]:
    """Yield the position in ``SPLITS`` of each row by its key: no other row has a say in it.

    Args:
        split: Its shares, which are met roughly, and seed.
        keys: ``(N,)`` of ``row_keys``.
    """
    seed = _mixed(np.array([split.seed + 1], dtype=np.uint64))
    boundaries = np.cumsum(split.fractions[:2])
    for start, stop in blocks(keys.rows):
        drawn = _mixed(keys.read(start, stop) ^ seed) >> np.uint64(11)
        yield np.searchsorted(boundaries, drawn * 2.0**-53, side="right")


def _mixed(values: Keys) -> Keys:
    """Return a bijection of 64 bits that leaves no pattern.

    Reference:
        Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def check_sizes(split: Split, sizes: Sequence[int]) -> None:
    """Check that no split is empty.

    Raises:
        UserError: One is.
    """
    mend = {
        "leave_last_out": "it takes users with 3 rows or more; choose another data.split.by",
        "files": "its file holds none",
    }.get(split.by, f"raise its share in data.split.fractions={list(split.fractions)}")
    for name, count in zip(SPLITS, sizes, strict=True):
        if count == 0:
            raise UserError(f"data.split.by={split.by}: no {name} row of {sum(sizes)}; {mend}")


def windows(timestamp: Ints | None, num_rows: int, ends: Sequence[int]) -> Iterator[Ints]:
    """Yield the window of time of each row, block by block.

    Args:
        timestamp: ``(N,)``; None: rows stand in the order of time.
        num_rows: N.
        ends: ``(W,)`` ascending numbers of rows, oldest first, that lie before each boundary.

    Yields:
        ``0 .. W``; ties go by row order.
    """
    if timestamp is None or not len(ends):
        for start, stop in blocks(num_rows):
            yield np.searchsorted(ends, np.arange(start, stop), side="right")
        return
    inner = [min(end, num_rows - 1) for end in ends]
    values = order_statistics(timestamp, inner)
    earlier = np.zeros(len(ends), dtype=np.int64)
    for start, stop in blocks(num_rows):
        earlier += (timestamp[start:stop, None] < values).sum(0)
    ties_left = np.asarray(ends) - earlier  # rows at the boundary's value that lie before it
    for start, stop in blocks(num_rows):
        block = timestamp[start:stop]
        window = np.zeros(stop - start, dtype=np.int64)
        for boundary, value in enumerate(values):
            is_tie = block == value
            rank = np.cumsum(is_tie)
            window += (block > value) | (is_tie & (rank > ties_left[boundary]))
            ties_left[boundary] -= rank[-1] if len(rank) else 0
        yield window


def order_statistics(values: Ints, ranks: Sequence[int]) -> Ints:
    """Return the values at some ranks (0: the smallest), in memory that no count of rows bounds.

    A radix selection, most significant digits first: one pass over ``values`` per digit.

    Args:
        values: ``(N,)`` int64, may be memory-mapped.
        ranks: Below N.

    Returns:
        ``(len(ranks),)``.
    """
    left = np.asarray(ranks, dtype=np.int64).copy()
    prefix = np.zeros(len(left), dtype=np.uint64)
    num_digits = 1 << _DIGIT_BITS
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        known = np.unique(prefix)
        counts = np.zeros((len(known), num_digits), dtype=np.int64)
        for start, stop in blocks(len(values)):
            keys = values[start:stop].astype(np.uint64) ^ np.uint64(1 << 63)  # keeps the order
            above = (keys >> np.uint64(shift)) >> np.uint64(_DIGIT_BITS)
            if shift + _DIGIT_BITS == 64:
                above[:] = 0  # nothing is above the first digit
            which = np.searchsorted(known, above)
            is_known = known[np.minimum(which, len(known) - 1)] == above
            digit = (keys >> np.uint64(shift)) & np.uint64(num_digits - 1)
            place = (which * num_digits + digit.astype(np.int64))[is_known]
            counts += np.bincount(place, minlength=counts.size).reshape(counts.shape)
        for number, row in enumerate(np.searchsorted(known, prefix)):
            ends = np.cumsum(counts[row])
            chosen = int(np.searchsorted(ends, left[number], side="right"))
            left[number] -= ends[chosen - 1] if chosen else 0
            prefix[number] = (prefix[number] << np.uint64(_DIGIT_BITS)) | np.uint64(chosen)
    found: Ints = (prefix ^ np.uint64(1 << 63)).astype(np.int64)
    return found


def sort_rows(keys: Iterable[NDArray[np.integer]], path: Path, num_rows: int) -> Ints:
    """Write row numbers by (key, row order) to ``path``; return the rows of each key.

    A counting sort on disk: memory holds a count per key and one block.

    Args:
        keys: Small integers of all rows, block by block; read twice.
        path: A ``.npy`` file of 8 bytes a row.
        num_rows: N.
    """
    sizes = np.zeros(0, dtype=np.int64)
    for block in keys:
        found = np.bincount(block, minlength=len(sizes))
        found[: len(sizes)] += sizes
        sizes = found
    cursor = np.cumsum(sizes) - sizes
    order = allocate(path, np.int64, num_rows)
    start = 0
    for block in keys:
        by_key = np.argsort(block, kind="stable")
        found, firsts, counts = np.unique(block[by_key], return_index=True, return_counts=True)
        within = np.arange(len(block)) - np.repeat(firsts, counts)
        order[np.repeat(cursor[found], counts) + within] = start + by_key
        cursor[found] += counts
        start += len(block)
    return sizes


class Blocks:
    """The blocks of an array, as often as they are asked for."""

    def __init__(self, array: NDArray[np.integer]) -> None:
        self._array = array

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        """Yield them in order."""
        return (self._array[start:stop] for start, stop in blocks(len(self._array)))


def rows_by_user(
    group: Ids, timestamp: Ints, scratch: Path, most_rows: int = 1 << 20
) -> Iterator[Ints]:
    """Yield row numbers by (user, time, row order): whole users, about ``most_rows`` at a time.

    Args:
        group: ``(N,)`` user index, 0 .. users - 1.
        timestamp: ``(N,)``.
        scratch: A folder for a temporary file of 8 bytes a row.
        most_rows: Bound, unless one user has more.
    """
    path = scratch / "rows_by_user.tmp"
    sizes = sort_rows(Blocks(group), path, len(group))
    ends = np.cumsum(sizes)
    order = np.load(path, mmap_mode="r")
    user = 0
    while user < len(ends):
        begin = ends[user] - sizes[user]
        last = max(user, int(np.searchsorted(ends, begin + most_rows, side="right")) - 1)
        rows = np.array(order[begin : ends[last]])
        yield rows[np.lexsort((timestamp[rows], group[rows]))]
        user = last + 1
    del order
    path.unlink()


def share(part: int, whole: int) -> float | None:
    """Return ``part / whole``; None where there is no whole."""
    return int(part) / int(whole) if whole else None
