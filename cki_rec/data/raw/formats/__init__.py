"""Readers of published raw formats; one file per format, one row in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from cki_rec.config import Data
from cki_rec.data.raw.formats import avazu, criteo, movielens, sequences, synthetic
from cki_rec.data.raw.formats import csv as bars
from cki_rec.data.raw.reading import Reading


@dataclass(frozen=True, slots=True)
class Format:
    """One raw format."""

    files: Callable[[Data], list[Path]]
    """The files on disk whose bytes decide the content."""
    kinds: Callable[[Data], dict[str, str]]
    """Field -> kind it has unless ``data.fields`` says otherwise; of raw columns, times (see
    ``raw.TIME_FIELDS``) and ``history``."""
    read: Callable[[Data, Reading], Iterator[pl.DataFrame]]
    """Rows in the common form of ``cki_rec.data.raw.reading``, chunk by chunk."""
    user: Callable[[Data], str | None]
    """The column that names the user of a row; None: rows have none."""
    item: Callable[[Data], str | None]
    """The column that names the item of a row; None: rows have none."""
    has_published: bool = False
    """Whether ``conf/published.yaml`` knows files of this format."""
    is_chronological: Callable[[Data], bool] = lambda data: False
    """Whether rows without times stand in the order of time."""
    rows_per_step: Callable[[Data], int] = lambda data: 1
    """Rows of one user that stand together for one step in time."""
    describes: frozenset[str] = frozenset()
    """Names of raw files that tell of users and items, and hold no rows."""


def _of(module: Any, **others: Any) -> Format:
    return Format(module.files, module.kinds, module.read, module.user, module.item, **others)


FORMATS: dict[str, Format] = {
    "criteo": _of(criteo, is_chronological=lambda data: True),
    "avazu": _of(avazu),
    "movielens": _of(movielens, has_published=True, describes=movielens.DESCRIBES),
    "bars": _of(bars, has_published=True),
    "sequences": _of(
        sequences,
        rows_per_step=sequences.rows_per_step,
        describes=frozenset({sequences.ATTRIBUTES}),
    ),
    "synthetic": _of(synthetic, is_chronological=lambda data: data.synthetic.layout == "criteo"),
}
