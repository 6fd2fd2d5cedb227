"""Avazu: the ``train`` csv of the Kaggle competition, with its header.

``id`` is dropped. ``hour`` (YYMMDDHH) gives the time and the fields hour, weekday and weekend.
Source: https://www.kaggle.com/c/avazu-ctr-prediction.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.delimited import Layout, row_chunks, time_in_seconds
from cki_rec.data.raw.reading import (
    LABEL,
    TIME_FIELDS,
    Reading,
    Text,
    no_column,
    text_paths,
    texts,
)

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
CATEGORIES = tuple(HEADER.split(",")[3:])
LAYOUT = Layout(
    columns={**dict.fromkeys(HEADER.split(","), "text"), "click": "click", "hour": "yymmddhh"},
    separator=",",
    header=HEADER,
    required=("hour",),
    wanted=("click", "hour", *CATEGORIES),
)

files = text_paths
user = item = no_column


def kinds(_: Data) -> dict[str, str]:
    """Return the kind of every field."""
    return {**dict.fromkeys(CATEGORIES, "categorical"), **dict.fromkeys(TIME_FIELDS, "time")}


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the rows of all files, in the order of ``data.raw``.

    Raises:
        UserError: A row or a file is bad, or a file has no labels.
    """
    for text in texts(data):
        _check_labeled(text)
        yield from row_chunks(text, LAYOUT, reading, _common_form)


def _common_form(frame: pl.DataFrame) -> pl.DataFrame:
    label = pl.col("click").cast(pl.UInt8).alias(LABEL)
    return frame.with_columns(label, time_in_seconds("hour", "yymmddhh"))


def _check_labeled(text: Text) -> None:
    if text.first_line() == HEADER.replace("click,", ""):
        raise UserError(
            f"{text}, line 1: this is Avazu's test file, which has no clicks; use the train file "
            "(data.split splits it)"
        )
