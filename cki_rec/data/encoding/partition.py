"""Assign rows to parts, so that sources train on different rows.

Shape legend: N rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cki_rec.config import Partition, UserError
from cki_rec.data.columns import Ids, Ints, blocks
from cki_rec.data.encoding.split import windows
from cki_rec.data.permutation import Permutation

MOST_PARTS = 2**16 - 1
MOST_SHOWN = 5
"""Values of a column that a message names."""
WORDS = ("null", "true", "false", "nan", "inf")
"""Words that the command line does not read as text."""
EMPTY = "(empty)"
"""Name of an empty value."""
PARTITION_STREAM = 2
"""Seed word of this permutation; other permutations of the same seed use other words."""


def part_of_rows(
    partition: Partition,
    num_rows: int,
    *,
    group: Ids | None,
    item_index: Ids | None,
    timestamp: Ints | None,
    is_chronological: bool = False,
    domain: Ids | None = None,
    group_of_value: Ints | None = None,
) -> Iterator[Ints]:
    """Yield the part, 0 .. parts - 1, of each row, block by block; of a column its group.

    ``user`` and ``item`` assign users or items, in an order drawn from the seed, to groups whose
    sizes differ by at most one. ``time`` cuts the rows, oldest first (ties by row order), into
    consecutive windows of equal size. ``random`` cuts them in an order drawn from the seed.
    ``none`` assigns all rows to part 0. A column assigns rows by their value.

    Args:
        partition: Options of the partition.
        num_rows: N.
        group: ``(N,)`` raw user index, 0 .. users - 1.
        item_index: ``(N,)`` raw item index, 0 .. items - 1.
        timestamp: ``(N,)`` seconds.
        is_chronological: Whether rows without times are in chronological order.
        domain: ``(N,)`` index of the value of the column.
        group_of_value: Index of a value -> group (``groups_of``).

    Raises:
        UserError: The rows have no such column, or there are too many parts.
    """
    if partition.column is not None:
        assert domain is not None
        assert group_of_value is not None
        yield from (group_of_value[domain[start:stop]] for start, stop in blocks(num_rows))
        return
    by, parts = partition.by, partition.size
    if parts > MOST_PARTS:
        raise UserError(f"data.partition.parts={parts}: expected at most {MOST_PARTS}")
    if by == "time" and timestamp is None and not is_chronological:
        raise _without(by, "times")
    if by in ("time", "random") and parts > num_rows:
        raise _too_many(parts, "rows", num_rows)
    if by == "time":
        ends = [-(-num_rows * part // parts) for part in range(1, parts)]
        yield from windows(timestamp, num_rows, ends)
    elif by == "random":
        order = Permutation(num_rows, partition.seed, PARTITION_STREAM)
        for start, stop in blocks(num_rows):
            yield order(np.arange(start, stop)) * parts // num_rows
    elif by == "none":
        yield from (np.zeros(stop - start, np.int64) for start, stop in blocks(num_rows))
    else:
        entities = group if by == "user" else item_index
        if entities is None:
            raise _without(by, f"{by}s")
        num_entities = int(entities.max(initial=-1)) + 1
        if parts > num_entities:
            raise _too_many(parts, f"{by}s", num_entities)
        drawn = np.random.Generator(np.random.PCG64(partition.seed)).permutation(num_entities)
        part = np.empty(num_entities, dtype=np.int64)
        part[drawn] = np.arange(num_entities, dtype=np.int64) * parts // num_entities
        yield from (part[entities[start:stop]] for start, stop in blocks(num_rows))


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of rows that are in the same parts, by the values of a column."""

    of_value: Ints
    """Index of a value -> its group."""
    names: list[str]
    """Names of the groups: that of the part, or those of all its parts, joined by ``&``."""
    parts: list[list[int]]
    """Group -> its parts, ascending."""


def groups_of(partition: Partition, values: Sequence[str], counts: Ints) -> Groups:
    """Return the groups of the values of a column.

    Args:
        partition: Options of the partition; ``by`` is a column or ``file``.
        values: Its values, in the order of their indices.
        counts: Number of rows of each value.

    Raises:
        UserError: A part has no row, or the number of parts is not that of the values.
    """
    by, named = partition.by, partition.named
    if named is None:
        order = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
        largest = ",".join(_as_written(values[place]) for place in order)
        if partition.size != len(values):
            raise UserError(
                f"data.partition.parts={partition.parts}: {by} has {len(values)} values; name"
                f" those that are parts, e.g. the largest: data.partition.parts=[{largest}], or"
                " set data.partition.by to user or random"
            )
        each = [[place] for place in range(len(values))]
        return Groups(np.arange(len(values)), [value or EMPTY for value in values], each)
    for name, listed in named:
        if lacking := [value for value in listed if value not in values]:
            raise UserError(
                f"data.partition.parts: {name}: no row has {by}={lacking[0]}; remove it, or name"
                f" another value of data.partition.by={by}"
            )
    parts_of = [
        tuple(part for part, (_, listed) in enumerate(named) if value in listed)
        for value in values
    ]
    groups = sorted(set(parts_of), key=lambda parts: (len(parts), parts))
    names = [" & ".join(named[part][0] or EMPTY for part in parts) for parts in groups]
    of_value = np.array([groups.index(parts) for parts in parts_of], dtype=np.int64)
    return Groups(of_value, names, [list(parts) for parts in groups])


def _as_written(value: str) -> str:
    """Return a value as a list on the command line has it: in quotes if it needs them."""
    is_plain = re.fullmatch(r"[1-9]\d{0,17}|[a-z]\w*", value, re.ASCII | re.IGNORECASE)
    if is_plain and value.lower() not in WORDS:
        return value
    escaped = re.sub(
        r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), value
    )
    return f"'{escaped}'"


def _too_many(parts: int, things: str, number: int) -> UserError:
    return UserError(
        f"data.partition.parts={parts}: more parts than {things} ({number}); lower it"
    )


def _without(by: str, things: str) -> UserError:
    return UserError(
        f"data.partition.by={by}: these rows have no {things}; set it to random or none"
    )
