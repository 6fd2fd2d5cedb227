"""Values that types cannot check."""

from __future__ import annotations

import math
from operator import attrgetter

from cki_rec.config.errors import UserError, nearest
from cki_rec.config.options import Config

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
    "data.history_length": 1,
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
