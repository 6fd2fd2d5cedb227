"""The identity of a merge: all that its result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cki_rec.config import Config, section
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.models.layers import MASKS
from cki_rec.pipelines import preflight, train
from cki_rec.pipelines.sources import Source


def merge_reads(
    config: Config,
    candidates: Sequence[Source],
    base: Source | None,
    dataset: EncodedDataset | None,
    is_disjoint: bool,
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    rule = section(config.merge)
    if not rule["margin"]:
        del rule["margin"]
    rule.pop("plugins", None)
    del rule["memory_gb"]
    if rule["dtype"] is None:
        del rule["dtype"]
    of_refinement = ("effort", "refine", "refinement", "rows")  # held by the refined candidate
    for name in ("sources", "label", "vocabularies", *of_refinement):
        del rule[name]
    rule["base"] = None if base is None else base.identity
    if own := preflight.source_of(config.merge):
        rule["source"] = own
    reads = {
        "sources": [source.identity for source in candidates],
        "merge": rule,
        "data": dataset.hash if dataset else None,
        "model": train.model_identity(config.model) if dataset else None,
        "batch_size": config.train.batch_size if dataset else None,
        "seed": config.seed,
    }
    if config.merge.vocabularies:  # which ones: their hashes are in the sources
        reads["vocabularies"] = "joined"
    if is_disjoint:
        reads["counts"] = "sum"
    if config.merge.learn.what != "none":
        reads["masks"] = MASKS
    return reads
