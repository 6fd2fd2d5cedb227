"""The pipelines in a notebook: configurations, tables and figures of records, scores of raw rows.

See docs/notebook.md. Every function takes the words of the command line as overrides.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec import COMMAND_VARIABLE, checkpoints
from cki_rec.checkpoints import Checkpoint
from cki_rec.cli import compose_config, start_log
from cki_rec.config import Config, UserError, nearest, parse
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding import store, tokens
from cki_rec.data.encoding.frames import encode_frame
from cki_rec.data.encoding.frames import raw_rows as rows_of
from cki_rec.data.encoding.split import SPLITS
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import distributed, evaluator
from cki_rec.engine.record import Run
from cki_rec.help_text import PIPELINES
from cki_rec.pipelines import evaluate, export, report
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


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained or merged model, with all that its inputs are made of."""

    network: nn.Module
    """The network on the CPU, in evaluation mode."""
    schema: FeatureSchema
    """The fields that it reads."""
    dataset: EncodedDataset
    """The data set of its training rows."""
    tokens: dict[str, list[str]]
    """Table -> its tokens; the first one has id 2."""
    config: Config


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
    importlib.import_module(f"cki_rec.pipelines.{pipeline}").run(config)


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
    config = compose(*overrides)
    source = export.find(replace(config, run=_evaluated(config, str(name))))
    distributed.start(replace(config.runtime, device="cpu"))
    saved = checkpoints.load(source.checkpoint)
    network = export.restore(saved, source.checkpoint)
    encoded = Path(config.runtime.encoded)
    folder = export.data_set(encoded, saved.origin.data_hash)
    if folder is None:
        raise UserError(
            f"{name}: its data set is not encoded in {encoded}; name the folder with"
            " runtime.encoded=FOLDER, or encode it again: cki-rec prepare data=..."
        )
    dataset = EncodedDataset(encoded / folder)
    known = _tokens(saved, source.home, dataset)
    return LoadedModel(network, saved.schema, dataset, known, config)


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
    rows = encode_frame(plain, model.dataset, model.schema, model.tokens, model.config.data)
    places = np.arange(len(rows))
    device = torch.device("cpu")
    scores = evaluator.predict(model.network, rows, model.schema, places, device)
    return scores if logits else torch.from_numpy(scores).sigmoid().numpy()


def _evaluated(config: Config, name: str) -> str:
    """Return the model of an evaluation; other runs are returned as they are.

    Raises:
        UserError: The evaluation combines several models.
    """
    out = Path(config.runtime.out)
    folder = next((f for f in (Path(name), out / name) if f.is_dir()), None)
    record = None if folder is None else Run(folder).record
    members = [] if record is None else record["config"].get("members", [])
    if len(members) > 1:
        raise UserError(f"{name}: combines several models; load one of {', '.join(members)}")
    return members[0] if members else name


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


def _tokens(saved: Checkpoint, home: Path, dataset: EncodedDataset) -> dict[str, list[str]]:
    """Return the tokens of every table whose ids are no hashes, checked by their digests."""
    known = {}
    for table_name in dict.fromkeys(feature.table for feature in saved.schema.lookups):
        digest = saved.schema.vocabulary_hashes[table_name]
        if digest.startswith(tokens.HASHED):
            continue
        if dataset.schema.vocabulary_hashes.get(table_name) == digest:
            known[table_name] = dataset.vocabulary(table_name)
        else:
            known[table_name] = tokens.read_tokens(home / tokens.FOLDER, table_name, digest)
    for feature in saved.schema.numbers:
        ours, theirs = (
            s.vocabulary_hashes.get(feature.name) for s in (saved.schema, dataset.schema)
        )
        if ours != theirs:
            raise UserError(
                f"{home}: numbers of {feature.name} have another scale than in {dataset.folder}"
            )
    return known
