"""Values that types cannot check."""

from __future__ import annotations

import math
from operator import attrgetter

from cki_rec.config.errors import UserError, nearest
from cki_rec.config.options import Config

CHOICES = {
    "format": ("pt2", "onnx"),
    "data.on_bad_row": ("error", "skip"),
    "data.split.by": ("random", "hash", "time", "leave_last_out", "files"),
    "data.numeric": ("ln_squared", "quantile", "edges", "token", "log1p", "as_is"),
    "data.time_form": ("seconds", "yymmddhh"),
    "data.verify": ("fast", "full"),
    "data.synthetic.layout": ("criteo", "avazu", "movielens"),
    "data.partition.by": ("user", "item", "time", "random", "none"),
    "merge.align.by": ("none", "weights", "activations"),
    "merge.repair": ("none", "rescale", "least_squares", "select_units", "project"),
    "merge.tables": ("same", "evidence", "first"),
    "merge.biases": ("merge", "first"),
    "merge.scope": ("all", "head", "hidden", "output"),
    "merge.ablation": ("none", "permuted", "shuffled"),
    "merge.learn.what": ("none", "gates", "trunk"),
    "evaluate.resample": ("user", "row"),
    "model.activation": ("relu", "dice", "prelu", "sigmoid", "tanh"),
    "model.cross.structure": ("parallel", "stacked"),
    "model.attention.activation": ("relu", "dice", "prelu", "sigmoid", "tanh"),
    "train.embeddings": ("fused", "dense"),
    "train.table_optimizer": ("rowwise_adagrad", "adagrad"),
    "train.precision": ("fp32", "bf16"),
    "runtime.device": ("auto", "cpu", "cuda"),
    "runtime.sharding": ("table_wise", "row_wise", "column_wise", "planner"),
    "runtime.resume": ("auto", "never"),
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
    "model.embedding_dim": 1,
    "model.cross.layers": 1,
    "model.cross.experts": 1,
    "model.attention.length": 1,
    "model.streams.heads": 1,
    "train.epochs": 0,
    "train.batch_size": 1,
    "train.patience": 1,
    "train.learning_rate": 0,
    "train.table_learning_rate": 0,
    "train.table_l2": 0,
    "train.plateau_factor": 0,
    "train.min_learning_rate": 0,
    "train.min_gain": 0,
    "model.init_std": 0,
    "merge.align.starts": 1,
    "merge.sample": 1,
    "merge.learn.learning_rate": 0,
    "finetune.learning_rate": 0,
    "finetune.table_learning_rate": 0,
    "evaluate.seed": 0,
    "merge.learn.epochs": 1,
    "finetune.epochs": 0,
    "evaluate.bootstrap": 100,
    "runtime.threads": 0,
    "runtime.checkpoint_steps": 0,
    "runtime.checkpoint_minutes": 0,
    "runtime.keep": 1,
    "runtime.log_steps": 0,
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
    _check_model(config)
    _check_train(config)
    if not 0 < config.evaluate.confidence < 1:
        raise UserError(f"evaluate.confidence={config.evaluate.confidence}: must be in (0, 1)")
    part, partition = config.data.part, config.data.partition
    if part is not None and (partition.by == "none" or not 0 <= part < partition.parts):
        raise UserError(
            f"data.part={part}: data.partition has parts 0 to {partition.parts - 1}"
            if partition.by != "none"
            else f"data.part={part}: needs data.partition.by=user, item, time or random"
        )
    if not config.merge.sources:
        raise UserError("merge.sources is empty: name at least one model, e.g. [{seed: 1}]")
    if config.merge.learn.what == "trunk" and config.merge.scope == "all":
        raise UserError(
            "merge.learn.what=trunk: trains the parameters out of scope; set merge.scope to head,"
            " hidden or output"
        )


def _check_model(config: Config) -> None:
    model = config.model
    widths = {
        "model.hidden": model.hidden,
        "model.attention.hidden": model.attention.hidden,
        "model.streams.hidden": model.streams.hidden,
        "model.streams.gate_hidden": model.streams.gate_hidden,
    }
    for key, values in widths.items():
        if any(width < 1 for width in values):
            raise UserError(f"{key}={values}: every width must be at least 1")
    for key in ("model.dropout", "model.attention.dropout", "model.streams.dropout"):
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            raise UserError(f"{key}={value}: must be in [0, 1)")
    if model.matrix_std is not None and not 0 < model.matrix_std < math.inf:
        raise UserError(f"model.matrix_std={model.matrix_std}: must be above 0, or null")
    if model.cross.rank is not None and model.cross.rank < 1:
        raise UserError(f"model.cross.rank={model.cross.rank}: must be at least 1, or null")


def _check_train(config: Config) -> None:
    train = config.train
    weights = (train.monitor.auc, train.monitor.log_loss, train.monitor.gauc)
    if not any(weights) or not all(math.isfinite(weight) for weight in weights):
        raise UserError("train.monitor: weights must be finite, and one of them not 0")
    if train.gradient_clip is not None and not 0 < train.gradient_clip < math.inf:
        raise UserError(f"train.gradient_clip={train.gradient_clip}: must be above 0, or null")
    if train.ema is not None and not 0 <= train.ema < 1:
        raise UserError(f"train.ema={train.ema}: must be in [0, 1), or null")
