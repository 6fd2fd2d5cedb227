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

from cki_rec.config import Config, UserError, first_comment
from cki_rec.engine.record import Run, sweep_runs
from cki_rec.evaluation.display import display_frame, markdown_table
from cki_rec.evaluation.html import report_page
from cki_rec.evaluation.plots import metric_plot, splice_plot
from cki_rec.evaluation.tables import runs_frame, summary_frame, write_csv
from cki_rec.files import write_atomically
from cki_rec.pipelines.evaluate import REPLICATES

TERMINAL_COLUMNS = ("method", "AUC", "LogLoss", "AUC vs best parent", "AUC vs output ensemble")


def run(config: Config) -> None:
    """Write ``runs.csv``, ``table.md``, ``report.html`` and figures; print the table.

    Raises:
        UserError: No run is recorded under the name.
    """
    runs, num_missing = sweep_runs(Path(config.runtime.out), config.name)
    if not runs:
        raise UserError(
            f"name={config.name}: no run is recorded under it in {config.runtime.out}; start with"
            f" cki-rec evaluate -m experiment={config.name}, or evaluate name={config.name} ..."
        )
    records = [run.record for run in runs if run.record is not None]
    methods = list(dict.fromkeys(record["result"]["method"] for record in records))
    confidences = {record["config"]["evaluate"]["confidence"] for record in records}
    try:
        if len(confidences) > 1:
            raise ValueError(f"intervals of confidence {sorted(confidences)}")
        frame = runs_frame(records, methods)
        replicates = {run.path.name: _replicates(run) for run in runs}
        summary = summary_frame(frame, replicates, *confidences)
    except ValueError as error:
        raise UserError(
            f"name={config.name} holds runs that do not belong in one table ({error}); evaluate"
            " them again, each setting under a name of its own"
        ) from None
    incomplete = (
        [f"Incomplete: {num_missing} jobs of the sweep are missing."] if num_missing else []
    )

    suites = {name: first_comment("suite", name) for name in frame["suite"].unique()}
    names = {name: first_comment("merge", name) for name in methods}
    figures = {"AUC on test rows": metric_plot(summary, frame, "auc")}
    figures["LogLoss on test rows"] = metric_plot(summary, frame, "log_loss")
    for suite in frame["suite"].unique():
        if picture := splice_plot(records, suite=suite, methods=methods):
            figures[f"What was spliced from whom, suite {suite} (blank: trained, not spliced)"] = (
                picture
            )

    folder = Path(config.runtime.reports) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(frame, folder / "runs.csv")
    title = " ".join([config.name, *incomplete])
    table = markdown_table(summary, frame, title=title, suites=suites, methods=names)
    write_atomically(folder / "table.md", table.encode())
    for caption, picture in figures.items():
        write_atomically(folder / f"{_file_name(caption)}.svg", picture.encode())
    page = report_page(
        config.name,
        summary,
        frame,
        figures,
        notes=incomplete,
        provenance=_provenance(records),
        methods=names,
        suites=suites,
    )
    write_atomically(folder / "report.html", page.encode())

    _print(summary)
    print(" ".join([f"{len(runs)} evaluated models.", *incomplete]))
    print(f"report: {folder / 'report.html'}")


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
    """Return reference -> metric -> replicates of the difference."""
    nested: dict[str, dict[str, NDArray[np.float64]]] = {}
    with np.load(run.path / REPLICATES, allow_pickle=False) as arrays:
        for key in arrays.files:
            reference, metric = key.split("/")
            nested.setdefault(reference, {})[metric] = arrays[key]
    return nested


def _provenance(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return what the records say about where they were made, each distinct value once."""
    found = [record["provenance"] for record in records]
    commits = [f"{p['commit']}{' with changes' if p['dirty'] else ''}" for p in found]
    versions = [", ".join(f"{k} {v}" for k, v in p["versions"].items()) for p in found]
    memory = max(p["peak_memory_mb"] for p in found)
    return {
        "Commit": "; ".join(dict.fromkeys(commits)),
        "Versions": "; ".join(dict.fromkeys(versions)),
        "Hardware": "; ".join(dict.fromkeys(p["hardware"] for p in found)),
        "Peak memory of a process": f"{memory:,.0f} MB",
    }


def _file_name(caption: str) -> str:
    """Return ``auc_on_test_rows`` for "AUC on test rows"; what follows a bracket is left out."""
    words = caption.partition(" (")[0].lower().replace(",", " ").split()
    return "_".join(words)
