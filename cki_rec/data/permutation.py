"""Pseudo-random permutations that are computed position by position, without a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
SMALLEST_BITS = 8
"""Fewest bits of a network; smaller networks have too few round functions to be uniform."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A permutation of ``0 .. size - 1`` that depends on size and seed words alone.

    It is a Feistel network on the smallest sufficient power of two. A value outside the range
    passes through the network again until it is inside (cycle walking), so the map is a bijection.

    Args:
        size: Number of positions.
        words: Non-negative integers that select the permutation, e.g. ``(seed, epoch)``.

    Reference:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, section 3.
    """

    def __init__(self, size: int, *words: int) -> None:
        self.size = size
        bits = max(SMALLEST_BITS, (size - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._right_mask = np.uint64((1 << bits // 2) - 1)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the image of each position."""
        values = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._right_bits, values & self._right_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                right = right ^ (_scramble(left, key) & self._right_mask)
            else:
                left = left ^ (_scramble(right, key) & self._left_mask)
        return (left << self._right_bits) | right


def _scramble(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    mixed = (values ^ key) * _MIX
    return (mixed ^ (mixed >> np.uint64(29))) * _MIX >> np.uint64(32)
