"""Exact thresholds in blocks, and random masks that depend on the row only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cki_rec.merging.rows import in_blocks
from cki_rec.merging.sparsification import (
    keep_magnitudes,
    keep_random,
    keep_random_by_rank,
    kept_magnitudes,
    num_kept,
    order_statistics,
    uniform,
)


def ranked(tensor: torch.Tensor, *ranks: int, size: int | None = None) -> list[float]:
    """Return entries by rank, smallest first, of a parameter read in blocks of ``size`` rows."""
    (rows,) = in_blocks([{"x": tensor}], size=size).values()
    return order_statistics(rows, lambda block: block.models, lambda _: ranks)[0].tolist()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1e-40, 0.5, -0.5, 1.0, -3e38, 7.25]), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_order_statistics_are_those_of_a_sort(values, dtype, data):
    tensor = torch.tensor(values, dtype=dtype)
    places = st.lists(st.integers(1, len(values)), min_size=1, max_size=3)
    ranks, size = data.draw(places), data.draw(st.integers(1, 9))
    ordered = tensor.sort().values
    assert ranked(tensor, *ranks, size=size) == [float(ordered[rank - 1]) for rank in ranks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, None])
def test_order_statistics_in_blocks(monkeypatch, dtype, size):
    monkeypatch.setattr("cki_rec.merging.sparsification.BLOCK", 1000)
    tensor = torch.randn(123, 57, dtype=dtype, generator=torch.Generator().manual_seed(0))
    ordered, ranks = tensor.flatten().sort().values, (1, 2, 700, 3505, 7010, 7011)
    assert ranked(tensor, *ranks, size=size) == [float(ordered[rank - 1]) for rank in ranks]


def keep_largest(tensor: torch.Tensor, density: float, skipped: float = 0.0) -> torch.Tensor:
    """Return a mask of the entries that stay."""
    (rows,) = in_blocks([{"x": tensor}]).values()
    ends = kept_magnitudes(rows, lambda block: block.models, density, skipped)
    return keep_magnitudes(torch.where(tensor == 0, 1e-45, tensor), ends[0]) != 0


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize("skipped", [0.0, 0.01, 0.3, 1.0])
def test_density_keeps_so_many_and_never_all_or_none_by_rounding(density, size, skipped):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size))
    mask = keep_largest(tensor, density, skipped)
    num_top = min(int(skipped * size), size - 1)
    assert int(mask.sum()) == min(num_kept(size, density), size - num_top)
    rank = tensor.abs().argsort(descending=True).argsort()
    assert bool(mask[(rank >= num_top) & (rank < num_top + int(mask.sum()))].all())


def test_entries_that_tie_stay():
    assert keep_largest(torch.ones(50), 0.2, 0.1).all()
    assert not keep_largest(torch.ones(50), 0.0).any()


def test_draws_depend_on_the_row_only(monkeypatch):
    monkeypatch.setattr("cki_rec.merging.sparsification.ROWS", 16)
    whole = uniform(torch.empty(40, 6), 3, "table")
    assert torch.equal(uniform(torch.empty(23, 6), 3, "table"), whole[:23])
    for first, last in ((0, 1), (5, 20), (16, 32), (31, 40)):
        rows = uniform(torch.empty(last - first, 6), 3, "table", first)
        assert torch.equal(rows, whole[first:last])
    assert not torch.equal(whole[:16], whole[16:32])
    assert not torch.equal(whole, uniform(torch.empty(40, 6), 3, "other"))
    assert not torch.equal(whole, uniform(torch.empty(40, 6), 4, "table"))
    assert uniform(torch.empty(()), 3, "zero").shape == ()
    assert uniform(torch.empty(0, 4), 3, "none").shape == (0, 4)


@pytest.mark.parametrize(
    "keep", [keep_random, lambda *a: keep_random_by_rank(a[0], a[1], 0.4, *a[2:])]
)
def test_random_masks_keep_the_mean(keep):
    ones = torch.ones(4000, 10)
    kept = keep(ones, 0.3, 1, "table")
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)
    assert float((kept != 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_larger_changes_are_kept_more_often():
    rows = torch.arange(1.0, 11.0).expand(4000, 10)
    kept = (keep_random_by_rank(rows, 0.5, 0.4, 1, "table") != 0).float().mean(0)
    chances = 0.5 + 0.4 * ((torch.arange(10) + 0.5) / 10 - 0.5)
    torch.testing.assert_close(kept, chances, atol=0.03, rtol=0)
