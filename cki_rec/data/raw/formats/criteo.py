"""Criteo: ``train.txt`` of the Kaggle (DAC) set and the day files of the 1TB set.

Columns are separated by tabs, without a header: label, 13 integers ``I1`` to ``I13``, 26 hashed
categories ``C1`` to ``C26``. An empty value is missing. Rows are in chronological order.
Source: https://ailab.criteo.com/ressources/ (Kaggle Display Advertising Challenge; Terabyte Click
Logs).
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.delimited import Layout, row_chunks
from cki_rec.data.raw.reading import LABEL, Reading, Text, no_column, text_paths, texts

INTEGERS = tuple(f"I{number}" for number in range(1, 14))
CATEGORIES = tuple(f"C{number}" for number in range(1, 27))
LAYOUT = Layout(
    columns={
        "label": "click",
        **dict.fromkeys(INTEGERS, "integer"),
        **dict.fromkeys(CATEGORIES, "text"),
    },
    separator="\t",
)

files = text_paths
user = item = no_column


def kinds(_: Data) -> dict[str, str]:
    """Return the kind of every field."""
    return {**dict.fromkeys(INTEGERS, "numeric"), **dict.fromkeys(CATEGORIES, "categorical")}


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the rows of all files, in the order of ``data.raw``.

    Raises:
        UserError: A row or a file is bad, or a file has no labels.
    """
    for text in texts(data):
        _check_labeled(text)
        yield from row_chunks(text, LAYOUT, reading, _common_form)


def _common_form(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("label").cast(pl.UInt8).alias(LABEL))


def _check_labeled(text: Text) -> None:
    columns = text.first_line().count("\t") + 1
    if columns == len(LAYOUT.columns) - 1:
        raise UserError(
            f"{text}, line 1: {columns} columns, expected {len(LAYOUT.columns)}: this looks like "
            "Criteo's test file, which has no labels; use train.txt (data.split splits it)"
        )
