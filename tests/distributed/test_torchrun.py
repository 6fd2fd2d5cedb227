"""The command line under torchrun: one result and one record, and a process that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.engine.resume import RESUME
from cki_rec.engine.steps import STEPS

pytestmark = pytest.mark.dist
SMALL = (
    *("train.batch_size=101", "train.learning_rate=0.01", "model.hidden=[8]"),
    *("model.embedding_dim=8", "model.dropout=0.0", "model.init_std=0.1", "runtime.threads=1"),
    *("runtime.device=cpu", "runtime.tensorboard=false", "runtime.log_steps=1"),
)


@pytest.fixture
def words(raw_zip, tmp_path):
    """Function (name, *more) -> the words of a training that writes to the folder of that name."""

    def make(name: str, *more: str) -> list[str]:
        places = [f"runtime.{key}={tmp_path / name / key}" for key in ("out", "reports")]
        shared = [f"data.raw={raw_zip}", f"runtime.encoded={tmp_path / 'encoded'}"]
        return ["train", *shared, *places, *SMALL, *more]

    return make


def two_processes(words: list[str]) -> subprocess.Popen:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "cki_rec", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(folder: Path) -> dict[str, dict]:
    """Return the records of trainings by the name of their folders."""
    paths = folder.glob("out/train-*/record.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


@pytest.mark.slow
def test_two_processes_train_the_chain_of_one(words, tmp_path):
    """Two trainings, the second of which starts from the first."""
    chain = ("train.epochs=2", "train.start={seed: 2}")
    assert main(words("one", *chain)) == 0
    process = two_processes(words("two", *chain, "runtime.sharding=row_wise"))
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    ones, twos = records(tmp_path / "one"), records(tmp_path / "two")
    assert ones.keys() == twos.keys()
    assert len(ones) == 2
    for run_id, one in ones.items():
        two = twos[run_id]
        assert one["run_id"] == two["run_id"]
        assert two["result"]["valid_auc"] == pytest.approx(one["result"]["valid_auc"], abs=1e-4)
        for mine, theirs in zip(two["result"]["history"], one["result"]["history"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        assert [r["provenance"]["world_size"] for r in (one, two)] == [1, 2]
        shards = two["provenance"]["plan"]["user"]["shards"]
        assert {shard["rank"] for shard in shards} == {0, 1}
        folder = tmp_path / "two" / "out" / run_id
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint", "record.json", STEPS]
    assert len([*(tmp_path / "two" / "out").glob("train-*")]) == 2
    assert out.count("model: ") == 1  # the first speaks for both
    assert out.count("rank 1: ") == 2  # of each training
    assert "Traceback" not in error


@pytest.mark.slow
def test_two_processes_refine_the_model_of_one(words, tmp_path):
    """Under the default plan, some tables are on one process alone."""
    more = ("suite=seeds", "merge=average", "train.epochs=1", "merge.refinement.steps=20")
    more += ("merge.refinement.batch_size=301", "merge.refine=mean")
    assert main(["merge", *words("one", *more)[1:]]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for pattern in ("merge-*", "refine-*", "teachers"):  # the sources stay
        for folder in (tmp_path / "two" / "out").glob(pattern):
            shutil.rmtree(folder)
    process = two_processes(["merge", *words("two", *more)[1:]])
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    runs = [next((tmp_path / n / "out").glob("refine-*")) for n in ("one", "two")]
    one, two = (json.loads((run / "record.json").read_text()) for run in runs)
    assert two["provenance"]["world_size"] == 2
    for mine, theirs in zip(two["result"]["history"], one["result"]["history"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    params = [checkpoint.load(run / "checkpoint").params for run in runs]
    for name, tensor in params[0].items():
        torch.testing.assert_close(params[1][name], tensor, rtol=1e-4, atol=1e-5)


SEARCH = ("suite=shards", "merge=auto", "train.epochs=1", "merge.sample=400",
          "merge.refinement.steps=10", "merge.refinement.map_steps=5", "evaluate.bootstrap=100",
          "merge.recipes=[{}, {align.by: activations, repair: select_units}]")  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_search_refine_and_evaluate_as_one(words, tmp_path):
    """``auto`` from nothing: sources, recipes, maps, refinement, recalibration and metrics."""
    assert main(["evaluate", *words("one", *SEARCH)[1:]]) == 0
    process = two_processes(["evaluate", *words("two", *SEARCH)[1:]])
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    one, two = (next((tmp_path / n / "out").glob("evaluate-*")) for n in ("one", "two"))
    assert one.name == two.name
    found, expected = (json.loads((run / "record.json").read_text()) for run in (two, one))
    assert found["provenance"]["world_size"] == 2
    for split in ("valid", "test"):
        value = expected["result"][split]["auc"]
        assert found["result"][split]["auc"] == pytest.approx(value, abs=1e-4)
    runs = {p.name for p in (tmp_path / "one" / "out").glob("*-*")}
    assert runs == {p.name for p in (tmp_path / "two" / "out").glob("*-*")}
    assert any(name.startswith("refine-") for name in runs)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_and_the_command_goes_on(words, tmp_path, victim):
    more = ("train.epochs=12", "train.patience=12", "runtime.checkpoint_steps=5")
    assert main(words("one", *more)) == 0
    process = two_processes(words("two", *more))
    steps, deadline = "out/train-*/" + STEPS, time.time() + 120
    while time.time() < deadline and process.poll() is None:
        found = list((tmp_path / "two").glob(steps))
        if found and len(found[0].read_text().splitlines()) > 40:
            break
        time.sleep(0.005)
    assert process.poll() is None
    os.kill(children_of(process.pid)[victim], signal.SIGKILL)
    killed = time.time()
    _, error = process.communicate(timeout=60)
    assert time.time() - killed < 15
    assert process.returncode == 1
    message = "cki-rec: another process has ended; run the same command again: it resumes from the"
    assert message in error
    assert 'File "' not in error.replace("torch/distributed", "")[: error.index(message)]
    (folder,) = (tmp_path / "two" / "out").glob("train-*")
    assert list((folder / RESUME).iterdir())
    process = two_processes(words("two", *more))
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    (one,), (two,) = (records(tmp_path / name).values() for name in ("one", "two"))
    assert two["provenance"]["resumed_at_step"] >= 35
    assert two["result"]["valid_auc"] == pytest.approx(one["result"]["valid_auc"], abs=1e-4)
    assert not (folder / RESUME).exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_a_merge_with_one_message(words, tmp_path, victim):
    process = two_processes(["evaluate", *words("two", *SEARCH)[1:]])
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if [*(tmp_path / "two" / "out").glob("merge-*")]:
            break
        time.sleep(0.005)
    assert process.poll() is None
    children = children_of(process.pid)
    os.kill(children[victim], signal.SIGKILL)
    killed = time.time()
    _, error = process.communicate(timeout=60)
    assert time.time() - killed < 15
    assert process.returncode == 1
    assert error.count("cki-rec: ") == 1
    assert "cki-rec: another process has ended; run the same command again" in error
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
