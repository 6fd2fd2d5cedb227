"""The facts that merging reads from the network of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from cki_rec.checkpoints import Checkpoint
from cki_rec.data.schema import random_batch
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.lookups import merging_module
from cki_rec.merging.steps import Network
from cki_rec.merging.symmetry import LogitScale, Symmetry
from cki_rec.merging.traits import elementwise_parameters, logit_scale_of, symmetries_of
from cki_rec.models import build_model

PROBE_ROWS = 512
"""Random rows on which aligned sources must score as before."""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declarations of a network (``merging.traits``)."""

    symmetries: Sequence[Symmetry]
    logit_scale: LogitScale | None
    elementwise: Collection[str]
    """Names of the parameters of element-wise modules."""


def declared(saved: Checkpoint) -> Declared:
    """Return the declarations of the network of a checkpoint; nothing is computed."""
    network = build_model(saved.schema, saved.model, torch.device("meta"))
    return Declared(
        symmetries_of(network), logit_scale_of(network), elementwise_parameters(network)
    )


def tables_of(saved: Checkpoint) -> list[str]:
    """Return the names of the parameters that are embedding tables."""
    return [name for name in saved.params if table_of(name)]


def merging_network(saved: Checkpoint, seed: int, is_aligned: bool) -> Network:
    """Return the network of a checkpoint for a merge.

    Args:
        saved: A checkpoint; of several processes, the rows of this one.
        seed: Seed of the probe.
        is_aligned: Build the network and the probe on which aligned sources are verified.
    """
    facts = declared(saved)
    module, probe = None, None
    if is_aligned:
        module = merging_module(saved.schema, saved.model)
        probe = random_batch(saved.schema, PROBE_ROWS, seed)
    return Network(facts.symmetries, tables_of(saved), module, probe, facts.logit_scale)
