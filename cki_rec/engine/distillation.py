"""Training of one model on what several models say. Shape legend: B rows, K teachers."""

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
    """Return a model trained to give the mean logit of its teachers on all training rows.

    The loss is the cross entropy with the probability of that logit; labels are not used. Adam
    trains everything, whole tables too (in ``dense`` mode: a step costs as much as the tables are
    large); the last epoch is kept.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        teachers: Parameters of the same network.
        start: Parameters to start from.
        dataset: Where rows are.
        schema: The features that ``network`` reads.
        epochs: Passes.
        learning_rate: Of Adam.
        batch_size: Rows per step.
        seed: Of row order and dropout.
        title: For the progress display.

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
