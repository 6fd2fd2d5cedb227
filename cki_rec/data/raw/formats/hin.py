"""Ratings with attributes of users and items: Douban-Book and Yelp as published with HERec.

The data set is a folder or a zip. ``user_ITEM.dat`` has a user, an item and a rating a line. Every
other ``user_NAME.dat`` and ``ITEM_NAME.dat`` has a user or an item and one value of an attribute.
The file without its suffix is the name of the field. Columns are separated by tabs or spaces, and
weights of attributes are not read.
Source: https://github.com/librahu/HIN-Datasets-for-Recommendation-and-Network-Embedding (Shi et
al., Heterogeneous Information Network Embedding for Recommendation, TKDE 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.delimited import Layout, read_rows, row_chunks
from cki_rec.data.raw.reading import LABEL, RawFiles, Reading, Text, paths

SUFFIX = ".dat"
USER = "user"
SEPARATOR = "|"
"""Separator of the values of an attribute in the common form."""


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of a data set."""

    raw: RawFiles
    ratings: str
    """Member with the ratings."""
    attributes: dict[str, tuple[str, str]]
    """Field -> its member, and the column of the ratings that it describes."""


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    source = _find(data)
    members = [source.ratings, *(member for member, _ in source.attributes.values())]
    return list(dict.fromkeys(source.raw.on_disk(members)))


def kinds(data: Data) -> dict[str, str]:
    """Return the kind of every field: an attribute with several values of one entity is a set."""
    source = _find(data)
    tables = {name: _read_attribute(source, name, Reading("error")) for name in source.attributes}
    is_single = {name: table[name].list.len().max() == 1 for name, table in tables.items()}
    attributes = {name: "categorical" if is_single[name] else "multi" for name in tables}
    return {"user": "categorical", "item": "categorical", **attributes}


def user(_: Data) -> str:
    """Return the column of users."""
    return "user"


def item(_: Data) -> str:
    """Return the column of items."""
    return "item"


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the ratings with the attributes of their users and items.

    Raises:
        UserError: A file is missing or damaged, or a row is bad.
    """
    source = _find(data)
    entries = [entry if isinstance(entry, str) else entry.get("column", entry["name"])
               for entry in data.fields]  # fmt: skip
    used = [name for name in source.attributes if name in (*entries, data.partition.by)]
    tables = {}
    for name in used:
        table = _read_attribute(source, name, reading)
        key = source.attributes[name][1]
        tables[key, name] = table.with_columns(pl.col(name).list.join(SEPARATOR))
    text = source.raw.text(source.ratings)
    layout = Layout(
        columns={"user": "text", "item": "text", "rating": "number"},
        separator=_separator(text),
        required=("user", "item", "rating"),
    )
    step = partial(_common_form, tables=tables, threshold=data.label_threshold)
    yield from row_chunks(text, layout, reading, step)


def _common_form(
    ratings: pl.DataFrame, tables: dict[tuple[str, str], pl.DataFrame], threshold: float
) -> pl.DataFrame:
    for (key, _), table in tables.items():
        ratings = ratings.join(table, on=key, how="left", maintain_order="left")
    return ratings.with_columns((pl.col("rating") >= threshold).cast(pl.UInt8).alias(LABEL))


def _find(data: Data) -> _Source:
    """Return the files of ratings and of attributes."""
    listed = paths(data)
    if len(listed) != 1:
        raise UserError(f"data.raw={data.raw}: {len(listed)} paths, expected one zip or folder")
    raw = RawFiles(listed[0])
    members = {PurePosixPath(m).stem: m for m in raw.members() if m.endswith(SUFFIX)}
    pairs = {stem: stem.split("_", 1) for stem in members if "_" in stem}
    described = {first for first, _ in pairs.values()} - {USER}
    ratings = [s for s, (first, second) in pairs.items() if first == USER and second in described]
    if len(ratings) != 1:
        found = ", ".join(sorted(members.values())[:8]) or "nothing"
        raise UserError(
            f"{raw.path}: contains no ratings user_ITEM.dat with an attribute ITEM_NAME.dat (found"
            f" {found}), expected files such as user_book.dat and book_author.dat; set data.raw"
        )
    thing = pairs[ratings[0]][1]
    attributes = {
        stem: (members[stem], "user" if first == USER else "item")
        for stem, (first, second) in sorted(pairs.items())
        if stem != ratings[0] and first in (USER, thing) and second not in (USER, thing)
    }
    return _Source(raw, members[ratings[0]], attributes)


def _read_attribute(source: _Source, name: str, reading: Reading) -> pl.DataFrame:
    """Return every described user or item with the list of its distinct values."""
    member, key = source.attributes[name]
    text = source.raw.text(member)
    separator = _separator(text)
    columns = {key: "text", name: "text"}
    if len(text.first_line().split(separator)) == 3:
        columns["weight"] = "text"
    layout = Layout(columns=columns, separator=separator, required=(key, name))
    rows = pl.concat(list(read_rows(text, layout, reading)))
    return rows.group_by(key, maintain_order=True).agg(pl.col(name).unique(maintain_order=True))


def _separator(text: Text) -> str:
    return "\t" if "\t" in text.first_line() else " "
