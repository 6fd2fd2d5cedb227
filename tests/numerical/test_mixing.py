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
