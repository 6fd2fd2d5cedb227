"""Training of the local gate: gradients reach it through the spliced parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import Gate, UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.evaluator import predict
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MixingWeights, Params
from cki_rec.merging.vocabulary import restrict_weights
from cki_rec.progress import progress

Gates = dict[str, Tensor | None]
Metric = Callable[[NDArray[np.float32], NDArray[np.float32]], float | None]
Weigh = Callable[[Sequence[Params], Sequence[Params], Mapping[str, Tensor | None]], MixingWeights]
"""``weigh(models, counts, gates)`` of some parameters; of a table, it may be some rows only."""


@dataclass(slots=True)
class Trained:
    """The best epoch of a gate's training."""

    gates: Gates
    trunk: Params
    epoch: int
    valid_metric: float | None


class SplicedAtLookup(nn.Module):
    """A network whose parameters are spliced when it is called, tables where the batch reads.

    The rows that a batch reads are gathered from all sources, spliced, and looked up as if they
    were the table: rules act on rows one by one, so the logits are those of the merged table. That
    is never built; time and memory of a step do not depend on its size.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: The sources.
        counts: Per source, ``(V,)`` under the name of each table; may be empty.
        gates: Gate per parameter; None where there is none.
        weigh: How sources are weighed.
        moving: Parameters that are taken as they are, whatever the sources hold.
        schema: The features that ``network`` reads.
        owners: Which rows of a table each source has (``integration.vocabulary``).
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
        owners: Mapping[str, Tensor] = {},
    ) -> None:
        super().__init__()
        self.owners = owners
        self.network, self.models, self.counts = network, models, counts
        self.gates, self.weigh, self.moving, self.schema = gates, weigh, moving, schema
        names = [name for name in models[0] if name not in moving]
        self.changing = [n for n in names if gates[n] is not None or table_of(n)]
        constant = [n for n in names if n not in self.changing]
        self.constant = self._splice(
            [{n: model[n] for n in constant} for model in models], [{} for _ in counts], {}
        )
        self.buffers_of_network = {name for name, _ in network.named_buffers()}

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of the merged model."""
        renumbered, rows = rows_read(batch, self.schema)
        logit_B: Tensor = functional_call(self.network, self.params(rows), (renumbered,))
        return logit_B

    def params(self, rows: Mapping[str, Tensor]) -> Params:
        """Return the merged parameters, of tables the ``rows`` of their vocabulary only."""
        parts = [{n: at_rows(n, model[n], rows) for n in self.changing} for model in self.models]
        counts = [
            {n: at_rows(n, count, rows) for n, count in source.items() if n in self.changing}
            for source in self.counts
        ]
        constant = {  # a batch norm in training writes into its statistics
            name: tensor.clone() if name in self.buffers_of_network else tensor
            for name, tensor in self.constant.items()
        }
        moving = {name: at_rows(name, tensor, rows) for name, tensor in self.moving.items()}
        own = {n: has[:, rows[table_of(n) or n]] for n, has in self.owners.items()}
        return {**self._splice(parts, counts, own), **constant, **moving}

    def _splice(
        self, parts: Sequence[Params], counts: Sequence[Params], owners: Mapping[str, Tensor]
    ) -> Params:
        if not parts[0]:
            return {}
        weights = self.weigh(parts, counts, {n: self.gates[n] for n in parts[0]})
        return mix(parts, restrict_weights(weights, owners))


def at_rows(name: str, tensor: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of a table's tensor (embeddings, counts); others as they are."""
    table = table_of(name)
    return tensor if table is None else tensor[rows[table]]


def rows_read(batch: Batch, schema: FeatureSchema) -> tuple[Batch, dict[str, Tensor]]:
    """Return which rows a batch reads of each table, and the batch with their places as ids.

    A table of which nothing is read keeps its first row: a lookup needs one.
    """
    features = schema.lookups
    if not features:
        return batch, {}
    sizes = [len(batch)] * len(features)
    if batch.lengths is not None:
        sizes = batch.lengths.view(len(features), -1).sum(1).tolist()
    pieces, rows = list(batch.values.split(sizes)), {}
    for table in dict.fromkeys(feature.table for feature in features):
        places = [place for place, feature in enumerate(features) if feature.table == table]
        ids = torch.cat([pieces[place] for place in places])
        found, renumbered = ids.unique(return_inverse=True)
        rows[table] = found if len(found) else ids.new_zeros(1)
        for place, piece in zip(
            places, renumbered.split([sizes[place] for place in places]), strict=True
        ):
            pieces[place] = piece
    return replace(batch, values=torch.cat(pieces)), rows


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
    options: Gate,
    batch_size: int,
    seed: int,
    metric: Metric,
    title: str,
    counts: Sequence[Params] = (),
    owners: Mapping[str, Tensor] = {},
) -> Trained:
    """Learn the gates on training rows, with the sources' weights frozen.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: The sources.
        gates: Initial gate per parameter; None where there is none.
        weigh: Sources, counts and gates -> mixing weights.
        trunk: Parameters that start from the first source and learn along; empty: none. Statistics
            of batch norms among them are those of the rows they see.
        dataset: Where rows are.
        schema: The features that ``network`` reads.
        train_rows: Rows to learn from.
        valid_rows: Rows that choose the epoch.
        options: Epochs and learning rate.
        batch_size: Rows per step.
        seed: Of row order and dropout.
        metric: Larger is better.
        title: For the progress display.
        counts: Per source, ``(V,)`` under the name of each table; what ``weigh`` is given.
        owners: Which rows of a table each source has; without trunk.

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
    buffers = {name for name, _ in network.named_buffers()}
    moving = {name: models[0][name].clone() for name in trunk}
    parameters = [gate for gate in learned.values() if gate is not None]
    parameters += [t.requires_grad_() for name, t in moving.items() if name not in buffers]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    module = SplicedAtLookup(network, models, counts, learned, weigh, moving, schema, owners)
    best = Trained({}, {}, 0, None)
    label = dataset.labels(valid_rows)
    loader = Loader(dataset, schema, train_rows, batch_size, seed=seed)
    with progress(title, options.epochs * len(train_rows)) as advance:
        for epoch in range(1, options.epochs + 1):
            module.train()
            for batch in loader:
                loss = binary_cross_entropy_with_logits(module(batch), batch.label)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss.item()}; lower merge.gate.learning_rate"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(len(batch), f"epoch {epoch}")
            value = metric(
                label, predict(module, dataset, schema, valid_rows, torch.device("cpu"))
            )
            if best.epoch == 0 or (value or 0.0) > (best.valid_metric or 0.0):
                best = Trained(
                    {n: None if g is None else g.detach().clone() for n, g in learned.items()},
                    {n: t.detach().clone() for n, t in moving.items()},
                    epoch,
                    value,
                )
    return best
