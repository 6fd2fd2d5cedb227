"""One standalone report page: no script, no network, readable on a phone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .display import (
    METHOD_NOTES,
    delong_columns,
    display_frame,
    facts,
    method_name,
    number,
    p_value,
    reading_notes,
)
from .metrics import REPEATED

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    value: str
    range: str = ""
    """Interval, shown below the value."""
    mark: str = ""
    """``+``, ``++``, ``-``, ``--`` or nothing."""

    @property
    def kind(self) -> str:
        """The class of the mark in the page's style."""
        return "better" if self.mark.startswith("+") else "worse"


def report_page(
    title: str,
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    figures: Mapping[str, str],
    notes: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    methods: Mapping[str, str] | None = None,
    suites: Mapping[str, str] | None = None,
) -> str:
    """Return a standalone HTML page of one experiment.

    Args:
        title: Plain text, as are all texts below; the template escapes them.
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
        figures: Caption -> SVG text; the caption also names the figure to screen readers.
        notes: Paragraphs under the title.
        provenance: Rows of the last table, such as versions, commit, seconds.
        methods: Method -> one sentence that describes it; added to ``display.METHOD_NOTES``.
        suites: Suite -> one sentence on the difference between its sources.

    Returns:
        HTML text; the same arguments give the same bytes.
    """
    shown = display_frame(summary)
    described = METHOD_NOTES | dict(methods or {})
    present = [name for name in runs["method"].unique() if name in described]
    return _TEMPLATES.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        suites=[
            _suite(suite, shown[shown["suite"] == suite], runs[runs["suite"] == suite])
            | {"description": (suites or {}).get(suite)}
            for suite in summary["suite"].unique()
        ],
        figures=[_figure(caption, svg) for caption, svg in figures.items()],
        methods={method_name(name, False): described[name] for name in present},
        reading=reading_notes(summary, runs),
        commands="\n".join(dict.fromkeys(runs["command"])),
        provenance=[(name, [Cell(text)]) for name, text in (provenance or {}).items()],
    )


def _suite(name: str, shown: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    """Return the facts and the cells of one suite's two tables."""
    shown = shown.drop(columns="suite")
    shown = shown[[column for column in shown.columns if (shown[column] != "").any()]]
    tests = delong_columns(runs)
    run_rows = []
    for run in runs.to_dict("records"):
        cells = [str(run["seed"])]
        cells += [number(run[metric.name], metric.digits) for metric in REPEATED]
        cells += [p_value(run[column]) for column in tests]
        cells.append(run["run_id"])
        method = method_name(run["method"], run["finetuned"])
        run_rows.append((method, [Cell(cell) for cell in cells]))
    titles = [metric.title for metric in REPEATED]
    return {
        "name": name,
        "facts": {key: text for key, text in facts(runs).items() if key != "Command"},
        "columns": list(shown.columns),
        "rows": [(name, [_cell(c) for c in cells]) for name, *cells in shown.to_numpy()],
        "run_columns": ["method", "seed", *titles, *tests.values(), "run"],
        "runs": run_rows,
    }


def _cell(text: str) -> Cell:
    """Return a summary cell by its parts: value, interval, mark."""
    pattern = r"(?P<value>\S+) (?P<range>\[.*\])(?: \((?P<mark>[+-]{1,2})\))?"
    match = re.fullmatch(pattern, text)
    return Cell(text) if match is None else Cell(**match.groupdict(""))


def _figure(caption: str, svg: str) -> dict[str, Any]:
    """Return the drawing after its ``<svg`` and the widths in pixels that keep it readable."""
    width = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)
    assert width is not None
    pixels = float(width[1]) * 4 / 3
    return {
        "caption": caption,
        "drawing": svg.partition("<svg")[2].rstrip(),
        "min_width": round(0.72 * pixels),
        "max_width": round(1.15 * pixels),
    }
