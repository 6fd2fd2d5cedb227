"""Which part of the data each row belongs to, when parents train on different rows.

Shape legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cki_rec.config import Partition, UserError
from cki_rec.data.columns import Ids, Ints, blocks
from cki_rec.data.encoding.split import windows
from cki_rec.data.permutation import Permutation

KINDS = ("user", "item", "time", "random", "none")
MOST_PARTS = 2**16 - 1
PARTITION_STREAM = 2
"""Sets the order of this draw apart from others of the same seed."""


def part_of_rows(
    partition: Partition,
    num_rows: int,
    *,
    group: Ids | None,
    item_index: Ids | None,
    timestamp: Ints | None,
    is_chronological: bool = False,
) -> Iterator[Ints]:
    """Yield the part, 0 .. parts - 1, of each row, block by block; a function of its arguments.

    ``user`` and ``item`` deal the entities, in an order drawn from the seed, into groups whose
    sizes differ by at most one. ``time`` cuts the rows, oldest first (ties by row order), into
    consecutive windows of equal count; ``random`` cuts them in a drawn order. ``none``: all 0.

    Args:
        partition: How to divide.
        num_rows: N.
        group: ``(N,)`` raw user index, 0 .. users - 1.
        item_index: ``(N,)`` raw item index, 0 .. items - 1.
        timestamp: ``(N,)`` seconds.
        is_chronological: Whether rows without times stand in the order of time.

    Raises:
        UserError: An unknown kind, fewer than one part, more parts than entities, or no such
            entities.
    """
    by, parts = partition.by, partition.parts
    if by not in KINDS:
        raise UserError(f"data.partition.by={by}: expected one of {', '.join(KINDS)}")
    if parts < 1:
        raise UserError(f"data.partition.parts={parts}: expected 1 or more")
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


def _too_many(parts: int, what: str, found: int) -> UserError:
    return UserError(f"data.partition.parts={parts}: more parts than {what} ({found}); lower it")


def _without(by: str, what: str) -> UserError:
    return UserError(f"data.partition.by={by}: these rows have no {what}; choose random or none")
