"""Models on their devices, from checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import Description, accumulator_shapes
from cki_rec.config import Runtime, Train, UserError
from cki_rec.engine import checkpoint_io
from cki_rec.engine.embeddings import ShardedModel, build

log = logging.getLogger(__name__)


def restore(
    saved: Description, folder: Path, schedule: Train, runtime: Runtime, to_train: bool = False
) -> ShardedModel:
    """Return a model on its devices from a checkpoint, ready to predict or to train.

    Accumulators of fused tables are restored to train, if the checkpoint has some. Otherwise they
    are zero, as before any training.

    Args:
        saved: Description of the checkpoint.
        folder: The checkpoint.
        schedule: Options of training: they choose the kernels.
        runtime: Devices and the plan of the tables.
        to_train: Restore accumulators too.

    Raises:
        UserError: The accumulators belong to another table optimizer.
    """
    model = build(saved.schema, saved.model, schedule, runtime)
    tensors: dict[str, dict[str, Any]] = {"model": model.module.state_dict()}
    accumulators = model.accumulators() if to_train else {}
    shapes = accumulator_shapes(folder) if accumulators else {}
    for name, accumulator in accumulators.items():  # of tables of this process
        shape, needed = shapes.get(name), tuple(accumulator.metadata().size)
        if shapes and shape != needed:
            raise UserError(
                f"{folder}: the accumulator of {name} is {shape}, train.table_optimizer="
                f"{schedule.table_optimizer} needs {needed}; use the optimizer of its training"
            )
    if shapes:
        tensors["accumulator"] = accumulators
    elif accumulators:
        log.info("  %s has no accumulators: fused tables start without", folder)
    checkpoint_io.load_into(tensors, folder)
    return model
