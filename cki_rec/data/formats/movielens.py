"""MovieLens: latest, latest-small, 25M, 32M (csv) and 1M (``::``), zipped or in a folder.

The csv form holds ``ratings.csv`` and ``movies.csv`` with a header each; the other form holds
``ratings.dat``, ``movies.dat`` and ``users.dat`` in latin-1 without headers.
Source: https://grouplens.org/datasets/movielens/ (Harper and Konstan, doi 10.1145/2827872).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.raw import BadRows, RawFiles, RawRows

RATING_FIELDS = ["user", "item", "genres", "year", "hour", "history"]
"""What every variant gives."""
USER_FIELDS = ["gender", "age", "occupation", "zip"]
"""What ``users.dat`` adds."""

_RATINGS_HEADER = "userId,movieId,rating,timestamp"
_MOVIES_HEADER = "movieId,title,genres"
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_NO_GENRES = ("", "(no genres listed)")
_RATING_COLUMNS = ["user", "item", "rating_text", "timestamp_text", "extra"]
_EXPECTED = {
    "missing field": "4 fields: user, movie, rating, timestamp",
    "extra field": "4 fields: user, movie, rating, timestamp",
    "not a number": "whole numbers for user and timestamp, a number for rating",
    "not finite": "a finite rating",
    "unknown movie": "a movie listed in the movies file",
    "unknown user": "a user listed in the users file",
}
_BAD_LINE = {"movies": "bad movies line", "users": "bad users line"}


def files(path: Path) -> list[Path]:
    """Return the files on disk whose bytes decide the content."""
    raw = RawFiles(path)
    return raw.on_disk([m for m in _members(raw) if m])


def read(path: Path, fields: Sequence[str], on_bad_row: str) -> RawRows:
    """Return the rows of a MovieLens data set, in the order of its ratings file.

    Args:
        path: The zip as published, or the folder it unpacks to.
        fields: Fields that must be there.
        on_bad_row: ``error`` stops at the first bad row; ``skip`` drops and counts bad rows.

    Raises:
        UserError: A file is missing or damaged, a field does not exist, or a row is bad.
    """
    raw = RawFiles(path)
    ratings, movies, users = _members(raw)
    known = RATING_FIELDS + (USER_FIELDS if users else [])
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError(
            f"data.fields: {raw.label(ratings)} gives no {', '.join(unknown)}; "
            f"it gives {', '.join(known)}"
        )
    bad_rows = BadRows(on_bad_row)
    movie_frame = _read_movies(raw, movies, bad_rows)
    user_frame = _read_users(raw, users, bad_rows) if users else None
    frame = _read_ratings(raw, ratings, movie_frame, user_frame, bad_rows)
    return RawRows(frame, bad_rows)


def _members(raw: RawFiles) -> tuple[str, str, str | None]:
    """Return the members that hold ratings, movies and, if there are any, users."""
    for suffix in ("csv", "dat"):
        ratings = raw.find(f"ratings.{suffix}")
        if ratings is None:
            continue
        folder = ratings.rpartition("/")[0]
        beside = [f"{folder}/{kind}.{suffix}".lstrip("/") for kind in ("movies", "users")]
        found = [member if member in raw.members() else None for member in beside]
        needed = 1 if suffix == "csv" else 2
        for member, wanted in list(zip(found, beside, strict=True))[:needed]:
            if member is None:
                raise UserError(
                    f"{raw.path}: holds {ratings} but no {wanted}, expected both; "
                    "fetch the whole MovieLens data set again"
                )
        assert found[0] is not None
        return ratings, found[0], found[1] if needed == 2 else None
    listed = ", ".join(raw.members()[:5]) or "nothing"
    raise UserError(
        f"{raw.path}: holds no ratings.csv or ratings.dat (found {listed}), expected MovieLens "
        "data as published; set data.raw or data.format"
    )


def _read_ratings(
    raw: RawFiles,
    member: str,
    movies: pl.DataFrame,
    users: pl.DataFrame | None,
    bad_rows: BadRows,
) -> pl.DataFrame:
    """Return the ratings joined with what is known of their movies and users."""
    where = raw.label(member)
    content = raw.read(member)
    if not content.strip():
        raise UserError(f"{where}: empty, expected ratings; fetch the data set again")
    text = content.decode("utf-8-sig", errors="replace")
    frame = pl.DataFrame({"text": pl.Series([text], dtype=pl.String).str.split("\n").explode()})
    del content, text
    frame = frame.with_columns(pl.col("text").str.strip_chars_end("\r")).with_row_index(
        "line", offset=1
    )
    is_csv = member.endswith(".csv")
    if is_csv:
        _check_header(where, frame["text"][0], _RATINGS_HEADER)
        frame = frame.slice(1)
    frame = frame.filter(pl.col("text") != "")
    pieces = pl.col("text").str.split_exact("," if is_csv else "::", 4)
    frame = frame.with_columns(
        pieces.struct.rename_fields(_RATING_COLUMNS).alias("pieces")
    ).unnest("pieces")
    frame = frame.with_columns(
        pl.col("rating_text").cast(pl.Float64, strict=False).alias("rating"),
        pl.col("timestamp_text").cast(pl.Int64, strict=False).alias("timestamp"),
    )
    frame = frame.join(movies, on="item", how="left", maintain_order="left")
    if users is not None:
        frame = frame.join(users, on="user", how="left", maintain_order="left")
    frame = frame.with_columns(_reason(users is not None).alias("reason"))
    rows_read = len(frame)
    _report(where, frame.filter(pl.col("reason").is_not_null()), bad_rows)
    frame = frame.filter(pl.col("reason").is_null())
    if not len(frame):
        raise UserError(
            f"{where}: no usable row among {rows_read}, expected ratings; fetch the data set again"
        )
    hour = (pl.col("timestamp") // 3600 % 24).cast(pl.String)
    names = ["user", "item", "genres", "year"] + (USER_FIELDS if users is not None else [])
    return frame.select("line", "rating", "timestamp", hour.alias("hour"), *names)


def _reason(has_users: bool) -> pl.Expr:
    """Return why a row is bad, by the order of ``_EXPECTED``; null for a good row."""
    is_missing = pl.any_horizontal(
        pl.col(name).is_null() | (pl.col(name) == "") for name in _RATING_COLUMNS[:4]
    )
    is_text = pl.any_horizontal(
        pl.col("user").cast(pl.Int64, strict=False).is_null(),
        pl.col("rating").is_null(),
        pl.col("timestamp").is_null(),
    )
    tests = {
        "missing field": is_missing,
        "extra field": pl.col("extra").is_not_null(),
        "not a number": is_text,
        "not finite": ~pl.col("rating").is_finite(),
        "unknown movie": pl.col("is_movie").is_null(),
    }
    if has_users:
        tests["unknown user"] = pl.col("is_user").is_null()
    reason = pl.lit(None, dtype=pl.String)
    for name, test in reversed(tests.items()):
        reason = pl.when(test).then(pl.lit(name)).otherwise(reason)
    return reason


def _report(where: str, bad: pl.DataFrame, bad_rows: BadRows) -> None:
    """Hand bad rating rows to ``bad_rows``, the first line first."""
    for (reason,), rows in bad.group_by("reason", maintain_order=True):
        name = str(reason)
        texts = rows.head(3).select("line", "text").rows()
        for position, (line, text) in enumerate(texts):
            count = len(rows) - len(texts) + 1 if position == 0 else 1
            bad_rows.add(name, f"{where}, line {line}", text, _EXPECTED[name], count)


def _read_movies(raw: RawFiles, member: str, bad_rows: BadRows) -> pl.DataFrame:
    """Return item, genres, year and a mark that the movie is known."""
    where = raw.label(member)
    items: dict[str, tuple[list[str], str | None]] = {}
    for line, parts in _lines(where, raw.read(member), member, _MOVIES_HEADER):
        if len(parts) < 3 or not parts[0] or parts[0] in items:
            problem = "repeated movie id" if parts[0] in items else "missing field"
            expected = f"movie id (each once), title, genres ({problem})"
            bad_rows.add(_BAD_LINE["movies"], f"{where}, line {line}", str(parts), expected)
            continue
        year = _YEAR.search("::".join(parts[1:-1]))
        genres = [] if parts[-1] in _NO_GENRES else parts[-1].split("|")
        items[parts[0]] = (genres, year.group(1) if year else None)
    return pl.DataFrame(
        {
            "item": list(items),
            "genres": [genres for genres, _ in items.values()],
            "year": [year for _, year in items.values()],
            "is_movie": [True] * len(items),
        },
        schema={
            "item": pl.String,
            "genres": pl.List(pl.String),
            "year": pl.String,
            "is_movie": pl.Boolean,
        },
    )


def _read_users(raw: RawFiles, member: str, bad_rows: BadRows) -> pl.DataFrame:
    """Return user, gender, age, occupation, zip and a mark that the user is known."""
    where = raw.label(member)
    users: dict[str, list[str]] = {}
    for line, parts in _lines(where, raw.read(member), member, ""):
        if len(parts) != 5 or not all(parts) or parts[0] in users:
            expected = "user id (each once), gender, age, occupation, zip code"
            bad_rows.add(_BAD_LINE["users"], f"{where}, line {line}", str(parts), expected)
            continue
        users[parts[0]] = [*parts[1:4], parts[4][:2]]
    rows = [[user, *values, True] for user, values in users.items()]
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(["user", *USER_FIELDS], pl.String)
    return pl.DataFrame(rows, schema={**schema, "is_user": pl.Boolean}, orient="row")


def _lines(
    where: str, content: bytes, member: str, header: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of a small file; blank lines are passed over."""
    if not content.strip():
        raise UserError(f"{where}: empty, expected one entry a line; fetch the data set again")
    if member.endswith(".csv"):
        text = content.decode("utf-8-sig", errors="replace")
        _check_header(where, text.split("\n", 1)[0].rstrip("\r"), header)
        reader = csv.reader(io.StringIO(text, newline=""))
        next(reader)
        try:
            yield from ((reader.line_num, parts) for parts in reader if parts)
        except csv.Error as error:
            raise UserError(
                f"{where}, after line {reader.line_num}: {error}, expected quotes that close; "
                "mend the line or fetch the data set again"
            ) from None
        return
    for number, line in enumerate(content.decode("latin-1").split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r").split("::")


def _check_header(where: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{where}, line 1: found {found[:80]!r}, expected the header {expected!r}; "
            "restore the header line or fetch the data set again"
        )
