"""Assign rows to splits and time windows, and read them user by user; all of it streams.

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
SPLIT_STREAM = 1
"""Seed word of this permutation; other permutations of the same seed use other words."""
LARGEST_KEY = 2**31
"""Largest key of one token, before keys are mixed."""
_DIGIT_BITS = 8
Keys = NDArray[np.uint64]


def check_split(split: Split) -> None:
    """Check the options of a split without reading any data.

    Raises:
        UserError: The fractions are not valid.
    """
    shares = split.fractions
    is_valid = len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
    has_shares = split.by in ("random", "hash", "time") or draws_validation(split)
    if has_shares and not is_valid:
        raise UserError(
            f"data.split.fractions={list(shares)}: expected the fractions of training, validation "
            "and test rows, each 0 or more, with sum 1"
        )


def draw_validation(split: Split, codes: ColumnFile) -> None:
    """Draw validation rows from the training rows, unless files define validation rows.

    Args:
        split: Its first two ``fractions`` are the shares; its seed determines the draw.
        codes: ``(N,)`` split code of each row; changed in place.
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
    """Yield the split code (position in ``SPLITS``) of each row, block by block.

    ``random`` cuts the rows in an order drawn from the seed. ``time`` assigns the oldest rows to
    training and the newest to test; rows without times are in chronological order.
    ``leave_last_out`` assigns the last step of each user to test and the one before to
    validation; users with fewer than 3 steps are training users only. Ties are broken by row
    order.

    Args:
        split: Options of the split; ``by`` is neither ``files`` nor ``hash``.
        num_rows: N.
        group: ``(N,)`` user index.
        timestamp: ``(N,)`` seconds.
        rows_per_step: Consecutive rows of one user that form one step.
        scratch: Folder for temporary files.

    Raises:
        UserError: ``leave_last_out`` is requested and the rows have no users or no times.
    """
    if split.by == "leave_last_out":
        if group is None or timestamp is None:
            raise UserError(
                "data.split.by=leave_last_out: these rows have no users or no times; set it to "
                "random, or set data.user and data.time"
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
    """Return ``(rows,)`` hashes of the tokens of ``columns`` and of the time, if there is one."""
    key = np.zeros(len(frame), dtype=np.uint64)
    for column in columns:
        tokens = hash_tokens(frame[column].cast(pl.String).fill_null(""), LARGEST_KEY)
        key = _mixed(key + tokens.to_numpy().astype(np.uint64))
    return _mixed(key + frame[TIME].to_numpy().astype(np.uint64)) if TIME in frame.columns else key


def codes_by_key(split: Split, keys: ColumnFile) -> Iterator[NDArray[np.integer]]:
    """Yield the split code of each row from its key alone, block by block.

    Args:
        split: Its fractions, which are met approximately, and its seed.
        keys: ``(N,)`` results of ``row_keys``.
    """
    seed = _mixed(np.array([split.seed + 1], dtype=np.uint64))
    boundaries = np.cumsum(split.fractions[:2])
    for start, stop in blocks(keys.rows):
        drawn = _mixed(keys.read(start, stop) ^ seed) >> np.uint64(11)
        yield np.searchsorted(boundaries, drawn * 2.0**-53, side="right")


def _mixed(values: Keys) -> Keys:
    """Return splitmix64, a pseudo-random bijection of 64 bits.

    Reference:
        Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def check_sizes(split: Split, sizes: Sequence[int], is_listed: bool = False) -> None:
    """Check that no split is empty.

    Args:
        split: Options of the split.
        sizes: Rows of each split.
        is_listed: Whether token lists are named. Then nothing is learned from training rows, and
            ``fractions`` may set their share, or those of training and validation rows, to 0.

    Raises:
        UserError: A split is empty.
    """
    fix = {
        "leave_last_out": "it requires users with 3 rows or more; choose another data.split.by",
        "files": "its file has no rows; choose another data.split.by",
    }.get(split.by, f"raise its share in data.split.fractions={list(split.fractions)}")
    num_zeros = 0
    is_without_training = split.by in ("random", "hash", "time") and split.fractions[0] == 0
    if is_without_training and is_listed:
        num_zeros = 2 if split.fractions[1] == 0 else 1
    elif is_without_training:
        fix += (
            ", or, for evaluation alone, name the token lists of the models in data.vocabularies"
        )
    for name, count in list(zip(SPLITS, sizes, strict=True))[num_zeros:]:
        if count == 0:
            raise UserError(f"data.split.by={split.by}: no {name} row of {sum(sizes)}; {fix}")


def windows(timestamp: Ints | None, num_rows: int, ends: Sequence[int]) -> Iterator[Ints]:
    """Yield the time window of each row, block by block.

    Args:
        timestamp: ``(N,)``; None: rows are in chronological order.
        num_rows: N.
        ends: ``(W,)`` ascending numbers of rows before each boundary, oldest first.

    Yields:
        Windows ``0 .. W``; ties are broken by row order.
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
    """Return the values at some ranks (0: the smallest), in memory independent of N.

    It is a radix selection, most significant digits first, with one pass over ``values`` per
    digit.

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
    selected: Ints = (prefix ^ np.uint64(1 << 63)).astype(np.int64)
    return selected


def sort_rows(keys: Iterable[NDArray[np.integer]], path: Path, num_rows: int) -> Ints:
    """Write row numbers by (key, row order) to ``path``; return the number of rows per key.

    It is a counting sort on disk: memory holds one count per key and one block.

    Args:
        keys: Small integers of all rows, block by block; iterated twice.
        path: A new ``.npy`` file of 8 bytes per row.
        num_rows: N.
    """
    sizes = np.zeros(0, dtype=np.int64)
    for block in keys:
        counts = np.bincount(block, minlength=len(sizes))
        counts[: len(sizes)] += sizes
        sizes = counts
    cursor = np.cumsum(sizes) - sizes
    order = allocate(path, np.int64, num_rows)
    start = 0
    for block in keys:
        by_key = np.argsort(block, kind="stable")
        values, firsts, counts = np.unique(block[by_key], return_index=True, return_counts=True)
        within = np.arange(len(block)) - np.repeat(firsts, counts)
        order[np.repeat(cursor[values], counts) + within] = start + by_key
        cursor[values] += counts
        start += len(block)
    return sizes


class Blocks:
    """The blocks of an array, which can be iterated repeatedly."""

    def __init__(self, array: NDArray[np.integer]) -> None:
        self._array = array

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        """Yield the blocks in order."""
        return (self._array[start:stop] for start, stop in blocks(len(self._array)))


def rows_by_user(
    group: Ids, timestamp: Ints, scratch: Path, most_rows: int = 1 << 20
) -> Iterator[Ints]:
    """Yield row numbers by (user, time, row order): all rows of some users at a time.

    Args:
        group: ``(N,)`` user index, 0 .. users - 1.
        timestamp: ``(N,)``.
        scratch: Folder for a temporary file of 8 bytes per row.
        most_rows: Most rows at a time, unless one user has more.
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
    """Return ``part / whole``; None if ``whole`` is 0."""
    return int(part) / int(whole) if whole else None
