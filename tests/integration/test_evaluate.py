"""Evaluations follow from stored logits; nothing before them depends on test labels."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from cki_rec.cli import main
from cki_rec.config import Partition
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.test_labels import all_labels
from cki_rec.evaluation.metrics import log_loss
from cki_rec.evaluation.recalibration import recalibration
from cki_rec.evaluation.statistics import delong

TINY = ["runtime.threads=1", "train.epochs=2", "train.batch_size=256", "model.hidden=[16,8]"]


@pytest.fixture
def options(raw_zip, tmp_path):
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw_zip}", *places, *TINY, "evaluate.bootstrap=100", "suite=shards"]


def records(folder):
    by_id = [json.loads(path.read_text()) for path in folder.glob("*/record.json")]
    return {record["run_id"]: record for record in by_id}


def opened(folder):
    (manifest,) = folder.glob("*/manifest.json")
    return EncodedDataset(manifest.parent)


def test_recalibration_and_delong_follow_from_logits(options, tmp_path):
    assert main(["evaluate", "merge=average", *options]) == 0
    dataset, by_id = opened(tmp_path / "encoded"), records(tmp_path / "out")
    (record,) = (r for r in by_id.values() if r["run_id"].startswith("evaluate"))
    result = record["result"]

    def logits(identities):
        paths = [next((tmp_path / "out" / i).glob("logits-*.npz")) for i in identities]
        arrays = [np.load(path) for path in paths]
        return {s: np.mean([a[s].astype(np.float64) for a in arrays], 0) for s in arrays[0]}

    valid, test = (all_labels(dataset)[dataset.rows(split)] for split in ("valid", "test"))
    model = logits(record["config"]["members"])
    ensemble = logits(record["config"]["sources"])
    losses, fits = [], []
    for each in (model, ensemble):
        fits.append(recalibration(valid, each["valid"]))
        losses.append(log_loss(test, fits[-1].apply(each["test"])))
    assert result["recalibration"] == asdict(fits[0])
    assert result["recalibration"]["scale"] > 0
    assert result["test"]["log_loss_recalibrated"] == pytest.approx(losses[0], rel=1e-12)
    difference = result["difference"]["output_ensemble"]
    recalibrated = difference["log_loss_recalibrated"]
    assert recalibrated["estimate"] == pytest.approx(losses[0] - losses[1], abs=1e-12)
    assert recalibrated["low"] < recalibrated["estimate"] < recalibrated["high"]
    expected = delong(test, model["test"], ensemble["test"])
    assert difference["auc"]["delong_p"] == pytest.approx(expected.p_value, rel=1e-9)
    assert difference["auc"]["estimate"] == pytest.approx(expected.estimate, abs=1e-12)
    with np.load(tmp_path / "out" / record["run_id"] / "replicates.npz") as arrays:
        metrics = ("auc", "log_loss", "log_loss_recalibrated")
        expected = {f"{b}/{m}" for b in ("best_source", "output_ensemble") for m in metrics}
        assert set(arrays.files) == expected


def test_nothing_but_the_evaluation_depends_on_test_labels(options, tmp_path):
    words = ["evaluate", "merge=cki_gate", "merge.learn.epochs=1", "finetune=one_epoch"]
    assert main([*words, *options]) == 0
    dataset = opened(tmp_path / "encoded")
    path = dataset.folder / dataset.manifest["files"]["label"]["file"]
    label, rows = np.load(path), dataset.rows("test")
    label[rows] = 1 - label[rows]
    del dataset
    np.save(path, label)
    assert main([*words, *options, f"runtime.out={tmp_path / 'flipped'}"]) == 0
    one, two = records(tmp_path / "out"), records(tmp_path / "flipped")
    assert one.keys() == two.keys()
    assert len(one) == 5  # two sources, a merge, a fine-tuning, an evaluation
    for run_id, record in one.items():
        other = two[run_id]["result"]
        if not run_id.startswith("evaluate"):
            assert record["result"] == other
            continue
        for key in ("valid", "recalibration", "shares", "parameters"):
            assert record["result"][key] == other[key]
        assert record["result"]["test"]["auc"] == pytest.approx(1 - other["test"]["auc"])


def test_ranks_follow_from_logits_of_candidates(options, tmp_path):
    ranking = ["evaluate=ranking", "evaluate.ranking.negatives=7", "data.fields=[item,history]"]
    words = [*ranking, "model=gru4rec", "model.sequence.length=3", "model.sequence.hidden=4"]
    assert main(["evaluate", "merge=oracle_router", *options, *words]) == 0
    dataset, by_id = opened(tmp_path / "encoded"), records(tmp_path / "out")
    (record,) = (r for r in by_id.values() if r["run_id"].startswith("evaluate"))
    config, result = record["config"], record["result"]
    assert config["evaluate"]["ranking"] == {"negatives": 7, "draw": "uniform", "seed": 0}
    folders = [tmp_path / "out" / identity for identity in config["sources"]]
    ranked = [
        np.load(next(path for path in folder.glob("logits-*.npz") if path.stem.count("-") == 2))
        for folder in folders
    ]
    label = all_labels(dataset)
    for split, values in (("valid", result["valid"]), ("test", result["test"])):
        protocol = result["ranking"][split]
        rows = dataset.rows(split)
        liked = rows[label[rows] == 1]
        users = dataset.group[liked]
        assert (protocol["cases"], protocol["users"]) == (len(liked), len(np.unique(users)))
        assert protocol["item_fields"] == ["item"]
        part = dataset.parts(Partition(**config["partition"])).part[liked]
        scores = np.stack([arrays[split] for arrays in ranked])[part, range(len(liked))]
        rank = 1 + (scores[:, 1:] > scores[:, :1]).sum(1)
        assert (scores[:, 1:] != scores[:, :1]).all()
        hit = [(rank[users == user] <= 5).mean() for user in np.unique(users)]
        assert values["hr_5"] == pytest.approx(np.mean(hit), rel=1e-12)
    difference = result["difference"]["best_source"]
    assert difference["hr_10"]["estimate"] is not None
    assert difference["ndcg_10"]["low"] <= difference["ndcg_10"]["high"]
    assert main(["report", *options, "name=adhoc"]) == 0
    table = (tmp_path / "reports" / "adhoc" / "table.md").read_text()
    assert "HR@10" in table
    assert "NDCG@10 vs best source" in table
