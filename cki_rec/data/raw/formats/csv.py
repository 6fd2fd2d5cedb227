"""Csv files with a header, from any program, e.g. the published splits of the BARS benchmark.

``data.raw`` is a folder or zip with ``train.csv``, ``valid.csv`` and ``test.csv`` (each may be
``.csv.gz``) with ``data.split.by=files``, or a list of files with another ``data.split.by``. If a
benchmark publishes no ``valid.csv``, ``data.split.fractions=[0.9,0.1,0]`` draws validation rows
from the training rows, so that no choice depends on test rows.
Source: https://github.com/reczoo/Datasets (Zhu et al., BARS, SIGIR 2022).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import polars as pl

from cki_rec.config import FILE, Data, UserError, nearest
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.content import file_names
from cki_rec.data.raw.delimited import Layout, row_chunks
from cki_rec.data.raw.forms import (
    SEPARATORS,
    check_names,
    first_row,
    fixes_of,
    forms_of,
    option_of_missing,
    resolved,
    separator_of,
)
from cki_rec.data.raw.reading import (
    LABEL,
    LINE,
    SPLIT,
    TIME_FIELDS,
    RawFiles,
    Reading,
    Text,
    draws_validation,
    paths,
    texts,
)
from cki_rec.data.raw.values import Forms, as_word, time_in_seconds

SPLIT_FILES = ("train", "valid", "test")


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    return list(dict.fromkeys(text.path for text, _ in _texts(data)))


def kinds(data: Data) -> dict[str, str]:
    """Return the default kind of every field: columns are categories.

    Raises:
        UserError: The header lacks a column that an option names, or repeats a column.
    """
    (text, _), *_others = _texts(data)
    return kinds_of(_header(text, data), data)


def kinds_of(names: list[str], data: Data) -> dict[str, str]:
    """Return the default kinds of columns, and of the fields that follow from their roles."""
    kinds = dict.fromkeys((n for n in names if n != data.label), "categorical")
    if data.time is not None:
        derived = [n for n in TIME_FIELDS if n not in names or n == data.time]
        kinds.update(dict.fromkeys(derived, "time"))
    if data.time is not None and data.user is not None and data.item is not None:
        kinds.setdefault("history", "history")
    return kinds


def user(data: Data) -> str | None:
    """Return the column of users."""
    return data.user


def item(data: Data) -> str | None:
    """Return the column of items."""
    return data.item


def resolve(data: Data) -> Data:
    """Return options with the separator and the form of times of the first file."""
    return resolved(data, _texts(data)[0][0])


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the rows of all files, training rows first.

    Raises:
        UserError: A row or a file is bad, or the columns of files differ.
    """
    (first, _), *_others = split_texts = _texts(data)
    data = resolved(data, first)
    expected, forms, fixes = _header(first, data), forms_of(data), fixes_of(data)
    types = dict.fromkeys(expected, "text") | dict.fromkeys(numeric_columns(data), "number")
    types[data.label] = "label" if data.labels else "click"
    if data.time is not None:
        types[data.time] = data.time_form
    file_of = file_names(list(dict.fromkeys(text.path for text, _ in split_texts)))
    for text, split in split_texts:
        header, names = first_row(text, SEPARATORS[data.separator])
        check_names(text, names, first, expected)
        layout = Layout(
            columns={name: types[name] for name in names},
            separator=SEPARATORS[data.separator],
            header=header,
            required=(data.label, *(() if data.time is None else (data.time,))),
            is_quoted=True,
            forms=forms,
            fixes=fixes,
        )
        step = partial(
            common_form,
            data=data,
            columns=expected,
            forms=forms,
            split=split,
            file=file_of[text.path],
        )
        yield from row_chunks(text, layout, reading, step)


def common_form(
    frame: pl.DataFrame,
    data: Data,
    columns: list[str],
    forms: Forms,
    split: int | None,
    file: str,
) -> pl.DataFrame:
    """Return the rows of a file in the common form.

    ``split`` is the code of their split, if files define it; ``file`` is the name of the file.
    """
    label = pl.col(data.label)
    if data.labels:
        label = as_word(data.label).replace_strict(forms.labels, return_dtype=pl.UInt8)
    rows = frame.select(list(dict.fromkeys([*columns, LINE])))
    rows = rows.with_columns(label.cast(pl.UInt8).alias(LABEL))
    if split is not None:
        rows = rows.with_columns(pl.lit(split, dtype=pl.UInt8).alias(SPLIT))
    if data.partition.column == FILE:
        rows = rows.with_columns(pl.lit(file).alias(FILE))
    if data.time is not None:
        rows = rows.with_columns(time_in_seconds(data.time, data.time_form))
    return rows


def numeric_columns(data: Data) -> list[str]:
    """Return the columns of numeric fields."""
    entries = [entry for entry in data.fields if isinstance(entry, dict)]
    return [str(e.get("column", e["name"])) for e in entries if e.get("kind") == "numeric"]


def _texts(data: Data) -> list[tuple[Text, int | None]]:
    """Return the files, and the split code of each if files define the split."""
    if data.split.by != "files":
        return [(text, None) for text in texts(data)]
    listed = paths(data)
    if len(listed) == 1:
        raw = RawFiles(listed[0])
        members = {n: raw.find(f"{n}.csv") or raw.find(f"{n}.csv.gz") for n in SPLIT_FILES}
        by_name = {
            name: raw.text(member, data.encoding) for name, member in members.items() if member
        }
    else:
        every = [Text(path, encoding=data.encoding) for path in listed]
        by_name = {text.name.removesuffix(".csv"): text for text in every}
    codes = {name: code for code, name in enumerate(SPLIT_FILES)}
    if draws_validation(data.split) and "valid" not in by_name:
        del codes["valid"]
    missing = [f"{name}.csv" for name in codes if name not in by_name]
    if not missing and len(by_name) == len(codes):
        return [(by_name[name], code) for name, code in codes.items()]
    if isinstance(data.raw, list) and len(listed) == 3:
        return [(Text(path, encoding=data.encoding), code) for code, path in enumerate(listed)]
    problem = f"no {', '.join(missing)}" if missing else "other files"
    raise UserError(
        f"{', '.join(map(str, listed))}: {problem}, expected train.csv, "
        "valid.csv and test.csv; set data.raw to their folder or to a list of three files in this "
        "order, or split the rows with data.split.by=random, or draw "
        "validation rows from train.csv with data.split.fractions=[0.9,0.1,0]"
    )


def _header(text: Text, data: Data) -> list[str]:
    """Return the names of the columns."""
    separator = SEPARATORS[separator_of(text, data)]
    line, names = first_row(text, separator)
    if not re.sub(r"[\t\r\n]", "", line).isprintable():
        raise UserError(
            f"{text}, line 1: found {line[:40]!r}, expected a header of printable text in UTF-8; "
            "set data.encoding, e.g. data.encoding=latin-1, or convert the file"
        )
    if "\ufffd" in line and data.encoding == "utf-8":
        raise UserError(
            f"{text}, line 1: not UTF-8: found {line[:40]!r}, expected a header in UTF-8; set "
            "data.encoding, e.g. data.encoding=latin-1 or cp1252"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{text}, line 1: names {', '.join(twice)} twice, expected every column once; "
            "correct the header"
        )
    reserved = [n for n in names if n == "*" or (n[:1], n[-1:]) == ("^", "$")]
    if reserved:
        raise UserError(
            f"{text}, line 1: column {reserved[0]!r}: the names '*' and '^...$' are reserved, "
            "expected another name; rename the column"
        )
    if absent := option_of_missing(names, data):
        option, name = absent
        raise UserError(
            f"{text}, line 1: no column {name!r} in the header ({', '.join(names[:8])}), "
            f"expected data.{option}; {nearest(name, names)}set data.{option}"
            + _separator_hint(text, data, name)
        )
    return names


def _separator_hint(text: Text, data: Data, name: str) -> str:
    """Return advice to set ``data.separator`` if another one gives a column of this name."""
    for choice in (c for c in SEPARATORS if c != data.separator and data.separator != "auto"):
        if name in first_row(text, SEPARATORS[choice])[1]:
            return f", or data.separator={choice}, which the file seems to have"
    return ""
