"""One standalone report page: no script, no network, readable on a phone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cki_rec.evaluation import display
from cki_rec.evaluation.metrics import REPEATED

_TEMPLATES = Environment(
    autoescape=True,
    loader=FileSystemLoader(Path(__file__).parent),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)


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
    shown = display.display_frame(summary)
    described = display.METHOD_NOTES | dict(methods or {})
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
        methods={display.method_name(name, False): described[name] for name in present},
        reading=display.reading_notes(summary, runs),
        commands="\n".join(dict.fromkeys(runs["command"])),
        provenance=[(name, [(text, "", "")]) for name, text in (provenance or {}).items()],
    )


def _suite(name: str, shown: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    """Return the facts and the cells of one suite's two tables."""
    shown = shown.drop(columns="suite")
    shown = shown[[column for column in shown.columns if (shown[column] != "").any()]]
    tests = display.delong_columns(runs)
    run_rows = []
    for run in runs.to_dict("records"):
        cells = [str(run["seed"])]
        cells += [display.number(run[metric.name], metric.digits) for metric in REPEATED]
        cells += [display.p_value(run[column]) for column in tests]
        method = display.method_name(run["method"], run["finetuned"])
        run_rows.append((method, [(cell, "", "") for cell in [*cells, run["run_id"]]]))
    titles = [metric.title for metric in REPEATED]
    return {
        "name": name,
        "facts": {key: text for key, text in display.facts(runs).items() if key != "Command"},
        "columns": list(shown.columns),
        "rows": [(name, [_parts(c) for c in cells]) for name, *cells in shown.to_numpy()],
        "run_columns": ["method", "seed", *titles, *tests.values(), "run"],
        "runs": run_rows,
    }


def _parts(cell: str) -> tuple[str, ...]:
    """Return value, interval and mark of a summary cell."""
    match = re.fullmatch(r"(\S+) (\[.*\])(?: \(([+-]{1,2})\))?", cell)
    return match.groups("") if match else (cell, "", "")


def _figure(caption: str, svg: str) -> tuple[str, str, float]:
    """Return the caption, the drawing after its ``<svg``, and its width in pixels."""
    width = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)
    assert width is not None
    return caption, svg.partition("<svg")[2].rstrip(), float(width[1]) * 4 / 3
