"""Trainings that go on from another one, on the same data or on data with new tokens.

Data with new tokens are encoded with the token lists of the start, followed by the new tokens, and
with the start's facts of numbers. So known tokens keep their ids, day after day.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cki_rec.checkpoints import Description, describe, named_folder
from cki_rec.config import Config, Data, UserError, check_source, with_delta
from cki_rec.data.encoding import store
from cki_rec.data.encoding.findings import log_unseen
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine.embeddings import ShardedModel
from cki_rec.engine.restoration import restore
from cki_rec.models.comparison import decides, differences
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.provenance import check_rows, other_tables

Open = Callable[[Config], EncodedDataset | None]
"""Returns the encoded data set that ``config.data`` describes, or None."""

log = logging.getLogger(__name__)


def prepared(config: Config) -> EncodedDataset:
    """Return the encoded data set of a training; encode it, and those of its starts, if needed.

    Raises:
        UserError: An option, the raw data, a folder or the start is not usable.
    """
    dataset = _data_set(config, store.prepared)
    assert dataset is not None
    return dataset


def find(config: Config) -> EncodedDataset | None:
    """Return the encoded data set of a training if it exists; encode nothing.

    Raises:
        UserError: As ``prepared``.
    """
    return _data_set(config, lambda each: store.find(each.data, each.runtime.encoded))


def started(config: Config) -> Config:
    """Return the training that ``train.start`` describes by its differences from this one."""
    assert config.train.start is not None
    check_source(config.train.start, "train.start")
    plain = replace(config, train=replace(config.train, start=None))
    return with_delta(plain, config.train.start, "train.start")


def data_of_start(config: Config, dataset: EncodedDataset) -> EncodedDataset:
    """Return the data set of a start that is described by its differences.

    Raises:
        UserError: It is not encoded, has other fields, or may hold test rows of ``dataset`` as
            training rows.
    """
    encoded = find(started(config))
    where = f"train.start={config.train.start}"
    if encoded is None:
        raise UserError(f"{where}: its data set is not encoded; encode it with cki-rec prepare")
    if encoded.hash != dataset.hash and encoded.origin.may_have_seen(dataset.source_rows):
        raise UserError(
            f"{where}: is trained on another data set, encoding or split than"
            f" {dataset.folder.name}"
        )
    _check_fields(encoded.schema, dataset.schema, where)
    return encoded


def restored(
    config: Config, dataset: EncodedDataset, schema: FeatureSchema, folder: Path, scratch: Path
) -> tuple[ShardedModel, Provenance, Path]:
    """Return the configured network with parameters and accumulators of the start.

    Args:
        config: The training.
        dataset: Its data set.
        schema: Features of its network.
        folder: The checkpoint of the start.
        scratch: Folder for the start with the rows of new tokens; the caller removes it.

    Returns:
        The network, the origin of the start, and the checkpoint that has its row counts:
        ``scratch`` if the data set has other tokens.

    Raises:
        UserError: The start is another network, or has tokens that the data set lacks; or test
            rows may have been its training rows.
    """
    saved, where = describe(folder), f"train.start, {folder}"
    check_rows(saved, dataset, where)
    for key, (theirs, ours) in differences(saved.model, config.model).items():
        if decides(key, config.model):
            raise UserError(
                f"{where}: model.{key} is {theirs}, not {ours}; choose the model options it was"
                " trained with"
            )
    _check_fields(saved.schema, schema, where)
    is_mean = config.train.new_rows == "mean"
    moved, home = vocabularies.on_data_set(config, folder, where, dataset, scratch, is_mean)
    _log_new_tokens(saved, moved, config.train.new_rows)
    if home == scratch or config.data.vocabularies:
        log_unseen(dataset)
    moved = replace(moved, model=config.model)
    model = restore(moved, home, config.train, config.runtime, to_train=True)
    return model, saved.origin, home


def _data_set(config: Config, opened: Open) -> EncodedDataset | None:
    data, start = config.data, config.train.start
    if start is None:
        return opened(config)
    if "path" not in start:
        begun = started(config)
        if begun.data.fields != data.fields:
            where = f"train.start={start}, data.fields"
            raise UserError(f"{where}: {begun.data.fields} against {data.fields}; use the same")
        first = _data_set(begun, opened)
        if first is None or _content(begun.data) == _content(data):
            return first
        lists = first.folder
    if data.vocabularies:  # the user chooses the tokens
        return opened(config)
    if "path" in start:
        folder = named_folder(start, "train.start")
        saved = describe(folder)
        seen = {digest for rows in saved.origin.rows or () for digest in rows.files}
        if saved.origin.rows is None or seen & store.raw_digests(data, config.runtime.encoded):
            dataset = opened(config)
            if dataset is None or not other_tables(saved, dataset):
                return dataset
        lists = vocabularies.find_folder(config, folder, saved, "train.start")
    grown = replace(
        data,
        vocabularies=[str(lists)],
        new_tokens="add",
        numbers_from=data.numbers_from or str(lists),
    )
    return opened(replace(config, data=grown))


def _content(data: Data) -> Data:
    """Return options of a data set without those that choose a part of it."""
    partition = replace(data.partition, by="none", parts=1, seed=0)
    return replace(data, part=None, partition=partition)


def _check_fields(theirs: FeatureSchema, ours: FeatureSchema, where: str) -> None:
    if theirs.features != ours.features:
        fields = [", ".join(f.name for f in s.features) for s in (theirs, ours)]
        raise UserError(f"{where}: fields {fields[0]} against {fields[1]}")


def _log_new_tokens(saved: Description, moved: Description, begin: str) -> None:
    sizes = saved.schema.table_sizes
    new = {t: size - sizes[t] for t, size in moved.schema.table_sizes.items() if size > sizes[t]}
    if new:
        listed = ", ".join(f"{table} {number:,}" for table, number in new.items())
        log.info("  tokens that the start lacks: %s; their rows begin as %s", listed, begin)
