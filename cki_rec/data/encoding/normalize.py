"""Ids without differences of form, so that files of several programs share tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl

from cki_rec.data.encoding.fields import Field
from cki_rec.data.raw.reading import TIME_FIELDS

_DECIMAL = r"^([+-]?[0-9]+)\.0*$"
_EXPONENT = r"^[+-]?[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+$"
LARGEST = 2.0**53
"""Largest id with an exponent that is converted, since a float represents smaller ones exactly."""


def id_columns(fields: tuple[Field, ...], entities: Iterable[str | None]) -> dict[str, str | None]:
    """Return the columns of ids -> the separator of their ids; None: one id.

    Args:
        fields: The fields of the data set.
        entities: Columns of users and items.
    """
    separators = {
        f.column: f.separator
        for f in fields
        if f.kind != "numeric" and not (f.kind == "time" and f.column in TIME_FIELDS)
    }
    others = {name: None for name in entities if name is not None and name not in separators}
    return separators | others


def normalized(frame: pl.DataFrame, separators: Mapping[str, str | None]) -> pl.DataFrame:
    """Return rows in the common form with normalized ids in the columns of ``id_columns``."""
    texts = [
        _each(pl.col(n), s) for n, s in separators.items() if frame.schema.get(n) == pl.String
    ]
    lists = [pl.col(n).list.eval(plain_form(pl.element())) for n in separators
             if isinstance(frame.schema.get(n), pl.List)]  # fmt: skip
    return frame.with_columns(*texts, *lists)


def plain_form(token: pl.Expr) -> pl.Expr:
    """Return ids as text without outer blanks, ``.0`` and exponents, with letters in form NFC."""
    text = token.str.strip_chars().str.normalize("NFC").str.replace(_DECIMAL, "${1}")
    value = pl.when(text.str.contains(_EXPONENT)).then(text).cast(pl.Float64, strict=False)
    is_whole = (value == value.round()) & (value.abs() < LARGEST)
    whole = pl.when(is_whole).then(value).cast(pl.Int64).cast(pl.String)
    return pl.coalesce(whole, text)


def _each(column: pl.Expr, separator: str | None) -> pl.Expr:
    """Return normalized ids of a column, whose values may list several."""
    if separator is None:
        return plain_form(column)
    return column.str.split(separator).list.eval(plain_form(pl.element())).list.join(separator)
