"""Raw rows -> ids and numbers, as in the training. It needs Python and polars alone.

``cki-rec export`` copies this file beside a model, so it imports nothing of cki_rec. The commands
read it too: it is the only way from raw rows to scores. Its folder holds ``encoder.json`` (the
rules), ``vocabulary.TABLE.parquet`` (tokens and their ids) and ``likes.NAME.parquet`` (histories).

    encoder = Encoder.load("export")
    inputs = encoder.inputs([{"user": "7", "item": "12", "genres": "Comedy|Drama"}])

``inputs`` are lists of numbers, by the name of the model's input. A token that is in no vocabulary
gets ``OOV_ID``. An empty value is ``None``, ``""`` or a word of the rules.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

PADDING_ID, OOV_ID, FIRST_ID = 0, 1, 2
RULES = "encoder.json"
BLANKS = " \t"  # removed from both ends of numbers and times
LARGEST_FLOAT = 3.4028234663852886e38
LARGEST_WHOLE = 2.0**53
LATEST = 4_102_444_800
"""Latest valid time: the year 2100, in seconds."""
OWN_TIMES = ("@time", "time")
"""Columns of seconds that take the place of the time of a format."""
PATTERNS = {
    "integer": r"^[+-]?[0-9]+$",
    "number": r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$",
    "thousands": r"^[+-]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)?(\.[0-9]*)?$",
    "decimal_comma": r"^[+-]?([0-9]{1,3}(\.[0-9]{3})+|[0-9]+)?(,[0-9]*)?$",
    "decimal": r"^([+-]?[0-9]+)\.0*$",
    "exponent": r"^[+-]?[0-9]+(\.[0-9]+)?[eE]\+?[0-9]+$",
    "iso": r"^(\d{4})-?(\d\d)-?(\d\d)(?:[T ]?(\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,]\d+)?)?)?)?"
    r" ?(Z|[+-]\d\d(?::?\d\d)?)?$",
}
MARKS = {"thousands": (",", "."), "decimal_comma": (".", ",")}
"""Form of numbers -> separator of thousands, decimal sign."""
SIGNS = "[$\u20ac\u00a3\u00a5%\\s]"
"""Signs that these forms ignore."""
X = pl.col("x")

Field = Mapping[str, Any]
Rows = pl.DataFrame | Sequence[Mapping[str, Any]]
"""Raw rows: a frame, or a mapping from column to value per row."""


class RowError(ValueError):
    """A value that is not readable."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row + 1}: {problem}")
        self.row, self.problem = row, problem


class Encoder:
    """Encode raw rows by the rules of a data set.

    Args:
        rules: The content of ``encoder.json``.
        vocabularies: Table -> its tokens and their ids; tables of hashes are left out.
        likes: History -> the items that users liked, as ``likes.NAME.parquet`` holds them.
    """

    def __init__(
        self,
        rules: Mapping[str, Any],
        vocabularies: Mapping[str, pl.DataFrame],
        likes: Mapping[str, pl.DataFrame],
    ) -> None:
        self.rules, self.fields = rules, list(rules["fields"])
        self.tables = {table: frame.sort("token") for table, frame in vocabularies.items()}
        self.likes = dict(likes)

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """Return the encoder of an exported model."""
        home = Path(folder)
        rules = json.loads((home / RULES).read_text(encoding="utf-8"))
        tables = {t: pl.read_parquet(home / name) for t, name in rules["vocabularies"].items()}
        likes = {n: pl.read_parquet(home / name) for n, name in rules["likes"].items()}
        return cls(rules, tables, likes)

    @property
    def columns(self) -> list[str]:
        """Return the raw columns that rows must have; the time may have another name."""
        names = [f["column"] for f in self.fields if not _is_liked(f) and f["kind"] != "time"]
        return list(dict.fromkeys(names + ([self.rules["time"][0]] if self._needs_time() else [])))

    def inputs(self, rows: Rows) -> dict[str, list[Any]]:
        """Return the inputs of the exported model: lists of equal lengths, one per row.

        Raises:
            ValueError: A column is missing, or a value is not readable.
        """
        encoded, result = self.encode(rows), {}
        kinds = {name: encoded.schema[name].base_type() for name in encoded.columns}
        for name in [name for name, kind in kinds.items() if kind == pl.List]:
            values = encoded[name].to_list()
            width = max([1, *map(len, values)])
            result[f"ids.{name}"] = [v + [PADDING_ID] * (width - len(v)) for v in values]
        for title, kind in (("ids", pl.Int64), ("numbers", pl.Float32)):
            if names := [name for name in kinds if kinds[name] == kind]:
                result[title] = [list(row) for row in encoded.select(names).rows()]
        return result

    def encode(self, rows: Rows) -> pl.DataFrame:
        """Return one column per field: Int64 ids, lists of Int64 ids, or Float32 numbers.

        Raises:
            ValueError: A column is missing, or a value is not readable.
        """
        frame = rows if isinstance(rows, pl.DataFrame) else as_frame(rows)
        if missing := self.missing(frame.columns):
            listed = ", ".join(frame.columns)
            raise ValueError(f"no column {', '.join(missing)}; the rows have {listed}")
        time = self._time(frame) if self._needs_time(frame.columns) else None
        encoded: dict[str, pl.Series] = {}
        for field in sorted(self.fields, key=_is_liked):  # which need the ids of users
            make = self._history if _is_liked(field) else self._field
            encoded[field["name"]] = make(field, frame, time, encoded)
        return pl.DataFrame({f["name"]: encoded[f["name"]] for f in self.fields})

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Return the columns that rows with ``columns`` lack."""
        lacking = [name for name in self.columns if name not in columns]
        if self.rules["time"] is not None:
            has_time = self._time_column(columns) is not None or not self._needs_time(columns)
            lacking = [n for n in lacking if not (has_time and n == self.rules["time"][0])]
        return lacking

    def _needs_time(self, columns: Sequence[str] = ()) -> bool:
        of_time = [f["name"] for f in self.fields if f["kind"] == "time"]
        return any(f"@{name}" not in columns for name in [*of_time, *self.likes])

    def _time_column(self, columns: Sequence[str]) -> tuple[str, str] | None:
        column, form, takes_seconds = self.rules["time"]
        own = [name for name in OWN_TIMES if takes_seconds and name in columns]
        if own:
            return own[0], "seconds"
        return (column, form) if column in columns else None

    def _field(self, field: Field, frame: pl.DataFrame, time: Any, _: Any) -> pl.Series:
        """Return the ids or numbers of a field that is no history of liked items."""
        if field["kind"] == "time":
            return self._ids(_time_token(time, field["column"]), field)
        column = frame[field["column"]]
        if field["kind"] in ("multi", "history"):
            return self._lists(column, field)
        if field["kind"] != "numeric":
            tokens = self._texts(column)
            if field["prefix"] is not None:
                tokens = tokens.str.head(field["prefix"])
            return self._ids(tokens, field)
        numbers = self._numbers(column, field).alias("x").to_frame()
        value = _filled(self.rules["numeric_missing"])
        if "bounds" in field:
            return self._ids(_buckets(numbers.select(_float(value)), field["bounds"]), field)
        if "mean" in field:
            number = _float(value)
            if field["transform"] == "log1p":
                number = number.sign() * number.abs().log1p()
            scaled = (number.fill_null(field["mean"]) - field["shift"]) / field["scale"]
            return numbers.select(scaled.cast(pl.Float32)).to_series()
        return self._ids(numbers.select(_number_token(value, field)).to_series(), field)

    def _texts(self, column: pl.Series) -> pl.Series:
        """Return the text of every value; empty ones are null."""
        text, words = column.cast(pl.String).alias("x").to_frame(), ["", *self.rules["missing"]]
        plain = _plain(X) if self.rules["normalize_ids"] else X
        return text.select(pl.when(~X.is_in(words)).then(plain)).to_series()

    def _numbers(self, column: pl.Series, field: Field) -> pl.Series:
        """Return numbers, null if empty.

        Raises:
            RowError: A value is not a finite number.
        """
        is_whole, form = field["type"] == "integer", self.rules["number_form"]
        kind = pl.Int64 if is_whole else pl.Float64
        if column.dtype.is_numeric():
            is_float = column.dtype.is_float()
            numbers = column.cast(pl.Float64).fill_nan(None) if is_float else column
            typed = numbers.cast(kind, strict=False)
            is_bad = numbers.is_not_null() & (typed.is_null() | (typed != numbers))
            return _checked(typed, is_bad | typed.is_infinite(), column, f"finite {field['type']}")
        text = self._bare(column)
        number, pattern = X, PATTERNS["integer" if is_whole else "number"]
        if not is_whole and form in MARKS:
            group, point = MARKS[form]
            signless = X.str.replace_all(SIGNS, "")
            plain = signless.str.replace_all(group, "", literal=True)
            plain = plain.str.replace(point, ".", literal=True)
            number = pl.when(signless.str.contains(PATTERNS[form])).then(plain)
        number = pl.when(number.str.contains(pattern)).then(number.str.strip_prefix("+"))
        typed = text.select(number.cast(kind, strict=False)).to_series()
        is_bad = text["x"].is_not_null() & typed.is_null()
        return _checked(typed, is_bad | typed.is_infinite(), column, f"finite {field['type']}")

    def _time(self, frame: pl.DataFrame) -> pl.Series:
        """Return the time of every row in seconds.

        Raises:
            RowError: A value is empty or not a time.
        """
        place = self._time_column(frame.columns)
        assert place is not None
        column, form = frame[place[0]], place[1]
        if column.dtype in (pl.Date, pl.Datetime):
            seconds = column.dt.epoch("s")
        else:
            text = self._bare(column)
            if form in ("seconds", "milliseconds"):
                text = text.select(X.str.replace(r"\.0*$", ""))
            seconds = text.select(_seconds(form)).to_series()
        is_bad = ~seconds.is_between(0, LATEST).fill_null(False)
        return _checked(seconds, is_bad, column, f"time ({form})")

    def _bare(self, column: pl.Series) -> pl.DataFrame:
        """Return texts without outer blanks, null if empty."""
        text = column.cast(pl.String).str.strip_chars(BLANKS).alias("x").to_frame()
        return text.select(pl.when(~X.is_in(["", *self.rules["missing"]])).then(X))

    def _ids(self, tokens: pl.Series, field: Field) -> pl.Series:
        """Return the id of every token; null is the empty token."""
        tokens = tokens.fill_null("")
        if field["hash_size"] is not None:
            known = tokens.unique()
            hashes = [FIRST_ID + zlib.crc32(t.encode()) % field["hash_size"] for t in known]
            return tokens.replace_strict(known, hashes, return_dtype=pl.Int64)
        table = self.tables[field["table"]]
        if table.is_empty():
            return pl.repeat(OOV_ID, len(tokens), dtype=pl.Int64, eager=True)
        places = table["token"].search_sorted(tokens, side="left").clip(0, len(table) - 1)
        is_known = table["token"].gather(places) == tokens
        ids = table["id"].gather(places).cast(pl.Int64)
        return ids.zip_with(is_known, pl.repeat(OOV_ID, len(ids), dtype=pl.Int64, eager=True))

    def _lists(self, column: pl.Series, field: Field) -> pl.Series:
        """Return the ids of a set or of a listed history."""
        if isinstance(column.dtype, pl.List):
            lists = column.cast(pl.List(pl.String))
        else:
            text, words = column.cast(pl.String).alias("x").to_frame(), self.rules["missing"]
            split = pl.when(~X.is_in(words)).then(X.str.split(field["separator"]))
            lists = text.select(split).to_series()
        if self.rules["normalize_ids"]:
            lists = lists.list.eval(_plain(pl.element()))
        lists = lists.list.eval(pl.element().filter(pl.element() != "")).fill_null([])
        if field["kind"] == "multi":
            lists = lists.list.unique(maintain_order=True)
            if field["max_length"] is not None:
                lists = lists.list.head(field["max_length"])
        flat = pl.DataFrame({"row": pl.int_range(len(lists), eager=True), "token": lists})
        flat = flat.filter(pl.col("token").list.len() > 0).explode("token")
        tokens = flat["token"]
        if field["prefix"] is not None:
            tokens = tokens.str.head(field["prefix"])
        flat = flat.select("row", self._ids(tokens, field).alias("id"))
        if field["kind"] == "multi":  # one id for all tokens out of vocabulary
            is_first = pl.struct("row", "id").is_first_distinct()
            flat = flat.filter((pl.col("id") != OOV_ID) | is_first)
        ids = _by_row(flat, len(lists))
        if field["kind"] == "history" and field["max_length"] is not None:
            is_latest = field["keep"] == "latest"
            cut = ids.list.tail if is_latest else ids.list.head
            ids = cut(field["max_length"])
        return ids

    def _history(self, field: Field, frame: pl.DataFrame, time: Any, encoded: Any) -> pl.Series:
        """Return the latest items that the user of each row liked before the time of the row.

        The column ``@NAME`` lists their tokens by time, separated by ``|``. Without it, they are
        looked up in the training rows by the id of the user.
        """
        name, length = field["name"], field["max_length"]
        if f"@{name}" in frame.columns:
            listed = {**field, "separator": "|", "keep": "latest"}
            return self._lists(frame[f"@{name}"], listed)
        if name not in self.likes:
            raise ValueError(f"{name}: {field['reason']}, or pass a column @{name}")
        likes, users = self.likes[name], encoded[field["user"]]
        times = likes["time"].unique().sort()
        width = len(times) + 1
        keys = likes["user"].cast(pl.Int64) * width + times.search_sorted(likes["time"], "left")
        first = keys.search_sorted(users * width, side="left").cast(pl.Int64)
        stop = keys.search_sorted(users * width + times.search_sorted(time, "left"), side="left")
        window = pl.DataFrame({"user": users, "oldest": first, "stop": stop.cast(pl.Int64)})
        start = pl.max_horizontal("oldest", pl.col("stop") - length)
        start = pl.when(pl.col("user") == OOV_ID).then("stop").otherwise(start)
        places = window.select(pl.int_ranges(start, "stop").alias("place")).with_row_index("row")
        flat = places.filter(pl.col("place").list.len() > 0).explode("place")
        items = likes["item"].gather(flat["place"]).cast(pl.Int64)
        flat = flat.select(pl.col("row").cast(pl.Int64), items.alias("id"))
        return _by_row(flat, len(frame))


def _is_liked(field: Field) -> bool:
    return field["kind"] == "history" and field["separator"] is None


def as_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Return rows as a frame: columns of floats, of lists of text, or of text."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pl.DataFrame({n: _as_column(n, [row.get(n) for row in rows]) for n in names})


def _as_column(name: str, values: list[Any]) -> pl.Series:
    present = [value for value in values if value is not None]
    if count := sum(isinstance(value, list | tuple) for value in present):
        if count < len(present):
            raise ValueError(f"column {name}: lists and texts; pass lists in every row")
        lists = [value if value is None else [str(v) for v in value] for value in values]
        return pl.Series(lists, dtype=pl.List(pl.String))
    if present and {type(value) for value in present} - {int} == {float}:
        return pl.Series(values, dtype=pl.Float64, strict=False)
    texts = [str(v).lower() if isinstance(v, bool) else v for v in values]
    return pl.Series([v if v is None else str(v) for v in texts], dtype=pl.String)


def _checked(values: pl.Series, is_bad: pl.Series, raw: pl.Series, expected: str) -> pl.Series:
    """Return the values.

    Raises:
        RowError: One is bad.
    """
    if is_bad.any():
        row = int(is_bad.arg_true()[0])
        shown = repr(raw[row])[:60]
        raise RowError(row, f"column {raw.name}: found {shown}, expected a {expected}")
    return values


def _by_row(flat: pl.DataFrame, num_rows: int) -> pl.Series:
    """Return the ids of every row as a list, from a frame of ``row`` and ``id``."""
    lists = flat.group_by("row", maintain_order=True).agg("id")
    every = pl.DataFrame({"row": pl.int_range(num_rows, eager=True)})
    joined = every.join(lists, on="row", how="left", maintain_order="left")
    return joined["id"].cast(pl.List(pl.Int64)).fill_null([])


def _filled(missing: float | None) -> pl.Expr:
    """Return the raw number, or ``missing`` if it is empty."""
    if missing is None:
        return X
    return X.fill_null(int(missing) if missing == int(missing) else missing)


def _float(value: pl.Expr) -> pl.Expr:
    return value.cast(pl.Float64).clip(-LARGEST_FLOAT, LARGEST_FLOAT)


def _number_token(value: pl.Expr, field: Field) -> pl.Expr:
    """Return the token of a number; see ``cki_rec.data.encoding.numbers.as_token``."""
    if field["transform"] == "ln_squared":
        value = value.cast(pl.Float64).clip(lower_bound=-LARGEST_WHOLE)
        squared = (value.log() * value.log()).floor()
        whole = pl.when(value > 2).then(squared).otherwise(value).cast(pl.Int64)
        return whole.cast(pl.String)
    if field["transform"] == "edges":
        first, *others = field["edges"]
        above = ((value > edge).cast(pl.Int64) for edge in others[:-1])
        bucket = pl.sum_horizontal(pl.lit(0, dtype=pl.Int64), *above)
        is_inside = (value > first) & (value <= others[-1])
        return pl.when(is_inside).then(bucket).cast(pl.String)
    return value.cast(pl.String)


def _buckets(numbers: pl.DataFrame, bounds: Sequence[float]) -> pl.Series:
    """Return the token of the quantile bucket of every number: the number of smaller bounds."""
    column = numbers.to_series()
    bucket = pl.Series(bounds, dtype=pl.Float64).search_sorted(column, side="left")
    return bucket.cast(pl.String).zip_with(column.is_not_null(), pl.Series([""]))


def _time_token(seconds: pl.Series, name: str) -> pl.Series:
    """Return the hour, the weekday (Sunday is 0) or whether it is a weekend, in UTC."""
    time = pl.from_epoch(seconds).dt
    if name == "hour":
        return time.hour().cast(pl.String)
    if name == "weekday":
        return (time.weekday() % 7).cast(pl.String)
    return (time.weekday() > 5).cast(pl.Int8).cast(pl.String)


def _plain(token: pl.Expr) -> pl.Expr:
    """Return an id without outer blanks, ``.0`` and exponents, with letters in form NFC."""
    text = token.str.strip_chars().str.normalize("NFC").str.replace(PATTERNS["decimal"], "${1}")
    exponent = pl.when(text.str.contains(PATTERNS["exponent"])).then(text)
    value = exponent.cast(pl.Float64, strict=False)
    is_whole = (value == value.round()) & (value.abs() < LARGEST_WHOLE)
    return pl.coalesce(pl.when(is_whole).then(value).cast(pl.Int64).cast(pl.String), text)


def _seconds(form: str) -> pl.Expr:
    """Return the times of texts in seconds; null if a text is no time."""
    if form != "iso":
        plain = X.str.strip_prefix("+")
        whole = pl.when(X.str.contains(PATTERNS["integer"])).then(plain)
        number = whole.cast(pl.Int64, strict=False)
        if form == "yymmddhh":
            digits = pl.lit("20") + number.cast(pl.String).str.zfill(8) + "00"
            return digits.str.strptime(pl.Datetime, "%Y%m%d%H%M", strict=False).dt.epoch("s")
        return number // 1000 if form == "milliseconds" else number
    part = X.str.extract_groups(PATTERNS["iso"])
    parts = [part.struct.field(str(n)) for n in range(1, 8)]
    numbers = [p.fill_null("00") if n > 2 else p for n, p in enumerate(parts[:6])]
    local = pl.concat_str(numbers).str.strptime(pl.Datetime, "%Y%m%d%H%M%S", strict=False)
    zone = parts[6].str.replace("Z", "+00", literal=True).fill_null("+00")
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    hours = zone.str.slice(1, 2).cast(pl.Int64, strict=False)
    minutes = zone.str.slice(-2, 2).cast(pl.Int64, strict=False)
    minutes = pl.when(zone.str.len_chars() > 3).then(minutes).otherwise(0)
    return local.dt.epoch("s") - sign * (3600 * hours + 60 * minutes)
