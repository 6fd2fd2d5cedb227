"""MovieLens: 100K (tabs), 1M and 10M (``::``), 20M, 25M, 32M, latest and latest-small (csv).

The data set is a zip as published, or a folder. The csv form has ``ratings.csv`` and
``movies.csv``, each with a header. 1M and 10M have ``ratings.dat``, ``movies.dat`` and (1M only)
``users.dat``. 100K has ``u.data``, ``u.item``, ``u.user`` and ``u.genre``. The last two forms are
in latin-1.
Source: https://grouplens.org/datasets/movielens/ (Harper and Konstan, doi 10.1145/2827872).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.delimited import Known, Layout, check_header, row_chunks
from cki_rec.data.raw.reading import LABEL, TIME, TIME_FIELDS, RawFiles, Reading, Text, paths

RATING_FIELDS = {"user": "categorical", "item": "categorical", "genres": "multi",
                 "year": "categorical", **dict.fromkeys(TIME_FIELDS, "time"),
                 "history": "history"}  # fmt: skip
"""Fields of every variant."""
USER_FIELDS = ("gender", "age", "occupation", "zip")
"""Fields that a file of users adds."""
MOVIES_HEADER = "movieId,title,genres"
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_RELEASED = re.compile(r"-(\d{4})$")
_NO_GENRES = ("", "(no genres listed)")
_COLUMNS = {"user": "integer", "item": "text", "rating": "number", "timestamp": "seconds"}


@dataclass(frozen=True, slots=True)
class Variant:
    """Names and separators of one published form."""

    ratings: str
    movies: str
    users: str | None
    separator: str
    header: str | None
    user_order: tuple[str, ...]
    """Columns of the file of users after the id."""


VARIANTS = (
    Variant("ratings.csv", "movies.csv", None, ",", "userId,movieId,rating,timestamp", ()),
    Variant("ratings.dat", "movies.dat", "users.dat", "::", None,
            ("gender", "age", "occupation", "zip")),
    Variant("u.data", "u.item", "u.user", "\t", None, ("age", "gender", "occupation", "zip")),
)  # fmt: skip
DESCRIBES = frozenset(
    {"u.genre"}
    | {name for variant in VARIANTS for name in (variant.movies, variant.users) if name}
)


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of a data set."""

    raw: RawFiles
    variant: Variant
    ratings: str
    movies: str
    users: str | None


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    source = _find(data)
    others = [source.users] if source.users else []
    if source.variant.movies == "u.item":
        others.append(_genres_member(source))
    return source.raw.on_disk([source.ratings, source.movies, *others])


def kinds(data: Data) -> dict[str, str]:
    """Return the kind of every field."""
    users = USER_FIELDS if _find(data).users else ()
    return {**RATING_FIELDS, **dict.fromkeys(users, "categorical")}


def user(_: Data) -> str:
    """Return the column of users."""
    return "user"


def item(_: Data) -> str:
    """Return the column of items."""
    return "item"


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the ratings with the fields of their movies and users.

    Raises:
        UserError: A file is missing or damaged, or a row is bad.
    """
    source = _find(data)
    movies = _read_movies(source, reading)
    users = _read_users(source, reading) if source.users else None
    known = {"item": Known(movies["item"], "unknown movie", "a movie of the movies file")}
    if users is not None:
        known["user"] = Known(users["user"], "unknown user", "a user of the users file")
    layout = Layout(
        columns=_COLUMNS,
        separator=source.variant.separator,
        header=source.variant.header,
        required=tuple(_COLUMNS),
        known=known,
    )
    step = partial(_common_form, movies=movies, users=users, threshold=data.label_threshold)
    yield from row_chunks(source.raw.text(source.ratings), layout, reading, step)


def _common_form(
    ratings: pl.DataFrame, movies: pl.DataFrame, users: pl.DataFrame | None, threshold: float
) -> pl.DataFrame:
    rows = ratings.join(movies, on="item", how="left", maintain_order="left")
    if users is not None:
        rows = rows.join(users, on="user", how="left", maintain_order="left")
    return rows.with_columns(
        (pl.col("rating") >= threshold).cast(pl.UInt8).alias(LABEL),
        pl.col("timestamp").alias(TIME),
        pl.col("user").cast(pl.String),
    )


def _find(data: Data) -> _Source:
    """Return the files of ratings, movies and, if there are any, users."""
    listed = paths(data)
    if len(listed) != 1:
        raise UserError(f"data.raw={data.raw}: {len(listed)} paths, expected one zip or folder")
    raw = RawFiles(listed[0])
    for variant in VARIANTS:
        ratings = raw.find(variant.ratings)
        if ratings is None:
            continue
        folder = ratings.rpartition("/")[0]
        movies, users = (
            name and f"{folder}/{name}".lstrip("/") for name in (variant.movies, variant.users)
        )
        if movies not in raw.members():
            raise UserError(
                f"{raw.path}: contains {ratings} but no {movies}, expected both; "
                "fetch the whole MovieLens data set again"
            )
        assert movies is not None
        return _Source(raw, variant, ratings, movies, users if users in raw.members() else None)
    content = ", ".join(raw.members()[:5]) or "nothing"
    raise UserError(
        f"{raw.path}: contains no ratings.csv, ratings.dat or u.data (found {content}), expected "
        "MovieLens data as published; set data.raw or data.format"
    )


def _read_movies(source: _Source, reading: Reading) -> pl.DataFrame:
    """Return item, genres (joined by ``|``; null: none) and year of every movie."""
    text = source.raw.text(source.movies)
    items: dict[str, tuple[str | None, str | None]] = {}
    for line, shown, parts in _movie_lines(source, text):
        if len(parts) < 3 or not parts[0] or parts[0] in items:
            problem = "repeated movie id" if parts and parts[0] in items else "missing field"
            expected = f"movie id (each once), title, genres ({problem})"
            reading.skip("bad movies line", f"{text}, line {line}", str(shown), expected)
            continue
        year = _YEAR.search("::".join(parts[1:-1]))
        genres = None if parts[-1] in _NO_GENRES else parts[-1]
        items[parts[0]] = (genres, year.group(1) if year else None)
    rows = [(item, *values) for item, values in items.items()]
    return pl.DataFrame(rows, schema=dict.fromkeys(["item", "genres", "year"], pl.String),
                        orient="row")  # fmt: skip


def _movie_lines(source: _Source, text: Text) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield line number, raw fields, and id, title, ..., genres of a movie (no entries: bad)."""
    content = source.raw.read(source.movies)
    if source.variant.movies != "u.item":
        separator = source.variant.separator
        header = MOVIES_HEADER if separator == "," else None
        for line, parts in _lines(text, content, separator, header):
            yield line, parts, parts
        return
    member = _genres_member(source)
    names = [
        parts[0] for _, parts in _lines(source.raw.text(member), source.raw.read(member), "|")
    ]
    for line, parts in _lines(text, content, "|"):
        # id, title, release date, video date, address, then one flag per genre
        flags = parts[5:]
        if len(flags) != len(names) or not set(flags) <= {"0", "1"}:
            yield line, parts, []
            continue
        genres = [name for name, flag in zip(names, flags, strict=True) if flag == "1"]
        title, released = parts[1], _RELEASED.search(parts[2])
        if released:
            title = f"{title} ({released.group(1)})"
        yield line, parts, [parts[0], title, "|".join(genres)]


def _genres_member(source: _Source) -> str:
    """Return the file with the names of the flags of ``u.item``."""
    member = source.movies.removesuffix("u.item") + "u.genre"
    if member not in source.raw.members():
        raise UserError(
            f"{source.raw.path}: contains {source.movies} but no {member}, expected both; "
            "fetch the whole MovieLens data set again"
        )
    return member


def _read_users(source: _Source, reading: Reading) -> pl.DataFrame:
    """Return user (Int64), gender, age, occupation and the first two digits of the zip code."""
    assert source.users is not None
    text, order = source.raw.text(source.users), source.variant.user_order
    separator = "|" if source.variant.users == "u.user" else source.variant.separator
    users: dict[str, dict[str, str]] = {}
    for line, parts in _lines(text, source.raw.read(source.users), separator):
        if len(parts) != 5 or not all(parts) or parts[0] in users or not parts[0].isdecimal():
            expected = f"user id (each once), {', '.join(order)}"
            reading.skip("bad users line", f"{text}, line {line}", str(parts), expected)
            continue
        users[parts[0]] = dict(zip(order, parts[1:], strict=True))
        users[parts[0]]["zip"] = users[parts[0]]["zip"][:2]
    rows = [(int(user), *(values[name] for name in USER_FIELDS)) for user, values in users.items()]
    schema = {"user": pl.Int64, **dict.fromkeys(USER_FIELDS, pl.String)}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _lines(
    text: Text, content: bytes, separator: str, header: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of a small file; blank lines are skipped."""
    if not content.strip():
        raise UserError(f"{text}: empty, expected one entry per line; fetch the data set again")
    if header is not None:
        decoded = content.decode("utf-8-sig", errors="replace")
        check_header(text, decoded.split("\n", 1)[0].rstrip("\r"), header)
        reader = csv.reader(io.StringIO(decoded, newline=""), strict=True)
        next(reader)
        try:
            yield from ((reader.line_num, parts) for parts in reader if parts)
        except csv.Error as error:
            raise UserError(
                f"{text}, after line {reader.line_num}: {error}, expected quotes that close; "
                "correct the line or fetch the data set again"
            ) from None
        return
    for number, line in enumerate(content.decode("latin-1").split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r").split(separator)
