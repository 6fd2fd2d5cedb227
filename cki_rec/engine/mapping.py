"""Linear maps of all sources' tables, fitted to a teacher: the first stage of a refinement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cki_rec.checkpoints import Checkpoint
from cki_rec.config import UserError
from cki_rec.data.columns import Ints
from cki_rec.data.loader import LoadedRows, Loader, Targets
from cki_rec.data.schema import Batch
from cki_rec.engine import distributed
from cki_rec.engine.lookups import merging_module
from cki_rec.merging.inputs import sources_of
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.refinement import Plan, fit
from cki_rec.progress import progress


def fit_maps(
    sources: Sequence[Checkpoint],
    lead: int,
    data: LoadedRows,
    rows: Ints,
    targets: Targets,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    title: str,
    device: torch.device,
) -> Params:
    """Return one source with linear maps of all sources' tables, fitted to a teacher.

    Parameters that are not tables are fitted too. Several processes take the same steps on the
    same batches, with their rows of the tables, on CPU. All processes call this.

    Args:
        sources: The sources, of equal vocabularies; of several processes, the rows of this one.
        lead: The source that the maps begin as.
        data: The holder of the rows.
        rows: Row numbers.
        targets: The teacher's logits on them.
        steps: Steps of Adam.
        batch_size: Rows of a step.
        learning_rate: First learning rate; falls to 0 by a cosine.
        seed: Seed of the order of the rows.
        title: Title of the progress display.
        device: Device of the network.

    Raises:
        UserError: The loss is not finite.
    """
    schema, model = sources[0].schema, sources[0].model
    network = merging_module(schema, model)
    if distributed.world_size() == 1:
        network.to(device)
    else:
        device = torch.device("cpu")
    held = sources_of([{n: t.to(device) for n, t in s.params.items()} for s in sources])
    loader = Loader(data, schema, rows, batch_size, seed=seed, device=device, targets=targets)
    plan = Plan(stages=("maps",), steps=steps, learning_rate=learning_rate)
    with progress(title, steps * batch_size) as advance:
        try:
            fitted = fit(
                *(plan, network, held, _endless(loader), held.models[lead], lead, None),
                lambda stage, *_: advance(batch_size, stage) if stage != "done" else None,
            )
        except MergeError as error:
            raise UserError(f"{title}: {error} (merge.refinement)") from error
    return {name: tensor.cpu() for name, tensor in held.restored(fitted.params).items()}


def _endless(loader: Loader) -> Iterator[tuple[Batch, Tensor]]:
    while True:
        for batch in loader:
            assert batch.target is not None
            yield batch, batch.target
