"""Options of a data set: raw files, encoding, split, parts; values live in ``conf/data``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

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


@section
class Partition:
    """How rows are divided among sources."""

    by: Literal["user", "item", "time", "random", "none"]
    """``user``, ``item``, ``time``, ``random`` or ``none``."""
    parts: Positive
    seed: NonNegative


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
    part: int | None
    """Train and validate on this part only; null: on all rows. A part by time of a split by time
    has only later validation rows: all of them."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.part is None:
            return self
        if self.partition.by == "none":
            raise ValueError(
                f"part={self.part} needs data.partition.by=user, item, time or random"
            )
        if not 0 <= self.part < self.partition.parts:
            raise ValueError(
                f"part={self.part}: data.partition has parts 0 to {self.partition.parts - 1}"
            )
        return self
