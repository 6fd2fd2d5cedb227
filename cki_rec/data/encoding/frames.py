"""Raw rows in memory -> ids and numbers of an encoded data set, by the code that encoded it.

Shape legend: N rows of the frame, C columns of ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, UserError, nearest
from cki_rec.data.columns import RAGGED, ColumnFile, Ids, Ints, Ragged
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding import normalize
from cki_rec.data.encoding.encode import fill_buckets, listed_vocabularies
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.history import histories
from cki_rec.data.encoding.lookup import look_up
from cki_rec.data.encoding.numbers import ordered_keys, scaled
from cki_rec.data.encoding.staging import Staging, plan_columns, stage_frame
from cki_rec.data.raw.formats import FORMATS, recorded_format, recorded_name
from cki_rec.data.raw.reading import LABEL, LINE, SPLIT, TIME, Reading
from cki_rec.data.schema import OOV_ID, FeatureSchema

NOT_OPTIONS = ("format", "fields", "split", "synthetic", "vocabularies", "on_bad_row")
"""Options of a manifest that are not read as they are."""
RAW_FILE = "frame"


@dataclass(slots=True)
class FrameRows:
    """Rows without labels, in memory, in the form of an encoded data set."""

    schema: FeatureSchema
    id_columns: list[str]
    ids: Ids
    """``(N, C)``."""
    numbers: NDArray[np.float32]
    """``(N, numeric fields)``."""
    ragged: dict[str, Ragged]

    def __len__(self) -> int:
        """Return N."""
        return len(self.numbers)

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field."""
        if name in self.ragged:
            return self.ragged[name]
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        return self.numbers[:, [feature.name for feature in self.schema.numbers].index(name)]

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return NaN: these rows have no labels."""
        return np.full(len(rows), np.nan, np.float32)


def encode_frame(
    frame: pl.DataFrame,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    tokens: Mapping[str, Sequence[str]],
    data: Data,
) -> FrameRows:
    """Return rows as a model of ``schema`` reads them.

    Args:
        frame: The raw columns of the data set's format, as text or typed; for csv those of the
            file. Labels are not read.
        dataset: The data set whose options, scales and histories are used.
        schema: Features of the model.
        tokens: Table -> its tokens in the order of ids; tables of hashes are left out.
        data: Options that the manifest lacks.

    Raises:
        UserError: A column is missing, or a value is not readable.
    """
    options, names = dataset.manifest["options"], {f.name for f in schema.features}
    every = [_field(entry) for entry in options["fields"]]
    chosen = tuple(field for field in every if field.name in names)
    data = _data_of(options, data, every)
    reader = recorded_format(options["format"])
    user = reader.user(data)
    plan = plan_columns(chosen, None, None, data.numeric_missing, data.buckets)
    if data.normalize_ids:
        plan.normalized = normalize.id_columns(chosen, ())
    rows = _common_form(frame, data, chosen, bool(plan.histories))
    with TemporaryDirectory() as name, closing(Staging(Path(name), plan)) as columns:
        columns.append(stage_frame(plan, rows, Reading("error", has_published=False)))
        columns.files["split"] = ColumnFile(Path(name) / "split.npy", np.uint8)
        columns.files["split"].append(np.zeros(len(rows), np.uint8))
        edges = dataset.manifest["quantile_edges"]
        for number, column in enumerate(plan.quantiles):
            fill_buckets(columns, number, ordered_keys(np.array(edges[column.name])))
        listed = {table: pl.Series(words, dtype=pl.String) for table, words in tokens.items()}
        look_up(columns, listed_vocabularies(columns, listed))
        id_columns = [column.name for column in plan.ids]
        files = columns.files
        ids = files["ids"].read(0, len(rows)) if plan.ids else np.empty((len(rows), 0), np.int32)
        ragged = {
            column.name: Ragged(*(_all(files[f"field.{column.name}.{piece}"]) for piece in RAGGED))
            for column in plan.multi
        }
        numbers = np.empty((len(rows), 0), np.float32)
        if plan.numbers:
            numbers = _scaled(files["raw_numbers"].read(0, len(rows)), plan.numbers, dataset)
    for history, source in plan.histories.items():
        keys = [f.name for f in plan.ids if f.column == user and f.kind == "categorical"]
        ragged[history] = _history(
            dataset, every, history, source.name, keys, (ids, id_columns), rows
        )
    return FrameRows(schema, id_columns, ids, numbers, ragged)


def _field(entry: Mapping[str, Any]) -> Field:
    edges = entry.get("edges")
    return Field(**{**entry, "edges": None if edges is None else tuple(edges)})


def _data_of(options: Mapping[str, Any], data: Data, every: Sequence[Field]) -> Data:
    """Return the options of the data set, for its reader."""
    known = {f.name for f in fields(Data)} - set(NOT_OPTIONS)
    read = {name: value for name, value in options.items() if name in known}
    name = next(n for n in FORMATS if recorded_name(n) == options["format"])
    entries = [{"name": f.name, "kind": f.kind, "column": f.column} for f in every]
    plain = replace(data.split, by="random")
    return replace(
        data, format=name, fields=entries, on_bad_row="error", split=plain, part=None, **read
    )


def _common_form(
    frame: pl.DataFrame, data: Data, chosen: Sequence[Field], has_histories: bool
) -> pl.DataFrame:
    """Return rows in the common form of ``data.raw.reading``, with labels of 0."""
    reader = FORMATS[data.format]
    needed = list(dict.fromkeys(f.column for f in chosen if f.kind != "time"))
    needs_time = has_histories or any(f.kind == "time" for f in chosen)
    lists = [f for f in chosen if isinstance(frame.schema.get(f.column), pl.List)]
    joined = (
        pl.col(f.column).cast(pl.List(pl.String)).list.join(f.separator or "|") for f in lists
    )
    frame = frame.with_columns(*joined)
    if reader.has_free_kinds:
        needed += [data.time] if needs_time and data.time is not None else []
        _require(frame, needed)
        return _read_as_file(frame.select(list(dict.fromkeys(needed))), data, needs_time)
    if TIME not in frame.columns and "time" in frame.columns:
        frame = frame.rename({"time": TIME})
    needed += [TIME] if needs_time else []
    _require(frame, needed)
    texts = {f.column for f in chosen if f.kind not in ("numeric", "time")}
    rows = frame.select(pl.col(n).cast(pl.String) if n in texts else pl.col(n) for n in needed)
    return rows.with_columns(pl.lit(0, pl.UInt8).alias(LABEL))


def _read_as_file(frame: pl.DataFrame, data: Data, needs_time: bool) -> pl.DataFrame:
    """Return rows that the reader of the format makes of a frame."""
    plain: dict[str, Any] = {"separator": "comma", "encoding": "utf-8", "labels": None}
    with TemporaryDirectory() as folder:
        path = Path(folder) / RAW_FILE
        label = pl.lit("0").alias(data.label)
        FORMATS[data.format].write_frame(frame.with_columns(label), path)
        data = replace(data, raw=str(path), user=None, item=None, **plain)
        data = data if needs_time else replace(data, time=None)
        kept = [e for e in data.fields if e["column"] in frame.columns]
        data = replace(data, fields=kept)
        reading = Reading("error", has_published=False)
        try:
            return pl.concat(list(FORMATS[data.format].read(data, reading)))
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"the frame as {data.format}")) from None


def _require(frame: pl.DataFrame, needed: Sequence[str]) -> None:
    """Check that a frame has columns.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise UserError(
            f"frame: no column {', '.join(missing)}; {nearest(missing[0], frame.columns)}it has"
            f" {', '.join(frame.columns)}"
        )


def _scaled(
    block: NDArray[np.float64], numbers: Sequence[Field], dataset: EncodedDataset
) -> NDArray[np.float32]:
    """Return numbers on the scale of the data set; empty ones are the mean of training rows."""
    facts = np.array([dataset.manifest["numbers"][field.name] for field in numbers]).T
    shift, scale = facts
    mean = shift.copy()
    names = [feature.name for feature in dataset.schema.numbers]
    for place, field in enumerate(numbers):
        if field.transform == "as_is":  # its shift is 0, whatever its mean
            column = dataset.numbers[dataset.rows("train"), names.index(field.name)]
            mean[place] = column.astype(np.float64).mean()
    return scaled(block, mean, shift, scale)


def _history(
    dataset: EncodedDataset,
    every: Sequence[Field],
    name: str,
    source: str,
    users: Sequence[str],
    encoded: tuple[Ids, list[str]],
    rows: pl.DataFrame,
) -> Ragged:
    """Return the items that each row's user liked before, in training rows of the data set."""
    if any(field.name == name and field.rows == "earlier" for field in every):
        raise UserError(
            f"{name}: rows=earlier reads labels of all rows; predict covers training rows only"
        )
    if not users or dataset.timestamp is None:
        raise UserError(
            f"{name}: histories are looked up by the id of the user, which is no field of this"
            " data set; add it to data.fields"
        )
    ids, id_columns = encoded
    train = dataset.rows("train")
    liked = train[dataset.labels(train) == 1]
    known = [dataset.column(column)[liked] for column in (source, users[0])]  # type: ignore[index]
    user = ids[:, id_columns.index(users[0])]
    part = histories(
        np.concatenate([known[0], np.zeros(len(rows), np.int32)]),
        np.arange(len(liked) + len(rows)) < len(liked),
        np.concatenate([known[1], user]),
        np.concatenate([dataset.timestamp[liked], rows[TIME].to_numpy()]),
        dataset.manifest["options"]["history_length"],
    )
    lengths = np.where(user == OOV_ID, 0, part.lengths[len(liked) :]).astype(np.int32)
    return Ragged(part.values, part.starts[len(liked) :], lengths)


def _all(file: ColumnFile) -> NDArray[Any]:
    return file.read(0, file.rows)


def raw_rows(data: Data) -> pl.DataFrame:
    """Return all raw rows of a data set in the common form, in the order of its encoded rows.

    Raises:
        UserError: The raw files are not readable.
    """
    reading = Reading(data.on_bad_row, has_published=False)
    frame = pl.concat(list(FORMATS[data.format].read(data, reading)))
    return frame.drop([name for name in (LABEL, SPLIT, LINE) if name in frame.columns])
