"""One standalone report page: the answer first, the rest folded. It loads nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cki_rec.evaluation import display, plots
from cki_rec.evaluation.metrics import REPEATED
from cki_rec.evaluation.tables import BEST_SOURCE, difference_column
from cki_rec.evaluation.verdict import verdicts

_TEMPLATES = Environment(
    autoescape=True,
    loader=FileSystemLoader(Path(__file__).parent),
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)
THEME = {
    plots.INK: "var(--ink)",
    plots.SOFT: "var(--soft)",
    plots.LINE: "var(--line)",
    plots.PAPER: "var(--page)",
}
"""Color of a figure -> color of the page, so that figures follow its dark mode."""


def report_page(
    title: str,
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    figures: Mapping[str, str],
    notes: Sequence[str] = (),
    provenance: Mapping[str, str] | None = None,
    methods: Mapping[str, str] | None = None,
    suites: Mapping[str, str] | None = None,
    answer: Mapping[str, str] = {},
    titles: Mapping[str, str] = {},
    regions: Mapping[str, pd.DataFrame] = {},
) -> str:
    """Return a standalone HTML page of one experiment.

    Args:
        title: Plain text, as are all texts below; the template escapes them.
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
        figures: Caption -> SVG text; the caption also names the figure to screen readers.
        notes: Paragraphs under the title.
        provenance: Where the numbers come from: versions, commit, memory.
        methods: Method -> one sentence that describes it; added to ``display.METHOD_NOTES``.
        suites: Suite -> one sentence on the difference between its sources.
        answer: The drawings of the one figure under the verdict, like ``figures``.
        titles: Suite -> its heading; by default its name.
        regions: Suite -> table of ``region_tables``.

    Returns:
        HTML text; the same arguments give the same bytes.
    """
    main, full = display.main_frame(summary), display.display_frame(summary)
    described = display.METHOD_NOTES | dict(methods or {})
    present = [name for name in runs["method"].unique() if name in described]
    return _TEMPLATES.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        level=" and ".join(f"{value * 100:g} %" for value in summary["confidence"].unique()),
        suites=[
            {
                "name": titles.get(suite, suite),
                "is_named": titles.get(suite, suite) == suite,
                "description": (suites or {}).get(suite),
                "verdict": sentences,
                "facts": _facts(runs[runs["suite"] == suite]),
                "main": _table(main[main["suite"] == suite].drop(columns="suite")),
                "regions": _table(regions[suite]) if suite in regions else None,
                "full": _table(full[full["suite"] == suite].drop(columns="suite")),
                "runs": _run_table(runs[runs["suite"] == suite]),
            }
            for suite, sentences in verdicts(summary, runs).items()
        ],
        compared=summary[difference_column("auc", BEST_SOURCE)].notna().any(),
        answer=[_figure(caption, svg) for caption, svg in answer.items()],
        figures=[_figure(caption, svg) for caption, svg in figures.items()],
        methods={display.method_name(name, False): described[name] for name in present},
        reading=display.reading_notes(summary, runs),
        commands="\n".join(dict.fromkeys(runs["command"])),
        provenance=dict(provenance or {}),
    )


def _facts(runs: pd.DataFrame) -> dict[str, str]:
    return {key: text for key, text in display.facts(runs).items() if key != "Command"}


def _table(part: pd.DataFrame) -> dict[str, Any]:
    """Return the columns and the cells of one suite's summaries."""
    part = display.filled(part)
    rows = [
        (name, [display.cell_parts(cell) for cell in cells]) for name, *cells in part.to_numpy()
    ]
    return {"columns": list(part.columns), "rows": rows}


def _run_table(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the columns and the cells of the table with one row per run."""
    tests = display.delong_columns(runs)
    rows = []
    for run in runs.to_dict("records"):
        cells = [str(run["seed"])]
        cells += [display.number(run[metric.name], metric.digits) for metric in REPEATED]
        cells += [display.p_value(run[column]) for column in tests]
        method = display.method_name(run["method"], run["finetuned"])
        rows.append((method, [(cell, "", "") for cell in [*cells, run["run_id"]]]))
    titles = [metric.title for metric in REPEATED]
    return {"columns": ["method", "seed", *titles, *tests.values(), "run"], "rows": rows}


def _figure(caption: str, svg: str) -> tuple[str, str, float]:
    """Return the caption, the drawing after its ``<svg``, and its width in pixels."""
    width = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)
    assert width is not None
    drawing = svg.partition("<svg")[2].rstrip()
    colored = re.sub("|".join(THEME), lambda match: THEME[match[0]], drawing)
    return caption, colored, float(width[1]) * 4 / 3
