"""Training of the local gate: gradients reach it through the spliced parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import Gate, UserError
from cki_rec.data.loader import Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.data.store import EncodedDataset
from cki_rec.engine.evaluator import predict
from cki_rec.integration.params import Params, Weights
from cki_rec.integration.splicing import splice
from cki_rec.progress import progress

Gates = dict[str, Tensor | None]
Metric = Callable[[NDArray[np.float32], NDArray[np.float32]], float | None]


@dataclass(slots=True)
class Trained:
    """The best epoch of a gate's training."""

    gates: Gates
    trunk: Params
    epoch: int
    valid_metric: float | None


class Spliced(nn.Module):
    """A network called with parameters given from outside."""

    def __init__(self, network: nn.Module, params: Params) -> None:
        super().__init__()
        self.network, self.params = network, params

    def forward(self, batch: object) -> Tensor:
        """Return the logits of ``network`` with ``params``."""
        logit: Tensor = functional_call(self.network, self.params, (batch,))
        return logit


def train_gates(
    network: nn.Module,
    models: Sequence[Params],
    gates: Gates,
    weigh: Callable[[Mapping[str, Tensor | None]], Weights],
    trunk: Sequence[str],
    dataset: EncodedDataset,
    schema: FeatureSchema,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    options: Gate,
    batch_size: int,
    seed: int,
    metric: Metric,
    title: str,
) -> Trained:
    """Learn the gates on training rows, with the sources' weights frozen.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: The sources.
        gates: Initial gate per parameter; None where there is none.
        weigh: Gates -> splicing weights.
        trunk: Parameters that start from the first source and learn along; empty: none.
        dataset: Where rows are.
        schema: The features that ``network`` reads.
        train_rows: Rows to learn from.
        valid_rows: Rows that choose the epoch.
        options: Epochs and learning rate.
        batch_size: Rows per step.
        seed: Of row order and dropout.
        metric: Larger is better.
        title: For the progress display.

    Returns:
        Gates and trunk of the epoch with the best validation metric.

    Reference:
        CKI (arXiv 2501.07596), released recommendation code: Adam, no weight decay.

    Differs:
        The released code chooses the epoch on test rows; we choose on validation rows.
    """
    torch.manual_seed(seed)
    learned: Gates = {
        name: None if gate is None else gate.detach().clone().requires_grad_()
        for name, gate in gates.items()
    }
    moving = {name: models[0][name].clone().requires_grad_() for name in trunk}
    parameters = [gate for gate in learned.values() if gate is not None] + list(moving.values())
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    best = Trained({}, {}, 0, None)
    label = dataset.labels(valid_rows)
    loader = Loader(dataset, schema, train_rows, batch_size, seed=seed)
    with progress(title, options.epochs * len(train_rows)) as advance:
        for epoch in range(1, options.epochs + 1):
            network.train()
            for batch in loader:
                params = {**splice(models, weigh(learned)), **moving}
                logit_B = functional_call(network, params, (batch,))
                loss = binary_cross_entropy_with_logits(logit_B, batch.label)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss.item()}; lower integrate.gate.learning_rate"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(len(batch), f"epoch {epoch}")
            with torch.no_grad():
                spliced = Spliced(network, {**splice(models, weigh(learned)), **moving})
            value = metric(
                label, predict(spliced, dataset, schema, valid_rows, torch.device("cpu"))
            )
            if best.epoch == 0 or (value or 0.0) > (best.valid_metric or 0.0):
                best = Trained(
                    {n: None if g is None else g.detach().clone() for n, g in learned.items()},
                    {n: t.detach().clone() for n, t in moving.items()},
                    epoch,
                    value,
                )
    return best
