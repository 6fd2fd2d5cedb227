"""Provenance of a model: the rows it was trained on, to detect test rows among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SEVERAL = "several"
"""Replaces the hash of the data set if there were several."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of raw files and how they were split, whatever their vocabularies."""

    files: tuple[str, ...]
    """sha256 of each raw file with rows."""
    division: str
    """Hash of the columns that identify rows and their splits."""
    rule: str | None = None
    """Rule that determines the split of a row from the row alone (``data.split.by=hash``); None:
    the split depends on other rows too."""

    def agree(self, other: Rows) -> bool:
        """Return whether certainly no test row of one is a training row of the other."""
        if self.files == other.files:
            return self.division == other.division
        return self.rule is not None and self.rule == other.rule

    def share_files(self, other: Rows) -> bool:
        """Return whether both contain a common raw file."""
        return bool(set(self.files) & set(other.files))


@dataclass(frozen=True, slots=True)
class Provenance:
    """The data that a model, or any model it was made from, was trained on."""

    data_hash: str
    """Hash of the encoded data set, or ``SEVERAL``."""
    rows: tuple[Rows, ...] | None = None
    """Training rows; None: unknown, for models of earlier releases."""
    sets: tuple[str, ...] = ()
    """Hashes of the encoded data sets if there were several; empty for earlier releases."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """Return the hashes of the encoded data sets; empty if they are not recorded."""
        return self.sets if self.data_hash == SEVERAL else (self.data_hash,)

    def may_have_seen(self, rows: Rows) -> bool:
        """Return whether the model was trained on another split of raw files of ``rows``."""
        return any(not seen.agree(rows) and seen.share_files(rows) for seen in self.rows or ())

    def has_other_files(self, rows: Rows) -> bool:
        """Return whether the model was trained on other raw files, which may contain test rows."""
        return any(not seen.agree(rows) and not seen.share_files(rows) for seen in self.rows or ())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, which ``from_json`` reads."""
        return {name: value for name, value in asdict(self).items() if name != "sets" or value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Provenance:
        """Return the provenance that ``to_json`` returned; other keys are ignored."""
        listed = value.get("rows")
        rows = [Rows(**{**r, "files": tuple(r["files"])}) for r in listed or ()]
        known = None if listed is None else tuple(rows)
        return cls(value["data_hash"], known, tuple(value.get("sets", ())))

    @classmethod
    def union(cls, provenances: Sequence[Provenance]) -> Provenance:
        """Return the provenance of a model that was made from models of ``provenances``."""
        hashes = list(dict.fromkeys(name for each in provenances for name in each.hashes))
        is_known = all(each.hashes for each in provenances)
        data_hash = hashes[0] if is_known and len(hashes) == 1 else SEVERAL
        sets = tuple(hashes) if is_known and data_hash == SEVERAL else ()
        rows: dict[Rows, None] = {}
        for provenance in provenances:
            if provenance.rows is None:
                return cls(data_hash, None, sets)
            rows |= dict.fromkeys(provenance.rows)
        return cls(data_hash, tuple(rows), sets)
