"""Adam, without ``torch.optim``, whose import of the compiler takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DECAY = (0.9, 0.999)
"""Of the running means of gradients and of their squares."""
EPSILON = 1e-8


class Adam:
    """Adam with the default options of torch; sparse gradients are made dense.

    Args:
        leaves: The fitted tensors.

    References:
        Adam: A Method for Stochastic Optimization (Kingma and Ba, ICLR 2015).
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in leaves]
        self._steps = [0] * len(leaves)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take a step by the gradients of the tensors, and clear them."""
        for place, (leaf, (first, second)) in enumerate(
            zip(self._leaves, self._moments, strict=True)
        ):
            if leaf.grad is None:
                continue
            gradient = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
            self._steps[place] += 1
            unbiased = [1 - decay ** self._steps[place] for decay in DECAY]
            first.lerp_(gradient, 1 - DECAY[0])
            second.mul_(DECAY[1]).addcmul_(gradient, gradient, value=1 - DECAY[1])
            scale = (second.sqrt() / unbiased[1] ** 0.5).add_(EPSILON)
            leaf.addcdiv_(first, scale, value=-learning_rate / unbiased[0])
            leaf.grad = None
