"""Readers of raw formats: one module per format, one row in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from cki_rec.config import Data
from cki_rec.data.raw.chunks import Check, Chunk, frames
from cki_rec.data.raw.formats import (
    avazu,
    completejourney,
    criteo,
    csv,
    hin,
    movielens,
    parquet,
    sequences,
    synthetic,
)
from cki_rec.data.raw.forms import recorded_forms
from cki_rec.data.raw.reading import Reading


@dataclass(frozen=True, slots=True)
class Format:
    """One raw format."""

    files: Callable[[Data], list[Path]]
    """The files on disk that the rows depend on."""
    kinds: Callable[[Data], dict[str, str]]
    """Field -> default kind: one entry per raw column, per entry of ``TIME_FIELDS`` and for
    ``history``."""
    chunks: Callable[[Data, Reading], Iterator[Chunk | Check]]
    """Chunks of rows that become the common form of ``cki_rec.data.raw.reading``."""
    user: Callable[[Data], str | None]
    """The column of users; None: rows have no users."""
    item: Callable[[Data], str | None]
    """The column of items; None: rows have no items."""
    has_published: bool = False
    """Whether ``conf/published.yaml`` lists files of this format."""
    is_chronological: Callable[[Data], bool] = lambda data: False
    """Whether rows without times are in chronological order."""
    rows_per_step: Callable[[Data], int] = lambda data: 1
    """Consecutive rows of one user that form one step in time."""
    has_free_kinds: bool = False
    """Whether ``data.fields`` may make a numeric field of any column."""
    has_types: bool = False
    """Whether columns have types, so that whole numbers stay whole."""
    has_threshold: bool = False
    """Whether ``data.label_threshold`` defines the labels."""
    time: tuple[str, str] = ("time", "seconds")
    """The raw column of times and its form (``values.TIMES``), unless ``data.time`` names it."""
    columns: tuple[str, ...] = ()
    """Columns of files without a header, the label first; empty: files have a header."""
    true_logits: Callable[[Data], Path] | None = None
    """The file of the true logits of the rows; None: rows are not synthetic."""
    describes: frozenset[str] = frozenset()
    """Names of raw files that describe users or items and hold no rows."""
    resolve: Callable[[Data], Data] = lambda data: data
    """Options with values of the raw files in place of ``auto``."""
    recorded_forms: Callable[[Data], dict[str, Any]] = lambda data: {}
    """Options of the form of raw files that differ from the defaults, for manifests."""
    recorded_as: str | None = None
    """Name of the format in manifests and provenance, where it differs: renaming a format must not
    change the identity of encoded sets."""

    def read(self, data: Data, reading: Reading) -> Iterator[pl.DataFrame]:
        """Yield the rows of all chunks in the common form.

        Raises:
            UserError: A row or a file is bad.
        """
        yield from frames(self.chunks(data, reading), reading)


def _format(module: Any, **traits: Any) -> Format:
    return Format(module.files, module.kinds, module.chunks, module.user, module.item, **traits)


FORMATS: dict[str, Format] = {
    "criteo": _format(
        criteo, is_chronological=lambda data: True, columns=tuple(criteo.LAYOUT.columns)
    ),
    "avazu": _format(avazu, time=("hour", "yymmddhh")),
    "movielens": _format(
        movielens,
        has_published=True,
        has_threshold=True,
        time=("timestamp", "seconds"),
        describes=movielens.DESCRIBES,
    ),
    "csv": _format(
        csv,
        has_published=True,
        has_free_kinds=True,
        resolve=csv.resolve,
        recorded_forms=recorded_forms,
        recorded_as="bars",
    ),
    "parquet": _format(
        parquet,
        has_free_kinds=True,
        resolve=parquet.resolve,
        recorded_forms=parquet.recorded_forms,
        has_types=True,
    ),
    "sequences": _format(
        sequences,
        rows_per_step=sequences.rows_per_step,
        describes=frozenset({sequences.ATTRIBUTES}),
    ),
    "hin": _format(hin, has_threshold=True),
    "completejourney": _format(
        completejourney,
        rows_per_step=completejourney.rows_per_step,
        describes=completejourney.DESCRIBES,
    ),
    "synthetic": _format(
        synthetic,
        is_chronological=lambda data: data.synthetic.layout == "criteo",
        true_logits=synthetic.true_logits,
    ),
}


def recorded_name(name: str) -> str:
    """Return the name under which manifests store a format."""
    return FORMATS[name].recorded_as or name


def recorded_format(name: str) -> Format:
    """Return the format that ``recorded_name`` stored as ``name``.

    Raises:
        KeyError: No format has this name.
    """
    return {recorded_name(key): row for key, row in FORMATS.items()}[name]
