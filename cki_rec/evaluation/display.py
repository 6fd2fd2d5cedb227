"""Summaries as text, shared by the terminal, table.md and the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from cki_rec.evaluation.metrics import COMPARED, METRICS, PRIMARY, SHOWN, Metric
from cki_rec.evaluation.tables import (
    BASELINES,
    BEST_SOURCE,
    DOMAIN,
    ENSEMBLE,
    JOINT,
    WINS,
    difference_column,
    domain_columns,
)

METHOD_NAMES = {
    BEST_SOURCE: "best source",
    "newest_source": "newest source",
    ENSEMBLE: "output ensemble",
    JOINT: "joint",
}
METHOD_NOTES = {
    BEST_SOURCE: "The source with the best validation AUC, without merging.",
    "newest_source": "The last of the sources, without merging.",
    ENSEMBLE: "The mean of the sources' logits; every prediction runs all sources.",
    JOINT: "One model trained on all rows of all sources; an upper reference, not a merge.",
}
MAX_COMMANDS = 3
"""Commands shown before the reader is sent to runs.csv."""


def number(value: Any, digits: int = 4, sign: bool = False) -> str:
    """Return ``.7995`` for 0.7995 and ``+.0056`` with ``sign``; blank for an undefined value."""
    if is_undefined(value):
        return ""
    text = f"{float(value) + 0.0:{'+' if sign else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def bounded(
    value: Any, low: Any, high: Any, digits: int = 4, sign: bool = False, separator: str = " "
) -> str:
    """Return ``.7995 [.7990, .8001]``; without brackets when there is no interval."""
    text = number(value, digits, sign)
    if not text or is_undefined(low) or is_undefined(high):
        return text
    return f"{text}{separator}[{number(low, digits, sign)}, {number(high, digits, sign)}]"


def p_value(value: Any) -> str:
    """Return ``.0312``, ``<.0001`` below that; blank for an undefined value."""
    return "<.0001" if not is_undefined(value) and value < 0.0001 else number(value)


def is_undefined(value: Any) -> bool:
    """Return whether a cell holds None, NaN or ``<NA>``."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def method_name(method: str, finetuned: bool) -> str:
    """Return the name shown to readers."""
    return METHOD_NAMES.get(method, method) + (" + fine-tuned" if finetuned else "")


def display_frame(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary as text cells, same rows; columns without any value are left out.

    A difference whose interval excludes 0 ends with ``(+)`` if it is better and ``(-)`` if it is
    worse than the baseline, whichever direction of the metric that is; with ``(++)`` or ``(--)``
    if that also holds after Holm's correction.
    """
    rows = []
    for row in summary.to_dict("records"):
        cells = {
            "suite": row["suite"],
            "method": method_name(row["method"], row["finetuned"]),
            "seeds": str(row["num_seeds"]),
            "cost": number(row["inference_cost"], digits=0),
        }
        once = [metric for metric in SHOWN if not metric.over_repetitions]
        cells |= {metric.title: _mean(row, metric) for metric in SHOWN if metric not in once}
        for baseline in BASELINES:
            for metric in COMPARED:
                cells[versus(metric, baseline)] = _difference(row, metric, baseline)
            column = f"W/T/L vs {METHOD_NAMES[baseline]}"
            is_one = is_undefined(row[f"{WINS}{baseline}"]) or row["num_seeds"] == 1
            cells[column] = "" if is_one else row[f"{WINS}{baseline}"]
        share = [row[f"recovered_share{end}"] for end in ("", "_low", "_high")]
        value, low, high = share
        cells["recovered"] = bounded(value, low, high, digits=2)
        for column in domain_columns(summary):
            cells[f"AUC {column.removeprefix(DOMAIN)}"] = number(row[column])
        cells |= {metric.title: _mean(row, metric) for metric in once}
        rows.append(cells)
    return filled(pd.DataFrame(rows, dtype=object))


def main_frame(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the suite and at most eight columns of ``display_frame``, the best AUC first."""
    ordered = summary.sort_values("auc", ascending=False, kind="stable", na_position="last")
    shown = display_frame(ordered)
    recalibrated, plain = METRICS["log_loss_recalibrated"].title, METRICS["log_loss"].title
    columns = [
        *("suite", "method", "seeds", "cost", METRICS["auc"].title),
        recalibrated if recalibrated in shown else plain,
        *(versus(METRICS["auc"], baseline) for baseline in BASELINES),
        "recovered",
    ]
    return shown[[column for column in columns if column in shown]]


def cell_parts(cell: str) -> tuple[str, ...]:
    """Return value, interval and mark of a cell of ``display_frame``."""
    match = re.fullmatch(r"(\S+) (\[.*\])(?: \(([+-]{1,2})\))?", cell)
    return match.groups("") if match else (cell, "", "")


def filled(shown: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that have a value in some row."""
    return shown[[column for column in shown.columns if (shown[column] != "").any()]]


def versus(metric: Metric, baseline: str) -> str:
    """Return the title of the column of differences to a baseline."""
    return f"{metric.title} vs {METHOD_NAMES[baseline]}"


def reading_notes(summary: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Return how to read the columns and how intervals were made, from the records' settings."""
    level = "".join(f"{(1 - value) * 100:g} %" for value in summary["confidence"].unique())
    percent = "".join(f"{value * 100:g} %" for value in summary["confidence"].unique())
    settings = runs[["bootstrap", "resample"]].drop_duplicates().dropna()
    drawn = " and ".join(f"{count} resamples of {unit}s" for count, unit in settings.to_numpy())
    primary = " and ".join(metric.title for metric in PRIMARY)
    lines = [
        f"Each row is the mean over its repetitions (seeds). Brackets after {primary}: "
        f"{percent} Student t interval over repetitions; none with one repetition.",
        "Differences are paired: same repetition, same test rows. Their brackets: "
        f"{percent} percentile bootstrap interval of the mean over repetitions"
        + (f", {drawn} of the test rows" if drawn else "")
        + ", the same resamples for every model and repetition. They cover the choice of test "
        "rows, not the luck of training.",
        "(+) better and (-) worse than the baseline: the interval excludes 0. (++) and (--): also "
        f"after Holm's correction at {level}, over all single models of the suite in this table, "
        "for each column; its p values are normal, with the standard error of the same resamples.",
    ]
    if (summary["num_seeds"] > 1).any():
        lines.append(
            "W/T/L: repetitions whose interval of the AUC difference lies above, around, below 0."
        )
    if delong_columns(runs):
        lines.append(
            "DeLong p (runs.csv, and per run in the report): of no difference in AUC, taking test "
            "rows as independent. Where users have several rows it is too small; brackets, marks "
            "and W/T/L resample the unit that is named above."
        )
    if summary["finetuned"].any():
        lines.append(
            "Fine-tuned rows are compared with the best source and the ensemble as they are, "
            "without fine-tuning."
        )
    lines += [m.note for m in SHOWN if m.note and summary[m.name].notna().any()]
    lines.append("cost: forward passes per prediction, in models.")
    if summary["recovered_share"].notna().any():
        lines.append(
            "recovered: (AUC - best source) / (joint - best source), a ratio of means over "
            "repetitions; 1 equals training on all rows. Blank if joint is not the better one. "
            "Its interval is of the same resamples, if joint is the better one in each."
        )
    lines.append("A blank cell is undefined or was not measured; it is never a zero.")
    return lines


def delong_columns(runs: pd.DataFrame) -> dict[str, str]:
    """Return column -> name of the DeLong p values that some run has."""
    columns = {
        f"{difference_column('auc', baseline)}_delong_p": f"DeLong p vs {METHOD_NAMES[baseline]}"
        for baseline in BASELINES
    }
    return {column: name for column, name in columns.items() if runs[column].notna().any()}


def facts(runs: pd.DataFrame) -> dict[str, str]:
    """Return the facts that the runs share: data, rows, seeds, hardware, commands.

    Args:
        runs: Rows of ``runs_frame``, usually those of one suite.
    """
    rows = []
    for split in ("train", "valid", "test"):
        counts = [f"{count:,}" for count in runs[f"rows_{split}"].dropna().unique()]
        if counts:
            rows.append(f"{' or '.join(counts)} {split}")
    if skipped := [f"{n:,}" for n in runs["rows_skipped"].dropna().unique() if n]:
        rows.append(f"{' or '.join(skipped)} bad rows skipped")
    kinds = {True: "synthetic data", False: "real data"}
    assumed = "no test row is in raw files that only the models were trained on"
    commands = list(dict.fromkeys(runs["command"]))
    shown = commands[:MAX_COMMANDS]
    if len(commands) > len(shown):
        shown.append(f"({len(commands) - len(shown)} more in runs.csv)")
    return {
        "Data": _joined(runs["data_name"])
        + f" ({' and '.join(kinds[bool(flag)] for flag in runs['synthetic'].unique())})",
        "Data hash": _joined(runs["data_hash"]),
        "Rows": ", ".join(rows),
        **({"Assumed, not checked": assumed} if runs["disjoint_files"].any() else {}),
        "Seeds": ", ".join(str(seed) for seed in sorted(runs["seed"].unique())),
        "Hardware": _joined(runs["hardware"]),
        "Command": "\n".join(shown),
    }


def _mean(row: Mapping[Any, Any], metric: Metric) -> str:
    """Return a metric's mean; with its interval if it is a primary one."""
    mean = row[metric.name]
    if not metric.primary:
        return number(mean, metric.digits)
    return bounded(mean, row[f"{metric.name}_low"], row[f"{metric.name}_high"], metric.digits)


def _difference(row: Mapping[Any, Any], metric: Metric, baseline: str) -> str:
    column = difference_column(metric.name, baseline)
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    text = bounded(row[column], low, high, metric.digits, sign=True)
    if is_undefined(low) or is_undefined(high) or low <= 0 <= high:
        return text
    adjusted = row[f"{column}_holm"]
    is_sure = not is_undefined(adjusted) and adjusted < 1 - row["confidence"]
    mark = "+" if (low > 0) != (metric.better == "lower") else "-"
    return f"{text} ({mark * (2 if is_sure else 1)})"


def _joined(values: pd.Series[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
