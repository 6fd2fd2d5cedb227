"""The pipelines in a notebook: configurations, tables and figures of records, scores of raw rows.

See docs/notebook.md. Every function takes the words of the command line as overrides.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from cki_rec import COMMAND_VARIABLE
from cki_rec.cli import compose_config, start_log
from cki_rec.config import Config, UserError, nearest, parse
from cki_rec.data.encoding import store
from cki_rec.data.encoding.frames import encode_frame
from cki_rec.data.encoding.frames import raw_rows as rows_of
from cki_rec.data.encoding.split import SPLITS
from cki_rec.engine import evaluator
from cki_rec.help_text import PIPELINES
from cki_rec.pipelines import evaluate, loading, names, report
from cki_rec.pipelines.loading import LoadedModel
from cki_rec.plugins import load, load_class
from cki_rec.search_path import with_folders

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "LoadedModel",
    "UserError",
    "compose",
    "load_model",
    "metric_figure",
    "mixing_figure",
    "predict",
    "raw_rows",
    "records",
    "run",
    "table",
]


def compose(*overrides: str) -> Config:
    """Return the configuration of a command with these words, e.g. ``"data=movielens_1m"``.

    Code of the user that it names is loaded.

    Raises:
        UserError: A mistake in the overrides.
    """
    config = parse(compose_config(with_folders(overrides)))
    if config.model.module is not None:
        load_class(config.model.module)
    for plugin in config.merge.plugins:
        load(plugin, "merge.plugins")
    evaluate.own_metrics(config)
    return config


def run(pipeline: str, *overrides: str) -> None:
    """Run a pipeline as ``cki-rec PIPELINE OVERRIDES`` does, without sweeps.

    Raises:
        UserError: A mistake in the overrides, or in the input.
    """
    if pipeline not in PIPELINES:
        raise UserError(f"no pipeline '{pipeline}': {nearest(pipeline, PIPELINES)}see cki-rec -h")
    start_log()
    config = compose(*overrides)
    os.environ[COMMAND_VARIABLE] = shlex.join(["cki-rec", pipeline, *overrides])
    importlib.import_module(f"cki_rec.pipelines.{pipeline}").run(names.resolved(config))


def records(name: str, *overrides: str) -> pd.DataFrame:
    """Return one row per evaluated model of a name: settings, metrics, differences, hardware.

    Raises:
        UserError: No run is recorded under the name.
    """
    return report.recorded(_named(name, overrides)).runs


def table(name: str, *overrides: str) -> pd.DataFrame:
    """Return one row per suite, method and stage: means over seeds, intervals, p values.

    These are all numbers of the report of this name, unrounded.

    Raises:
        UserError: No run is recorded under the name, or its runs do not belong in one table.
    """
    return report.recorded(_named(name, overrides)).summary


def metric_figure(name: str, metric: str = "auc", *overrides: str) -> Figure:
    """Return the figure of a metric per method: means, intervals and repetitions.

    Raises:
        UserError: See ``table``; or there is no such metric.
    """
    from cki_rec.evaluation.metrics import REPEATED
    from cki_rec.evaluation.plots import drawn, metric_plot

    known = [each.name for each in REPEATED]
    if metric not in known:
        raise UserError(f"metric={metric}: {nearest(metric, known)}one of {', '.join(known)}")
    results = report.recorded(_named(name, overrides))
    figure: Figure = metric_plot(results.summary, results.runs, metric, render=drawn)
    return figure


def mixing_figure(name: str, suite: str | None = None, *overrides: str) -> Figure:
    """Return the figure of mixing weights: the share of every source in every tensor.

    Raises:
        UserError: See ``table``; or no method of the suite has shares.
    """
    from cki_rec.evaluation.plots import drawn, mixing_plot

    results = report.recorded(_named(name, overrides))
    figure: Figure | str = mixing_plot(
        results.records, suite, methods=results.labels, render=drawn
    )
    if isinstance(figure, str):
        raise UserError(f"name={name}: no method has mixing weights in suite {suite or 'any'}")
    return figure


def load_model(name: str | Path, *overrides: str) -> LoadedModel:
    """Return the model of a run: its folder, its checkpoint folder, or its id.

    Args:
        name: The run. Of an evaluation it is the model that was evaluated.
        *overrides: Words of the command line, such as ``"runtime.out=..."``.

    Raises:
        UserError: There is no such model, or its data set is not encoded here.
    """
    return loading.load(compose(*overrides), str(name))


def raw_rows(config: Config, split: str | None = None) -> pl.DataFrame:
    """Return the raw rows of a data set, in the order of its encoded rows.

    Args:
        config: Of ``compose``.
        split: ``train``, ``valid`` or ``test``; None: all rows.

    Raises:
        UserError: The raw files are not readable.
    """
    if split not in (*SPLITS, None):
        raise UserError(f"split={split}: pass one of {', '.join(SPLITS)}, or None for all rows")
    dataset = store.prepared(config)
    rows = rows_of(config.data)
    return rows if split is None else rows[np.asarray(dataset.rows(split))]


def predict(
    model: LoadedModel, frame: pl.DataFrame | pd.DataFrame, logits: bool = False
) -> NDArray[np.float32]:
    """Return the click probability of every row of a frame with raw columns.

    The columns are those of the raw files. Labels are not read. Values that no training row had
    get the id of unknown tokens, as in an evaluation.

    Args:
        model: Of ``load_model``.
        frame: A polars or pandas frame. Read ids as text, e.g. with ``dtype=str``: a pandas
            column with gaps turns 7 into 7.0.
        logits: Return logits, as the evaluation stores them.

    Raises:
        UserError: A column is missing, or a value is not readable.
    """
    plain = frame if isinstance(frame, pl.DataFrame) else _from_pandas(frame)
    if not len(plain):
        return np.empty(0, np.float32)
    rows = encode_frame(plain, model.encoder, model.schema)
    places = np.arange(len(rows))
    device = torch.device("cpu")
    scores = evaluator.predict(model.network, rows, model.schema, places, device)
    return scores if logits else torch.from_numpy(scores).sigmoid().numpy()


def _named(name: str, overrides: Sequence[str]) -> Config:
    return replace(compose(*overrides), name=name)


def _from_pandas(frame: pd.DataFrame) -> pl.DataFrame:
    """Return a pandas frame as polars; missing values of all kinds are null."""
    columns = {}
    for name in frame.columns:
        values = frame[name]
        is_plain = values.dtype.kind in "iufbM" and not values.isna().any()
        columns[str(name)] = (
            pl.Series(values.to_numpy())
            if is_plain
            else pl.Series(
                [None if gap else value for gap, value in zip(values.isna(), values, strict=True)]
            )
        )
    return pl.DataFrame(columns)
