"""What every reader of a raw format shares: opening files, bad rows, the common form of rows."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import polars as pl

from cki_rec.config import UserError

EXAMPLES = 3
"""Skipped rows shown per reason."""


@dataclass(slots=True)
class BadRows:
    """Stops at a bad row, or counts it by reason and keeps the first examples."""

    on_bad_row: str
    """``error`` or ``skip``."""
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, found: str, expected: str, count: int = 1) -> None:
        """Record ``count`` bad rows, the first of them at ``where``.

        Raises:
            UserError: ``on_bad_row`` is ``error``.
        """
        shown = repr(found if len(found) <= 80 else found[:77] + "...")
        if self.on_bad_row == "error":
            raise UserError(
                f"{where}: {reason}: found {shown}, expected {expected}; "
                "mend the line, or leave such rows out with data.on_bad_row=skip"
            )
        self.counts[reason] = self.counts.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{where}: {shown}")


@dataclass(frozen=True, slots=True)
class RawRows:
    """Rows of one data set in the common form, in the order of the source."""

    frame: pl.DataFrame
    """``rating`` float64, ``timestamp`` int64, ``line`` uint32 (in the source), and one column a
    field: String (null: missing) or List[String]. ``user`` and ``item`` are always there."""
    bad_rows: BadRows


@dataclass(frozen=True, slots=True)
class RawFiles:
    """The files of a data set, inside a zip or a folder.

    Raises:
        UserError: From any method: absent, unreadable or damaged.
    """

    path: Path

    def find(self, name: str) -> str | None:
        """Return the member called ``name`` at the top or one folder below, or None."""
        found = [m for m in self.members() if PurePosixPath(m).name == name]
        found.sort(key=lambda member: (member.count("/"), member))
        if len(found) > 1 and found[0].count("/") == found[1].count("/"):
            raise UserError(
                f"{self.path}: holds {name} twice ({found[0]}, {found[1]}), expected one data "
                "set; name the folder of one of them in data.raw"
            )
        return found[0] if found else None

    def members(self) -> list[str]:
        """Return the names of all files at the top or one folder below."""
        try:
            if self.path.is_dir():
                both = [*self.path.glob("*"), *self.path.glob("*/*")]
                return sorted(p.relative_to(self.path).as_posix() for p in both if p.is_file())
            if not self.path.exists():
                raise UserError(
                    f"{self.path}: no such file or folder; put the raw data there or set data.raw "
                    "to where it is (data/README.md says where to get it)"
                )
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read: {error.strerror}; set data.raw"
            ) from None
        return [n for n in names if not n.endswith("/") and not n.startswith("__MACOSX/")]

    def read(self, member: str) -> bytes:
        """Return the content of one member."""
        try:
            if self.path.is_dir():
                return (self.path / member).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
            raise self._damaged(str(e)) from None
        except OSError as error:
            where = self.label(member)
            raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None

    def label(self, member: str) -> str:
        """Return how messages name a member."""
        if self.path.is_dir():
            return str(self.path / member)
        return f"{self.path} (member {member})"

    def on_disk(self, members: list[str]) -> list[Path]:
        """Return the files whose bytes decide the content: the zip, or the members."""
        return [self.path / m for m in members] if self.path.is_dir() else [self.path]

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: damaged or not a zip ({what}), expected a whole zip file or a folder; "
            "fetch it again or set data.raw"
        )
