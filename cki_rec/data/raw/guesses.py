"""Guesses about the columns of a text file: kinds, roles, labels, times, words for missing values.

``pipelines.inspect`` prints them and drafts a configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from cki_rec.data.raw.values import LATEST, PAIRS, TIMES, Forms, converted, is_valid

MISSING = ("-", "?", "NULL", "null", "\\N", "NaN", "nan", "NA", "N/A", "None", "none")
"""Words that other programs write for an empty value."""
FORMS = ("plain", "thousands", "decimal_comma")
MOST_CATEGORIES = 20
"""Numbers with more distinct values than this are numeric fields."""
EARLIEST = 946_684_800
"""The year 2000, in seconds: smaller whole numbers are no times, except in columns named so."""
NAMES = {
    "label": r"label|click|clicked|is_click|target|y|converted|conversion|like|liked|purchase|buy",
    "user": r"user|uid|user_?id|customer_?(id)?|member_?(id)?|visitor_?(id)?|session_?(id)?",
    "item": r"item|iid|item_?id|product_?(id)?|movie_?(id)?|ad_?id|sku|article_?(id)?|news_?id"
    r"|video_?(id)?|song_?(id)?|book_?(id)?",
    "time": r"time|timestamp|time_?stamp|date|datetime|ts|at|hour|created_?(at)?|unix\w*",
}
"""Role -> names of columns that have it."""


@dataclass(slots=True)
class Column:
    """Facts about one column of text."""

    name: str
    kind: str
    """``label``, ``number``, ``time``, ``list`` or ``text``."""
    empty: float
    """Share of empty cells, words for missing values included."""
    distinct: int
    examples: list[str]
    missing: list[str]
    """Words for missing values."""
    form: str = ""
    """Form of numbers or times."""
    labels: dict[str, int] | None = None
    """Word -> label, of a candidate for the label."""
    separator: str = ""
    """Separator of a list."""

    def is_named(self, role: str) -> bool:
        """Return whether the name is a usual one for a role."""
        return re.fullmatch(NAMES[role], self.name.strip().lower()) is not None


def describe(values: pl.Series) -> Column:
    """Return the facts about a column of text."""
    name, plain = values.name, values.str.strip_chars(" \t").replace("", None)
    distinct = plain.drop_nulls().unique(maintain_order=True)
    missing = [word for word in MISSING if word in set(distinct.filter(distinct.is_in(MISSING)))]
    known = plain.filter(~plain.is_in(missing).fill_null(True)) if missing else plain.drop_nulls()
    distinct = known.unique(maintain_order=True)
    examples = distinct.head(3).to_list()
    empty = 1 - len(known) / len(values)
    column = Column(name, "text", empty, len(distinct), examples, missing)
    column.labels = labels_of(distinct.to_list()) if len(distinct) == 2 and not empty else None
    times = [f for f in TIMES if len(known) and _fits(known, f, Forms())]
    forms = [f for f in FORMS if len(known) and _fits(known, "number", Forms(number_form=f))]
    if form := _time_form(known, times, column.is_named("time")):
        column.kind, column.form = "time", form
    elif column.labels is not None:
        column.kind = "label"
    elif forms:
        column.kind, column.form = "number", forms[0]
    elif separators := [s for s in "|;, " if _is_list(known, s)]:
        column.kind, column.separator = "list", separators[0]
    return column


def labels_of(values: Sequence[str]) -> dict[str, int] | None:
    """Return word -> label of two values; None if they are no usual pair."""
    words = {value.lower().removesuffix(".0"): value for value in values}
    for positive, negative in (("1", "0"), *PAIRS):
        if set(words) == {positive, negative}:
            return {words[positive]: 1, words[negative]: 0}
    return None


def _fits(values: pl.Series, kind: str, forms: Forms) -> bool:
    """Return whether all values have a form."""
    frame = values.to_frame("value").select(converted("value", kind, forms))
    valid = is_valid("value", kind, forms) & pl.col("value").is_not_null()
    return bool(frame.select(valid.all()).item())


def _time_form(values: pl.Series, forms: Sequence[str], is_named: bool) -> str:
    """Return the form of a column of times; empty if it holds none."""
    if "iso" in forms and not _fits(values, "number", Forms()):
        return "iso"
    numbers = [form for form in forms if form != "iso"]
    if not numbers:
        return ""
    lowest = float(values.cast(pl.Float64, strict=False).min() or 0)  # type: ignore[arg-type]
    if lowest > LATEST and "milliseconds" in numbers:
        return "milliseconds"
    if is_named and "yymmddhh" in numbers and lowest < EARLIEST:
        return "yymmddhh"
    is_recent = lowest >= EARLIEST and "seconds" in numbers
    return "seconds" if is_recent and (is_named or values.n_unique() > MOST_CATEGORIES) else ""


def _is_list(values: pl.Series, separator: str) -> bool:
    """Return whether values are lists of tokens: separated often, from a smaller set."""
    parts = values.str.split(separator)
    if separator == " " or (parts.list.len() > 1).mean() < 0.05:  # type: ignore[operator]
        return False
    return parts.explode().n_unique() < values.n_unique() * 2
