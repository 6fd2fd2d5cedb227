"""Training steps on CUDA: a step overlaps with the copy and id exchange of the next batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch
from cki_rec.engine.embeddings import ShardedModel

Pipelineable.register(Batch)  # Batch has the methods, but data must not import torchrec


class Pipeline(TrainPipelineSparseDist):  # type: ignore[misc]
    """TorchRec's pipeline with gradient clipping, and without updates from a non-finite loss.

    A pipeline serves one epoch. It cannot be reused for the next.

    Args:
        model: Model with fused tables.
        adam: Optimizer of the other parameters.
        forward: Function of a batch that returns the mean cross entropy over the rows of all
            processes, and the local loss to differentiate.
        finish: Called between the backward pass and Adam's step.
    """

    def __init__(
        self,
        model: ShardedModel,
        adam: torch.optim.Optimizer,
        forward: Callable[[Batch], tuple[float, Tensor]],
        finish: Callable[[], None],
    ) -> None:
        self._finish, self._is_finite = finish, True

        def forward_of(batch: Any) -> tuple[Tensor, tuple[float, int]]:
            value, loss = forward(batch)
            self._is_finite = math.isfinite(value)
            return loss, (value, batch.step_rows or len(batch))

        super().__init__(
            model.module, adam, model.device, pipeline_postproc=True, custom_model_fwd=forward_of
        )

    def steps(self, loader: Loader) -> Iterator[tuple[float, int]]:
        """Take a step for every remaining batch of the epoch; yield loss and rows of each."""
        batches = iter(loader)
        while True:
            try:
                yield self.progress(batches)
            except StopIteration:
                self.detach()
                return

    def _backward(self, losses: Tensor) -> None:
        if self._is_finite:
            losses.backward()

    def _optimizer_step(self) -> None:
        if self._is_finite:
            self._finish()
            self._optimizer.step()
