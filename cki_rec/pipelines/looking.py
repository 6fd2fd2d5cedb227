"""Which rows an integration looks at, and what methods get from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Config, Merge, UserError, with_delta
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.schema import Batch
from cki_rec.engine import distributed
from cki_rec.engine.distillation import imitate
from cki_rec.engine.fisher import fisher_diagonal
from cki_rec.engine.sampling import sample_statistics
from cki_rec.merging.params import Params
from cki_rec.merging.registry import METHODS, needs_of
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.models import build_model
from cki_rec.pipelines import matching
from cki_rec.pipelines.scores import check_data, check_rows

ENOUGH = 10
"""Rows per input of a layer. Least squares of I inputs on n rows have a mean square error larger
by the share I / (n - I - 1) than the best linear map has: here about a ninth."""

log = logging.getLogger(__name__)


class ScarceSample(UserError):
    """A sample has too few rows to fit a layer."""


def looks_at_rows(options: Merge) -> bool:
    """Return whether method, alignment or repair look at training rows."""
    needs = METHODS[options.method].needs
    is_matched = len(options.sources) > 1 and matching.looks_at_rows(options)
    return bool({"fisher", "moments", "training"} & needs) or is_matched


def needs_rows(options: Merge) -> bool:
    """Return whether the integration looks at rows of the data set."""
    return needs_labels(options) or looks_at_rows(options)


def needs_labels(options: Merge) -> bool:
    """Return whether the integration looks at validation rows, whatever its network."""
    if options.recalibrate or options.gate.train != "none":
        return True
    return options.method != "cki" and "labels" in needs_of(options.method, options.options)


def check_encoding(config: Config, source: Checkpoint) -> None:
    """Check that rows that choose a source are not encoded with the vocabulary of one.

    Raises:
        UserError: They are.
    """
    is_joined = config.merge.vocabularies and not config.data.vocabularies
    if is_joined and matching.is_led(config.merge, source):
        raise UserError(
            "merge.repair=project: chooses a source by validation rows, which are not encoded"
            " with the joined vocabularies; use repair=select_units, or data.vocabularies=[FOLDER,...],"
            " the encoded data sets of the sources"
        )


def check_sources(
    config: Config,
    sources: Sequence[Checkpoint],
    dataset: EncodedDataset,
    names: Sequence[str],
) -> None:
    """Check that rows that are looked at fit the sources: all, or the first if no label is read.

    Raises:
        UserError: By name, a source that was trained on other rows, or on other tokens.
    """
    options = config.merge
    is_led = matching.is_led(options, sources[0])
    judged = sources if is_led or needs_labels(options) else sources[:1]
    fits = (
        check_data if METHODS[options.method].merges_parameters else check_rows
    )  # kept, then moved
    for source, name in zip(judged, names, strict=False):
        fits(source, dataset, name)


def seen(
    config: Config,
    models: Sequence[Params],
    saved: Checkpoint,
    dataset: EncodedDataset | None,
    observe: ActivationStatistics | None,
) -> dict[str, Any]:
    """Return the fields of ``MergeInputs`` that come of the network, and of rows where it needs them.

    All sources are seen on the same sample of training rows (``merge.sample``), but for the
    Fisher information: a source has it on the rows it was trained on where its part is known
    (``data.part``). A model that is trained sees all rows.
    """
    needs = METHODS[config.merge.method].needs
    found: dict[str, Any] = {"symmetries": matching.symmetries_of(saved)}
    if "fisher" in needs:
        assert observe is not None
        assert dataset is not None
        found["fisher"] = [
            fisher_diagonal(observe.network, m, _own(config, delta, saved, dataset, observe))
            for m, delta in zip(models, config.merge.sources, strict=True)
        ]
    if "moments" in needs:
        assert observe is not None
        found["moments"] = observe(models).second
    if "training" in needs:
        assert dataset is not None
        distributed.start(config.runtime)
        rows, network = dataset, build_model(saved.schema, saved.model, torch.device("cpu"))
        title = f"{config.merge.label}, {config.suite.name}, seed {config.seed}"
        batch_size, seed = config.train.batch_size, config.seed
        found["imitate"] = lambda start, epochs, rate: imitate(
            *(network, models, start, rows, saved.schema),
            *(epochs, rate, batch_size, seed, title),
        )
    return found


def check_sample(options: Merge, params: Params, observe: ActivationStatistics) -> None:
    """Check that a sample can tell what layers should be (``merge.repair``); warn if barely.

    Args:
        options: How to repair.
        params: A model.
        observe: Of the sample.

    Raises:
        ScarceSample: A layer sees no more rows than it has inputs: anything fits there.
    """
    kept = matching.coordinatewise(observe.network) if options.repair == "project" else set()
    rows = {name: seen for name, seen in observe([params]).rows.items() if name not in kept}
    inputs = {name: params[name].shape[1] + 1 for name in rows}
    scarce = min(rows, key=lambda name: rows[name] / inputs[name], default=None)
    if scarce is None or rows[scarce] >= ENOUGH * inputs[scarce]:
        return
    sample = sum(len(batch) for batch in observe.batches)
    needed = -(-ENOUGH * inputs[scarce] * sample // rows[scarce])
    says = (
        f"merge.sample: merge.repair={options.repair} fits the {inputs[scarce]:,} inputs"
        f" of {scarce} on {rows[scarce]:,} rows, noise and all; take {needed:,} or more, or"
        " repair=rescale"
    )
    if rows[scarce] <= inputs[scarce]:
        raise ScarceSample(says)
    log.warning("  %s", says)


def _own(
    config: Config,
    delta: dict[str, Any],
    saved: Checkpoint,
    dataset: EncodedDataset,
    observe: ActivationStatistics,
) -> Sequence[Batch]:
    """Return a sample of the rows that a source was trained on; of all if that is not known."""
    if "path" in delta:
        return observe.batches
    own = with_delta(config, delta)
    if own.data.part is None or own.train.start is not None:
        return observe.batches
    data = own.data
    rows = dataset.rows("train", data.partition, data.part)
    size, seed = config.merge.sample, config.seed
    return sample_statistics(observe.network, dataset, saved.schema, size, seed, rows).batches
