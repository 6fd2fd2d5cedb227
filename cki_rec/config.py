"""Every option and its type; values live in ``conf/``. Imports no torch.

``parse`` crosses the edge from Hydra's text to these objects once; inside, only typed objects.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(Exception):
    """A mistake of the user: shown as one line without a traceback, exit code 2."""


@dataclass(slots=True, kw_only=True)
class Split:
    """How rows are divided into training, validation and test."""

    by: str
    """``random``, ``time`` (oldest rows train) or ``leave_last_out`` (each user's last row)."""
    fractions: list[float]
    """Shares of training, validation and test rows; sum 1. Unused by ``leave_last_out``."""
    seed: int
    """Of ``random``. Fixed over the repetitions of an experiment: all runs share test rows."""


@dataclass(slots=True, kw_only=True)
class Partition:
    """How rows are divided among parents."""

    by: str
    """``user``, ``item``, ``time``, ``random`` or ``none``."""
    parts: int
    seed: int


@dataclass(slots=True, kw_only=True)
class Data:
    """One data set: raw files, encoding, split, and the part of it a model sees."""

    name: str
    format: str
    """A row of ``cki_rec.data.formats.FORMATS``."""
    raw: str
    """The raw file (zip) or folder."""
    fields: list[str]
    """Features of the encoded set, in order."""
    label_threshold: float
    """A rating at or above it is a click."""
    history_length: int
    """The latest liked items kept per row."""
    min_count: int
    """Tokens with fewer training rows share the id of unseen tokens."""
    on_bad_row: str
    """``error`` or ``skip`` (skipped rows are counted in the manifest)."""
    split: Split
    partition: Partition
    part: int | None
    """Train and validate on this part only; null: on all rows."""


@dataclass(slots=True, kw_only=True)
class Model:
    """One network."""

    name: str
    embedding_dim: int
    hidden: list[int]
    dropout: float
    init_std: float
    """Standard deviation of initial embeddings."""
    histories: bool
    """Feed the user's history as one more mean-pooled field."""


@dataclass(slots=True, kw_only=True)
class Train:
    """Optimization of one model."""

    epochs: int
    batch_size: int
    learning_rate: float
    """Adam, dense parameters."""
    table_learning_rate: float
    """Row-wise Adagrad, fused into the backward pass."""
    table_l2: float
    """L2 on looked-up embeddings, as a term of the loss."""
    plateau_factor: float
    """Both learning rates times this when validation AUC stalls for an epoch."""
    patience: int
    """Stop after this many epochs in a row without a better validation AUC."""


@dataclass(slots=True, kw_only=True)
class Gate:
    """The local gate of the dual assessment."""

    kind: str
    """``full``, ``diagonal``, ``scalar``, ``identity`` (not learned) or ``none`` (L = 1/2)."""
    train: str
    """``none``, ``frozen`` (only gates learn) or ``trunk`` (released protocol)."""
    epochs: int
    learning_rate: float


@dataclass(slots=True, kw_only=True)
class Integrate:
    """How several models become one."""

    method: str
    """A row of ``cki_rec.integration.methods.METHODS``."""
    label: str
    """Name of this setting in tables; unique per file of ``conf/integrate``."""
    sources: list[dict[str, Any]]
    """Parents as config deltas, ``[{seed: 1}, {seed: 2}]``, or checkpoints, ``[{path: a}]``."""
    perspective: str
    """``local``, ``global`` or ``dual``."""
    local: str
    """Local term of the dual rule on tables: ``gate`` or ``evidence``."""
    splice: str
    """``soft`` or ``hard``."""
    tables: str
    """Rule for tables: ``same`` as the rest, ``evidence`` or ``base`` (first source)."""
    bias: str
    """``splice`` or ``base`` (first source, as released)."""
    a: float
    c: float
    bins: int
    gate: Gate


@dataclass(slots=True, kw_only=True)
class Finetune:
    """Short training of an integrated model on all data."""

    epochs: int
    """0: none."""
    learning_rate: float
    table_learning_rate: float


@dataclass(slots=True, kw_only=True)
class Evaluate:
    """Metrics and intervals."""

    bootstrap: int
    """Resamples."""
    resample: str
    """Unit of resampling: ``user`` (rows of a user depend on each other) or ``row``."""
    confidence: float
    seed: int


@dataclass(slots=True, kw_only=True)
class Runtime:
    """Where and on what things run; never part of a run's identity."""

    out: str
    """Folder of run directories."""
    reports: str
    """Folder of reports, one folder per name."""
    encoded: str
    """Folder of encoded data sets."""
    device: str
    """``auto``, ``cpu`` or ``cuda``."""
    threads: int
    """CPU threads per process; 0: all cores."""
    force: bool
    """Run again what is already recorded."""


@dataclass(slots=True, kw_only=True)
class Config:
    """Everything."""

    name: str
    """Experiment the run is reported under."""
    suite: str
    """What its sources differ in: ``seeds``, ``shards`` or any name of ``conf/suite``."""
    seed: int
    """Of everything random but the split."""
    data: Data
    model: Model
    train: Train
    integrate: Integrate
    finetune: Finetune
    evaluate: Evaluate
    runtime: Runtime


_Section = TypeVar("_Section")


def parse(composed: DictConfig) -> Config:
    """Return the typed configuration of a composed Hydra tree.

    Raises:
        UserError: An unknown key, a wrong type or an impossible combination, by dotted path.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    return config
