"""Parts of a training step: optimizer, L2 term, clipping, moving average.

Shape legend: B rows, F fields, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from cki_rec.engine.embeddings import ShardedModel, clone, local_tensors
from cki_rec.models.embeddings import NUMBERS, Embedded

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state per parameter."""


def initialized_adam(model: ShardedModel, learning_rate: float) -> torch.optim.Adam:
    """Return Adam for the parameters without a fused optimizer, with an initialized state.

    Adam itself creates its state in the first step, and DCP silently skips a missing state.
    """
    parameters = model.dense_parameters()
    adam = torch.optim.Adam(parameters.values(), lr=learning_rate, fused=True)
    for parameter in parameters.values():
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return adam


def moments(model: ShardedModel, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Return Adam's state as tensors by name of moment and parameter."""
    return {
        f"{moment}.{name}": adam.state[parameter][moment]
        for name, parameter in model.dense_parameters().items()
        for moment in MOMENTS
    }


class TableL2:
    """The gradient of an L2 term on embeddings; the value of the term is not computed.

    The term is ``l2`` times the squared norm of the looked up embeddings per row for ``fused``
    tables, and ``l2 / 2`` times the squared norm of whole tables for ``dense`` ones, as in
    published baselines.

    Differs:
        A fused optimizer can change the rows of the batch only, so only these have the term.
        First-order weights and the vectors of numeric fields have none.
    """

    def __init__(self, model: ShardedModel, l2: float) -> None:
        self.scale = 1.0
        """Factor of the next step: processes / rows."""
        self._model, self._l2 = model, l2
        self._num_looked_up = len(model.sparse.looked_up)
        hook = model.sparse.register_forward_hook(self._penalize)
        self.remove = hook.remove

    def _penalize(self, _: nn.Module, __: Any, emb: Embedded) -> None:
        if not self._l2 or not self._model.is_fused:
            return
        looked_up = [(emb.fields_BFD, self._num_looked_up)]
        looked_up += [(history, history.shape[1]) for history in emb.histories.values()]
        for value, num in looked_up:
            if isinstance(value, Tensor) and value.requires_grad:  # proxies while tracing
                value.register_hook(self._adder(value.detach(), num, 2 * self._l2 * self.scale))

    @staticmethod
    def _adder(value: Tensor, num: int, factor: float) -> Any:
        """Return a hook that adds ``factor`` times the first ``num`` fields to the gradient."""

        def add(gradient: Tensor) -> Tensor:
            if num == value.shape[1]:
                return torch.add(gradient, value, alpha=factor)
            changed = gradient.clone()
            changed[:, :num].add_(value[:, :num], alpha=factor)
            return changed

        return add

    @torch.no_grad()
    def add_to_dense(self) -> None:
        """Add the gradient of the term to the gradients of dense tables."""
        if not self._l2 or self._model.is_fused:
            return
        for name, parameter in self._model.dense_parameters().items():
            is_embedding = name in self._model.tables or name.rpartition(".")[2] in NUMBERS
            if is_embedding and parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=self._l2)


def clip(model: ShardedModel, largest: float | None) -> None:
    """Clip the gradient of Adam's parameters to a norm of ``largest``; None: no clipping."""
    if largest is not None:
        nn.utils.clip_grad_norm_(model.dense_parameters().values(), largest)


class Average:
    """Exponential moving average of all weights.

    It needs memory for a copy of all weights, and every step reads and writes whole tables.

    Differs:
        Buffers (statistics of batch norms) are not averaged.
    """

    def __init__(self, model: ShardedModel, decay: float) -> None:
        self._decay = decay
        state = model.module.state_dict()
        buffers = {name for name, _ in model.module.named_buffers()}
        self._weights = {name: value for name, value in state.items() if name not in buffers}
        self.state: dict[str, Tensor | ShardedTensor] = {
            name: clone(value) for name, value in self._weights.items()
        }
        """The average by parameter name, sharded like the model."""

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step."""
        for name, value in self._weights.items():
            pairs = zip(local_tensors(self.state[name]), local_tensors(value), strict=True)
            for mean, new in pairs:
                mean.lerp_(new.detach(), 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the average as the weights of the model within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._weights.items():
            for mean, weight in zip(
                local_tensors(self.state[name]), local_tensors(value), strict=True
            ):
                copy = weight.detach().clone()
                weight.copy_(mean)
                mean.copy_(copy)
