"""The form of a csv file: separator, header, and the options that describe its values."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.raw.reading import LONGEST_LINE, Reading, Text
from cki_rec.data.raw.values import BLANKS, LATEST, TIMES, Forms, converted, is_valid

SEPARATORS = {"comma": ",", "tab": "\t", "semicolon": ";", "pipe": "|", "space": " "}
"""Choices of ``data.separator``."""
GUESSED = ("comma", "tab", "semicolon", "pipe")
"""Separators that ``auto`` tries, in this order."""
SAMPLE_ROWS = 1000
"""Rows that ``data.time_form=auto`` looks at."""


def first_row(text: Text, separator: str) -> tuple[str, list[str]]:
    """Return the first row of a csv: its lines and its fields, newlines replaced by spaces.

    Raises:
        UserError: Its quotes are wrong.
    """
    lines: list[str] = []

    def taken() -> Iterator[str]:
        for line in _lines(text):
            lines.append(line.removesuffix("\n").removesuffix("\r"))
            yield line

    csv.field_size_limit(LONGEST_LINE)
    try:
        names = next(csv.reader(taken(), delimiter=separator, strict=True), [])
    except csv.Error as error:
        place = "line 1" if len(lines) == 1 else f"lines 1 to {len(lines)}"
        raise UserError(
            f"{text}, {place}: found {lines[0][:40]!r}, expected a header with quotes that close "
            f"({error}); correct the header"
        ) from None
    return "\n".join(lines), [re.sub(r"[\r\n]+", " ", name) for name in names]


def separator_of(text: Text, data: Data) -> str:
    """Return the choice of ``data.separator``; ``auto`` is replaced by the one of a file.

    It is the first with which the header names the column of labels, or else the one with the
    most columns.
    """
    if data.separator != "auto":
        return data.separator
    columns: dict[str, list[str]] = {}
    for choice in GUESSED:
        try:
            columns[choice] = first_row(text, SEPARATORS[choice])[1]
        except UserError:
            columns[choice] = []
    fitting = [choice for choice in GUESSED if data.label in columns[choice]]
    return fitting[0] if fitting else max(GUESSED, key=lambda choice: len(columns[choice]))


def time_form_of(text: Text, data: Data) -> str:
    """Return the choice of ``data.time_form``; ``auto`` is replaced by the one of a file.

    Raises:
        UserError: No form or several fit the first times of the file.
    """
    if data.time_form != "auto" or data.time is None:
        return "seconds" if data.time is None else data.time_form
    reader = csv.reader(_lines(text), delimiter=SEPARATORS[separator_of(text, data)])
    names = [re.sub(r"[\r\n]+", " ", name) for name in next(reader, [])]
    if data.time not in names:
        return "seconds"  # the missing column is reported when the header is checked
    place = names.index(data.time)
    try:
        rows = [r for r in itertools.islice(reader, SAMPLE_ROWS) if len(r) == len(names)]
    except csv.Error:
        rows = []  # reported with its line when the rows are read
    return fitting_form(text, [row[place] for row in rows], data)


def fitting_form(where: object, column: Sequence[str], data: Data) -> str:
    """Return the only form of times that fits the first cells of a column.

    Args:
        where: Name of the file.
        column: The cells.
        data: Options, with the words for empty cells.

    Raises:
        UserError: No form or several fit.
    """
    values = [value.strip(BLANKS) for value in column]
    values = [value for value in values if value not in ("", *forms_of(data).missing)]
    counts = {form: _num_valid(values, form) for form in TIMES}
    fitting = [form for form in TIMES if values and counts[form] == max(counts.values()) > 0]
    if len(fitting) == 1:
        return fitting[0]
    example = f"{values[0]!r}" if values else "no value"
    problem = f"may be {' or '.join(fitting)}" if fitting else "is no time in a known form"
    raise UserError(
        f"{where}: column {data.time!r}: {example} {problem}, expected times in one form; set "
        f"data.time_form to one of {', '.join(TIMES)}"
    )


def forms_of(data: Data) -> Forms:
    """Return the forms of values that the options of a data set describe."""
    labels = {
        word: int(label)
        for key, label in (data.labels or {}).items()
        for word in _label_words(key)
    }
    missing = dict.fromkeys(word for entry in data.missing for word in _missing_words(entry))
    return Forms(labels, tuple(missing), data.number_form)


def recorded_forms(data: Data) -> dict[str, Any]:
    """Return the options of the form that differ from the defaults, for manifests."""
    forms = forms_of(data)
    options = {
        "separator": "" if data.separator == "comma" else data.separator,
        "encoding": "" if data.encoding == "utf-8" else data.encoding,
        "labels": dict(forms.labels),
        "missing": list(forms.missing),
        "number_form": "" if data.number_form == "plain" else data.number_form,
    }
    return {name: value for name, value in options.items() if value}


def resolved(data: Data, text: Text) -> Data:
    """Return options with the separator and the form of times of a file in place of ``auto``."""
    data = replace(data, separator=cast(Any, separator_of(text, data)))
    return replace(data, time_form=cast(Any, time_form_of(text, data)))


def fixes_of(data: Data) -> dict[str, str]:
    """Return the option to name for a bad value, by the kind of its column or by reason."""
    times = f"set data.time_form (now {data.time_form}) to one of {', '.join(TIMES)}"
    return {
        "click": "map the labels to 1 and 0 with {labels}",
        "label": "add the word to data.labels",
        "number": 'name words for missing values in data.missing, e.g. data.missing=["-","NULL"],'
        " set data.number_form=thousands (1,234.5) or decimal_comma (1.234,5), or skip such rows"
        " with data.on_bad_row=skip",
        **dict.fromkeys(TIMES, f"{times}, or skip such rows with data.on_bad_row=skip"),
        "not UTF-8": "set data.encoding, e.g. data.encoding=latin-1 or cp1252, or skip such rows"
        " with data.on_bad_row=skip",
    }


def option_of_missing(names: Sequence[str], data: Data) -> tuple[str, str] | None:
    """Return the first option that names a column which is not there, and the name."""
    options = {"label": data.label, "user": data.user, "item": data.item, "time": data.time}
    absent = [(key, n) for key, n in options.items() if n is not None and n not in names]
    return absent[0] if absent else None


def check_names(text: Text, names: Sequence[str], first: Text, expected: Sequence[str]) -> None:
    """Check that a file has the columns of the first file, in any order.

    Raises:
        UserError: Columns are missing or new.
    """
    lacking = [name for name in expected if name not in names]
    new = [name for name in names if name not in expected]
    if lacking or new or len(names) != len(expected):
        parts = [f"lacks {', '.join(lacking)}"] if lacking else []
        parts += [f"has also {', '.join(new)}"] if new else []
        raise UserError(
            f"{text}, line 1: the header {' and '.join(parts) or 'repeats a column'}, expected "
            f"the columns of {first} ({', '.join(expected[:8])}) in any order; correct the header"
        )


def _lines(text: Text) -> Iterator[str]:
    """Yield the lines of a text with their ends."""
    reading = Reading("error", block_bytes=1 << 16, has_published=False)
    for block in text.blocks(reading, keep_returns=True):
        for line in block.split(b"\n")[:-1]:
            yield line.decode("utf-8", errors="replace") + "\n"


def _num_valid(values: list[str], form: str) -> int:
    texts = pl.DataFrame({"time": values}, schema={"time": pl.String})
    typed = texts.select(converted("time", form, Forms()))
    valid = is_valid("time", form, Forms()) & pl.col("time").is_not_null()
    if form == "milliseconds":
        valid &= pl.col("time") > LATEST  # smaller ones are seconds, or milliseconds of 1970
    return int(typed.select(valid)["time"].sum())


def _label_words(key: object) -> tuple[str, ...]:
    """Return the words in a file for a key of ``data.labels``, which YAML may have converted."""
    if isinstance(key, bool):
        return ("true", "yes") if key else ("false", "no")
    if isinstance(key, int | float):
        return tuple(dict.fromkeys([f"{key:g}", str(float(key))]))
    return ("null",) if key is None else (str(key).strip(BLANKS).lower(),)


def _missing_words(entry: object) -> tuple[str, ...]:
    """Return the words in a file for an entry of ``data.missing``."""
    if entry is None:
        return "null", "NULL", "Null"
    if isinstance(entry, float) and math.isnan(entry):
        return "nan", "NaN", "NAN"
    return (str(entry),)
