"""Options of a data set: raw files, encoding, split, parts; values live in ``conf/data``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cki_rec.config.section import NonNegative, Positive, section
from cki_rec.config.texts import Name


@section
class Split:
    """How rows are divided into training, validation and test."""

    by: Literal["random", "hash", "time", "leave_last_out", "files"]
    """``random``, ``hash`` (of a row's user, item and time: the same in any file it stands in),
    ``time`` (oldest rows train), ``leave_last_out`` (each user's last row) or ``files`` (as
    published: train, valid and test files)."""
    fractions: list[float]
    """Shares of training, validation and test rows; sum 1. For ``random``, ``hash`` and ``time``;
    where ``files`` lack valid.csv and the third share is 0, the first two divide training rows."""
    seed: NonNegative
    """Of ``random`` and ``hash``, and of validation rows drawn from training files. Fixed over the
    repetitions of an experiment: all runs share test rows."""


PARTITIONS = ("user", "item", "time", "random", "none", "file")
"""Values of ``data.partition.by`` that are no columns."""
FILE = "@file"
"""Column of the common form with the name of the file of a row, without folder and suffix."""


def _parts(value: Any) -> Any:
    """Return a number of parts, or the names of parts, checked."""
    if not isinstance(value, list):
        if isinstance(value, bool) or not isinstance(value, int):
            raise PydanticCustomError("parts", "must be a whole number or a list of parts")
        if value < 1:
            raise PydanticCustomError("parts", "must be at least 1")
        return value
    for entry in value:
        is_named = isinstance(entry, dict) and set(entry) == {"name", "values"}
        values = entry["values"] if is_named else [entry]
        if not isinstance(values, list) or not all(isinstance(v, _WORDS) for v in values):
            raise PydanticCustomError(
                "parts", "must list values, or parts as {name: north, values: [31, 35]}"
            )
        if not values:
            raise PydanticCustomError("parts", "must list a value or more for every part")
    names = [name for name, _ in named_parts(value)]
    if not names or len(set(names)) < len(names):
        raise PydanticCustomError("parts", "must list one part or more, each once")
    return value


_WORDS = (str, int, float)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def named_parts(parts: list[Any]) -> list[tuple[str, list[str]]]:
    """Return name and values of every entry of ``parts``."""
    entries = [e if isinstance(e, dict) else {"name": e, "values": [e]} for e in parts]
    return [(_word(e["name"]), [_word(value) for value in e["values"]]) for e in entries]


@section
class Partition:
    """How rows are divided among sources."""

    by: str
    """``user``, ``item``, ``time``, ``random``, ``none``, ``file`` (the raw file of a row), or a
    column of the raw files."""
    parts: Annotated[int | list[Any], BeforeValidator(_parts)]
    """The number of parts. Of a column or of files: the values that are parts, each a value or
    ``{name: ..., values: [...]}``. A value may be in several parts. Rows of other values are left
    out. A number is then that of all values."""
    seed: NonNegative

    @model_validator(mode="after")
    def _check(self) -> Partition:
        if isinstance(self.parts, list) and self.by in PARTITIONS[:-1]:
            raise ValueError(
                f"parts: a list requires by=file or by=COLUMN (got by={self.by}); set a number"
            )
        return self

    @property
    def column(self) -> str | None:
        """Return the column of the common form whose values are parts; None: there is none."""
        return None if self.by in PARTITIONS[:-1] else FILE if self.by == "file" else self.by

    @property
    def named(self) -> list[tuple[str, list[str]]] | None:
        """Return name and values of every part; None: parts are numbers."""
        return named_parts(self.parts) if isinstance(self.parts, list) else None

    @property
    def values(self) -> list[str] | None:
        """Return the values of all parts, in text order; None: all that rows have."""
        named = self.named
        return None if named is None else sorted({v for _, values in named for v in values})

    @property
    def size(self) -> int:
        """Return the number of parts."""
        if isinstance(self.parts, list):
            return len(self.parts)
        return 1 if self.by == "none" else self.parts

    @property
    def overlaps(self) -> bool:
        """Return whether a value is in several parts."""
        return sum(len(set(values)) for _, values in self.named or ()) > len(self.values or ())

    def number(self, part: int | str) -> int | None:
        """Return the position of a part by its name or number; None: there is no such part."""
        if self.named is not None:
            names = [name for name, _ in self.named]
            return names.index(str(part)) if str(part) in names else None
        return part if isinstance(part, int) and 0 <= part < self.size else None

    def shown(self) -> str:
        """Return the parts for messages."""
        if self.named is None:
            return f"parts 0 to {self.size - 1}"
        return f"parts {', '.join(name for name, _ in self.named)}"


def _part(value: Any) -> Any:
    """Return a part: numbers of the command line are numbers again."""
    return int(value) if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]*", value) else value


@section
class Synthetic:
    """Raw files written from a known click model."""

    layout: Literal["criteo", "avazu", "movielens"]
    """``criteo``, ``avazu`` or ``movielens``: whose format and fields."""
    rows: int
    vocabulary: float
    """Sizes of vocabularies as a multiple of the published data set's."""
    skew: float
    """Exponent of the power law of token frequencies; 0: uniform."""
    signal: float
    """Standard deviation of the true logit."""
    drift: float
    """Share of the weights' variance that moves from the first row to the last; 0: none."""
    domains: int
    """Groups of rows that differ in their weights."""
    difference: float
    """Share of the weights' variance that is a domain's own; 0: domains are alike."""
    seed: int


@section
class Download:
    """Source of the raw files."""

    url: str | None
    """null: there is no address that a program may fetch from."""
    md5: str | None
    """Of the fetched file, as published; null: nobody published one."""
    by_hand: str | None
    """Instructions for getting the files if ``url`` is null."""


@section
class Data:
    """One data set: raw files, encoding, split, and the part of it a model sees."""

    name: Name
    format: str
    """A row of ``cki_rec.data.raw.formats.FORMATS``."""
    raw: Any
    """A path, a pattern (``day_*.gz``) or a list of them."""
    fetch: bool
    """Download the raw files if they are not there."""
    download: Download
    published: str | None
    """The entry of ``conf/published.yaml`` that the raw files should be; null: none."""
    fields: list[Any]
    """Features of the encoded set, in order: a name, or ``{name: ..., option: ...}`` with options
    of ``cki_rec.data.encoding.fields.Field``. csv: empty for all columns but label and time."""
    separator: Literal["auto", "comma", "tab", "semicolon", "pipe", "space"]
    """csv: text between columns; ``auto``: the one with which the header names ``label``."""
    encoding: str
    """csv: encoding of the files, e.g. ``utf-8``, ``latin-1``, ``cp1252`` or ``utf-16``."""
    label: str
    """csv: column that is 0 or 1."""
    labels: dict[Any, Literal[0, 1]] | None
    """csv: word -> label, e.g. ``{true: 1, false: 0}``, without case; null: labels are 0 or 1."""
    missing: list[Any]
    """csv: words that count as empty values."""
    number_form: Literal["plain", "thousands", "decimal_comma"]
    """csv: ``plain`` (1234.5), ``thousands`` (1,234.5) or ``decimal_comma`` (1.234,5); the last
    two ignore signs of currencies."""
    label_threshold: float
    """MovieLens: a rating at or above it is a click."""
    user: str | None
    """csv: column of users; null: rows have none."""
    item: str | None
    """csv: column of items; null: rows have none."""
    time: str | None
    """csv: column of times; null: rows have none."""
    time_form: Literal["auto", "seconds", "milliseconds", "iso", "yymmddhh"]
    """csv: ``seconds``, ``milliseconds``, ``iso`` (2024-03-01 00:00:50), ``yymmddhh``, or
    ``auto``: the only one that fits the first rows."""
    normalize_ids: bool
    """Remove differences of form from ids: ``100003.0``, ``1.00003E+05``, spaces, NFD letters."""
    numeric: Literal["ln_squared", "quantile", "edges", "token", "log1p", "as_is"]
    """Encoding of numeric fields: ``ln_squared``, ``quantile``, ``edges`` or ``token``
    (categories), ``log1p`` or ``as_is`` (numbers)."""
    numeric_missing: float | None
    """The value of an empty number; null: a category of its own, or the mean."""
    buckets: Annotated[int, Field(ge=2)]
    """Of ``quantile``."""
    min_count: Positive
    """Tokens with fewer training rows share the id of unseen tokens."""
    vocabularies: list[str]
    """Folders whose token lists, joined in this order, give the ids: encoded sets, merged runs or
    the ``vocabulary`` folders in them. Empty: tokens of training rows, by ``min_count``."""
    new_tokens: Literal["oov", "add"]
    """Tokens of training rows that ``vocabularies`` lack: ``oov`` (they share the id of unseen
    tokens) or ``add`` (those of ``min_count`` rows follow the listed ones)."""
    numbers_from: str | None
    """Folder of an encoded set or a run whose learned facts of numbers (``log1p``, ``quantile``)
    this one takes over; null: they are learned from training rows."""
    history_length: Positive
    """The latest liked items kept per row."""
    negatives: Positive
    """Sequences: unseen items drawn per step of a user."""
    negatives_seed: NonNegative
    on_bad_row: Literal["error", "skip"]
    """``error`` or ``skip`` (skipped rows are counted in the manifest)."""
    verify: Literal["fast", "full"]
    """Of an encoded set when it is opened: ``fast`` (sizes and types) or ``full`` (digests)."""
    synthetic: Synthetic
    split: Split
    partition: Partition
    part: Annotated[int | str | None, BeforeValidator(_part)]
    """Train and validate on this part only, a number or a name; null: on all rows. A part by time
    of a split by time has only later validation rows: all of them."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.part is None:
            return self
        if self.partition.by == "none":
            raise ValueError(
                f"part={self.part} needs data.partition.by=user, item, time, random, file or a"
                " column"
            )
        if self.partition.number(self.part) is None:
            raise ValueError(f"part={self.part}: data.partition has {self.partition.shown()}")
        return self
