"""The fast form of mixing, for one weight per source, against the general one."""

from __future__ import annotations

import pytest
import torch

from cki_rec.merging import mixing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.2, 0.8), (0.0, 1.0), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (70_001,), (300, 5)])
def test_one_weight_per_source_gives_the_bits_of_the_general_form(dtype, shares, shape):
    noise = torch.Generator().manual_seed(len(shares))
    tensors = [torch.randn(shape, generator=noise).to(dtype) for _ in shares]
    for tensor in tensors:
        tensor.view(-1)[:2] = torch.tensor([-0.0, 3.0])[: tensor.numel()]  # equal in all
    weight = torch.tensor(shares, dtype=mixing.compute_dtype(tensors[0]))
    weight = weight.reshape(-1, *[1] * len(shape))
    fast, general = (form(tensors, weight) for form in (mixing._mix_wholes, mixing._splice_block))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[fast.element_size()]
    assert fast.dtype == dtype
    assert torch.equal(fast.view(bits), general.view(bits))
    assert fast.data_ptr() not in [tensor.data_ptr() for tensor in tensors] or not fast.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [(300, 1), (300, 5), (1, 5)])
@pytest.mark.parametrize("num_sources", [2, 3])
def test_weights_of_entries_give_the_bits_of_the_general_form(dtype, form, num_sources):
    """Weights of exactly 0 and 1, equal entries and infinities included."""
    noise = torch.Generator().manual_seed(num_sources)
    for value in (None, torch.inf, torch.nan, 3e38):
        tensors = [torch.randn(300, 5, generator=noise).to(dtype) for _ in range(num_sources)]
        for tensor in tensors:
            tensor[:9] = torch.tensor([-0.0, 3.0, 1e-30])[:, None].repeat(3, 1)  # equal in all
        if value is not None:
            tensors[0][4, 2] = value
        weight = torch.rand(num_sources, *form, generator=noise)
        weight[:, ::3] = torch.eye(num_sources)[0].reshape(-1, *[1] * len(form))
        weight[:, 1::3] = torch.eye(num_sources)[1].reshape(-1, *[1] * len(form))
        weight = (weight / weight.sum(0)).to(mixing.compute_dtype(tensors[0]))
        fast, general = (f(tensors, weight) for f in (mixing._mix_block, mixing._splice_block))
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[fast.element_size()]
        assert torch.equal(fast.isnan(), general.isnan())
        assert torch.equal(fast.nan_to_num(0).view(bits), general.nan_to_num(0).view(bits))
