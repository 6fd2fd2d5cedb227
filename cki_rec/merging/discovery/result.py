"""The result of a search, as an immutable sequence that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

from cki_rec.merging.symmetry import Slice, Symmetry

MEMBERS = 4
"""Members of a class that the table prints; the rest is counted."""


class Symmetries(Sequence[Symmetry]):
    """Verified symmetries of one module. Printed, they are a table.

    Attributes:
        frozen: Readable reasons why some axes do not move: unknown operations, control flow that
            depends on values, refused classes, a failed trace.
        errors: Per symmetry: the largest relative change of an output that its trials measured.
        runs: Forward passes of the search.
    """

    def __init__(
        self,
        symmetries: Iterable[Symmetry] = (),
        errors: Iterable[float] = (),
        frozen: Iterable[str] = (),
        runs: int = 0,
    ) -> None:
        self._symmetries = tuple(symmetries)
        self.errors = tuple(errors)
        self.frozen = tuple(frozen)
        self.runs = runs

    @overload
    def __getitem__(self, index: int) -> Symmetry: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Symmetry, ...]: ...

    def __getitem__(self, index: int | slice) -> Symmetry | tuple[Symmetry, ...]:
        return self._symmetries[index]

    def __len__(self) -> int:
        return len(self._symmetries)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Symmetries):
            return self._symmetries == other._symmetries
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._symmetries)

    def __repr__(self) -> str:
        return f"<Symmetries: {len(self)} found, {len(self.frozen)} reasons for frozen axes>"

    def __str__(self) -> str:
        header = ("class", "group", "size", "members")
        rows = [header] + [
            (str(number), symmetry.kind.replace("_", " "), str(symmetry.size), members(symmetry))
            for number, symmetry in enumerate(self)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        if not self:
            lines = ["no symmetries"]
        return "\n".join([*lines, *(f"frozen: {reason}" for reason in self.frozen)])


def members(symmetry: Symmetry) -> str:
    """Return the first members of a symmetry in words."""
    texts = [member(part, symmetry.size) for part in symmetry.slices]
    more = len(texts) - MEMBERS
    return ", ".join(texts[:MEMBERS]) + (f" and {more} more" if more > 0 else "")


def member(part: Slice, size: int) -> str:
    """Return one member in words, such as ``mlp.0.weight axis 0 [0:32]``."""
    step = part.step or part.width
    if part.starts:
        places = f"[{', '.join(map(str, part.starts[:3]))}{', ...' if size > 3 else ''}]"
    else:
        end = part.start + (size - 1) * step + part.width
        places = f"[{part.start}:{end}]" if step == part.width else f"[{part.start}:{end}:{step}]"
    rows = "".join(f" of axis {axis} [{a}:{b}]" for axis, a, b in part.within)
    width = f" by {part.width}" if part.width > 1 else ""
    sign = "" if part.signed else " without signs"
    return f"{part.parameter} axis {part.axis} {places}{width}{rows}{sign}"
