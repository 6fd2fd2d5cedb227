"""Assessments as text for a terminal, without dependencies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

MOST_ROWS = 30
"""Parameters that are shown; the least compatible ones."""
NARROWEST = 24
"""Characters of a name that are shown in any case."""
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, its text, and its rank; high ranks are left out of a narrow table."""

    title: str
    text: Callable[[Row], str]
    rank: int = 0


def assessment_text(
    rows: Sequence[Row],
    barrier: Mapping[str, Any] | None,
    suggestion: str,
    width: int | None = None,
) -> str:
    """Return a table of the rows, the barrier and the suggestion.

    Args:
        rows: Rows of an assessment.
        barrier: Its barrier.
        suggestion: Its suggestion.
        width: Columns of the terminal; None: asked from the system.
    """
    width = width or shutil.get_terminal_size((110, 24)).columns
    parameters = [row for row in rows if row["kind"] in ("table", "tensor")]
    summaries = [row for row in rows if row["kind"] not in ("table", "tensor")]
    shown = parameters[:MOST_ROWS]
    lines = _table([*shown, *summaries], width)
    num_hidden = len(parameters) - len(shown)
    lines.insert(1 + len(shown), f"({num_hidden} more compatible ones)" if num_hidden else "")
    lines += ["", *wrap(LEGEND, width)]
    if barrier is not None:
        lines += ["", *_barrier_lines(barrier, width)]
    return "\n".join([*lines, "", *wrap(suggestion, width)])


LEGEND = (
    "Compat is the smallest score of a source over the largest; 1 means equal sources. Local and"
    " global are its two perspectives. Hard and soft are the percentages that the sources give."
    " Dist and cos are their relative distance and cosine, > after alignment. Rows are percentages"
    " of a table: seen by all sources / by some / by none."
)


def _columns(rows: Sequence[Row]) -> list[Column]:
    columns = [
        Column("kind", lambda row: row["kind"], 4),
        Column("entries", lambda row: f"{row['entries']:,}", 3),
        Column("compat", lambda row: _number(row["compatibility"])),
        Column("local", lambda row: _number(row["local_compatibility"]), 1),
        Column("global", lambda row: _number(row["global_compatibility"]), 1),
        Column("hard", lambda row: _percents(row["hard"]), 2),
        Column("soft", lambda row: _percents(row["soft"]), 2),
        Column("dist", lambda row: _number(row["distance"])),
        Column(">dist", lambda row: _number(row["aligned_distance"])),
        Column("cos", lambda row: _number(row["cosine"])),
        Column(">cos", lambda row: _number(row["aligned_cosine"])),
        Column("base cos", lambda row: _number(row["task_cosine"])),
        Column("rows", _seen, 1),
    ]
    return [column for column in columns if any(column.text(row) for row in rows)]


def _table(rows: Sequence[Row], width: int) -> list[str]:
    """Return the lines of a table; columns are left out, then names cut, until it fits."""
    columns = _columns(rows)

    def sizes() -> list[int]:
        return [max(len(c.title), *(len(c.text(row)) for row in rows)) for c in columns]

    while sum(sizes()) + 2 * len(columns) + NARROWEST > width and any(c.rank for c in columns):
        columns.remove(max(columns, key=lambda column: column.rank))
    room = max(NARROWEST, width - sum(sizes()) - 2 * len(columns))
    room = min(room, max(len(row["name"]) for row in rows))
    layout = list(zip(columns, sizes(), strict=True))
    lines = ["  ".join([f"{'parameter':{room}}", *(f"{c.title:>{size}}" for c, size in layout)])]
    for row in rows:
        texts = (f"{c.text(row):>{size}}" for c, size in layout)
        lines.append("  ".join([f"{_cut(row['name'], room):{room}}", *texts]).rstrip())
    return lines


def _barrier_lines(barrier: Mapping[str, Any], width: int) -> list[str]:
    """Return the heights of the barrier, and the values on each line."""
    heights = [
        f"{b} {_number(barrier[b], 4)}" for b in ("raw", "aligned") if barrier[b] is not None
    ]
    lines = [f"barrier ({barrier['measure']}): {', '.join(heights)}"]
    groups: dict[tuple[str, str], list[str]] = {}
    for point in barrier["points"]:
        key = (point["basis"], point["line"])
        groups.setdefault(key, []).append(_number(point["value"], 4))
    for (basis, line), values in groups.items():
        lines += wrap(f"  {basis} {line}: {' '.join(values)}", width, subsequent_indent="    ")
    return lines


def _seen(row: Row) -> str:
    if not row["rows"]:
        return ""
    some = row["rows_some"] + sum(row["rows_one"])
    counts = (row["rows_all"], some, row["rows_none"])
    return "/".join(f"{100 * count / row['rows']:.0f}" for count in counts)


def _percents(shares: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value + 0.0:.{digits}f}"


def _cut(name: str, size: int) -> str:
    """Return a name of at most ``size`` characters: its end."""
    return name if len(name) <= size else f"...{name[3 - size :]}"
