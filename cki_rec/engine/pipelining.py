"""Training steps on CUDA: the next batch is copied and its ids exchanged during a step."""

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

Pipelineable.register(Batch)  # it has the methods; data may not import torchrec


class Pipeline(TrainPipelineSparseDist):  # type: ignore[misc]
    """TorchRec's pipeline with our rules: no update from a loss that is not finite, and clipping.

    One serves one epoch: reused, it would train no batch of the next.

    Args:
        model: With fused tables.
        adam: Of the rest.
        forward: Batch -> (mean cross entropy of all processes' rows, what to differentiate).
        finish: Called between backward and Adam's step.
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
        """Take a step for every batch that is left of the epoch; yield loss and rows of each."""
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
