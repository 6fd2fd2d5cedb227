"""``table.md``: the verdict and the main columns of every suite, then everything else, folded."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

import pandas as pd

from cki_rec.evaluation.display import (
    display_frame,
    facts,
    filled,
    main_frame,
    method_name,
    reading_notes,
)
from cki_rec.evaluation.verdict import verdicts


def markdown_table(
    summary: pd.DataFrame,
    runs: pd.DataFrame,
    title: str = "Results",
    suites: Mapping[str, str] = {},
    methods: Mapping[str, str] = {},
    titles: Mapping[str, str] = {},
    regions: Mapping[str, pd.DataFrame] = {},
) -> str:
    """Return a Markdown file of one experiment.

    Args:
        summary: Of ``summary_frame``.
        runs: Of ``runs_frame``, the same runs.
        title: First heading. Plain text, as are all texts below; Markdown and HTML are escaped.
        suites: Suite -> one sentence on the difference between its sources.
        methods: Method -> one sentence that describes it.
        titles: Suite -> its heading; by default its name.
        regions: Suite -> table of ``region_tables``.
    """
    main, full = main_frame(summary), display_frame(summary)
    lines = [f"# {escaped(title)}", ""]
    for suite, sentences in verdicts(summary, runs).items():
        lines += [
            f"**{escaped(titles.get(suite, suite))}**",
            "",
            *(f"- {escaped(text)}" for text in sentences),
            "",
        ]
    for suite in summary["suite"].unique():
        lines += [f"## {escaped(titles.get(suite, suite))}", ""]
        if suites.get(suite):
            lines += [escaped(suites[suite]), ""]
        lines += _table(main[main["suite"] == suite].drop(columns="suite"))
        if suite in regions:
            lines += ["AUC by region:", "", *_table(regions[suite])]
        lines += ["<details><summary>All columns, data, hardware, command</summary>", ""]
        for name, value in facts(runs[runs["suite"] == suite]).items():
            if name == "Command":
                commands = [f"  {command}" for command in value.split("\n")]
                lines += [f"- {name}:", "", "  ```sh", *commands, "  ```"]
            else:
                lines.append(f"- {name}: {escaped(value)}")
        lines += [
            "",
            *_table(full[full["suite"] == suite].drop(columns="suite")),
            "</details>",
            "",
        ]
    if methods:
        notes = [f"{method_name(name, False)}: {text}" for name, text in methods.items()]
        lines += _folded_list("Methods", notes)
    lines += _folded_list("How to read the tables", reading_notes(summary, runs))
    return "\n".join(lines[:-1]) + "\n"


def escaped(text: str) -> str:
    """Return text that Markdown shows as typed: no tag, link, emphasis, code or table cell."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~#])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word it is no emphasis


def _table(part: pd.DataFrame) -> list[str]:
    part = filled(part)
    lines = [_row(map(escaped, part.columns)), "| --- |" + " ---: |" * (len(part.columns) - 1)]
    # cells after the first are numbers; their brackets make no link
    return [*lines, *(_row([escaped(name), *cells]) for name, *cells in part.to_numpy()), ""]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _folded_list(title: str, notes: list[str]) -> list[str]:
    items = [f"- {escaped(note)}" for note in notes]
    return [f"<details><summary>{title}</summary>", "", *items, "", "</details>", ""]
