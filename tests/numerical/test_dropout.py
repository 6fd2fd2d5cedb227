"""Dropout from 16 random bits: its rate, scale and gradient, and masks that follow from seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cki_rec.models.layers import LEVELS, Dropout


def mask(rate: float, *shape: int, dtype=torch.float32):
    return Dropout(rate)(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_a_share_of_the_rate_is_dropped_and_the_mean_stays(rate):
    torch.manual_seed(1)
    drawn = mask(rate, 1000, 501)
    share = (drawn == 0).double().mean().item()
    rounded = round(LEVELS * rate) / LEVELS
    deviation = math.sqrt(rounded * (1 - rounded) / drawn.numel())
    assert abs(share - rounded) < 4 * deviation
    torch.testing.assert_close(drawn.max().item(), 1 / (1 - rounded), rtol=1e-6, atol=0)
    assert abs(drawn.double().mean().item() - 1) < 4 * deviation / (1 - rounded)


def test_neighbours_rows_and_columns_are_independent():
    torch.manual_seed(2)
    drawn = (mask(0.3, 2000, 399) > 0).double() - 0.7
    for shift in (1, 2, 3, 4, 8, 399):
        one, other = drawn.flatten()[:-shift], drawn.flatten()[shift:]
        correlation = (one * other).mean() / 0.21
        assert abs(correlation) < 4 / math.sqrt(drawn.numel())
    for axis in (0, 1):
        assert drawn.mean(axis).abs().max() < 5 * math.sqrt(0.21 / drawn.shape[axis])


def test_the_gradient_has_the_same_mask():
    torch.manual_seed(3)
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)


def test_masks_follow_from_the_seed_and_differ_from_call_to_call():
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append([mask(0.5, 40, 40), mask(0.5, 40, 40)])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_shape_and_type(shape, dtype):
    drawn = mask(0.5, *shape, dtype=dtype)
    assert drawn.shape == shape
    assert drawn.dtype == dtype
    assert ((drawn == 0) | (drawn == 2)).all()


def test_nothing_is_drawn_outside_of_training_or_at_rate_zero():
    x, state = torch.randn(3, 4), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rate_near_one_keeps_a_finite_scale():
    assert torch.isfinite(mask(1 - 1e-9, 100, 100)).all()


def test_it_is_a_dropout_of_torch():
    assert isinstance(Dropout(0.5), nn.Dropout)
