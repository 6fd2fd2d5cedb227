"""Every option and its type; values live in ``conf/``. Imports no torch.

``parse`` crosses the edge from Hydra's text to these objects once; inside, only typed objects.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cki_rec import __version__, project_root


class UserError(Exception):
    """A mistake of the user: shown as one line without a traceback, exit code 2."""


@dataclass(slots=True, kw_only=True)
class Split:
    """How rows are divided into training, validation and test."""

    by: str
    """``random``, ``time`` (oldest rows train), ``leave_last_out`` (each user's last row) or
    ``files`` (as published: train, valid and test files)."""
    fractions: list[float]
    """Shares of training, validation and test rows; sum 1. For ``random`` and ``time``."""
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
class Synthetic:
    """Raw files written from a known click model."""

    layout: str
    """``criteo``, ``avazu`` or ``movielens``: whose format and fields."""
    rows: int
    vocabulary: float
    """Sizes of vocabularies as a multiple of the published data set's."""
    skew: float
    """Exponent of the power law of token frequencies; 0: uniform."""
    signal: float
    """Standard deviation of the true logit."""
    drift: float
    """Share of the weights' variance that moves from the first row to the last; 0: none."""
    domains: int
    """Groups of rows that differ in their weights."""
    difference: float
    """Share of the weights' variance that is a domain's own; 0: domains are alike."""
    seed: int


@dataclass(slots=True, kw_only=True)
class Download:
    """Where a user may fetch the raw files from."""

    url: str | None
    """null: there is no address that a program may fetch from."""
    md5: str | None
    """Of the fetched file, as published; null: nobody published one."""
    by_hand: str | None
    """What to do where ``url`` is null."""


@dataclass(slots=True, kw_only=True)
class Data:
    """One data set: raw files, encoding, split, and the part of it a model sees."""

    name: str
    format: str
    """A row of ``cki_rec.data.formats.FORMATS``."""
    raw: Any
    """A path, a pattern (``day_*.gz``) or a list of them."""
    fetch: bool
    """Download the raw files if they are not there."""
    download: Download
    published: str | None
    """The entry of ``conf/published.yaml`` that the raw files should be; null: none."""
    fields: list[Any]
    """Features of the encoded set, in order: a name, or ``{name: ..., option: ...}`` with options
    of ``cki_rec.data.fields.Field``."""
    label: str
    """csv: column that is 0 or 1."""
    label_threshold: float
    """MovieLens: a rating at or above it is a click."""
    user: str | None
    """csv: column of users; null: rows have none."""
    item: str | None
    """csv: column of items; null: rows have none."""
    time: str | None
    """csv: column of times; null: rows have none."""
    time_form: str
    """csv: ``seconds`` or ``yymmddhh``."""
    numeric: str
    """What numeric fields become: ``ln_squared``, ``quantile``, ``edges`` or ``token``
    (categories), ``log1p`` or ``as_is`` (numbers)."""
    numeric_missing: float | None
    """What an empty number stands for; null: a category of its own, or the mean."""
    buckets: int
    """Of ``quantile``."""
    min_count: int
    """Tokens with fewer training rows share the id of unseen tokens."""
    history_length: int
    """The latest liked items kept per row."""
    negatives: int
    """Sequences: unseen items drawn per step of a user."""
    negatives_seed: int
    on_bad_row: str
    """``error`` or ``skip`` (skipped rows are counted in the manifest)."""
    verify: str
    """Of an encoded set when it is opened: ``fast`` (sizes and types) or ``full`` (digests)."""
    synthetic: Synthetic
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
    chunk_mb: int
    """Raw text that is encoded at a time, in MiB; no result depends on it."""
    force: bool
    """Run again what is already recorded."""


@dataclass(slots=True, kw_only=True)
class Suite:
    """What the parents differ in."""

    name: str
    sources: list[dict[str, Any]]
    """The parents that every method of the suite is compared with, as config deltas."""


@dataclass(slots=True, kw_only=True)
class Config:
    """Everything."""

    name: str
    """Experiment the run is reported under."""
    suite: Suite
    seed: int
    """Of everything random but the split."""
    select: str | None
    """The one measurement that ``bench`` makes; null: all."""
    data: Data
    model: Model
    train: Train
    integrate: Integrate
    finetune: Finetune
    evaluate: Evaluate
    runtime: Runtime


CHOICES = {
    "data.on_bad_row": ("error", "skip"),
    "data.split.by": ("random", "time", "leave_last_out", "files"),
    "data.numeric": ("ln_squared", "quantile", "edges", "token", "log1p", "as_is"),
    "data.time_form": ("seconds", "yymmddhh"),
    "data.verify": ("fast", "full"),
    "data.synthetic.layout": ("criteo", "avazu", "movielens"),
    "data.partition.by": ("user", "item", "time", "random", "none"),
    "integrate.perspective": ("local", "global", "dual"),
    "integrate.local": ("gate", "evidence"),
    "integrate.splice": ("soft", "hard"),
    "integrate.tables": ("same", "evidence", "base"),
    "integrate.bias": ("splice", "base"),
    "integrate.gate.kind": ("full", "diagonal", "scalar", "identity", "none"),
    "integrate.gate.train": ("none", "frozen", "trunk"),
    "evaluate.resample": ("user", "row"),
    "runtime.device": ("auto", "cpu", "cuda"),
}
"""Options that take one of a few words."""

AT_LEAST = {
    "seed": 0,
    "data.split.seed": 0,
    "data.partition.seed": 0,
    "data.history_length": 0,
    "data.buckets": 2,
    "data.negatives": 1,
    "data.negatives_seed": 0,
    "runtime.chunk_mb": 1,
    "data.min_count": 1,
    "data.partition.parts": 1,
    "model.embedding_dim": 4,
    "train.epochs": 1,
    "train.batch_size": 1,
    "train.patience": 1,
    "train.learning_rate": 0,
    "train.table_learning_rate": 0,
    "train.table_l2": 0,
    "train.plateau_factor": 0,
    "model.init_std": 0,
    "integrate.gate.learning_rate": 0,
    "finetune.learning_rate": 0,
    "finetune.table_learning_rate": 0,
    "evaluate.seed": 0,
    "integrate.bins": 2,
    "integrate.gate.epochs": 1,
    "finetune.epochs": 0,
    "evaluate.bootstrap": 100,
    "runtime.threads": 0,
}
"""Smallest values."""


def first_comment(group: str, choice: str) -> str:
    """Return the first comment of a file in ``conf/``, which says what the choice is."""
    path = project_root() / "conf" / group / f"{choice}.yaml"
    lines = path.read_text().splitlines() if path.exists() else []
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return next((line for line in comments if not line.startswith("@package")), "")


def register_resolvers() -> None:
    """Define what ``${...:}`` in ``conf/`` may call: ``add`` and ``project``."""
    OmegaConf.register_new_resolver("add", lambda *terms: sum(terms), replace=True)
    OmegaConf.register_new_resolver(
        "project", lambda path: str(project_root() / path), replace=True
    )


def parse(composed: DictConfig) -> Config:
    """Return the typed configuration of a composed Hydra tree.

    Raises:
        UserError: An unknown key, a wrong type or an impossible combination, by dotted path.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), composed))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def check(config: Config) -> None:
    """Check values that types cannot.

    Raises:
        UserError: The first impossible value, by dotted path.
    """
    for key, choices in CHOICES.items():
        value = attrgetter(key)(config)
        if value not in choices:
            raise UserError(f"{key}={value}: {nearest(value, choices)}one of {', '.join(choices)}")
    for key, smallest in AT_LEAST.items():
        value = attrgetter(key)(config)
        if not math.isfinite(value):
            raise UserError(f"{key}={value}: must be finite")
        if value < smallest:
            raise UserError(f"{key}={value}: must be at least {smallest}")
    if any(width < 1 for width in config.model.hidden):
        raise UserError(f"model.hidden={config.model.hidden}: every width must be at least 1")
    if config.model.embedding_dim % 4:
        raise UserError(
            f"model.embedding_dim={config.model.embedding_dim}: the lookup kernels need a multiple"
            " of 4"
        )
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"model.dropout={config.model.dropout}: must be in [0, 1)")
    if not 0 < config.evaluate.confidence < 1:
        raise UserError(f"evaluate.confidence={config.evaluate.confidence}: must be in (0, 1)")
    part, partition = config.data.part, config.data.partition
    if part is not None and (partition.by == "none" or not 0 <= part < partition.parts):
        raise UserError(
            f"data.part={part}: data.partition has parts 0 to {partition.parts - 1}"
            if partition.by != "none"
            else f"data.part={part}: needs data.partition.by=user, item, time or random"
        )
    if not config.integrate.sources:
        raise UserError("integrate.sources is empty: name at least one model, e.g. [{seed: 1}]")
    if config.integrate.gate.train != "none" and config.integrate.gate.kind in (
        "identity",
        "none",
    ):
        raise UserError(
            f"integrate.gate.train={config.integrate.gate.train}: a gate of kind"
            f" {config.integrate.gate.kind} has nothing to learn; use full, diagonal or scalar"
        )


def nearest(word: object, choices: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the choice most like ``word``, or nothing."""
    close = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? " if close else ""


def run_id(pipeline: str, reads: dict[str, Any]) -> str:
    """Return ``<pipeline>-<hash>``: equal for equal work, whatever machine or folder it runs in.

    Args:
        pipeline: Its name.
        reads: Everything its result depends on; never ``runtime``.
    """
    text = json.dumps({"version": __version__, **reads}, sort_keys=True)
    return f"{pipeline}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def section(value: Any) -> dict[str, Any]:
    """Return a section of the configuration as plain JSON values."""
    return asdict(value)


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error).splitlines()[0]


def with_delta(config: Config, delta: dict[str, Any]) -> Config:
    """Return ``config`` with dotted keys replaced, as ``integrate.sources`` names parents.

    Raises:
        UserError: A key that does not exist, or a value of another type.
    """
    tree = OmegaConf.structured(config)
    for key, value in delta.items():
        try:
            OmegaConf.update(tree, key, value, force_add=False)
        except OmegaConfBaseException as error:
            raise UserError(f"integrate.sources, {key}: {_first_line(error)}") from None
    changed = OmegaConf.to_object(tree)
    assert isinstance(changed, Config)
    check(changed)
    return changed
