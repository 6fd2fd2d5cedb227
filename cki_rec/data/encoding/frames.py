"""Raw rows in memory -> ids and numbers of an encoded data set.

Shape legend: N rows of the frame, C columns of ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, UserError, nearest
from cki_rec.data.columns import Ids, Ints, Ragged
from cki_rec.data.encoding.encoder import Encoder, RowError
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.raw.reading import LABEL, LINE, SPLIT, Reading
from cki_rec.data.schema import FeatureSchema


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
    encoder: Encoder,
    schema: FeatureSchema,
    where: str = "frame",
    first: int = 1,
) -> FrameRows:
    """Return rows as a model of ``schema`` reads them.

    Args:
        frame: The raw columns of the data set's format, as text or typed; for csv those of the
            file. Labels are not read.
        encoder: Of ``rules.encoder_of``.
        schema: Features of the model.
        where: Name of the rows, for messages.
        first: Number of the first row, for messages; a column ``LINE`` has lines instead.

    Raises:
        UserError: A column is missing, or a value is not readable.
    """
    if missing := encoder.missing(frame.columns):
        raise UserError(
            f"{where}: no column {', '.join(missing)}; {nearest(missing[0], frame.columns)}it has"
            f" {', '.join(name for name in frame.columns if name != LINE)}"
        )
    try:
        encoded = encoder.encode(frame)
    except RowError as error:
        named = f"row {first + error.row}"
        if LINE in frame.columns:
            named = f"line {frame[LINE][error.row]}"
        raise UserError(f"{where}, {named}: {error.problem}; correct the value") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    id_columns = [f.name for f in schema.lookups if f.kind == "categorical"]
    ids = np.empty((len(frame), len(id_columns)), np.int32)
    for place, name in enumerate(id_columns):
        ids[:, place] = encoded[name].to_numpy()
    numbers = np.empty((len(frame), len(schema.numbers)), np.float32)
    for place, feature in enumerate(schema.numbers):
        numbers[:, place] = encoded[feature.name].to_numpy()
    lists = [f.name for f in schema.lookups if f.kind != "categorical"]
    return FrameRows(schema, id_columns, ids, numbers, {n: _ragged(encoded[n]) for n in lists})


def _ragged(lists: pl.Series) -> Ragged:
    lengths = lists.list.len().to_numpy().astype(np.int32)
    values = lists.filter(lists.list.len() > 0).explode().to_numpy().astype(np.int32)
    return Ragged(values, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)


def raw_rows(data: Data) -> pl.DataFrame:
    """Return all raw rows of a data set in the common form, in the order of its encoded rows.

    Raises:
        UserError: The raw files are not readable.
    """
    reading = Reading(data.on_bad_row, has_published=False)
    frame = pl.concat(list(FORMATS[data.format].read(data, reading)))
    return frame.drop([name for name in (LABEL, SPLIT, LINE) if name in frame.columns])
