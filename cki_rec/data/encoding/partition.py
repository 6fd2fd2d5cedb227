"""Assign rows to parts, so that sources train on different rows.

Shape legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cki_rec.config import Partition, UserError
from cki_rec.data.columns import Ids, Ints, blocks
from cki_rec.data.encoding.split import windows
from cki_rec.data.permutation import Permutation

MOST_PARTS = 2**16 - 1
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
) -> Iterator[Ints]:
    """Yield the part, 0 .. parts - 1, of each row, block by block.

    ``user`` and ``item`` assign users or items, in an order drawn from the seed, to groups whose
    sizes differ by at most one. ``time`` cuts the rows, oldest first (ties by row order), into
    consecutive windows of equal size. ``random`` cuts them in an order drawn from the seed.
    ``none`` assigns all rows to part 0.

    Args:
        partition: Options of the partition.
        num_rows: N.
        group: ``(N,)`` raw user index, 0 .. users - 1.
        item_index: ``(N,)`` raw item index, 0 .. items - 1.
        timestamp: ``(N,)`` seconds.
        is_chronological: Whether rows without times are in chronological order.

    Raises:
        UserError: The rows have no such column, or there are too many parts.
    """
    by, parts = partition.by, partition.parts
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


def _too_many(parts: int, things: str, number: int) -> UserError:
    return UserError(
        f"data.partition.parts={parts}: more parts than {things} ({number}); lower it"
    )


def _without(by: str, things: str) -> UserError:
    return UserError(
        f"data.partition.by={by}: these rows have no {things}; set it to random or none"
    )
