"""Data sets in records, and checks that a model may be judged on their rows: none trained it."""

from __future__ import annotations

from typing import Any

from cki_rec.checkpoints import Checkpoint, Description
from cki_rec.config import UserError
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import SEVERAL


def check_data(saved: Checkpoint | Description, dataset: EncodedDataset, name: str) -> None:
    """Check that a checkpoint was trained on a data set, or fits its encoding unchanged.

    Raises:
        UserError: As for ``check_rows``; or its vocabularies differ.
    """
    check_rows(saved, dataset, name)
    if tables := other_tables(saved, dataset):
        raise UserError(
            f"{name}: trained on another data set, encoding or split than {dataset.folder.name}:"
            f" table '{tables[0]}' has other tokens, or in another order; encode the rows with"
            " those of the model: data.vocabularies=[FOLDER,...], in the order of merge.sources"
        )


def other_tables(saved: Checkpoint | Description, dataset: EncodedDataset) -> list[str]:
    """Return the tables of a checkpoint whose rows belong to other tokens than the data set's."""
    if saved.origin.data_hash == dataset.hash:
        return []
    hashes, theirs = saved.schema.vocabulary_hashes, dataset.schema.vocabulary_hashes
    return [table for table in saved.schema.table_sizes if hashes[table] != theirs[table]]


def check_rows(saved: Checkpoint | Description, dataset: EncodedDataset, name: str) -> None:
    """Check that no row of validation or test is known to have been a training row.

    Equal vocabularies are not enough: with another split, test rows may have been training rows.
    Raw files that the checkpoint has not seen are covered by ``evaluate.disjoint_files``.

    Raises:
        UserError: Raw files of this data set were split otherwise for the checkpoint, or may have
            been; or fields differ.
    """
    origin = saved.origin
    if origin.data_hash == dataset.hash:
        return
    problem = f"{name}: trained on another data set, encoding or split than {dataset.folder.name}"
    if origin.rows is None:
        fix = "choose the data options it was trained with"
        if origin.data_hash == SEVERAL:
            fix = "its training rows are not recorded; train and merge its sources again"
        raise UserError(f"{problem}; {fix}")
    if origin.may_have_seen(dataset.source_rows):
        raise UserError(
            f"{problem}: the same raw files were split otherwise, so test rows may have been its"
            " training rows; choose the data options it was trained with"
        )
    schema = dataset.schema
    for feature in saved.schema.features:
        key = feature.table or feature.name
        hashes = saved.schema.vocabulary_hashes.get(key), schema.vocabulary_hashes.get(key)
        if feature not in schema.features or (not feature.table and hashes[0] != hashes[1]):
            raise UserError(
                f"{problem}: field '{feature.name}' ({feature.kind}) is missing, or its numbers"
                " were scaled otherwise; choose the data options it was trained with"
            )


def data_facts(dataset: EncodedDataset) -> dict[str, Any]:
    """Return a record's entries about its data set."""
    manifest = dataset.manifest
    return {
        "name": dataset.folder.name.rpartition("-")[0],
        "hash": dataset.hash,
        "rows": {name: split["rows"] for name, split in manifest["splits"].items()},
        "skipped": sum(entry["count"] for entry in manifest["skipped"].values()),
        "synthetic": manifest["synthetic"],
    }
