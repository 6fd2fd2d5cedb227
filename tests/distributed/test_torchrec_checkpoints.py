"""Checkpoints that TorchRec has written on two processes: read, merged, and loaded again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cki_rec.checkpoints.formats import layout, open_stored
from cki_rec.cli import main

WRITER = Path(__file__).with_name("torchrec_writer.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("torchrec")
    for seed in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(WRITER), str(home / str(seed)), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return [home / "1", home / "2"]


def model_of(state):
    sys.path.insert(0, str(WRITER.parent))
    import torchrec_writer

    model = torchrec_writer.Ranker("cpu")
    model.load_state_dict(state)
    return model(torchrec_writer.ids_of(torch.Generator().manual_seed(7))).detach()


def read(path):
    stored = open_stored(path)
    return {name: stored.rows(full) for name, full in layout(stored).names.items()}


def test_shards_of_every_kind_give_the_scores_of_the_training(folders):
    for folder in folders:
        scores = torch.load(folder / "scores.pt", weights_only=True)
        assert torch.allclose(model_of(read(folder)), scores, atol=1e-6)
        parts = layout(open_stored(folder))
        assert "momentum1" in parts.state["tables.embedding_bags.user.weight"]


def test_the_merged_folder_loads_in_torchrec(folders, tmp_path, capsys):
    sources = ",".join(map(str, folders))
    options = [f"merge.sources=[{sources}]", f"runtime.out={tmp_path}"]
    assert main(["merge", "merge=evidence", *options]) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("merge-*/model")
    card = json.loads((path.parent / "merge.json").read_text())
    assert card["evidence"]["kind"] == "optimizer"
    merged = read(path)
    state = {name: torch.zeros_like(tensor) for name, tensor in merged.items()}
    dcp.load({"model": state}, checkpoint_id=path, no_dist=True)  # as a plain user of it
    assert torch.allclose(model_of(state), model_of(merged), atol=1e-6)
    assert len(card["evidence"]["tables"]) == 3
    for table, rows in (("user", 50), ("item", 30), ("city", 20)):
        name = f"tables.embedding_bags.{table}.weight"
        one, two = (read(folder)[name] for folder in folders)
        half = rows // 2  # rows from here on are of nobody's training
        mean = (one + two) / 2
        assert torch.allclose(merged[name][half:], mean[half:])
        assert not torch.isclose(merged[name][:half], mean[:half]).all(1).any()
