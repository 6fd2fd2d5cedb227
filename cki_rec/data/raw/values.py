"""Text of a column -> typed values, by the kind of the column. Both paths use these rules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from cki_rec.data.raw.reading import TIME

TYPES: dict[str, type[pl.DataType]] = {
    "text": pl.String,
    "label": pl.String,
    "integer": pl.Int64,
    "number": pl.Float64,
    "click": pl.Float64,
    "yymmddhh": pl.Int64,
    "seconds": pl.Int64,
    "milliseconds": pl.Int64,
    "iso": pl.String,
}
"""Kind of a column -> its type. A ``click`` is 0 or 1, a ``label`` is a word that means 0 or 1."""
TIMES = ("seconds", "milliseconds", "iso", "yymmddhh")
"""Kinds that are times."""
LATEST = 4_102_444_800
"""Latest valid time: the year 2100, in seconds. Larger numbers are milliseconds or no times."""
BLANKS = " \t"
"""Characters that are removed from both ends of numbers, times and labels."""
_INTEGER = r"^[+-]?[0-9]+$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_GROUPED = {
    "thousands": (r"^[+-]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)?(\.[0-9]*)?$", ",", "."),
    "decimal_comma": (r"^[+-]?([0-9]{1,3}(\.[0-9]{3})+|[0-9]+)?(,[0-9]*)?$", ".", ","),
}
"""Form of numbers -> pattern, separator of thousands, decimal sign."""
_SIGNS = "[$\u20ac\u00a3\u00a5%\\s]"
"""Signs of currencies, per cent and blanks, which these forms ignore."""
_ISO = (
    r"^(\d{4})-?(\d\d)-?(\d\d)(?:[T ]?(\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,]\d+)?)?)?)?"
    r" ?(Z|[+-]\d\d(?::?\d\d)?)?$"
)
PAIRS = (("true", "false"), ("yes", "no"), ("t", "f"), ("y", "n"), ("1", "-1"), ("2", "1"))
"""Words that other programs write for the labels 1 and 0."""
MEANING = {"integer": "a whole number", "number": "a number", "click": "0 or 1",
           "yymmddhh": "a time as YYMMDDHH", "seconds": "seconds since 1970",
           "milliseconds": "milliseconds since 1970",
           "iso": "a time as 2024-03-01 00:00:50"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms of values in a file, as options of the format csv describe them."""

    labels: Mapping[str, int] = field(default_factory=dict)
    """Word in lower case -> the label it means."""
    missing: tuple[str, ...] = ()
    """Words that count as empty."""
    number_form: str = "plain"
    """``plain``, or a key of ``_GROUPED``."""


def converted(name: str, kind: str, forms: Forms) -> pl.Expr:
    """Return the typed values of a column of text; null if a value is empty or has no such form.

    Args:
        name: The column, without empty values and words for them.
        kind: A key of ``TYPES``.
        forms: The form of numbers.
    """
    text = pl.col(name)
    if TYPES[kind] is pl.String:
        return text
    text = text.str.strip_chars(BLANKS)
    if kind == "number" and forms.number_form != "plain":
        pattern, group, point = _GROUPED[forms.number_form]
        text = text.str.replace_all(_SIGNS, "")
        plain = text.str.replace_all(group, "", literal=True)
        plain = plain.str.replace(point, ".", literal=True)
        text = pl.when(text.str.contains(pattern)).then(plain)
    if kind in ("seconds", "milliseconds"):
        text = text.str.replace(r"\.0*$", "")
    pattern = _NUMBER if TYPES[kind] is pl.Float64 else _INTEGER
    signless = text.str.strip_prefix("+")
    return pl.when(text.str.contains(pattern)).then(signless).cast(TYPES[kind], strict=False)


def is_valid(name: str, kind: str, forms: Forms) -> pl.Expr:
    """Return whether typed values are valid; an empty label is not, an empty value otherwise is.

    Args:
        name: The typed column.
        kind: A key of ``TYPES``.
        forms: The words for labels.
    """
    column = pl.col(name)
    if kind == "click":
        return column.is_in([0.0, 1.0]).fill_null(False)
    if kind == "label":
        return as_word(name).is_in(list(forms.labels)).fill_null(False)
    if kind in ("yymmddhh", "iso"):
        return column.is_null() | seconds(name, kind).is_between(0, LATEST).fill_null(False)
    if kind in ("seconds", "milliseconds"):
        return column.is_between(0, LATEST * (1000 if kind == "milliseconds" else 1)).fill_null(
            True
        )
    return column.is_finite().fill_null(True)


def as_word(name: str) -> pl.Expr:
    """Return the words of a label column, as ``Forms.labels`` has them."""
    return pl.col(name).str.strip_chars(BLANKS).str.to_lowercase()


def seconds(name: str, kind: str) -> pl.Expr:
    """Return the times of a typed column in seconds; null if a value is not a time."""
    if kind == "seconds":
        return pl.col(name)
    if kind == "milliseconds":
        return pl.col(name) // 1000
    if kind == "yymmddhh":
        digits = pl.col(name).cast(pl.String).str.zfill(8)
        form = "%Y%m%d%H%M"
        return (
            (pl.lit("20") + digits + "00")
            .str.strptime(pl.Datetime, form, strict=False)
            .dt.epoch("s")
        )
    part = pl.col(name).str.strip_chars(BLANKS).str.extract_groups(_ISO)
    parts = [part.struct.field(str(n)) for n in range(1, 8)]
    numbers = [p.fill_null("00") if n > 2 else p for n, p in enumerate(parts[:6])]
    local = pl.concat_str(numbers).str.strptime(pl.Datetime, "%Y%m%d%H%M%S", strict=False)
    zone = parts[6].str.replace("Z", "+00", literal=True).fill_null("+00")
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    hours = zone.str.slice(1, 2).cast(pl.Int64, strict=False)
    minutes = zone.str.slice(-2, 2).cast(pl.Int64, strict=False)
    minutes = pl.when(zone.str.len_chars() > 3).then(minutes).otherwise(0)
    return local.dt.epoch("s") - sign * (3600 * hours + 60 * minutes)


def time_in_seconds(column: str, form: str) -> pl.Expr:
    """Return the column ``TIME`` in seconds, from a column of valid times in ``form``."""
    return seconds(column, form).alias(TIME)


def fault_of(name: str, kind: str, value: str, forms: Forms) -> tuple[str, str]:
    """Return the reason and the expectation for a value that is not valid."""
    shown = repr(value if len(value) <= 40 else value[:37] + "...")
    words = ", ".join(forms.labels) if kind == "label" else MEANING[kind]
    expected = f"{words} in {name}, not {shown}"
    bare = value.strip(BLANKS)
    if kind == "label":
        return "not a label", expected
    if kind == "iso":
        return "not a time", expected
    if TYPES[kind] is pl.Int64:
        is_number = re.match(_INTEGER, bare) and -(2**63) <= int(bare) < 2**63
        return ("not a time" if is_number else "not a number"), expected
    if kind == "number" and forms.number_form != "plain":
        return "not a number", expected
    if not re.match(_NUMBER, bare):
        is_special = bare.lower().lstrip("+-") in ("nan", "inf", "infinity")
        return ("not finite" if is_special else "not a number"), expected
    if kind == "click" and math.isfinite(float(bare)):
        return "not a label", expected
    return "not finite", expected


def suggested_labels(value: str) -> str:
    """Return the value of ``data.labels`` that a label suggests."""
    word = value.strip(BLANKS).lower()
    positive, negative = next((pair for pair in PAIRS if word in pair), ("GOOD", "BAD"))
    return f"data.labels={{{positive}: 1, {negative}: 0}}"
