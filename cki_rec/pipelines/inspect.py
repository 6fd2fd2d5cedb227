"""``cki-rec inspect my.csv``: describe the columns of a file, and draft its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cki_rec.config import Config, Data, UserError
from cki_rec.data.encoding.fields import is_field_name
from cki_rec.data.raw.columnar import first_rows, is_columnar
from cki_rec.data.raw.forms import SEPARATORS, separator_of
from cki_rec.data.raw.guesses import FORMS, MOST_CATEGORIES, Column, describe
from cki_rec.data.raw.reading import Reading, paths, texts
from cki_rec.data.raw.values import TIMES
from cki_rec.files import write_atomically
from cki_rec.search_path import CONF, WORKING_CONF

MOST_BYTES = 1 << 28
"""Bytes of a text that are looked at, from its start."""
MOST_ROWS = 1 << 20
"""Rows of a Parquet or Arrow file that are looked at."""


def run(config: Config) -> None:
    """Print the columns of ``data.raw``, and write a draft of its file in ``conf/data``.

    Raises:
        UserError: The file is not readable, or it has no columns.
    """
    data, path = config.data, paths(config.data)[0]
    if path.is_file() and is_columnar(path):
        frame, is_whole = _read_columnar(path)
        form = ["format: parquet  # Parquet or Arrow"]
    else:
        frame, separator, is_whole = read_text(data)
        form = [
            "format: csv  # text with a header",
            f"separator: {separator}  # between columns",
            f"encoding: {data.encoding}  # of the text",
        ]
    columns = [describe(frame[name]) for name in frame.columns]
    _print(columns, len(frame), is_whole)
    name = config.data.name if config.data.name != "csv" else file_name(config.data)
    text = draft(name, data, form, columns, len(frame))
    target = WORKING_CONF / "data" / f"{name}.yaml"
    if target.exists() and not config.runtime.force:
        print(f"{target} exists and is kept; runtime.force=true replaces it. The draft:\n\n{text}")
        return
    was_there = target.exists()
    write_atomically(target, text.encode())
    print(f"{'replaced' if was_there else 'wrote'} {target}: read it, every line has a comment")
    if "\nlabel: ???" in text:
        print("no column has two values that could be the label: set `label` and `labels` there")
    print(f"next: cki-rec train data={name}")


def file_name(data: Data) -> str:
    """Return the name of the data set: that of the file, unless ``conf/data`` has it."""
    stem = re.sub(r"\.(csv|tsv|txt|parquet|gz|zip)\b", "", paths(data)[0].name.lower())
    name = re.sub(r"\W+", "_", stem).strip("_") or "mine"
    return f"{name}_own" if (CONF / "data" / f"{name}.yaml").exists() else name


def _read_columnar(path: Path) -> tuple[pl.DataFrame, bool]:
    """Return the first rows of a Parquet or Arrow file as text, and whether they are all.

    The items of a list are joined by ``|``.
    """
    frame = first_rows(path, MOST_ROWS + 1)
    lists = [n for n, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    joined = (pl.col(n).cast(pl.List(pl.String)).list.join("|") for n in lists)
    texts = frame.with_columns(*joined).head(MOST_ROWS)
    texts = texts.select(pl.col(n).cast(pl.String) for n in texts.columns)
    return texts, len(frame) <= MOST_ROWS


def read_text(data: Data) -> tuple[pl.DataFrame, str, bool]:
    """Return the rows as text, the name of the separator, and whether the file was read whole.

    Raises:
        UserError: The file is not readable, or it is not text in columns.
    """
    text = texts(data)[0]
    blocks, size, is_whole = list[bytes](), 0, True
    for block in text.blocks(Reading("error", has_published=False)):
        if size > MOST_BYTES:
            is_whole = False
            break
        blocks.append(block)
        size += len(block)
    content = b"".join(blocks)
    try:
        content.decode()
    except UnicodeDecodeError:
        raise UserError(
            f"{text}: not UTF-8; name its encoding, e.g. data.encoding=latin-1, cp1252 or utf-16"
        ) from None
    separator = separator_of(text, data)
    try:
        frame = pl.read_csv(
            content,
            separator=SEPARATORS[separator],
            infer_schema=False,
            truncate_ragged_lines=True,
        )
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{text}: {str(error).splitlines()[0]}; set data.separator") from None
    if not len(frame):
        raise UserError(f"{text}: no row below the header")
    return frame, separator, is_whole


def _print(columns: Sequence[Column], num_rows: int, is_whole: bool) -> None:
    """Print one row per column."""
    part = "" if is_whole else " (the start of the file)"
    table = Table(title=f"{num_rows:,} rows{part}", title_justify="left", box=SIMPLE_HEAD)
    for title in ("column", "kind", "empty", "distinct", "examples"):
        table.add_column(title, justify="right" if title in ("empty", "distinct") else "left")
    for c in columns:
        kind = " ".join(filter(None, (c.kind, c.form if c.form != "plain" else c.separator)))
        examples = ", ".join(e if len(e) <= 24 else f"{e[:21]}..." for e in c.examples)
        table.add_row(c.name, kind, f"{c.empty:.1%}", f"{c.distinct:,}", examples)
    console = Console(width=110, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def draft(
    name: str, data: Data, form: Sequence[str], columns: Sequence[Column], num_rows: int
) -> str:
    """Return the YAML of the data set, with a comment in every line."""
    labels = sorted(
        (c for c in columns if c.labels),
        key=lambda c: (not c.is_named("label"), c.kind != "label"),
    )
    label = labels[0] if labels else None
    rest = [c for c in columns if c is not label]
    time = next((c for c in rest if c.kind == "time"), None)
    user, item = (next((c for c in rest if c.is_named(r) and c is not time), None)
                  for r in ("user", "item"))  # fmt: skip
    lines = [
        f"# {data.raw}, drafted by cki-rec inspect",
        "defaults:",
        "  - default",
        "  - _self_",
        "",
        f"name: {name}  # of the encoded data set and of this file",
        form[0],
        f"raw: {_yaml(data.raw)}  # a path, a pattern (day_*.csv) or a list",
        *form[1:],
    ]
    others = ", ".join(c.name for c in labels[1:])
    hint = f"; other candidates: {others}" if others else ""
    lines.append(f"label: {_yaml(label.name) if label else '???'}  # the column of clicks{hint}")
    words = (label.labels if label else None) or {}
    is_plain = all(word in ("0", "1", "0.0", "1.0") for word in words)
    shown = (
        "null" if is_plain else f"{{{', '.join(f'{_yaml(w)}: {n}' for w, n in words.items())}}}"
    )
    lines.append(f"labels: {shown}  # word: label; null: the column holds 0 and 1")
    for role, column in (("user", user), ("item", item), ("time", time)):
        value = _yaml(column.name) if column else "null"
        lines.append(f"{role}: {value}  # the column of {role}s; null: there is none")
    time_form = time.form if time else "auto"
    lines.append(f"time_form: {time_form}  # {', '.join(TIMES)}, or auto")
    words_for_missing = dict.fromkeys(word for c in columns for word in c.missing)
    shown = ", ".join(json.dumps(word) for word in words_for_missing)
    lines.append(f"missing: [{shown}]  # words that count as empty, in every column")
    grouped = [c.form for c in columns if c.kind == "number" and c.form != "plain"]
    lines.append(f"number_form: {grouped[0] if grouped else 'plain'}  # {', '.join(FORMS)}")
    lines += ["fields:  # inputs of the model"]
    lines += [f"  {line}" for c in rest for line in _field(c, c in (user, item), time, num_rows)]
    taken = {c.name for c in columns}
    lines += [f"  - {n}  # of the time" for n in ("hour", "weekday") if time and n not in taken]
    by = "time" if time else "random"
    lines += [
        "split:",
        f"  by: {by}  # time (the oldest rows train), random, hash, leave_last_out",
        "partition:",
        f"  by: {'user' if user else 'random'}  # how suite=shards divides rows among sources",
    ]
    return "\n".join(lines) + "\n"


def _field(column: Column, is_entity: bool, time: Column | None, num_rows: int) -> Iterator[str]:
    """Yield the line of a field; a comment for a column that is left out."""
    facts = f"{column.distinct:,} distinct, {column.empty:.1%} empty"
    if column is time:
        return
    reason = ""
    if column.distinct < 2:
        reason = "one value only"
    elif column.distinct == num_rows and column.kind == "text" and not is_entity:
        reason = "another value in every row"
    options = {"name": column.name}
    if not is_field_name(column.name):
        clean = re.sub(r"\W+", "_", column.name).strip("_") or "field"
        name = clean if is_field_name(clean) else f"field_{clean}"
        options = {"name": name, "column": column.name}
    is_number = column.kind == "number" and column.distinct > MOST_CATEGORIES and not is_entity
    if is_number and not re.search(r"(^|_)(id|code|zip)$", column.name.lower()):
        options |= {"kind": "numeric", "transform": "log1p"}
    elif column.kind == "list":
        options |= {"kind": "multi", "separator": column.separator}
    entries = [f"{key}: {_yaml(value)}" for key, value in options.items()]
    shown = _yaml(column.name) if len(options) == 1 else f"{{{', '.join(entries)}}}"
    yield f"# - {shown}  # left out: {reason}" if reason else f"- {shown}  # {facts}"


def _yaml(value: object) -> str:
    """Return a scalar as YAML: quoted unless it is a plain word."""
    text = str(value)
    reserved = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    is_plain = re.fullmatch(r"[A-Za-z_][\w./*-]*", text) and text.lower() not in reserved
    return text if is_plain else json.dumps(text, ensure_ascii=False)
