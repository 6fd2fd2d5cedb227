"""Records of evaluated models -> one frame of runs -> one frame of summaries.

A record is the content of one ``record.json`` of the evaluate pipeline. No number of a table comes
from anywhere else. ``display`` turns summaries into text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cki_rec.evaluation.metrics import COMPARED, METRICS, REPEATED
from cki_rec.evaluation.statistics import (
    Interval,
    bootstrap_p_value,
    holm,
    mean_interval,
    mean_of_paired,
    percentile_interval,
    win_tie_loss,
)

JOINT, BEST_SOURCE, ENSEMBLE = "joint", "best_source", "output_ensemble"
"""References: trained on all data; one source; mean of all sources' outputs."""
BASELINES = (BEST_SOURCE, ENSEMBLE)
"""References that every model is compared with."""

DOMAIN = "auc_domain_"
"""Begins the columns of one domain's AUC."""
WINS = "auc_win_tie_loss_"
"""Begins the columns of wins/ties/losses against one baseline over repetitions, in AUC."""

Replicates = Mapping[str, Mapping[str, Mapping[str, npt.NDArray[np.float64]] | None]]
"""run_id -> baseline -> metric -> ``(R,)``: this run minus the baseline, in each resample."""

_TEXT = (
    *("suite", "method", "seeds", "data_name", "data_hash"),
    *("resample", "hardware", "command", "run_id", "fingerprint"),
    *(f"{WINS}{baseline}" for baseline in BASELINES),
)
_WHOLE = (
    *("seed", "num_seeds", "rows_train", "rows_valid", "rows_test", "rows_skipped"),
    *("bootstrap", "inference_cost", "parameters"),
)
_FLAGS = ("finetuned", "disjoint", "synthetic", "disjoint_files")


def difference_column(metric: str, baseline: str) -> str:
    """Return the column that holds ``metric`` minus the baseline's."""
    return f"{metric}_minus_{baseline}"


def runs_frame(
    records: Sequence[Mapping[str, Any]], methods: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return one row per record, without anything that differs between two equal runs.

    Rows are sorted by suite, method, direct before fine-tuned, and seed.

    A suite of one source has no ensemble: differences to it are left undefined. So are numbers
    that older records lack.

    Args:
        records: Of evaluated models, in any order.
        methods: Order of methods; others follow by name. By default best source, merged
            models by name, output ensemble, joint.

    Returns:
        Undefined numbers are NaN (``<NA>`` in columns of whole numbers).

    Raises:
        ValueError: There is no record, or two describe the same suite, method, stage and seed.
    """
    if not records:
        raise ValueError("no records to report")
    if methods is None:
        names = {record["result"]["method"] for record in records}
        references = {BEST_SOURCE, ENSEMBLE, JOINT}
        methods = [BEST_SOURCE, *sorted(names - references), ENSEMBLE, JOINT]
    place = {method: index for index, method in enumerate(methods)}
    domains = sorted({name for record in records for name in record["result"]["test"]["domains"]})
    rows = [_run_row(record, domains) for record in records]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        method = row["method"]
        position = place.get(method, len(place))
        return (row["suite"], position, method, row["finetuned"], row["seed"])

    rows.sort(key=key)
    for first, second in itertools.pairwise(rows):
        if key(first) == key(second):
            raise ValueError(
                f"runs {first['run_id']} and {second['run_id']} are both suite={first['suite']} "
                f"method={first['method']} finetuned={first['finetuned']} seed={first['seed']}"
            )
    return _typed(pd.DataFrame(rows))


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """Return a frame as CSV: shortest text that reads back to the same float, blank if undefined.

    The same frame gives the same bytes.
    """
    return frame.to_csv(index=False, lineterminator="\n", na_rep="").encode()


def summary_frame(
    runs: pd.DataFrame, replicates: Replicates, confidence: float = 0.95
) -> pd.DataFrame:
    """Return one row per suite, method and stage: means over repetitions with intervals.

    Metrics get a Student t interval over repetitions. Differences get a percentile bootstrap
    interval of their mean over repetitions, which needs the replicates of every run of the row
    that has the difference. A mean over repetitions is undefined if one of its values is.
    Differences of fine-tuned rows are, as recorded, to the direct best source and ensemble.

    Holm's correction is over the single models of a suite, direct and fine-tuned, for each metric
    and baseline; their p values are of the same resamples as the intervals.

    Args:
        runs: Of ``runs_frame``; metrics that an older file lacks are undefined.
        replicates: By run; runs without them have no bootstrap interval.
        confidence: Of all intervals.

    Returns:
        Columns ``suite, method, finetuned, num_seeds, seeds``, each metric with ``_low`` and
        ``_high``, calibration, each difference with ``_low``, ``_high``, ``_p`` and ``_holm``,
        wins/ties/losses in AUC per baseline (repetitions whose interval lies above, around, below
        0), ``recovered_share`` with its bounds, ``inference_cost``, ``parameters``,
        ``confidence``, and the mean AUC per domain.

    Raises:
        ValueError: The runs of a suite were not evaluated on the same data, or the repetitions of
            a row have different numbers of resamples.
    """
    for suite, part in runs.groupby("suite"):
        if part["data_hash"].nunique(dropna=False) > 1:
            raise ValueError(f"suite {suite} mixes data sets: {sorted(set(part['data_hash']))}")
    pairs = itertools.product(COMPARED, BASELINES)
    bounds = [_with_bounds(difference_column(metric.name, name)) for metric, name in pairs]
    columns = dict.fromkeys([*runs.columns, *METRICS, *itertools.chain(*bounds)])
    runs = runs.reindex(columns=list(columns))
    groups = runs.groupby(["suite", "method", "finetuned"], sort=False)
    rows = [_summary_row(group, replicates, confidence) for _, group in groups]
    frame = pd.DataFrame(rows)
    for baseline, metric in itertools.product(BASELINES, COMPARED):
        _add_holm(frame, difference_column(metric.name, baseline))
    shares = _recovered_shares(runs, frame, replicates, confidence)
    frame = pd.concat([frame, pd.DataFrame(shares)], axis=1)
    return _typed(frame[[*_summary_columns(), *domain_columns(runs)]])


def domain_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns that hold the AUC of one domain each."""
    return [column for column in frame.columns if column.startswith(DOMAIN)]


def recovered_share(auc: float, best_source: float, joint: float) -> float | None:
    """Return how much of the way from the best source to the joint model was made, in AUC.

    Returns:
        (auc - best_source) / (joint - best_source); 1 equals training on all data. None when the
        joint model is not better than the best source.
    """
    return (auc - best_source) / (joint - best_source) if joint > best_source else None


def _run_row(record: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
    result, data, provenance = record["result"], record["data"], record["provenance"]
    test, evaluate = result["test"], record["config"].get("evaluate", {})
    row: dict[str, Any] = {
        "suite": result["suite"],
        "seed": result["seed"],
        "method": result["method"],
        "finetuned": bool(result["finetuned"]),
        "disjoint": bool(record["config"].get("disjoint")),
    }
    for name in METRICS:
        row[name] = test.get(name)
    row["valid_auc"] = result.get("valid", {}).get("auc")
    for name in ("scale", "shift"):
        row[f"recalibration_{name}"] = result.get("recalibration", {}).get(name)
    for domain in domains:
        row[f"{DOMAIN}{domain}"] = test["domains"].get(domain, {}).get("auc")
    for baseline in BASELINES:
        row |= _difference_cells(record, baseline)
    row["inference_cost"] = result["inference_cost"]
    row["parameters"] = result["parameters"]
    for split in ("train", "valid", "test"):
        row[f"rows_{split}"] = data["rows"].get(split)
    row["rows_skipped"] = data.get("skipped", 0)
    row["data_name"] = data["name"]
    row["data_hash"] = data["hash"]
    row["synthetic"] = bool(data["synthetic"])
    for name in ("bootstrap", "resample", "confidence"):
        row[name] = evaluate.get(name)
    row["disjoint_files"] = bool(evaluate.get("disjoint_files"))
    row["hardware"] = provenance["hardware"]
    row["command"] = provenance["command"]
    row["run_id"] = record["run_id"]
    row["fingerprint"] = record["fingerprint"]
    return row


def _difference_cells(record: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """Return the differences to a baseline with their bounds, and DeLong's p value."""
    difference = (record["result"]["difference"] or {}).get(baseline) or {}
    if baseline == ENSEMBLE and len(set(record["config"].get("sources", ()))) == 1:
        difference = {}  # an ensemble of one model is the best source
    cells: dict[str, Any] = {}
    for metric in COMPARED:
        interval = difference.get(metric.name) or {}
        bounds = (interval.get(key) for key in ("estimate", "low", "high"))
        columns = _with_bounds(difference_column(metric.name, baseline))
        cells |= dict(zip(columns, bounds, strict=True))
    p_value = (difference.get("auc") or {}).get("delong_p")
    return {**cells, f"{difference_column('auc', baseline)}_delong_p": p_value}


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    types = {}
    for column in frame.columns:
        if column in _FLAGS:
            types[column] = "bool"
        elif column in _WHOLE:
            types[column] = "Int64"
        else:
            types[column] = "object" if column in _TEXT else "float64"
    return frame.astype(types)


def _summary_row(group: pd.DataFrame, replicates: Replicates, confidence: float) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {
        "suite": first["suite"],
        "method": first["method"],
        "finetuned": first["finetuned"],
        "num_seeds": len(group),
        "seeds": " ".join(str(seed) for seed in group["seed"]),
    }
    for name, metric in METRICS.items():
        if metric in REPEATED:
            interval = mean_interval(group[name].to_numpy(dtype=np.float64), confidence)
            row |= _bounds(name, interval)
        else:
            row[name] = group[name].mean(skipna=False)
    for name in domain_columns(group):
        row[name] = group[name].mean(skipna=False)
    for baseline in BASELINES:
        for metric in COMPARED:
            row |= _mean_difference(group, metric.name, baseline, replicates, confidence)
        row[f"{WINS}{baseline}"] = _wins(group, difference_column("auc", baseline))
    for name in ("inference_cost", "parameters"):
        row[name] = first[name] if group[name].nunique(dropna=False) == 1 else None
    row["confidence"] = confidence
    return row


def _mean_difference(
    group: pd.DataFrame, metric: str, baseline: str, replicates: Replicates, confidence: float
) -> dict[str, float | None]:
    """Return the mean difference over repetitions, its bounds and its p value.

    Raises:
        ValueError: The repetitions have different numbers of resamples.
    """
    column = difference_column(metric, baseline)
    estimates = group[column].to_numpy(dtype=np.float64)
    cells = {**dict.fromkeys(_with_bounds(column)), f"{column}_p": None}
    if np.isnan(estimates).any():
        return cells
    cells[column] = estimates.mean()
    of_runs = [(replicates.get(run) or {}).get(baseline) or {} for run in group["run_id"]]
    arrays = [of_run[metric] for of_run in of_runs if metric in of_run]
    if len(arrays) < len(group):
        return cells
    if len({len(values) for values in arrays}) > 1:
        raise ValueError(f"method {group['method'].iloc[0]}: repetitions differ in resamples")
    stacked = np.stack(arrays)
    interval = mean_of_paired(stacked, estimates, confidence)
    cells |= _bounds(column, interval)
    cells[f"{column}_p"] = bootstrap_p_value(stacked.mean(axis=0), interval.estimate)
    return cells


def _bounds(column: str, interval: Interval) -> dict[str, float | None]:
    bounds = (interval.estimate, interval.low, interval.high)
    return dict(zip(_with_bounds(column), bounds, strict=True))


def _wins(group: pd.DataFrame, column: str) -> str | None:
    bounds = group[[column, f"{column}_low", f"{column}_high"]].to_numpy(dtype=np.float64)
    intervals = [Interval(*(None if np.isnan(x) else float(x) for x in run)) for run in bounds]
    counts = win_tie_loss(intervals)
    return None if counts is None else "/".join(map(str, counts))


def _add_holm(summary: pd.DataFrame, column: str) -> None:
    """Add the adjusted p values of a difference, over the single models of each suite."""
    name = f"{column}_holm"
    summary[name] = np.nan
    for _, family in summary[summary["inference_cost"] == 1].groupby("suite"):
        p_values = [None if pd.isna(p) else float(p) for p in family[f"{column}_p"]]
        summary.loc[family.index, name] = [np.nan if p is None else p for p in holm(p_values)]


def _recovered_shares(
    runs: pd.DataFrame, summary: pd.DataFrame, replicates: Replicates, confidence: float
) -> list[dict[str, float | None]]:
    """Return the share per summary row: a ratio of means over the seeds that have all three.

    It is of suites whose sources saw disjoint rows: there a joint model knows more than they do.
    Its bounds are percentiles of the ratio of both differences to the best source, resample by
    resample. They are undefined unless the joint model is the better one in every resample.
    """
    disjoint = runs.groupby("suite")["disjoint"].all()
    runs_of: dict[tuple[str, str, bool], dict[int, tuple[str, float]]] = {}
    columns = runs[["suite", "method", "finetuned", "seed", "run_id", "auc"]]
    for suite, method, finetuned, seed, run_id, auc in columns.itertuples(index=False):
        if not np.isnan(auc):
            runs_of.setdefault((suite, method, finetuned), {})[seed] = (run_id, auc)
    shares = []
    for suite, method, finetuned in zip(
        summary["suite"], summary["method"], summary["finetuned"], strict=True
    ):
        parts = [
            runs_of.get(key, {})
            for key in (
                (suite, method, finetuned),
                (suite, BEST_SOURCE, False),
                (suite, JOINT, False),
            )
        ]
        seeds = sorted(set.intersection(*(set(part) for part in parts)))
        is_reference = method in (BEST_SOURCE, JOINT) and not finetuned
        share = None
        if disjoint[suite] and not is_reference and seeds:
            means = [float(np.mean([part[seed][1] for seed in seeds])) for part in parts]
            share = recovered_share(*means)
        gained, possible = (
            _mean_replicates([part[seed][0] for seed in seeds], replicates)
            for part in (parts[0], parts[2])
        )
        interval = Interval(share, None, None)
        if share is not None and gained is not None and possible is not None:
            if (possible > 0).all() and len(gained) == len(possible):
                interval = percentile_interval(gained / possible, share, confidence)
        shares.append(_bounds("recovered_share", interval))
    return shares


def _mean_replicates(
    run_ids: Sequence[str], replicates: Replicates
) -> npt.NDArray[np.float64] | None:
    """Return ``(R,)``, the mean AUC difference of runs to the best source in each resample."""
    of_runs = [((replicates.get(run) or {}).get(BEST_SOURCE) or {}).get("auc") for run in run_ids]
    arrays = [values for values in of_runs if values is not None]
    if not arrays or len(arrays) < len(run_ids) or len({len(values) for values in arrays}) > 1:
        return None
    mean_R: npt.NDArray[np.float64] = np.stack(arrays).mean(axis=0)
    return mean_R


def _with_bounds(*columns: str) -> list[str]:
    return [f"{column}{end}" for column in columns for end in ("", "_low", "_high")]


def _summary_columns() -> list[str]:
    """Return the columns of a summary but those of domains; own metrics may be registered late."""
    return [
        *("suite", "method", "finetuned", "num_seeds", "seeds"),
        *_with_bounds(*(metric.name for metric in REPEATED)),
        *(name for name, metric in METRICS.items() if metric not in REPEATED),
        *(
            f"{difference_column(metric.name, baseline)}{end}"
            for baseline in BASELINES
            for metric in COMPARED
            for end in ("", "_low", "_high", "_p", "_holm")
        ),
        *(f"{WINS}{baseline}" for baseline in BASELINES),
        *_with_bounds("recovered_share"),
        *("inference_cost", "parameters", "confidence"),
    ]
