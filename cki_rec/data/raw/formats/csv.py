"""Csv files with a header, e.g. the published splits of the BARS benchmark.

``data.raw`` is a folder or zip with ``train.csv``, ``valid.csv`` and ``test.csv`` (each may be
``.csv.gz``) with ``data.split.by=files``, or a list of files with another ``data.split.by``. If a
benchmark publishes no ``valid.csv``, ``data.split.fractions=[0.9,0.1,0]`` draws validation rows
from the training rows, so that no choice depends on test rows.
Source: https://github.com/reczoo/Datasets (Zhu et al., BARS, SIGIR 2022).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from cki_rec.config import Data, UserError, nearest
from cki_rec.data.raw.delimited import Layout, check_header, read_rows, time_in_seconds
from cki_rec.data.raw.reading import (
    LABEL,
    SPLIT,
    TIME_FIELDS,
    RawFiles,
    Reading,
    Text,
    draws_validation,
    paths,
    texts,
)

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
    names = _header(text, data)
    kinds_of = dict.fromkeys((n for n in names if n != data.label), "categorical")
    if data.time is not None:
        derived = [n for n in TIME_FIELDS if n not in names or n == data.time]
        kinds_of.update(dict.fromkeys(derived, "time"))
    if data.time is not None and data.user is not None and data.item is not None:
        kinds_of.setdefault("history", "history")
    return kinds_of


def user(data: Data) -> str | None:
    """Return the column of users."""
    return data.user


def item(data: Data) -> str | None:
    """Return the column of items."""
    return data.item


def read(data: Data, reading: Reading) -> Iterator[pl.DataFrame]:
    """Yield the rows of all files, training rows first.

    Raises:
        UserError: A row or a file is bad, or the headers of files differ.
    """
    (first, _), *_others = split_texts = _texts(data)
    header = first.first_line()
    types = {name: "text" for name in _header(first, data)}
    types.update(dict.fromkeys(_numeric_columns(data), "number"))
    types[data.label] = "click"
    if data.time is not None:
        types[data.time] = data.time_form
    layout = Layout(
        columns=types,
        separator=",",
        header=header,
        required=() if data.time is None else (data.time,),
        is_quoted=True,
    )
    for text, split in split_texts:
        check_header(text, text.first_line(), header)
        for frame in read_rows(text, layout, reading):
            rows = frame.with_columns(pl.col(data.label).cast(pl.UInt8).alias(LABEL))
            if split is not None:
                rows = rows.with_columns(pl.lit(split, dtype=pl.UInt8).alias(SPLIT))
            if data.time is not None:
                rows = rows.with_columns(time_in_seconds(data.time, data.time_form))
            yield rows


def _numeric_columns(data: Data) -> list[str]:
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
        by_name = {name: raw.text(member) for name, member in members.items() if member}
    else:
        by_name = {Text(path).name.removesuffix(".csv"): Text(path) for path in listed}
    codes = {name: code for code, name in enumerate(SPLIT_FILES)}
    if draws_validation(data.split) and "valid" not in by_name:
        del codes["valid"]
    missing = [f"{name}.csv" for name in codes if name not in by_name]
    if not missing and len(by_name) == len(codes):
        return [(by_name[name], code) for name, code in codes.items()]
    if isinstance(data.raw, list) and len(listed) == 3:
        return [(Text(path), code) for code, path in enumerate(listed)]
    problem = f"no {', '.join(missing)}" if missing else "other files"
    raise UserError(
        f"{', '.join(map(str, listed))}: {problem}, expected train.csv, "
        "valid.csv and test.csv; set data.raw to their folder or to a list of three files in this "
        "order, or split the rows with data.split.by=random, or draw "
        "validation rows from train.csv with data.split.fractions=[0.9,0.1,0]"
    )


def _header(text: Text, data: Data) -> list[str]:
    """Return the names of the columns."""
    line = text.first_line()
    if not line.isprintable():
        raise UserError(
            f"{text}, line 1: found {line[:40]!r}, expected a header of printable text in UTF-8; "
            "convert the file"
        )
    names = next(csv.reader(io.StringIO(line)), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{text}, line 1: names {', '.join(twice)} twice, expected every column once; "
            "correct the header"
        )
    for option, name in (
        ("label", data.label),
        ("user", data.user),
        ("item", data.item),
        ("time", data.time),
    ):
        if name is not None and name not in names:
            raise UserError(
                f"{text}, line 1: no column {name!r} in the header ({', '.join(names[:8])}), "
                f"expected data.{option}; {nearest(name, names)}set data.{option}"
            )
    return names
