"""Parquet and Arrow files, with the options of the format csv.

``data.raw`` is a file, a pattern, a list, or a folder of such files, as Spark writes them. With
``data.split.by=files`` it is a folder with ``train``, ``valid`` and ``test`` (``.parquet``,
``.arrow``), or a list of three files in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import polars as pl

from cki_rec.config import Data, UserError, nearest
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.columnar import TEMPORAL, first_values, is_columnar, row_chunks, schema_of
from cki_rec.data.raw.content import file_names
from cki_rec.data.raw.delimited import Layout
from cki_rec.data.raw.formats.csv import SPLIT_FILES, common_form, kinds_of, numeric_columns
from cki_rec.data.raw.forms import SAMPLE_ROWS, fitting_form, fixes_of, forms_of, option_of_missing
from cki_rec.data.raw.reading import Reading, draws_validation, paths

NO_FIELDS = (pl.Struct, pl.Binary, pl.Object, pl.Array, pl.Duration, pl.Time)
"""Types that no field can have."""


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    return [path for path, _ in _files(data)]


def kinds(data: Data) -> dict[str, str]:
    """Return the default kind of every field: lists are ``multi``, other columns categories.

    Raises:
        UserError: A column that an option names is not there.
    """
    path, _ = _files(data)[0]
    columns = _columns(path, data)
    lists = {n: "multi" for n, dtype in columns.items() if isinstance(dtype, pl.List)}
    return {n: lists.get(n, kind) for n, kind in kinds_of(list(columns), data).items()}


def user(data: Data) -> str | None:
    """Return the column of users."""
    return data.user


def item(data: Data) -> str | None:
    """Return the column of items."""
    return data.item


def resolve(data: Data) -> Data:
    """Return options with the form of times of the first file; dates and times become seconds."""
    path, _ = _files(data)[0]
    if data.time is None or data.time_form != "auto":
        return replace(data, time_form="seconds" if data.time is None else data.time_form)
    if isinstance(_columns(path, data)[data.time], TEMPORAL):
        return replace(data, time_form="seconds")
    form = fitting_form(path, first_values(path, data.time, SAMPLE_ROWS), data)
    return replace(data, time_form=cast(Any, form))


def recorded_forms(data: Data) -> dict[str, Any]:
    """Return the options of the form of values that differ from the defaults, for manifests."""
    forms = forms_of(data)
    named = {"labels": dict(forms.labels), "missing": list(forms.missing)}
    return {name: value for name, value in named.items() if value}


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the rows of all files, training rows first.

    Raises:
        UserError: A file is bad, or its columns differ from those of the first one.
    """
    options = resolve(data)
    listed = _files(data)
    first = listed[0][0]
    expected = _columns(first, data)
    entries = [str(e.get("column", e["name"])) if isinstance(e, dict) else e for e in data.fields]
    named = (data.label, data.user, data.item, data.time, data.partition.column)
    roles = [n for n in named if n is not None]
    read = [n for n in expected if not data.fields or n in (*entries, *roles)]
    file_of = file_names([path for path, _ in listed])
    for path, split in listed:
        columns, data = _columns(path, options), options
        if data.time is not None and isinstance(columns[data.time], TEMPORAL):
            data = replace(data, time_form="seconds")
        if lacking := [name for name in read if name not in columns]:
            raise UserError(
                f"{path}: no column {', '.join(lacking)}, expected the columns of {first}; "
                "write the file again or set data.raw"
            )
        _check_types(path, {name: columns[name] for name in read}, data)
        layout = Layout(
            columns={name: _kind(name, columns[name], data) for name in read},
            separator=",",
            required=(data.label, *(() if data.time is None else (data.time,))),
            forms=forms_of(data),
            fixes=fixes_of(data),
        )
        step = partial(
            common_form,
            data=data,
            columns=read,
            forms=layout.forms,
            split=split,
            file=file_of[path],
        )
        yield from row_chunks(path, layout, reading, step)


def _kind(name: str, dtype: pl.DataType, data: Data) -> str:
    """Return the kind of a column: a key of ``values.TYPES``."""
    if name == data.label:
        return "label" if data.labels else "click"
    if name == data.time:
        return data.time_form
    if name in numeric_columns(data):
        return "integer" if dtype.is_integer() else "number"
    return "text"


def _check_types(path: Path, columns: dict[str, pl.DataType], data: Data) -> None:
    """Check that columns have types that their fields can have.

    Raises:
        UserError: One has not.
    """
    for name, dtype in columns.items():
        is_list, inner = isinstance(dtype, pl.List), getattr(dtype, "inner", None)
        if isinstance(dtype, NO_FIELDS) or isinstance(inner, pl.List):
            raise UserError(
                f"{path}: column {name!r} is of type {dtype}, expected numbers, text, dates or "
                "lists of them; leave it out of data.fields or write it in another type"
            )
        if is_list and _kind(name, dtype, data) != "text":
            raise UserError(
                f"{path}: column {name!r} is of type {dtype}, expected one value a row; give the "
                "field kind: multi, or name another column"
            )


def _columns(path: Path, data: Data) -> dict[str, pl.DataType]:
    """Return the columns of a file; those that options name must be there."""
    columns = schema_of(path)
    if absent := option_of_missing(list(columns), data):
        option, name = absent
        raise UserError(
            f"{path}: no column {name!r} ({', '.join(list(columns)[:8])}), expected "
            f"data.{option}; {nearest(name, columns)}set data.{option}"
        )
    return columns


def _files(data: Data) -> list[tuple[Path, int | None]]:
    """Return the files, and the split code of each if files define the split."""
    listed: list[Path] = []
    for path in paths(data):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [p for p in inside if p is path or (p.is_file() and is_columnar(p))]
        if not found:
            raise UserError(f"{path}: contains no Parquet or Arrow file; set data.raw")
        listed += found
    if data.split.by != "files":
        return [(path, None) for path in listed]
    by_name = {path.stem: path for path in listed}
    codes = {name: code for code, name in enumerate(SPLIT_FILES)}
    if draws_validation(data.split) and "valid" not in by_name:
        del codes["valid"]
    if set(codes) == set(by_name):
        return [(by_name[name], code) for name, code in codes.items()]
    if isinstance(data.raw, list) and len(listed) == len(SPLIT_FILES):
        return [(path, code) for code, path in enumerate(listed)]
    raise UserError(
        f"data.raw={data.raw}: files {', '.join(sorted(by_name)[:5])}, expected train, valid and "
        "test; set data.raw to their folder or to a list in this order, or set "
        "data.split.by=random"
    )
