"""Warnings about fields, before a training: those not read, and those that forbid later merges."""

from __future__ import annotations

import logging
from functools import lru_cache

from cki_rec.config import Config
from cki_rec.data.encoding.store import EncodedDataset

LEARNED = ("log1p", "quantile")
"""Transforms that are learned from the rows of a data set."""

log = logging.getLogger(__name__)


def warn_of_fields(config: Config, dataset: EncodedDataset) -> None:
    """Log the notes on the fields of a training, each once per process."""
    for line in notes(config, dataset):
        _warn_once(line)


def notes(config: Config, dataset: EncodedDataset) -> list[str]:
    """Return warnings about fields that a model does not read, or that forbid later merges.

    The data sets of ``conf/`` list a history for networks that read it, so theirs gives none.
    """
    lines = []
    histories = [f.name for f in dataset.schema.features if f.kind == "history"]
    if histories and not config.model.histories and config.data.format == "csv":
        lines.append(
            f"field {', '.join(histories)}: not read, because model.histories=false; set it to"
            " true, or remove the field from data.fields"
        )
    options = dataset.manifest["options"]
    learned = [f for f in options["fields"] if f["transform"] in LEARNED]
    if learned and "numbers_from" not in options:
        names = ", ".join(f"{f['name']} ({f['transform']})" for f in learned)
        lines.append(
            f"field {names}: scaled by the numbers of this data set. Models with different scales"
            f" cannot be merged: train others with data.numbers_from={dataset.folder} (or the run"
            " of this model), or use the transform ln_squared, edges or token"
        )
    return lines


@lru_cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)
