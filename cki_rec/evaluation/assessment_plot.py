"""The figure of an assessment: compatibility and cosines per parameter, and the barrier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from cki_rec.evaluation.plots import COLORS, svg_text, tensor_names

MOST_ROWS = 40
"""Parameters that are drawn; the least compatible ones."""
SERIES = (
    ("compatibility", "both", "D", COLORS[5], 7),
    ("local_compatibility", "local", "o", COLORS[0], 5),
    ("global_compatibility", "global", "s", COLORS[1], 5),
)
"""Entry of a row, its name, marker, color and size."""


def assessment_plot(rows: Sequence[Mapping[str, Any]], barrier: Mapping[str, Any] | None) -> str:
    """Return the figure of an assessment.

    The left panel shows the paper's compatibility per parameter, the least compatible first. The
    right panel shows the cosine of the sources, and an arrow to that after alignment. The panel
    below shows the values on the straight lines between sources, if they were measured.

    Args:
        rows: ``Assessment.rows``.
        barrier: ``Assessment.barrier``.

    Returns:
        SVG text.
    """
    drawn = [row for row in rows if row["kind"] in ("table", "tensor")][:MOST_ROWS]
    height = 0.3 * len(drawn) + 1.7
    below = 0.0 if barrier is None else 2.8

    def draw(figure: Figure) -> None:
        upper: Figure | SubFigure = figure
        if barrier is not None:
            parts: Any = figure.subfigures(2, 1, height_ratios=[height, below])
            upper = parts[0]
            _barrier_panel(parts[1].subplots(), barrier)
        left, right = upper.subplots(1, 2, sharey=True)
        names = tensor_names([row["name"] for row in drawn])
        left.set_yticks(range(len(drawn)), [names[row["name"]] for row in drawn])
        left.set_ylim(len(drawn) - 0.4, -0.6)
        _compatibility_panel(left, drawn)
        _cosine_panel(right, drawn)
        marks, titles = left.get_legend_handles_labels()
        upper.legend(marks, titles, loc="outside lower left", ncols=3, frameon=False)

    return svg_text(8.2, max(height, 2.4) + below, draw)


def _compatibility_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for entry, name, marker, color, size in SERIES:
        values = [row[entry] for row in rows]
        axes.plot(values, range(len(rows)), marker, color=color, ms=size, label=name)
    axes.set_xlim(-0.03, 1.03)
    axes.set_title("compatibility")
    axes.set_xlabel("smallest score over largest; 1: equal")
    _grid(axes)


def _cosine_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        before, after = row["cosine"], row["aligned_cosine"]
        if before is None:
            continue
        axes.plot(before, place, "o", color=COLORS[7], ms=6)
        if after is not None:
            axes.plot([before, after], [place, place], color=COLORS[7], lw=1.2)
            axes.plot(after, place, ">", color=COLORS[2], ms=7)
    axes.axvline(0, color="#666666", lw=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.set_title("cosine of the sources")
    axes.set_xlabel("circle: as they are; triangle: aligned")
    _grid(axes)


def _barrier_panel(axes: Axes, barrier: Mapping[str, Any]) -> None:
    lines = list(dict.fromkeys((p["basis"], p["line"]) for p in barrier["points"]))
    names = list(dict.fromkeys(line for _, line in lines))
    for basis, line in lines:
        points = [p for p in barrier["points"] if (p["basis"], p["line"]) == (basis, line)]
        axes.plot(
            [point["fraction"] for point in points],
            [point["value"] for point in points],
            "--" if basis == "raw" else "-",
            marker="o",
            ms=4,
            color=COLORS[names.index(line) % len(COLORS)],
            label=f"{line}, {basis}",
        )
    axes.set_title("on the straight line between the sources")
    axes.set_xlabel("fraction of the way")
    axes.set_ylabel(barrier["measure"])
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(frameon=False, ncols=2)
    axes.grid(color="#E5E5E5", lw=0.8)


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
