"""Which part of the data each row belongs to, when parents train on different rows.

Shape legend: N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import Partition, UserError

KINDS = ("user", "item", "time", "random", "none")


def part_of_rows(
    partition: Partition,
    *,
    group: NDArray[np.int32],
    item_index: NDArray[np.int32],
    timestamp: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the part, 0 .. parts - 1, of each row; a function of its arguments alone.

    ``user`` and ``item`` deal the entities, in an order drawn from the seed, into groups whose
    sizes differ by at most one. ``time`` cuts the rows, oldest first (ties by row order), into
    consecutive windows of equal count; ``random`` cuts them in a drawn order. ``none``: all 0.

    Args:
        partition: How to divide.
        group: ``(N,)`` raw user index, 0 .. users - 1.
        item_index: ``(N,)`` raw item index, 0 .. items - 1.
        timestamp: ``(N,)`` seconds.

    Returns:
        ``(N,)``.

    Raises:
        UserError: An unknown kind, fewer than one part, or more parts than entities.
    """
    rows = len(group)
    if partition.by not in KINDS:
        raise UserError(f"data.partition.by={partition.by}: expected one of {', '.join(KINDS)}")
    if partition.parts < 1:
        raise UserError(f"data.partition.parts={partition.parts}: expected 1 or more")
    if partition.by == "none":
        return np.zeros(rows, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(partition.seed))
    if partition.by == "time":
        return _cut(np.argsort(timestamp, kind="stable"), partition.parts, "rows")
    if partition.by == "random":
        return _cut(generator.permutation(rows), partition.parts, "rows")
    entities = group if partition.by == "user" else item_index
    order = generator.permutation(int(entities.max(initial=-1)) + 1)
    return _cut(order, partition.parts, f"{partition.by}s")[entities]


def _cut(order: NDArray[np.int64], parts: int, what: str) -> NDArray[np.int64]:
    """Return the part of each element when ``order`` is cut into ``parts`` equal runs."""
    if parts > len(order):
        raise UserError(
            f"data.partition.parts={parts}: more parts than {what} ({len(order)}); lower it"
        )
    part = np.empty(len(order), dtype=np.int64)
    part[order] = np.arange(len(order), dtype=np.int64) * parts // len(order)
    return part
