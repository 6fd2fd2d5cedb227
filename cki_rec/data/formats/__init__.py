"""Readers of published raw formats; one file per format, one row in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cki_rec.data.formats import movielens
from cki_rec.data.raw import RawRows


@dataclass(frozen=True, slots=True)
class Format:
    """One raw format."""

    files: Callable[[Path], list[Path]]
    """Path of the raw data -> the files on disk whose bytes decide the content."""
    read: Callable[[Path, Sequence[str], str], RawRows]
    """(path, fields, on_bad_row) -> rows in the common form, holding at least ``fields``."""


FORMATS: dict[str, Format] = {
    "movielens": Format(files=movielens.files, read=movielens.read),
}
