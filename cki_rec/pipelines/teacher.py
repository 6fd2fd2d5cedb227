"""Rows without labels, and the logits of a teacher on them.

Shape legend: K sources, R rows, V rows of a table.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cki_rec.checkpoints import describe, row_counts
from cki_rec.config import Config, UserError
from cki_rec.data.columns import Ints, Ragged
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import LoadedRows
from cki_rec.data.random_rows import RandomRows
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed
from cki_rec.engine.evaluator import predict
from cki_rec.engine.record import load_arrays, save_arrays
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.params import Params
from cki_rec.merging.teachers import router_shares, routing_table, separation
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.predictions import predictions, scoring_model
from cki_rec.pipelines.provenance import other_tables
from cki_rec.pipelines.sources import Source

log = logging.getLogger(__name__)

PASSES = 2
"""Fewest passes over the rows: after each, validation rows decide whether to go on."""
TEACHERS = "teachers"
"""Folder of cached logits of sources, under ``runtime.out``."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """The logit that a model is fitted to."""

    field: str | None
    """The field whose ids choose among the sources; None: their mean logit."""
    share: float
    """Share of the sources in the teacher's logit. The rest is the logit of the start."""
    separation: float | None = None
    """How far the sources were trained on different ids of the field (``separation``)."""


@dataclass(frozen=True, slots=True)
class UnlabelledRows:
    """The rows that a refinement reads."""

    data: LoadedRows
    numbers: Ints
    """Ascending row numbers."""
    identity: str


def unlabelled_rows(
    config: Config,
    dataset: EncodedDataset,
    sources: Sequence[Source],
    schema: FeatureSchema,
    steps: int,
) -> UnlabelledRows:
    """Return the rows of ``merge.rows``: at most as many as the steps of a refinement read.

    Raises:
        UserError: The rows have other vocabularies, or checkpoints hold no counts to draw from.
    """
    kind = config.merge.rows
    wanted = -(-steps * config.merge.refinement.batch_size // PASSES)
    if kind == "random":
        counts = [_counts(config, dataset, source) for source in sources]
        if any(not source for source in counts):
            raise UserError(
                "merge.rows=random: a source holds no row counts to draw ids from; use"
                " merge.rows=training"
            )
        summed = {t: torch.stack([c[t] for c in counts]).sum(0).numpy() for t in counts[0]}
        drawn = RandomRows(schema, summed, wanted, config.seed)
        names = [source.identity for source in sources]
        digest = _digest([names, wanted, config.seed, schema.vocabulary_hashes])
        return UnlabelledRows(drawn, np.arange(wanted), f"random-{digest}")
    data = dataset
    if kind != "training":
        data = EncodedDataset(Path(kind))
        if different := [t for t, h in schema.vocabulary_hashes.items()
                         if data.schema.vocabulary_hashes.get(t) != h]:  # fmt: skip
            raise UserError(
                f"merge.rows={kind}: table {different[0]} has another vocabulary than the models;"
                " encode these rows with data.vocabularies"
            )
    numbers = np.asarray(data.rows("train"))
    if len(numbers) > wanted:
        chosen = np.random.default_rng(config.seed).choice(len(numbers), wanted, replace=False)
        numbers = np.sort(numbers[chosen])
    return UnlabelledRows(data, numbers, f"{data.hash[:16]}-{len(numbers)}-{config.seed}")


def choose_teacher(config: Config, dataset: EncodedDataset, sources: Sequence[Source]) -> Teacher:
    """Return the teacher of ``merge.refine``; of ``auto`` the better one on validation rows.

    The router is tried if the sources were trained on different ids of a field.

    Raises:
        UserError: ``router``, and the sources have seen the same ids equally often.
    """
    options, mean = config.merge.refinement, Teacher(None, 1.0)
    if config.merge.refine == "mean":
        return mean
    counts = [_counts(config, dataset, source) for source in sources]
    field, far = _routing_field(config, dataset.schema, counts)
    if field is None:
        if config.merge.refine == "router":
            raise UserError(
                "merge.refine=router: the sources have seen the same ids equally often; use"
                " merge.refine=mean, or name a field (merge.refinement.field)"
            )
        return mean
    router = Teacher(field, options.share, far)
    if config.merge.refine == "router":
        return router
    label = dataset.labels(dataset.rows("valid"))
    logits_KR = np.stack([predictions(config, dataset, s)["valid"] for s in sources])
    shares_KR = _shares(config, dataset, sources, field, dataset, dataset.rows("valid"))
    routed = auc(label, (shares_KR * logits_KR).sum(0)) or 0.0
    return router if routed > (auc(label, logits_KR.mean(0)) or 0.0) else mean


def teacher_logits(
    config: Config,
    dataset: EncodedDataset,
    sources: Sequence[Source],
    teacher: Teacher,
    rows: UnlabelledRows,
    start: Source | None,
) -> NDArray[np.float32]:
    """Return ``(R,)`` logits of a teacher on unlabelled rows."""
    control = config.merge.refinement.control
    if control == "start" and start is not None:
        return _logits(config, dataset, start, rows)
    if control == "first_source":
        return _logits(config, dataset, sources[0], rows)
    logits_KR = np.stack([_logits(config, dataset, source, rows) for source in sources])
    if teacher.field is None:
        mean: NDArray[np.float32] = logits_KR.mean(0)
        return mean
    shares_KR = _shares(config, dataset, sources, teacher.field, rows.data, rows.numbers)
    if control == "shuffled":
        order = np.random.default_rng(config.seed).permutation(len(rows.numbers))
        shares_KR = shares_KR[:, order]
    routed: NDArray[np.float32] = (shares_KR * logits_KR).sum(0)
    if teacher.share == 1 or start is None:
        return routed
    own = _logits(config, dataset, start, rows)
    return teacher.share * routed + np.float32(1 - teacher.share) * own


def _logits(
    config: Config, dataset: EncodedDataset, source: Source, rows: UnlabelledRows
) -> NDArray[np.float32]:
    """Return the logits ``(R,)`` of a model, computed once and then read from disk.

    Raises:
        UserError: The model gives NaN or infinity.
    """
    name = f"{source.identity}-{_digest([rows.identity, dataset.hash])}.npz"
    path = Path(config.runtime.out) / TEACHERS / name
    known = load_arrays(path)
    if not distributed.from_first(known is not None and "logits" in known):
        module, schema, device = scoring_model(config, dataset, source)
        logits = predict(module, rows.data, schema, rows.numbers, device)
        if not np.isfinite(logits).all():
            raise UserError(
                f"{source.folder}: the model gives NaN or infinite logits on unlabelled rows; its"
                " training may have diverged, leave it out"
            )
        if distributed.rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_arrays(path, {"logits": logits})
            except OSError as error:  # they are in memory, and only the next run misses them
                log.warning("  %s: logits are not kept: %s", path, error.strerror or error)
        return logits
    assert known is not None
    return known["logits"]


def _shares(
    config: Config,
    dataset: EncodedDataset,
    sources: Sequence[Source],
    field: str,
    data: LoadedRows,
    numbers: Ints,
) -> NDArray[np.float32]:
    """Return ``(K, R)``: the share of each source in the observations of a row's ids."""
    table = next(f.table for f in dataset.schema.lookups if f.name == field)
    counts_KV = torch.stack([_counts(config, dataset, source)[table] for source in sources])
    column = data.column(field)
    if isinstance(column, Ragged):
        ids, lengths = column.ids(numbers)
        rows = np.repeat(np.arange(len(numbers)), lengths)
    else:
        ids, rows = column[numbers], np.arange(len(numbers))
    ids_N, rows_N = (torch.from_numpy(np.asarray(x, np.int64)) for x in (ids, rows))
    shares: NDArray[np.float32] = (
        router_shares(counts_KV, ids_N, rows_N, len(numbers)).float().numpy()
    )
    return shares


def _routing_field(
    config: Config, schema: FeatureSchema, counts: Sequence[Params]
) -> tuple[str | None, float | None]:
    """Return the field that routes, and how far the sources' ids of it differ."""
    named = config.merge.refinement.field
    if any(not source for source in counts):
        if named is not None or config.merge.refine == "router":
            raise UserError(
                "merge.refine=router: a source holds no row counts; use merge.refine=mean"
            )
        return None, None
    fields = {f.name: f for f in schema.lookups if f.table in counts[0]}
    if named is not None:
        if named not in fields:
            raise UserError(
                f"merge.refinement.field={named}: the models look up no field of this name;"
                f" one of {', '.join(fields)}"
            )
        return named, separation(counts).get(fields[named].table)
    table = routing_table(counts)
    if table is None:
        return None, None
    name = next((f.name for f in fields.values() if f.table == table), None)
    return name, separation(counts)[table]


def _counts(config: Config, dataset: EncodedDataset, source: Source) -> Params:
    """Return the row counts of a source, under the tables of the data set."""
    if other_tables(describe(source.folder), dataset):
        return vocabularies.counts_on_rows_of(config, source.folder, dataset)
    return row_counts(source.folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
