"""Tensors at rest: read checkpoints, in one process or rank by rank; ``engine`` writes them."""

from cki_rec.checkpoints.checkpoint import (
    CHECKPOINT,
    DESCRIPTION,
    FORMAT,
    TENSORS,
    Checkpoint,
    Description,
    accumulator_shapes,
    describe,
    load,
    locate,
    open_checkpoint,
    outline,
    row_counts,
)
from cki_rec.checkpoints.digests import file_digests
from cki_rec.checkpoints.tensors import fill, read_tensors, untrusted

__all__ = [
    "CHECKPOINT",
    "DESCRIPTION",
    "FORMAT",
    "TENSORS",
    "Checkpoint",
    "Description",
    "accumulator_shapes",
    "describe",
    "file_digests",
    "fill",
    "load",
    "locate",
    "open_checkpoint",
    "outline",
    "read_tensors",
    "row_counts",
    "untrusted",
]
