"""Selection of entries of a parameter: the largest, exactly, or random ones by seed.

Shapes: draws have the shape of the tensor; K sources, R ranks, B values of a digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import generator
from cki_rec.merging.rows import Block, Rows

BLOCK = 1 << 20
"""Entries that a selection reads at a time."""
ROWS = 4096
"""Rows drawn from one generator, so that a shard of rows can draw its own."""
DIGIT = 16
"""Bits of a float that a pass of a selection decides."""
BITS = {torch.float32: 32, torch.float64: 64}
INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def order_statistics(
    rows: Rows,
    keys: Callable[[Block], Sequence[Tensor]],
    ranks: Callable[[int], Sequence[int]],
) -> Tensor:
    """Return entries of a parameter by their ranks, exactly, for every source.

    This is a radix selection. Floats are ordered like integers made of their bits. Each pass over
    the rows counts 16 bits among the entries that agree with the bits of the passes before. A
    float32 parameter takes 2 passes and a float64 one takes 4, with memory for one block. Counts
    add up over blocks and processes. ``torch.kthvalue`` returns the same values, but on 64M
    float32 entries it takes 2 to 9 times as long and 1 GiB of memory instead of 0.1 GiB.

    Args:
        rows: The parameter.
        keys: (block) -> per source a float32 or float64 tensor without NaN.
        ranks: (number of entries, at least 1) -> ranks from 1, smallest first.

    Returns:
        ``(K, R)``; ``(K, 0)`` for a parameter without entries.
    """
    wanted: list[list[list[int]]] = []  # per source and rank: bits so far, rank among their equals
    dtype, done = torch.float32, 0

    def count(block: Block) -> Tensor:
        nonlocal dtype
        sources = [key.reshape(-1) for key in keys(block)]
        dtype = sources[0].dtype
        prefixes = [[bits for bits, _ in places] for places in wanted] or [[0]] * len(sources)
        return torch.stack(
            [
                torch.stack([_digits(flat, bits, done) for bits in each])
                for flat, each in zip(sources, prefixes, strict=True)
            ]
        )

    while True:
        counts_KRB = rows.reduce(count).cpu()
        if not wanted:
            num_entries = int(counts_KRB[0, 0].sum())
            if num_entries == 0:
                return torch.empty(len(counts_KRB), 0)
            wanted = [[[0, rank] for rank in ranks(num_entries)] for _ in counts_KRB]
            counts_KRB = counts_KRB.expand(-1, len(wanted[0]), -1)
        for places, counts_RB in zip(wanted, counts_KRB, strict=True):
            for place, counts_B in zip(places, counts_RB, strict=True):
                up_to = counts_B.cumsum(0)
                digit = int((up_to < place[1]).sum())
                place[1] -= int(up_to[digit - 1]) if digit else 0
                place[0] = place[0] << DIGIT | digit
        done += DIGIT
        if done == BITS[dtype]:
            return _floats([[bits for bits, _ in places] for places in wanted], dtype)


def _digits(flat: Tensor, prefix: int, done: int) -> Tensor:
    """Return how often each next digit follows the first ``done`` bits of an order."""
    size, counts = BITS[flat.dtype], torch.zeros(1 << DIGIT, dtype=torch.int64)
    counts = counts.to(flat.device)
    for block in flat.split(BLOCK):
        bits = block.view(INTEGER[flat.dtype])
        lowest = torch.iinfo(bits.dtype).min
        order = torch.where(bits < 0, ~bits, bits ^ lowest)  # as unsigned integers
        if done:
            order = order[order >> (size - done) & ((1 << done) - 1) == prefix]
        digit = order >> (size - done - DIGIT) & ((1 << DIGIT) - 1)
        counts += torch.bincount(digit, minlength=1 << DIGIT)
    return counts


def _floats(orders: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Return the floats whose bits have these places in the order."""
    top, size = 1 << (BITS[dtype] - 1), BITS[dtype]
    bits = [
        [order ^ top if order & top else ~order & (2 * top - 1) for order in each]
        for each in orders
    ]
    signed = [[value - (1 << size) if value & top else value for value in each] for each in bits]
    return torch.tensor(signed, dtype=INTEGER[dtype]).view(dtype)


def num_kept(num_entries: int, density: float) -> int:
    """Return how many entries a density keeps: rounded up, so that 0 alone keeps none."""
    return min(num_entries, math.ceil(density * num_entries - 1e-9))


def kept_magnitudes(
    rows: Rows,
    keys: Callable[[Block], Sequence[Tensor]],
    density: float,
    skipped: float = 0.0,
) -> Tensor:
    """Return ``(K, 2)``: the smallest and the largest magnitude of entries that stay.

    Args:
        rows: The parameter.
        keys: (block) -> per source a float32 or float64 tensor; the largest entries stay.
        density: Share to keep; rounded up to a whole number of entries.
        skipped: Share of the very largest that are not kept; rounded down. Equals of the largest
            that may stay, stay.
    """
    ends: list[int] = []

    def ranks(num_entries: int) -> Sequence[int]:
        num_top = min(int(skipped * num_entries + 1e-9), max(num_entries - 1, 0))
        num_rest = min(num_kept(num_entries, density), num_entries - num_top)
        ends[:] = [num_entries, num_top, num_rest]
        return [num_entries - max(num_top + num_rest, 1) + 1, num_entries - num_top]

    found = order_statistics(rows, lambda block: [key.abs() for key in keys(block)], ranks)
    if not ends or ends[2] == 0:  # nothing stays
        return torch.tensor([[math.inf, -math.inf]]).to(found.dtype).repeat(len(found), 1)
    if sum(ends[1:]) == ends[0]:
        found[:, 0] = -math.inf
    if not ends[1]:
        found[:, 1] = math.inf
    return found


def keep_magnitudes(tensor: Tensor, ends: Tensor) -> Tensor:
    """Return a tensor whose entries outside of ``(smallest, largest)`` magnitudes are 0."""
    low, high = ends.tolist()
    size = tensor.abs()
    return torch.where((size >= low) & (size <= high), tensor, 0)


def uniform(tensor: Tensor, seed: int, name: str, first: int = 0) -> Tensor:
    """Return float32 draws from [0, 1) in the shape of a tensor.

    They depend on seed, name and the number of a row only: not on order, device or the process
    or block that holds the row.

    Args:
        tensor: Rows that follow one another.
        seed: Of the draws.
        name: Of the draws.
        first: Number of the first row.
    """
    drawn = torch.empty(tensor.shape, dtype=torch.float32)
    if not drawn.numel():
        return drawn.to(tensor.device)
    rows = drawn.reshape(len(drawn) if drawn.ndim else 1, -1)
    start, stop = first, first + len(rows)
    while start < stop:
        number, skipped = divmod(start, ROWS)
        end = min(stop, (number + 1) * ROWS)
        shape = (end - number * ROWS, rows.shape[1])
        draws = torch.rand(shape, generator=generator(seed, f"{name}/{number}"))
        rows[start - first : end - first] = draws[skipped:]
        start = end
    return drawn.to(tensor.device)


def keep_random(tensor: Tensor, density: float, seed: int, name: str, first: int = 0) -> Tensor:
    """Return the tensor with entries kept at random, those divided by ``density``."""
    if density == 0:
        return torch.zeros_like(tensor)
    mask = uniform(tensor, seed, name, first) < density
    return torch.where(mask, tensor / density, 0)


def keep_random_by_rank(
    tensor: Tensor, density: float, window: float, seed: int, name: str, first: int = 0
) -> Tensor:
    """Return the tensor with entries kept at random, larger ones more likely.

    Ranks are within a row (the last axis), so no row of a table depends on another. The chance of
    an entry falls from ``density + window / 2`` to ``density - window / 2``, its mean in a row is
    ``density``; kept entries are divided by their chance. A window that would leave [0, 1] is
    narrowed.
    """
    if density == 0:
        return torch.zeros_like(tensor)
    window = min(window, 2 * density, 2 * (1 - density))
    rows = tensor if tensor.ndim else tensor.reshape(1)
    ranks = rows.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    chance = density + window * (0.5 - (ranks.to(tensor.dtype) + 0.5) / rows.shape[-1])
    chance = chance.reshape(tensor.shape)
    mask = uniform(tensor, seed, name, first) < chance
    return torch.where(mask, tensor / chance, 0)
