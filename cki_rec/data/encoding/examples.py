"""Raw rows that encode to rows of a data set: examples for exported models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from cki_rec.data.columns import Ragged
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.encoder import Encoder
from cki_rec.data.schema import FIRST_ID

UNSEEN = "a token out of vocabulary"
NUM_TRAINED = 8
"""Rows of the data set; one row without values and one of unseen tokens follow them."""

Row = dict[str, Any]
Words = Mapping[str, Sequence[str]]
"""Table -> its tokens in the order of ids."""


def example_rows(dataset: EncodedDataset, encoder: Encoder) -> list[Row]:
    """Return ten raw rows as plain JSON values: of training rows, an empty and an unseen one.

    A value is the token of an id, or a number that is encoded as the row's number is.
    """
    train = dataset.rows("train")
    places = np.linspace(0, len(train) - 1, NUM_TRAINED).astype(np.int64)
    tables = {f["table"] for f in encoder.fields if f["hash_size"] is None and "mean" not in f}
    words = {table: dataset.vocabulary(table) for table in tables}
    rows = [_raw(dataset, encoder, words, int(train[place])) for place in places]
    time = encoder.rules["time"]
    needed = [time[0]] if time is not None and time[0] in encoder.columns else []
    of_text = {
        f["column"]
        for f in encoder.fields
        if f["kind"] in ("categorical", "multi") or f["separator"] is not None
    }
    empty = {name: rows[0][name] if name in needed else None for name in rows[0]}
    unseen = {n: UNSEEN if n in of_text and n not in needed else v for n, v in rows[-1].items()}
    return [*rows, empty, unseen]


def _raw(dataset: EncodedDataset, encoder: Encoder, words: Words, row: int) -> Row:
    """Return the raw values of a row of the data set."""
    raw: Row = dict.fromkeys(encoder.columns)
    for field in encoder.fields:
        column = dataset.column(field["name"])
        if field["kind"] == "time":
            continue
        name = field["column"]
        if field["kind"] == "history" and field["separator"] is None:
            if field["name"] in encoder.likes:
                continue
            name = f"@{field['name']}"
        if isinstance(column, Ragged):
            ids = column.ids(np.array([row]))[0].tolist()
            tokens = [_token(words, field, value) for value in ids]
            raw[name] = (field["separator"] or "|").join(token or UNSEEN for token in tokens)
        elif "mean" in field:
            raw[name] = _number(float(column[row]), field)
        elif raw.get(name) is None:
            raw[name] = _value(_token(words, field, int(column[row])), field)
    time = encoder.rules["time"]
    if time is not None and time[0] in raw and dataset.timestamp is not None:
        raw[time[0]] = _time(int(dataset.timestamp[row]), time[1])
    return raw


def _token(words: Words, field: Mapping[str, Any], number: int) -> str | None:
    """Return the token of an id; None if it is a hash, or of no token."""
    if field["hash_size"] is not None or number < FIRST_ID:
        return None
    return words[field["table"]][number - FIRST_ID]


def _value(token: str | None, field: Mapping[str, Any]) -> Any:
    """Return a raw value with this token; None: an empty value."""
    if field["kind"] != "numeric":
        return UNSEEN if token is None else token or None
    if not token:
        return None
    if "bounds" in field:
        bounds, bucket = field["bounds"], int(token)
        value = bounds[bucket] if bucket < len(bounds) else bounds[-1] + 1
    elif field["transform"] == "edges":
        value = field["edges"][int(token) + 1]
    elif field["transform"] == "ln_squared":
        number = int(token)
        value = number if number <= 2 else math.ceil(math.exp(math.sqrt(number)))
    else:
        value = float(token)
    return math.floor(value) if field["type"] == "integer" else value


def _number(value: float, field: Mapping[str, Any]) -> float | int:
    """Return the raw number of a standardized one."""
    value = value * field["scale"] + field["shift"]
    if field["transform"] == "log1p":
        value = math.copysign(math.expm1(abs(value)), value)
    return round(value) if field["type"] == "integer" else float(f"{value:.7g}")


def _time(seconds: int, form: str) -> str | int:
    time = datetime.fromtimestamp(seconds, timezone.utc)
    if form == "iso":
        return time.strftime("%Y-%m-%d %H:%M:%S")
    if form == "yymmddhh":
        return time.strftime("%y%m%d%H")
    return seconds * (1000 if form == "milliseconds" else 1)
