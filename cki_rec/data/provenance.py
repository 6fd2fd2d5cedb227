"""What a model was trained on: can rows of a data set have been among its training rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

SEVERAL = "several"
"""Stands for the hash of the data set where there were several."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of raw files that were divided together; which vocabularies they have is no matter."""

    files: tuple[str, ...]
    """sha256 of each raw file that holds rows."""
    division: str
    """Hash of which row is which and in which split."""
    rule: str | None = None
    """What puts a row into its split whatever file it stands in (``data.split.by=hash``); None:
    other rows have a say."""

    def agree(self, other: Rows) -> bool:
        """Return whether no test row of one is a training row of the other, and that is sure."""
        if self.files == other.files:
            return self.division == other.division
        return self.rule is not None and self.rule == other.rule

    def share_files(self, other: Rows) -> bool:
        """Return whether a raw file is in both."""
        return bool(set(self.files) & set(other.files))


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a model was trained on, all that it was merged from included."""

    data_hash: str
    """Of the encoded data set, or ``SEVERAL``."""
    rows: tuple[Rows, ...] | None = None
    """None: not known, as of models of earlier releases."""

    def may_have_seen(self, rows: Rows) -> bool:
        """Return whether raw files of ``rows`` were divided otherwise for the model."""
        return any(not own.agree(rows) and own.share_files(rows) for own in self.rows or ())

    def has_other_files(self, rows: Rows) -> bool:
        """Return whether other raw files were trained on, that may hold test rows of ``rows``."""
        return any(not own.agree(rows) and not own.share_files(rows) for own in self.rows or ())

    def to_json(self) -> dict[str, Any]:
        """Return a form that ``json.dumps`` takes and ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Provenance:
        """Return the origin that ``to_json`` wrote, alone or among other keys."""
        listed = value.get("rows")
        rows = [Rows(**{**r, "files": tuple(r["files"])}) for r in listed or ()]
        return cls(value["data_hash"], None if listed is None else tuple(rows))

    @classmethod
    def union(cls, provenances: Sequence[Provenance]) -> Provenance:
        """Return the provenance of a model that was made from models of ``provenances``."""
        hashes = {provenance.data_hash for provenance in provenances}
        data_hash = hashes.pop() if len(hashes) == 1 else SEVERAL
        rows: dict[Rows, None] = {}
        for provenance in provenances:
            if provenance.rows is None:
                return cls(data_hash)
            rows |= dict.fromkeys(provenance.rows)
        return cls(data_hash, tuple(rows))
