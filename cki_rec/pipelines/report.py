"""Tables, figures and an HTML page from the records of a name; every number comes from them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from cki_rec import sweep_jobs
from cki_rec.config import Config, UserError, first_comment, nearest
from cki_rec.engine.record import Run, load_arrays
from cki_rec.engine.sweeps import list_of, sweep_runs
from cki_rec.evaluation.display import cell_parts, filled, main_frame
from cki_rec.evaluation.html import report_page
from cki_rec.evaluation.markdown import markdown_table
from cki_rec.evaluation.metrics import PRIMARY
from cki_rec.evaluation.plots import metric_plot, mixing_plot
from cki_rec.evaluation.records import current, current_name
from cki_rec.evaluation.regions import region_tables, titles
from cki_rec.evaluation.settings import check_settings
from cki_rec.evaluation.tables import (
    BEST_SOURCE,
    csv_bytes,
    difference_column,
    runs_frame,
    summary_frame,
)
from cki_rec.evaluation.verdict import verdicts
from cki_rec.files import write_atomically
from cki_rec.pipelines.evaluate import OWN, REPLICATES, own_metrics

TERMINAL_WIDTH = 100
"""Most characters of a line that is printed."""

MAX_FILE_NAME = 100
"""Letters of a figure's file name."""

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write ``runs.csv``, ``table.md``, ``report.html`` and figures; print verdict and table.

    Raises:
        UserError: No run is recorded under the name.
    """
    results = recorded(config)
    runs, num_missing, records, labels = (
        results.evaluated,
        results.missing,
        results.records,
        results.labels,
    )
    frame, summary = results.runs, results.summary
    incomplete = (
        [f"Incomplete: {num_missing} jobs of the sweep are missing."] if num_missing else []
    )
    if results.damaged:
        incomplete.append(f"Incomplete: {results.damaged} damaged runs are left out.")
    suites = {name: _about_sources(name, records) for name in frame["suite"].unique()}
    methods = {name: first_comment("merge", name) for name in labels}
    headings, regions = titles(records, OWN), region_tables(records, summary)
    titled, totals = (each.assign(suite=each["suite"].map(headings)) for each in (frame, summary))
    answer = _answer(titled, totals, headings)
    figures = _figures(records, titled, totals, labels, headings)
    page = report_page(
        *(config.name, summary, frame, figures, incomplete),
        provenance=_provenance(records),
        methods=methods,
        suites=suites,
        answer=answer,
        titles=headings,
        regions=regions,
    )
    title = " ".join([config.name, *incomplete])
    contents = {
        "runs.csv": csv_bytes(frame),
        "table.md": markdown_table(
            summary, frame, title, suites, methods, headings, regions
        ).encode(),
        **{
            f"{_file_name(caption)}.svg": svg.encode()
            for caption, svg in (answer | figures).items()
        },
        "report.html": page.encode(),
    }
    folder = Path(config.runtime.reports) / config.name
    for name, content in contents.items():
        write_atomically(folder / name, content)

    _print(summary, verdicts(summary, frame), headings, regions)
    print(" ".join([f"{len(runs)} evaluated models.", *incomplete]))
    print(f"report: {folder / 'report.html'}")


@dataclass(frozen=True, slots=True)
class Recorded:
    """The records of a name, as frames."""

    evaluated: list[Run]
    missing: int
    """Jobs of the sweep that are not finished."""
    damaged: int
    """Runs that are left out."""
    records: list[dict[str, Any]]
    labels: list[str]
    """Methods, in the order of the records."""
    runs: pd.DataFrame
    """``tables.runs_frame``."""
    summary: pd.DataFrame
    """``tables.summary_frame``."""


def recorded(config: Config) -> Recorded:
    """Return the records of the configured name.

    Raises:
        UserError: There is none, or they do not belong in one table.
    """
    own_metrics(config)
    listed, num_missing = sweep_runs(Path(config.runtime.out), config.name)
    runs, replicates = _readable(listed)
    if not runs:
        folder = Path(config.runtime.out) / "sweeps" / config.name
        if failed := sweep_jobs.latest_failures(folder):
            raise UserError(f"name={config.name}: {sweep_jobs.summary(failed, len(failed))}")
        names = [path.name for path in folder.parent.glob("*")]
        raise UserError(
            f"name={config.name}: no run is recorded under it in {config.runtime.out};"
            f" {nearest(config.name, names)}start with cki-rec evaluate name={config.name} ..."
        )
    records = [current(run.record) for run in runs if run.record is not None]
    labels = list(dict.fromkeys(record["result"]["method"] for record in records))
    frames = _frames(config, records, replicates, labels)
    return Recorded(runs, num_missing, len(listed) - len(runs), records, labels, *frames)


def _readable(
    runs: Sequence[Run],
) -> tuple[list[Run], dict[str, dict[str, dict[str, NDArray[np.float64]]]]]:
    """Return the undamaged runs and their replicates (``_replicates``); warn about the others."""
    readable, replicates = [], {}
    for run in runs:
        found = _replicates(run)
        if found is None:
            log.warning(
                "%s is missing or damaged; the run is left out: evaluate it again",
                run.path / REPLICATES,
            )
            continue
        readable.append(run)
        replicates[run.path.name] = found
    return readable, replicates


def _about_sources(suite: str, records: Sequence[dict[str, Any]]) -> str:
    """Return one sentence on the sources of a suite: the names of checkpoints, or the suite's."""
    results = [record["result"] for record in records if record["result"]["suite"] == suite]
    named = next((result["sources"] for result in results if "sources" in result), None)
    if named is None:
        return first_comment("suite", suite)
    return f"Checkpoints that the user named: {', '.join(named)}."


def _frames(
    config: Config,
    records: Sequence[dict[str, Any]],
    replicates: dict[str, dict[str, dict[str, NDArray[np.float64]]]],
    labels: Sequence[str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frame of runs and the frame of their summaries.

    Raises:
        UserError: The runs do not belong in one table.
    """
    confidences = {record["config"]["evaluate"]["confidence"] for record in records}
    try:
        if len(confidences) > 1:
            raise ValueError(f"intervals of confidence {sorted(confidences)}")
        check_settings(records)
        frame = runs_frame(records, labels)
        return frame, summary_frame(frame, replicates, *confidences)
    except ValueError as error:
        versions = [record["provenance"]["versions"] for record in records]
        releases = sorted({known.get("cki-rec", "unknown") for known in versions})
        made_by = f", made by releases {' and '.join(releases)}" if len(releases) > 1 else ""
        raise UserError(
            f"name={config.name} holds runs that do not belong in one table ({error}){made_by};"
            " evaluate them again, each setting and release under a separate name. To begin this"
            f" name anew, delete {list_of(Path(config.runtime.out), config.name)}"
        ) from None


def _answer(
    frame: pd.DataFrame, summary: pd.DataFrame, headings: Mapping[str, str]
) -> dict[str, str]:
    """Return caption -> SVG text: per suite, AUC against the best source, or AUC without one."""
    figures = {}
    for suite, part in summary.groupby("suite", sort=False):
        runs = frame[frame["suite"] == suite]
        has_differences = part[difference_column("auc", BEST_SOURCE)].notna().any()
        baseline = BEST_SOURCE if has_differences else None
        caption = "AUC against the best source" if has_differences else "AUC"
        named = f"suite {suite}" if suite in headings else str(suite)
        figures[f"{caption}, {named}"] = metric_plot(part, runs, "auc", baseline)
    return figures


def _figures(
    records: Sequence[dict[str, Any]],
    frame: pd.DataFrame,
    summary: pd.DataFrame,
    labels: Sequence[str],
    headings: Mapping[str, str],
) -> dict[str, str]:
    """Return caption -> SVG text: the primary metrics, and the mixing weights of each suite."""
    figures = {
        f"{metric.title} on test rows": metric_plot(summary, frame, metric.name)
        for metric in PRIMARY
    }
    for suite, heading in sorted(headings.items()):
        if svg := mixing_plot(records, suite=suite, methods=labels):
            named = f"suite {suite}" if suite == heading else heading
            figures[f"Mixing weights, {named} (blank: trained, not mixed)"] = svg
    return figures


def _print(
    summary: pd.DataFrame,
    answers: Mapping[str, Sequence[str]],
    headings: Mapping[str, str],
    regions: Mapping[str, pd.DataFrame],
) -> None:
    """Print the verdict of every suite, then its tables; names are shown as typed."""
    console = Console(markup=False, emoji=False, highlight=False)
    console.width = min(console.width, TERMINAL_WIDTH) if console.is_terminal else TERMINAL_WIDTH
    for suite, sentences in answers.items():
        console.print(f"{headings[suite]}: {' '.join(sentences)}")
    shown = main_frame(summary)
    for suite in answers:
        rows = filled(shown[shown["suite"] == suite].drop(columns="suite"))
        heading = headings[suite]
        named = f"suite {suite}" if heading == suite else heading
        console.print(_printable(rows, f"\n{named}"))
        if suite in regions:
            console.print(_printable(regions[suite], f"\n{named}, AUC by region"))


def _printable(rows: pd.DataFrame, title: str) -> Table:
    first, *others = map(str, rows.columns)
    table = Table(
        Column(first, overflow="fold"),
        *(Column(_broken(name), justify="right", no_wrap=True) for name in others),
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for name, *cells in rows.to_numpy():
        table.add_row(name, *map(_stacked, cells))
    return table


def _broken(title: str) -> str:
    """Return the title of a column in short lines."""
    return title.replace(" vs ", " vs\n").replace(" recal.", "\nrecal.")


def _stacked(cell: str) -> str:
    """Return a cell with its interval below value and mark."""
    value, interval, mark = cell_parts(cell)
    return f"{value} ({mark})\n{interval}" if mark else f"{value}\n{interval}".rstrip()


def _replicates(run: Run) -> dict[str, dict[str, NDArray[np.float64]]] | None:
    """Return baseline -> metric -> replicates of the difference; None if they are damaged."""
    arrays = load_arrays(run.path / REPLICATES)
    if arrays is None:
        return None
    nested: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key, array in arrays.items():
        baseline, metric = key.split("/")
        nested.setdefault(current_name(baseline), {})[metric] = array
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
    name = re.sub(r"[^\w.-]+", "_", caption.partition(" (blank")[0].lower()).strip("_")
    return name[:MAX_FILE_NAME]
