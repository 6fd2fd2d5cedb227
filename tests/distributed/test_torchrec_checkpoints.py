"""Checkpoints that TorchRec has written on two processes: read, merged, and loaded again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from cki_rec.checkpoints.formats import layout, open_stored
from cki_rec.cli import main
from cki_rec.pipelines import stream_plan

WRITER = Path(__file__).with_name("torchrec_writer.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("torchrec")
    for seed in (1, 2):
        torchrun("train", home / str(seed), seed)
    return [home / "1", home / "2"]


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(WRITER), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
        scores = torch.load(folder / "scores.pt", weights_only=True)["scores"]
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


def test_a_merge_from_disk_to_disk_serves_in_torchrec_and_in_pytorch(
    folders, tmp_path, monkeypatch
):
    """Its scores are those of the means of the sources' tables and heads."""
    monkeypatch.setattr(stream_plan, "BLOCK", 8)
    monkeypatch.setattr(stream_plan, "SMALLEST", 1)
    known = [torch.load(folder / "scores.pt", weights_only=True) for folder in folders]
    mean = {n: (known[0]["head"][n] + known[1]["head"][n]) / 2 for n in known[0]["head"]}
    inputs = (known[0]["inputs"] + known[1]["inputs"]) / 2
    expected = torch.nn.functional.linear(inputs, mean["weight"], mean["bias"]).squeeze(1)
    for folder in folders:  # the same as safetensors
        safetensors.torch.save_file(read(folder), folder.with_suffix(".safetensors"))
    for ending in ("", ".safetensors"):
        sources = ",".join(str(folder.with_suffix(ending)) for folder in folders)
        options = [f"merge.sources=[{sources}]", f"runtime.out={tmp_path / f'out{ending}'}"]
        assert main(["merge", "merge=average", "merge.memory_gb=1", *options]) == 0
        (path,) = (tmp_path / f"out{ending}").glob("merge-*/model*")
        assert torch.allclose(model_of(read(path)), expected, atol=1e-6)
        if ending:
            assert torch.allclose(model_of(load_file(path)), expected, atol=1e-6)
        else:
            torchrun("score", path, tmp_path / "scores.pt")
            found = torch.load(tmp_path / "scores.pt", weights_only=True)["scores"]
            assert torch.allclose(found, expected, atol=1e-6)


def test_evidence_of_parts_is_read_by_rows(folders, tmp_path, monkeypatch):
    """The accumulators of a table that is divided by columns lie one after the other."""
    monkeypatch.setattr(stream_plan, "BLOCK", 8)
    monkeypatch.setattr(stream_plan, "SMALLEST", 1)
    sources = f"merge.sources=[{','.join(map(str, folders))}]"
    models = []
    for more in ([], ["merge.memory_gb=1"]):
        out = tmp_path / str(len(models))
        assert main(["merge", "merge=evidence", sources, f"runtime.out={out}", *more]) == 0
        (path,) = out.glob("merge-*/model")
        models.append(read(path))
    assert all(torch.equal(models[1][name], tensor) for name, tensor in models[0].items())
