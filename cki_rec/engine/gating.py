"""Training of the local gate: gradients flow through the merged parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.evaluator import predict
from cki_rec.engine.lookups import at_rows, rows_read
from cki_rec.merging.extras import Gates, Learned, Weigh
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import Params
from cki_rec.merging.vocabulary import restrict_weights
from cki_rec.progress import progress

Metric = Callable[[NDArray[np.float32], NDArray[np.float32]], float | None]


class MergedAtLookup(nn.Module):
    """A network that merges its parameters in every call, and only the table rows of the batch.

    The rows of a batch are gathered from all sources, merged, and looked up like a table. Methods
    are row-wise, so the logits equal those of the merged table, which is never built. Time and
    memory of a step do not depend on the size of tables. Several processes collect the rows from
    each other (``lookups``).

    Args:
        network: The network; its own parameters are not used, so its tables may be on ``meta``.
        models: The sources; of several processes, the rows of this one.
        counts: ``(V,)`` per source and table; may be empty.
        gates: Gate per parameter; None: no gate.
        weigh: Function that returns the mixing weights.
        moving: Parameters that are used unmerged.
        schema: The features that ``network`` reads, with the sizes of whole tables.
        row_mask: The rows of a table that each source has (``merging.vocabulary``).
    """

    def __init__(
        self,
        network: nn.Module,
        models: Sequence[Params],
        counts: Sequence[Params],
        gates: Mapping[str, Tensor | None],
        weigh: Weigh,
        moving: Params,
        schema: FeatureSchema,
        row_mask: Mapping[str, Tensor] = {},
    ) -> None:
        super().__init__()
        self.row_mask = row_mask
        self.network, self.models, self.counts = network, models, counts
        self.gates, self.weigh, self.moving, self.schema = gates, weigh, moving, schema
        names = [name for name in models[0] if name not in moving]
        self.changing = [n for n in names if gates[n] is not None or table_of(n)]
        constant = [n for n in names if n not in self.changing]
        self.constant = self._mix(
            [{n: model[n] for n in constant} for model in models], [{} for _ in counts], {}
        )
        self.buffers_of_network = {name for name, _ in network.named_buffers()}

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of the merged model."""
        renumbered, rows = rows_read(batch, self.schema)
        logit_B: Tensor = functional_call(self.network, self.params(rows), (renumbered,))
        return logit_B

    def params(self, rows: Mapping[str, Tensor]) -> Params:
        """Return the merged parameters, with only the given ``rows`` of tables."""
        num, chosen = len(self.models), set(self.changing)
        held: list[Params] = [
            *({n: model[n] for n in self.changing} for model in self.models),
            *({n: c for n, c in source.items() if n in chosen} for source in self.counts),
            dict(self.moving),
            {n: has.T for n, has in self.row_mask.items()},
        ]
        *read, moving, row_mask = at_rows(held, self.schema, rows)
        row_mask = {n: has.T for n, has in row_mask.items()}
        constant = {  # copies of buffers, since batch norm in training changes its statistics
            name: tensor.clone() if name in self.buffers_of_network else tensor
            for name, tensor in self.constant.items()
        }
        merged = self._mix(read[:num], read[num:], row_mask)
        return {**merged, **constant, **moving}

    def _mix(
        self, parts: Sequence[Params], counts: Sequence[Params], row_mask: Mapping[str, Tensor]
    ) -> Params:
        if not parts[0]:
            return {}
        weights = self.weigh(parts, counts, {n: self.gates[n] for n in parts[0]})
        return mix(parts, restrict_weights(weights, row_mask))


def train_gates(
    network: nn.Module,
    models: Sequence[Params],
    gates: Gates,
    weigh: Weigh,
    trunk: Sequence[str],
    dataset: EncodedDataset,
    schema: FeatureSchema,
    train_rows: NDArray[np.int64],
    valid_rows: NDArray[np.int64],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    metric: Metric,
    title: str,
    counts: Sequence[Params] = (),
    row_mask: Mapping[str, Tensor] = {},
) -> Learned:
    """Train the gates on training rows, with frozen weights of the sources.

    Several processes take the same steps on the same batches, so that gates stay equal; they share
    the work of scoring. All processes call this.

    Args:
        network: The network; its own parameters are not used, so its tables may be on ``meta``.
        models: The sources; of several processes, the rows of this one.
        gates: Initial gate per parameter; None: no gate.
        weigh: Function of sources, counts and gates that returns mixing weights.
        trunk: Parameters that are trained too, from the values of the first source. Statistics of
            batch norms among them follow the training rows.
        dataset: The encoded data set.
        schema: The features that ``network`` reads, with the sizes of whole tables.
        train_rows: Rows to train on.
        valid_rows: Rows that select the epoch.
        epochs: Number of epochs.
        learning_rate: Learning rate of Adam.
        batch_size: Rows per step.
        seed: Seed of row order and dropout.
        metric: Metric on validation rows; larger is better.
        title: Title of the progress display.
        counts: ``(V,)`` per source and table, for ``weigh``.
        row_mask: The rows of a table that each source has; requires an empty trunk.

    Returns:
        Gates and trunk of the epoch with the best validation metric.

    Reference:
        CKI (arXiv 2501.07596), released recommendation code: Adam, no weight decay.

    Differs:
        The released code selects the epoch on test rows; we use validation rows.
    """
    torch.manual_seed(seed)
    learned = {
        name: None if gate is None else gate.detach().clone().requires_grad_()
        for name, gate in gates.items()
    }
    buffers = {name for name, _ in network.named_buffers()}
    moving = {name: models[0][name].clone() for name in trunk}
    parameters = [gate for gate in learned.values() if gate is not None]
    parameters += [t.requires_grad_() for name, t in moving.items() if name not in buffers]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    module = MergedAtLookup(network, models, counts, learned, weigh, moving, schema, row_mask)
    best = Learned({}, {}, 0, None)
    label = dataset.labels(valid_rows)
    loader = Loader(dataset, schema, train_rows, batch_size, seed=seed)
    with progress(title, epochs * len(train_rows)) as advance:
        for epoch in range(1, epochs + 1):
            module.train()
            for batch in loader:
                loss = binary_cross_entropy_with_logits(module(batch), batch.label)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss.item()}; lower merge.learn.learning_rate"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(len(batch), f"epoch {epoch}")
            value = metric(
                label, predict(module, dataset, schema, valid_rows, torch.device("cpu"))
            )
            if best.epoch == 0 or (value or 0.0) > (best.valid_metric or 0.0):
                best = Learned(
                    {n: None if g is None else g.detach().clone() for n, g in learned.items()},
                    {n: t.detach().clone() for n, t in moving.items()},
                    epoch,
                    value,
                )
    return best
