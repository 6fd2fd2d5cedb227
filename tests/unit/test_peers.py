"""experiments/peers: rows leave as our models see them, the table follows from records."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cki_rec import environment, project_root
from cki_rec.config import UserError
from cki_rec.data.columns import Ragged
from cki_rec.data.loader import Gather
from cki_rec.data.test_labels import all_labels
from cki_rec.engine.record import Run
from cki_rec.engine.sweeps import add_to_sweep

PEERS = project_root() / "experiments" / "peers"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def export():
    return load("export")


@pytest.fixture(scope="module")
def table():
    return load("table")


@pytest.fixture(scope="module")
def exported(export, raw_zip, tmp_path_factory):
    """Facts and arrays of the tiny data set."""
    folder = tmp_path_factory.mktemp("peers")
    overrides = [f"data.raw={raw_zip}", f"runtime.encoded={folder / 'encoded'}"]
    export.export(folder, "peers_movielens_small", overrides)
    stem = folder / "peers_movielens_small"
    arrays = dict(np.load(stem.with_suffix(".npz")))
    (encoded,) = (folder / "encoded").glob("movielens_small-*/manifest.json")
    dataset = export.EncodedDataset(encoded.parent)
    return json.loads(stem.with_suffix(".json").read_text()), arrays, dataset


def test_padded_keeps_the_last_ids(export):
    column = Ragged(
        np.array([4, 5, 6, 7], np.int32), np.array([0, 0, 3]), np.array([3, 0, 1], np.int32)
    )
    ids, lengths = export.padded(column)
    assert ids.tolist() == [[4, 5, 6], [0, 0, 0], [7, 0, 0]]
    assert lengths.tolist() == [3, 0, 1]
    ids, lengths = export.padded(column, length=2)
    assert ids.tolist() == [[5, 6], [0, 0], [7, 0]]
    assert lengths.tolist() == [2, 0, 1]


def test_exported_rows_are_those_of_our_batches(exported):
    facts, arrays, dataset = exported
    rows = np.sort(np.random.default_rng(0).choice(len(dataset), 50, replace=False))
    batch = Gather(dataset, dataset.schema)(rows)
    assert batch.lengths is not None
    lengths = batch.lengths.view(len(facts["fields"]), -1)
    found = batch.values.split(lengths.sum(1).tolist())
    for field, ids, sizes in zip(facts["fields"], found, lengths.tolist(), strict=True):
        array = arrays[f"field.{field['name']}"][rows]
        assert array.max() < field["size"]
        limit = array.shape[1] if array.ndim == 2 else 1
        for row, own in zip(array, ids.split(sizes), strict=True):
            held = np.atleast_1d(row)
            assert held[held != 0].tolist() == own[-limit:].tolist()
    known = dataset.split[rows] != 2  # labels of test rows are in no batch of ours
    assert arrays["label"][rows][known].tolist() == batch.label[known].tolist()
    assert np.array_equal(arrays["label"], all_labels(dataset))
    for split in ("train", "valid", "test"):
        assert arrays[split].tolist() == dataset.rows(split).tolist()


def test_facts_hold_the_options_of_every_model(exported):
    facts, arrays, _ = exported
    assert list(facts["models"]) == ["deepfm", "dcn", "din"]
    assert facts["seeds"] == [1, 2, 3, 4, 5]
    assert [o["histories"] for o in facts["models"].values()] == [False, False, True]
    attended = facts["models"]["din"]["attention_length"]
    assert arrays["field.history"].shape[1] == attended
    assert arrays["length.history"].max() <= attended


def test_options_that_the_peer_does_not_know_are_refused(export):
    models, _ = export.configs("peers_movielens_small", ["train.gradient_clip=1.0"])
    with pytest.raises(UserError, match=r"train\.gradient_clip=1\.0: deepctr-torch can"):
        export.options_of(models["deepfm"])


def test_both_experiments_compare_dense_mode(export):
    for name in ("peers_movielens_small", "peers_movielens_1m"):
        models, seeds = export.configs(name, ["data.raw=none"])
        assert len({str(export.options_of(models[m])) for m in ("deepfm", "dcn")}) == 2
        assert len(seeds) == 5


FACTS = {
    "data": "ml",
    "data_hash": "abc",
    "seeds": [1, 2],
    "models": {"deepfm": {"dropout": 0.2, "epochs": 3}},
}


def result(seed: int, auc: float, **changes):
    line = {"data_hash": "abc", "model": "deepfm", "seed": seed, "test_auc": auc}
    line |= {"test_log_loss": 1 - auc, "options": FACTS["models"]["deepfm"], "versions": {}}
    return {**line, "versions": {"torch": "1"}, **changes}


def write_run(out: Path, seed: int, auc: float, dropout: float = 0.2, data_hash: str = "abc"):
    trained, measured = f"train-{seed}-{dropout}", f"evaluate-{seed}-{dropout}-{data_hash}"
    config = {"model": {"name": "deepfm", "dropout": dropout}, "train": {"epochs": 3}}
    test = {"auc": auc, "log_loss": 1 - auc}
    records = {
        trained: {"config": config},
        measured: {
            "config": {"parents": [trained]},
            "data": {"hash": data_hash},
            "result": {"seed": seed, "test": test},
        },
    }
    for name, record in records.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        whole = {"run_id": name, "data": {}, "result": {}, "provenance": {}, **record}
        (out / name / "record.json").write_text(json.dumps(whole))
    add_to_sweep(out, "peers_ml", Run(out / measured))


def test_table_follows_from_records(table, tmp_path):
    out, exported = tmp_path / "runs", tmp_path / "exported"
    exported.mkdir()
    (exported / "peers_ml.json").write_text(json.dumps(FACTS))
    lines = [result(1, 0.7), result(2, 0.8), result(3, 0.1), result(1, 0.1, data_hash="other")]
    lines.append(result(2, 0.2, options={"dropout": 0.5, "epochs": 3}))
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_run(out, 1, 0.69)
    write_run(out, 2, 0.71)
    write_run(out, 2, 0.1, dropout=0.5)
    write_run(out, 1, 0.1, data_hash="other")
    table.main(exported, out, tmp_path / "results.jsonl", tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    sides = "| 2 | 0.75000 ± 0.07071 | 2 | 0.70000 ± 0.01414 | -0.05000 | yes |"
    assert f"| deepfm | AUC {sides}" in text
    assert "| 2 | 0.25000 ± 0.07071 | 2 | 0.30000 ± 0.01414 | +0.05000 | yes |" in text
    assert "Versions: torch 1" in text


@pytest.mark.parametrize(
    ("metric", "own", "verdict"),
    [
        ("auc", 0.68, "yes"), ("auc", 0.67, "no"), ("auc", 0.9, "yes"),
        ("log_loss", 0.82, "yes"), ("log_loss", 0.83, "no"), ("log_loss", 0.1, "yes"),
    ],
)  # fmt: skip
def test_verdict_is_one_standard_deviation(table, metric, own, verdict):
    assert table.row("deepfm", metric, [0.7, 0.8], [own])[-1] == verdict


def test_too_few_runs_leave_cells_blank(table):
    assert table.row("deepfm", "auc", [0.7], [0.7])[-2:] == ["", ""]
    assert table.row("deepfm", "auc", [0.7, 0.8], [])[-3:] == ["", "", ""]
    lines = table.table(FACTS, {}, {})
    assert "| deepfm | AUC | 0 |  | 0 |  |  |  |" in lines


def test_peers_use_our_torch_and_ours_uses_no_peer():
    pins = (PEERS / "requirements.txt").read_text()
    assert f"torch=={environment.TORCH}\n" in pins
    assert "deepctr" not in (project_root() / "pyproject.toml").read_text()
    assert ".venv-peers/" in (project_root() / ".gitignore").read_text().splitlines()
    text = (PEERS / "peer.py").read_text()
    assert not re.search(r"^\s*(from|import) cki_rec", text, flags=re.M)


def test_the_speed_table_follows_from_rounds():
    speed = load("speed")
    ours, theirs = [[0.1, 0.1], [0.2, 0.1], [0.1, 0.1]], [[0.17, 0.15], [0.2, 0.15], [0.18, 0.1]]
    text = speed.table({500_000: (ours, theirs)})
    cells = (
        "| 500,000 | 100.0 | 180.0 | 1.80 | 1.00 to 1.80 | 1.6 | reached | 100.0 | 150.0 | 1.50 |"
    )
    assert cells in text.splitlines()
    assert torch.backends.cpu.get_cpu_capability() in text


def test_fuxictr_is_in_no_environment_of_ours():
    assert "fuxictr==2.3.10\n" in (PEERS / "requirements-fuxictr.txt").read_text()
    assert "fuxictr" not in (project_root() / "pyproject.toml").read_text()
    assert ".venv-fuxictr/" in (project_root() / ".gitignore").read_text().splitlines()
    text = (PEERS / "fuxictr_step.py").read_text()
    assert not re.search(r"^\s*(from|import) cki_rec", text, flags=re.M)


def test_recbole_is_in_no_environment_of_ours():
    assert "recbole==1.2.1\n" in (PEERS / "requirements-recbole.txt").read_text()
    assert "recbole" not in (project_root() / "pyproject.toml").read_text()
    assert ".venv-recbole/" in (project_root() / ".gitignore").read_text().splitlines()
    assert "cki_rec" not in (PEERS / "recbole_ranks.py").read_text()
