"""Distillation of several models into one. Shape legend: B rows, K teachers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine.trainer import step_seed
from cki_rec.merging.params import Params
from cki_rec.progress import progress


def imitate(
    network: nn.Module,
    teachers: Sequence[Params],
    start: Params,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    title: str,
) -> Params:
    """Return a model trained to match the mean logit of its teachers on all training rows.

    The loss is the cross entropy with the probability of that logit; labels are not used. Adam
    trains all parameters, whole tables too, so the time of a step grows with the tables. The
    result is the model after the last epoch.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        teachers: Parameters of the same network.
        start: Initial parameters.
        dataset: The encoded data set.
        schema: The features that ``network`` reads.
        epochs: Number of epochs.
        learning_rate: Learning rate of Adam.
        batch_size: Rows per step.
        seed: Seed of row order and dropout.
        title: Title of the progress display.

    Raises:
        UserError: The loss is not finite.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    student, teacher = copy.deepcopy(network), copy.deepcopy(network).eval()
    state = student.state_dict()
    for name, tensor in start.items():
        state[name].copy_(tensor)
    adam = torch.optim.Adam(student.parameters(), lr=learning_rate)
    rows, step = dataset.rows("train"), 0
    loader = Loader(dataset, schema, rows, batch_size, seed=seed)
    student.train()
    with progress(title, epochs * len(rows)) as advance:
        for epoch in range(1, epochs + 1):
            for batch in loader:
                step += 1
                torch.manual_seed(step_seed(seed, step, 0))
                with torch.no_grad():
                    logit_KB = torch.stack(
                        [functional_call(teacher, params, (batch,)) for params in teachers]
                    )
                target_B = logit_KB.mean(0).sigmoid()
                loss = binary_cross_entropy_with_logits(student(batch), target_B)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"{title}: the loss is {loss.item()}; lower merge.options.learning_rate"
                    )
                adam.zero_grad()
                loss.backward()
                adam.step()
                advance(len(batch), f"epoch {epoch}")
    trained = student.state_dict()
    return {name: trained[name].detach().clone().to(t.dtype) for name, t in start.items()}
