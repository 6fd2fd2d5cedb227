"""The rules of an encoded data set -> an ``Encoder`` of raw rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import UserError
from cki_rec.data.columns import Ids
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding import encoder as encoder_module
from cki_rec.data.encoding.encoder import RULES, Encoder
from cki_rec.data.encoding.fields import Field, liked_field
from cki_rec.data.raw.formats import FORMATS, Format, recorded_format
from cki_rec.data.schema import FIRST_ID, OOV_ID, FeatureSchema

FORMAT = 1
"""Format of the rules."""


def encoder_of(
    datasets: Sequence[EncodedDataset],
    schema: FeatureSchema,
    tokens: Mapping[str, Sequence[str]],
) -> Encoder:
    """Return the encoder of a model: raw rows -> its ids and numbers.

    Raw rows have the form of the first data set. Histories hold the liked rows of all of them.

    Args:
        datasets: The data sets of its training rows.
        schema: Features of the model.
        tokens: Table -> its tokens in the order of ids; tables of hashes are left out.

    Raises:
        UserError: A field is not one of a data set, or the data sets encode it in several ways.
    """
    dataset, *others = datasets
    options, names = dataset.manifest["options"], [f.name for f in schema.features]
    every = _fields(dataset, names)
    for other in others:
        theirs = _fields(other, names)
        for name in names:  # counts of tokens decide vocabularies, which are joined
            if replace(theirs[name], min_count=every[name].min_count) != every[name]:
                raise UserError(
                    f"{other.folder}: field {name} has other options than in {dataset.folder};"
                    " train the sources with equal data.fields"
                )
    reader = _reader(options)
    fields: list[dict[str, Any]] = []
    likes: dict[str, pl.DataFrame] = {}
    for name in names:
        field = every[name]
        entry = {**asdict(field), **_numeric_rules(field, datasets, reader)}
        if field.kind == "history" and not field.is_listed:
            of_users = (options["user"] or "user", "categorical")
            users = [f for n in names if ((f := every[n]).column, f.kind) == of_users]
            entry["max_length"] = options["history_length"]
            if not users or any(d.timestamp is None for d in datasets):
                entry["reason"] = (
                    "histories are looked up by the id of the user, which is no field of this"
                    " model; add it to data.fields"
                )
            elif field.rows == "earlier":
                entry["reason"] = "rows=earlier reads labels of all rows, which a model lacks"
            else:
                entry["user"] = users[0].name
                parts = [_likes(d, field, users[0], schema, tokens) for d in datasets]
                likes[name] = pl.concat(parts).sort("user", "time", maintain_order=True)
        fields.append(entry)
    rules = {
        "format": FORMAT,
        "missing": options.get("missing", []),
        "number_form": options.get("number_form", "plain"),
        "normalize_ids": options.get("normalize_ids", False),
        "numeric_missing": options["numeric_missing"],
        "time": _time(options, reader),
        "fields": fields,
    }
    tables = {
        table: pl.DataFrame(
            {
                "token": pl.Series(words, dtype=pl.String),
                "id": np.arange(FIRST_ID, FIRST_ID + len(words), dtype=np.int32),
            }
        )
        for table, words in tokens.items()
    }
    return Encoder(rules, tables, likes)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """Write an encoder, its rules and its tables, so that the folder needs no cki_rec."""
    names = {table: f"vocabulary.{table}.parquet" for table in encoder.tables}
    likes = {name: f"likes.{name}.parquet" for name in encoder.likes}
    for table, frame in encoder.tables.items():
        frame.write_parquet(folder / names[table])
    for name, frame in encoder.likes.items():
        frame.write_parquet(folder / likes[name])
    rules = {**encoder.rules, "vocabularies": names, "likes": likes}
    (folder / RULES).write_text(json.dumps(rules, indent=1), encoding="utf-8")
    shutil.copyfile(encoder_module.__file__, folder / "encoder.py")


def reader_of(dataset: EncodedDataset) -> Format:
    """Return the format of the raw rows of a data set; of synthetic ones the written format."""
    return _reader(dataset.manifest["options"])


def _fields(dataset: EncodedDataset, names: Sequence[str]) -> dict[str, Field]:
    """Return the fields of a data set by name; those of ``names`` must be there."""
    every = {entry["name"]: _field(entry) for entry in dataset.manifest["options"]["fields"]}
    if unknown := [name for name in names if name not in every]:
        raise UserError(f"{dataset.folder}: no field {', '.join(unknown)}, which the model reads")
    return every


def _field(entry: Mapping[str, Any]) -> Field:
    edges = entry.get("edges")
    return Field(**{**entry, "edges": None if edges is None else tuple(edges)})


def _reader(options: Mapping[str, Any]) -> Format:
    if "synthetic" in options:
        return FORMATS[options["synthetic"]["layout"]]
    return recorded_format(options["format"])


def _time(options: Mapping[str, Any], reader: Format) -> tuple[str, str, bool] | None:
    """Return the raw column of times, its form, and whether a column of seconds may replace it."""
    if reader.has_free_kinds:
        return options["time"] and (options["time"], options["time_form"], False)
    return (*reader.time, True)


def _numeric_rules(
    field: Field, datasets: Sequence[EncodedDataset], reader: Format
) -> dict[str, Any]:
    """Return the type of a numeric field, and the facts that training rows gave."""
    if field.kind != "numeric":
        return {}
    rules: dict[str, Any] = {"type": _type(field, datasets, reader)}
    if field.transform == "quantile":
        rules["bounds"] = datasets[0].manifest["quantile_edges"][field.name]
    if field.is_number:
        rules["shift"], rules["scale"] = datasets[0].manifest["numbers"][field.name]
        rules["mean"] = rules["shift"]
        if field.transform == "as_is":  # its shift is 0, whatever its mean
            numbers = np.concatenate([_training_numbers(d, field.name) for d in datasets])
            rules["mean"] = float(numbers.astype(np.float64).mean())
    return rules


def _training_numbers(dataset: EncodedDataset, name: str) -> NDArray[np.float32]:
    names = [feature.name for feature in dataset.schema.numbers]
    numbers: NDArray[np.float32] = dataset.numbers[dataset.rows("train"), names.index(name)]
    return numbers


def _type(field: Field, datasets: Sequence[EncodedDataset], reader: Format) -> str:
    """Return the type of the raw numbers, on which their tokens depend."""
    if not reader.has_free_kinds:
        return "integer"
    if reader.has_types and field.transform == "token":
        tokens = (token for dataset in datasets for token in dataset.vocabulary(field.table))
        return "number" if any("." in t or "e" in t for t in tokens) else "integer"
    return "number"


def _likes(
    dataset: EncodedDataset,
    history: Field,
    user: Field,
    schema: FeatureSchema,
    tokens: Mapping[str, Sequence[str]],
) -> pl.DataFrame:
    """Return user, item and time of the liked training rows."""
    source = liked_field(history, _fields(dataset, ()).values())
    train = dataset.rows("train")
    liked = train[dataset.labels(train) == 1]
    item = dataset.column(history.column if source is None else source.name)
    columns = {"user": (user.table, dataset.column(user.name)), "item": (history.table, item)}
    return pl.DataFrame(
        {
            name: _model_ids(np.asarray(values[liked]), table, dataset, schema, tokens)  # type: ignore[index]
            for name, (table, values) in columns.items()
        }
    ).with_columns(time=dataset.timestamp[liked])  # type: ignore[index]


def _model_ids(
    ids: Ids,
    table: str,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    tokens: Mapping[str, Sequence[str]],
) -> NDArray[np.int32]:
    """Return ids of a data set as ids of a model, whose vocabulary may be another one."""
    digests = (s.vocabulary_hashes.get(table) for s in (dataset.schema, schema))
    if len(set(digests)) == 1:
        return ids
    theirs = pl.DataFrame({"token": pl.Series(dataset.vocabulary(table), dtype=pl.String)})
    ours = pl.DataFrame({"token": pl.Series(tokens[table], dtype=pl.String)})
    ours = ours.with_row_index("id", FIRST_ID)
    joined = theirs.join(ours, on="token", how="left", maintain_order="left")["id"]
    table_of = np.full(FIRST_ID + len(theirs), OOV_ID, np.int32)
    table_of[FIRST_ID:] = joined.fill_null(OOV_ID).to_numpy()
    translated: NDArray[np.int32] = table_of[ids]
    return translated
