"""Tensors at rest: read checkpoints, in one process or rank by rank; ``engine`` writes them."""

from cki_rec.checkpoints.checkpoint import (
    CHECKPOINT,
    DESCRIPTION,
    EXTERNAL,
    FORMAT,
    TENSORS,
    Checkpoint,
    Description,
    accumulator_shapes,
    check_files,
    content_digest,
    describe,
    external_identity,
    load,
    locate,
    named_folder,
    open_checkpoint,
    outline,
    row_counts,
)
from cki_rec.checkpoints.digests import file_digests
from cki_rec.checkpoints.tensors import fill, read_tensors, untrusted

__all__ = [
    "CHECKPOINT",
    "DESCRIPTION",
    "EXTERNAL",
    "FORMAT",
    "TENSORS",
    "Checkpoint",
    "Description",
    "accumulator_shapes",
    "check_files",
    "content_digest",
    "describe",
    "external_identity",
    "file_digests",
    "fill",
    "load",
    "locate",
    "named_folder",
    "open_checkpoint",
    "outline",
    "read_tensors",
    "row_counts",
    "untrusted",
]
