"""Permutations are bijections, determined by their words and without a visible pattern."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cki_rec.data.permutation import Permutation

LARGEST_CHANCE = 1e-5
"""Words are fixed, so a test that passes once passes always."""


def order_of(size: int, *words: int) -> np.ndarray:
    return Permutation(size, *words)(np.arange(size))


def chance(counts: np.ndarray) -> float:
    """Return the chance of a chi-square at least as large, if all cells are equally likely."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, counts.size - 1))


@pytest.mark.parametrize("words", [(0,), (7, 0, 3), (2**63, 5)])
def test_every_small_size_is_a_bijection(words):
    for size in range(1, 301):
        assert np.array_equal(np.sort(order_of(size, *words)), np.arange(size)), size


@pytest.mark.parametrize("size", [511, 512, 513, 65_535, 65_536, 65_537, 100_003, 1_000_000])
def test_large_sizes_are_bijections(size):
    assert (np.bincount(order_of(size, 3), minlength=size) == 1).all()


def test_no_positions_give_none():
    for size in (0, 1, 10**12):
        assert Permutation(size, 1)(np.empty(0, np.int64)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 10**13), words=st.lists(st.integers(0, 2**64), min_size=1, max_size=3),
       data=st.data())  # fmt: skip
def test_any_position_stays_in_range_and_meets_no_other(size, words, data):
    positions = np.array(
        data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    )
    result = Permutation(size, *words)(positions)
    assert result.dtype == np.int64
    assert ((result >= 0) & (result < size)).all()
    assert len(set(result.tolist())) == len(positions)


def test_a_position_goes_to_the_same_place_alone_or_among_others():
    order = Permutation(12_345, 6, 1)
    whole = order(np.arange(12_345))
    shuffled = np.random.default_rng(0).permutation(12_345)
    assert np.array_equal(order(shuffled), whole[shuffled])
    assert [int(order(np.array([i]))[0]) for i in range(50)] == whole[:50].tolist()


def test_positions_are_not_changed():
    positions = np.arange(100)
    Permutation(100, 1)(positions)
    assert positions.tolist() == list(range(100))


def test_order_is_a_function_of_size_and_words():
    assert np.array_equal(order_of(1000, 4, 2), order_of(1000, 4, 2))
    orders = {tuple(order_of(1000, seed, epoch, 3)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36
    assert not np.array_equal(order_of(1000, 0, 1), order_of(1000, 1, 0))
    assert not np.array_equal(order_of(1001, 4, 2)[:1000], order_of(1000, 4, 2))


def test_order_is_the_same_in_every_release():
    """Encoded sets and positions of loaders depend on it: a change needs a new format version."""
    assert order_of(10, 0, 1).tolist() == [7, 5, 2, 1, 3, 9, 6, 4, 0, 8]
    large = Permutation(10**12, 7, 0, 3)(np.arange(4)).tolist()
    assert large == [794122662928, 125878180257, 210217274992, 702551498398]


def test_streams_of_one_seed_differ():
    """Split, parts and shuffle of one seed are told apart by their last word."""
    split, parts, shuffle = (order_of(5000, *words) for words in ((3, 1), (3, 2), (3, 0, 3)))
    for one, other in ((split, parts), (split, shuffle), (parts, shuffle)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
        assert (one == other).sum() < 12  # 1 is expected


@pytest.mark.parametrize("size", [40, 64, 200])
def test_over_many_seeds_every_place_is_equally_likely(size):
    counts = np.zeros((8, 8))
    for seed in range(1500):
        order = order_of(size, seed)
        np.add.at(counts, (np.arange(size) * 8 // size, order * 8 // size), 1)
    assert chance(counts) > LARGEST_CHANCE


def test_over_many_seeds_one_position_goes_everywhere():
    result = np.array(
        [Permutation(256, seed)(np.arange(256))[[0, 1, 255]] for seed in range(3000)]
    )
    for column in result.T:
        assert chance(np.bincount(column // 8, minlength=32)) > LARGEST_CHANCE
    gap = (result[:, 1] - result[:, 0]) % 256  # never 0, else equally likely
    assert (gap > 0).all()
    assert chance(np.bincount((gap - 1) // 17, minlength=15)) > LARGEST_CHANCE


@pytest.mark.parametrize("size", [50_000, 65_536, 131_073])
def test_no_pattern_is_visible(size):
    order = order_of(size, 11, 0, 3)
    limit = 5 / np.sqrt(size)
    positions = np.arange(size)
    assert abs(np.corrcoef(positions, order)[0, 1]) < limit
    for lag in (1, 2, 256, 4096):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < limit, lag
    cells = np.bincount(positions * 16 // size * 16 + order * 16 // size, minlength=256)
    assert chance(cells) > LARGEST_CHANCE
    for bit in range(12):  # low bits of a place tell nothing about low bits of a position
        equal = ((positions ^ order) >> bit & 1).mean()
        assert abs(equal - 0.5) < limit, bit
    fixed = int((order == positions).sum())
    assert fixed < 12  # 1 is expected


def test_one_batch_is_a_fair_sample():
    """What matters to training: the rows of a batch come from everywhere."""
    size = 1_000_000
    for step in range(5):
        rows = Permutation(size, 1, 0, 3)(np.arange(4096 * step, 4096 * (step + 1)))
        assert chance(np.bincount(rows * 32 // size, minlength=32)) > LARGEST_CHANCE


@pytest.mark.parametrize("size", [10**12, 2**40 + 1, 4_400_000_000])
def test_large_order_needs_no_memory(size):
    positions = np.random.default_rng(1).integers(0, size, 10_000)
    tracemalloc.start()
    result = Permutation(size, 1)(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert ((result >= 0) & (result < size)).all()
    assert len(np.unique(result)) == len(np.unique(positions))
    assert chance(np.bincount(result * 32 // size, minlength=32)) > LARGEST_CHANCE
