"""Experiments on published boards say what the boards' own records say."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from samples import ROOT

from cki_rec.config import Config, parse
from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.models import build_model

BENCHMARKS = Path(os.environ.get("CKI_REC_DATA", "absent")).parent / "design" / "benchmarks.md"
NAMES = {"DeepFM": "deepfm", "DCN": "dcn", "DCNv2": "dcnv2", "DIN": "din"}
"""Model in the table -> choice of ``conf/model``, and last word of the experiment."""
LATER = {"criteo_x4_001": "criteo_x4", "avazu_x4_001": "avazu_x4"}
"""Board -> choice of ``conf/data``, where their names differ."""
MONITORS = {
    "AUC": (1, 0, 0),
    "gAUC": (0, 0, 1),
    "{'AUC': 1, 'logloss': -1}": (1, -1, 0),
    "{'AUC': 1, 'gAUC': 1}": (1, 0, 1),
}
"""As the boards write it -> weights of AUC, LogLoss and gAUC."""
FIVE_SEEDS = ("criteo_x1", "avazu_x1", "movielenslatest_x1", "frappe_x1")
SIZES = {
    "amazonelectronics_x1": {"item_id": 63003, "cate_id": 803},
    "taobaoad_x1": {
        "userid": 403958, "cms_segid": 99, "cms_group_id": 15, "final_gender_code": 4,
        "age_level": 9, "pvalue_level": 6, "shopping_level": 5, "occupation": 4,
        "new_user_class_level": 7, "adgroup_id": 246851, "cate_id": 11330,
        "campaign_id": 191771, "customer": 132136, "brand": 308870, "pid": 4, "btag": 6,
    },
}  # fmt: skip
"""Vocabularies, with padding and unseen, as the logs of both boards' DIN state them."""
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("bars_*.yaml"))


@pytest.fixture(scope="module")
def text() -> str:
    if not BENCHMARKS.exists():
        pytest.skip(f"no {BENCHMARKS}")
    return BENCHMARKS.read_text()


def section(text: str, number: str) -> dict[str, Any]:
    """Return the yaml block of a section."""
    block = re.search(rf"^### {re.escape(number)} .*?```yaml\n(.*?)```", text, re.S | re.M)
    found = OmegaConf.to_container(OmegaConf.create(block.group(1)))
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def configure(compose) -> Callable[[str], Config]:
    """Function (experiment) -> its configuration, composed once."""
    return lru_cache(maxsize=None)(lambda name: parse(compose(f"experiment={name}")))


@pytest.fixture(scope="module")
def rows(text) -> dict[str, dict[str, Any]]:
    """Experiment -> board's hyperparameters, with ``board`` and ``model``."""
    return {
        f"bars_{board}_{NAMES[model]}": {**values, "board": board, "model": NAMES[model]}
        for board, models in section(text, "1.4").items()
        for model, values in models.items()
    }


def first_of(row: dict[str, Any], *keys: str) -> Any:
    return next(row[key] for key in keys if key in row)


def number(value: float | str) -> float:
    return float(re.sub(r"^l2\((.*)\)$", r"\1", str(value)))


def names_of(entry: Any, known: set[str]) -> Any:
    """Return fields or tuples of them without those that the data set leaves out."""
    if isinstance(entry, str):
        return entry
    kept = [name for name in entry if name in known]
    return kept[0] if len(kept) == 1 else kept


def pairs_of(row: dict[str, Any], known: set[str]) -> list[Any]:
    """Return what attends to what, as ``model.attention.pairs`` writes it."""
    sides = [ast.literal_eval(row[f"din_{side}_field"]) for side in ("target", "sequence")]
    sides = [side if isinstance(side, list) else [side] for side in sides]
    return [[names_of(entry, known) for entry in pair] for pair in zip(*sides, strict=True)]


def fields_of(config: Config) -> dict[str, dict[str, Any]]:
    entries = [{"name": f} if isinstance(f, str) else f for f in config.data.fields]
    return {entry["name"]: entry for entry in entries}


def wanted(row: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return what the board says, by our dotted names."""
    activation = first_of(row, "hidden_activations", "dnn_activations").lower()
    want = {
        "data.name": LATER.get(row["board"], row["board"]),
        "model.name": row["model"],
        "model.embedding_dim": row["embedding_dim"],
        "model.hidden": first_of(
            row, "hidden_units", "dnn_hidden_units", "parallel_dnn_hidden_units"
        ),
        "model.activation": activation,
        "model.batch_norm": row["batch_norm"],
        "model.dropout": row["net_dropout"],
        "train.batch_size": row["batch_size"],
        "train.learning_rate": row["learning_rate"],
        "train.table_l2": number(row["embedding_regularizer"]),
        "train.epochs": row["epochs"],
        "train.patience": first_of(row, "patience", "early_stop_patience"),
    }
    weights = MONITORS[str(row["monitor"]).replace('"', "'")]
    metrics = [f"train.monitor.{metric}" for metric in ("auc", "log_loss", "gauc")]
    want |= dict(zip(metrics, weights, strict=True))
    if "min_categr_count" in row:
        want["data.min_count"] = row["min_categr_count"]
    if row["model"] in ("dcn", "dcnv2"):
        want["model.cross.layers"] = first_of(row, "crossing_layers", "num_cross_layers")
    if row["model"] == "dcnv2":
        assert not row["use_low_rank_mixture"]
        want |= {"model.cross.structure": row["model_structure"], "model.cross.rank": None}
    if row["model"] == "din":
        want |= {
            "model.attention.pairs": pairs_of(row, set(fields_of(config))),
            "model.attention.hidden": row["attention_hidden_units"],
            "model.attention.activation": row["attention_hidden_activations"].lower(),
            "model.attention.dropout": row["attention_dropout"],
            "model.attention.softmax": row["din_use_softmax"],
        }
        lengths = {f["max_length"] for f in fields_of(config).values() if "separator" in f}
        want["model.attention.length"] = max(lengths)
    return want


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains_as_its_board_did(configure, rows, name):
    config = configure(name)
    if name.endswith("_final_mlp"):
        return  # see below
    want = wanted(rows[name], config)
    tree = OmegaConf.create(asdict(config))
    assert {key: OmegaConf.select(tree, key) for key in want} == want
    assert (rows[name]["optimizer"], rows[name]["net_regularizer"]) == ("adam", 0)


def test_every_row_has_an_experiment(rows):
    assert set(rows) == {name for name in EXPERIMENTS if not name.endswith("_final_mlp")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_seeds_are_those_of_the_board(text, rows, name):
    five = re.search(r"there are 5-seed runs \(seeds ([\d, ]+);", text).group(1)
    tree = OmegaConf.load(ROOT / "conf" / "experiment" / f"{name}.yaml")
    seeds = [int(seed) for seed in str(tree.hydra.sweeper.params.seed).split(",")]
    if not name.endswith("_final_mlp"):
        many = [int(seed) for seed in five.split(",")]
        row = rows[name]
        assert seeds == (many if row["board"] in FIVE_SEEDS else [row["seed"]])
        assert seeds[0] == row["seed"]


def test_figures_are_those_of_the_board(text):
    for name in EXPERIMENTS:
        lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
        figures = re.findall(r"\b0\.\d{4,}", lines[1])
        assert figures
        for figure in figures:
            assert figure in text, f"{name}: {figure}"


def test_final_mlp_trains_as_far_as_its_record_is_known(configure, text):
    known = section(text, "1.5")["FinalMLP"]
    assert {f"bars_{board}_final_mlp" for board in known} == {
        name for name in EXPERIMENTS if name.endswith("_final_mlp")
    }
    ours = {
        "mlp1": "model.hidden",
        "mlp1_dropout": "model.dropout",
        "mlp2": "model.streams.hidden",
        "mlp2_dropout": "model.streams.dropout",
        "num_heads": "model.streams.heads",
        "use_fs": "model.streams.selection",
        "emb_l2": "train.table_l2",
    }
    for board, row in known.items():
        tree = OmegaConf.create(asdict(configure(f"bars_{board}_final_mlp")))
        for key, value in row.items():
            if key in ours:
                assert OmegaConf.select(tree, ours[key]) == value, (board, key)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_boards_share_their_semantics(configure, name):
    config = configure(name)
    assert config.name == name
    train = config.train
    assert (train.embeddings, train.gradient_clip, train.precision) == ("dense", 10.0, "fp32")
    assert (train.plateau_factor, train.min_learning_rate, train.min_gain) == (0.1, 1e-6, 1e-6)
    assert (config.model.init_std, train.ema, train.compile) == (1e-4, None, False)
    assert config.merge.sources == config.suite.sources == [{"seed": config.seed}]
    assert (config.merge.method, config.finetune.epochs) == ("best_source", 0)
    assert (config.data.partition.by, config.data.part) == ("none", None)
    assert (config.data.split.by, config.data.format) == ("files", "csv")
    has_histories = any(
        "separator" in f and f.get("kind") == "history" for f in fields_of(config).values()
    )
    assert config.model.histories == has_histories


@pytest.mark.parametrize("board", SIZES)
@pytest.mark.parametrize("model", ["dcn", "dcnv2", "din"])
def test_model_has_as_many_parameters_as_on_the_board(configure, text, board, model):
    config = configure(f"bars_{board}_{model}")
    features = []
    for name, field in fields_of(config).items():
        kind = field.get("kind", "categorical")
        table = "" if kind == "numeric" else field.get("table", name)
        features.append(Feature(name, table, kind))
    schema = FeatureSchema(tuple(features), SIZES[board], {})
    network = build_model(schema, config.model, torch.device("meta"))
    word = next(theirs for theirs, ours in NAMES.items() if ours == model)
    known = re.search(rf"params (\d+);.*src ranking/ctr/{word}/{word}_{board}/", text).group(1)
    assert sum(parameter.numel() for parameter in network.parameters()) == int(known)
