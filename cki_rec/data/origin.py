"""What a model was trained on: can rows of a data set have been among its training rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SEVERAL = "several"
"""Stands for the hash of the data set where there were several."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of raw files that were divided together; which vocabularies they have is no matter."""

    files: tuple[str, ...]
    """sha256 of each raw file."""
    division: str
    """Hash of which row is which and in which split."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model was trained on, all that it was merged from included."""

    data_hash: str
    """Of the encoded data set, or ``SEVERAL``."""
    rows: tuple[Rows, ...] | None = None
    """None: not known, as of models of earlier releases."""

    def may_have_seen(self, rows: Rows) -> bool:
        """Return whether raw files of ``rows`` were divided otherwise for the model."""
        return any(own != rows and set(own.files) & set(rows.files) for own in self.rows or ())

    def has_other_files(self, rows: Rows) -> bool:
        """Return whether the model was trained on rows of raw files that ``rows`` are not of."""
        return any(not set(own.files) & set(rows.files) for own in self.rows or ())

    def to_json(self) -> dict[str, Any]:
        """Return a form that ``json.dumps`` takes and ``from_json`` reads."""
        rows = self.rows
        listed = None if rows is None else [[list(r.files), r.division] for r in rows]
        return {"data_hash": self.data_hash, "rows": listed}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Origin:
        """Return the origin that ``to_json`` wrote, alone or among other keys."""
        listed = value.get("rows")
        rows = None if listed is None else tuple(Rows(tuple(f), d) for f, d in listed)
        return cls(value["data_hash"], rows)


def together(origins: Sequence[Origin]) -> Origin:
    """Return the origin of a model that was made of models, or trained on from one."""
    hashes = {origin.data_hash for origin in origins}
    rows: dict[Rows, None] = {}
    for origin in origins:
        if origin.rows is None:
            return Origin(hashes.pop() if len(hashes) == 1 else SEVERAL)
        rows |= dict.fromkeys(origin.rows)
    return Origin(hashes.pop() if len(hashes) == 1 else SEVERAL, tuple(rows))
