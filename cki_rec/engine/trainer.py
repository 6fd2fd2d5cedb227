"""The training loop: fused row-wise Adagrad for tables, Adam for the rest.

Shape legend: B rows, F fields, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import Train, UserError
from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.data.store import EncodedDataset
from cki_rec.engine.embeddings import ShardedModel
from cki_rec.engine.evaluator import predict
from cki_rec.models.layers import FieldEmbeddings
from cki_rec.progress import progress

Metric = Callable[[NDArray[np.uint8], NDArray[np.float32]], float | None]


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the training rows gave."""

    epoch: int
    train_loss: float
    valid_metric: float
    learning_rate: float
    is_best: bool


def fit(
    model: ShardedModel,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    schedule: Train,
    seed: int,
    metric: Metric,
    save: Callable[[], None],
    title: str,
) -> list[dict[str, Any]]:
    """Train until the validation metric stops rising; ``save`` is called at every best epoch.

    Both learning rates fall by ``plateau_factor`` after an epoch without a better metric; training
    ends after ``patience`` of them in a row.

    Returns:
        One dictionary per epoch, the fields of ``Epoch``.

    Raises:
        UserError: The loss is not finite, or the metric undefined.
    """
    torch.manual_seed(seed)  # dropout
    dense = torch.optim.Adam(model.dense_parameters(), lr=schedule.learning_rate)
    model.set_table_learning_rate(schedule.table_learning_rate)
    looked_up = LookedUp(model.module)
    scale, best, stalled = 1.0, -math.inf, 0
    history: list[dict[str, Any]] = []
    loader = Loader(
        dataset, schema, train_rows, schedule.batch_size, seed=seed,
        device=model.device,
    )  # fmt: skip
    label = dataset.label[valid_rows]
    with progress(title, schedule.epochs * len(train_rows)) as advance:
        for epoch in range(1, schedule.epochs + 1):
            model.module.train()
            total = 0.0
            for batch in loader:
                loss = train_step(model, dense, batch, looked_up, schedule)
                if not np.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss} in epoch {epoch}; lower train.learning_rate"
                        " or train.table_learning_rate"
                    )
                total += loss * len(batch)
                advance(len(batch), f"epoch {epoch}")
            logits = predict(model.module, dataset, schema, valid_rows, model.device)
            if not np.isfinite(logits).all():
                raise UserError(
                    f"{title}: scores are not finite after epoch {epoch}; lower"
                    " train.learning_rate or train.table_learning_rate"
                )
            value = metric(label, logits)
            if value is None:
                raise UserError(f"{title}: validation rows hold one class only, AUC is undefined")
            is_best = value > best
            best = max(best, value)
            history.append(
                asdict(
                    Epoch(
                        epoch,
                        total / len(train_rows),
                        value,
                        schedule.learning_rate * scale,
                        is_best,
                    )
                )
            )
            if is_best:
                stalled = 0
                save()
                continue
            stalled += 1
            if stalled == schedule.patience:
                break
            scale *= schedule.plateau_factor
            model.set_table_learning_rate(schedule.table_learning_rate * scale)
            for group in dense.param_groups:
                group["lr"] = schedule.learning_rate * scale
    looked_up.remove()
    return history


def train_step(
    model: ShardedModel,
    dense: torch.optim.Optimizer,
    batch: Batch,
    looked_up: LookedUp,
    schedule: Train,
) -> float:
    """Take one step; return the mean cross entropy of the batch, before the update."""
    dense.zero_grad()
    logit_B = model.module(batch)
    loss = binary_cross_entropy_with_logits(logit_B, batch.label)
    penalty = schedule.table_l2 * looked_up.emb_BFD.square().sum() / len(batch)
    value = loss.item()
    if np.isfinite(value):
        (loss + penalty).backward()
        dense.step()
    return value


class LookedUp:
    """Keeps the embeddings of the last forward pass, for the L2 term.

    Differs:
        Published baselines penalize whole tables in every step; with an optimizer fused into the
        lookup only rows of the batch can move, so only these are penalized.
    """

    def __init__(self, module: nn.Module) -> None:
        self.emb_BFD = torch.empty(0)
        (sparse,) = [m for m in module.modules() if isinstance(m, FieldEmbeddings)]
        has_numbers = len(sparse.looked_up) < len(sparse.fields)
        self._num_looked_up = len(sparse.looked_up) if has_numbers else None
        self.remove = sparse.register_forward_hook(self._keep).remove

    def _keep(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        emb_BFD = output[0]
        self.emb_BFD = (
            emb_BFD if self._num_looked_up is None else emb_BFD[:, : self._num_looked_up]
        )
