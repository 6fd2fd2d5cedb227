"""Tables, figures and an HTML page from the records of a name; every number comes from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cki_rec import sweep_jobs
from cki_rec.config import Config, UserError, first_comment
from cki_rec.engine.record import Run, sweep_runs
from cki_rec.evaluation.display import METHOD_NAMES, display_frame, markdown_table
from cki_rec.evaluation.html import report_page
from cki_rec.evaluation.metrics import METRICS, PRIMARY
from cki_rec.evaluation.plots import metric_plot, mixing_plot
from cki_rec.evaluation.records import current, current_name
from cki_rec.evaluation.tables import BASELINES, csv_bytes, runs_frame, summary_frame
from cki_rec.files import write_atomically
from cki_rec.pipelines.evaluate import REPLICATES

TERMINAL_COLUMNS = (
    "method",
    *(metric.title for metric in PRIMARY),
    *(f"{METRICS['auc'].title} vs {METHOD_NAMES[baseline]}" for baseline in BASELINES),
)
"""Columns printed to the terminal."""


def run(config: Config) -> None:
    """Write ``runs.csv``, ``table.md``, ``report.html`` and figures; print the table.

    Raises:
        UserError: No run is recorded under the name.
    """
    runs, num_missing = sweep_runs(Path(config.runtime.out), config.name)
    if not runs:
        folder = Path(config.runtime.out) / "sweeps" / config.name
        if failed := sweep_jobs.failures(folder):
            raise UserError(f"name={config.name}: {sweep_jobs.summary(failed, len(failed))}")
        raise UserError(
            f"name={config.name}: no run is recorded under it in {config.runtime.out}; start with"
            f" cki-rec evaluate -m experiment={config.name}, or evaluate name={config.name} ..."
        )
    records = [current(run.record) for run in runs if run.record is not None]
    labels = list(dict.fromkeys(record["result"]["method"] for record in records))
    frame, summary = _frames(config.name, runs, records, labels)
    incomplete = (
        [f"Incomplete: {num_missing} jobs of the sweep are missing."] if num_missing else []
    )
    suites = {name: _about_sources(name, records) for name in frame["suite"].unique()}
    methods = {name: first_comment("merge", name) for name in labels}
    figures = _figures(records, frame, summary, labels)
    page = report_page(
        config.name, summary, frame, figures, incomplete, _provenance(records), methods, suites
    )
    title = " ".join([config.name, *incomplete])
    contents = {
        "runs.csv": csv_bytes(frame),
        "table.md": markdown_table(summary, frame, title, suites, methods).encode(),
        **{f"{_file_name(caption)}.svg": svg.encode() for caption, svg in figures.items()},
        "report.html": page.encode(),
    }
    folder = Path(config.runtime.reports) / config.name
    for name, content in contents.items():
        write_atomically(folder / name, content)

    _print(summary)
    print(" ".join([f"{len(runs)} evaluated models.", *incomplete]))
    print(f"report: {folder / 'report.html'}")


def _about_sources(suite: str, records: Sequence[dict[str, Any]]) -> str:
    """Return one sentence on the sources of a suite: the names of checkpoints, or the suite's."""
    results = [record["result"] for record in records if record["result"]["suite"] == suite]
    named = next((result["sources"] for result in results if "sources" in result), None)
    if named is None:
        return first_comment("suite", suite)
    return f"Checkpoints that the user named: {', '.join(named)}."


def _frames(
    name: str, runs: Sequence[Run], records: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frame of runs and the frame of their summaries.

    Raises:
        UserError: The runs do not belong in one table.
    """
    confidences = {record["config"]["evaluate"]["confidence"] for record in records}
    try:
        if len(confidences) > 1:
            raise ValueError(f"intervals of confidence {sorted(confidences)}")
        frame = runs_frame(records, labels)
        replicates = {run.path.name: _replicates(run) for run in runs}
        return frame, summary_frame(frame, replicates, *confidences)
    except ValueError as error:
        versions = [record["provenance"]["versions"] for record in records]
        releases = sorted({known.get("cki-rec", "unknown") for known in versions})
        made_by = f", made by releases {' and '.join(releases)}" if len(releases) > 1 else ""
        raise UserError(
            f"name={name} holds runs that do not belong in one table ({error}){made_by}; evaluate"
            " them again, each setting and release under a separate name"
        ) from None


def _figures(
    records: Sequence[dict[str, Any]],
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    labels: Sequence[str],
) -> dict[str, str]:
    """Return caption -> SVG text: the primary metrics, and the mixing weights of each suite."""
    figures = {
        f"{metric.title} on test rows": metric_plot(summary, frame, metric.name)
        for metric in PRIMARY
    }
    for suite in frame["suite"].unique():
        if svg := mixing_plot(records, suite=suite, methods=labels):
            figures[f"Mixing weights, suite {suite} (blank: trained, not mixed)"] = svg
    return figures


def _print(summary: pd.DataFrame) -> None:
    """Print one table per suite, as wide as the terminal allows."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    shown = display_frame(summary)
    for suite, rows in shown.groupby("suite", sort=False):
        table = Table(title=f"suite {suite}", title_justify="left")
        columns = [c for c in TERMINAL_COLUMNS if c in rows and (rows[c] != "").any()]
        for column in columns:
            table.add_column(column)
        for row in rows[columns].itertuples(index=False):
            table.add_row(*map(str, row))
        console.print(table)


def _replicates(run: Run) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return baseline -> metric -> replicates of the difference."""
    nested: dict[str, dict[str, NDArray[np.float64]]] = {}
    with np.load(run.path / REPLICATES, allow_pickle=False) as arrays:
        for key in arrays.files:
            baseline, metric = key.split("/")
            nested.setdefault(current_name(baseline), {})[metric] = arrays[key]
    return nested


def _provenance(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return commit, versions, hardware and memory of the records, each distinct value once."""
    provenances = [record["provenance"] for record in records]
    commits = [f"{p['commit']}{' with changes' if p['dirty'] else ''}" for p in provenances]
    versions = [", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in provenances]
    memory = max(p["peak_memory_mb"] for p in provenances)
    return {
        "Commit": "; ".join(dict.fromkeys(commits)),
        "Versions": "; ".join(dict.fromkeys(versions)),
        "Hardware": "; ".join(dict.fromkeys(p["hardware"] for p in provenances)),
        "Peak memory of a process": f"{memory:,.0f} MB",
    }


def _file_name(caption: str) -> str:
    """Return ``auc_on_test_rows`` for "AUC on test rows"; text after a bracket is left out."""
    words = caption.partition(" (")[0].lower().replace(",", " ").split()
    return "_".join(words)
