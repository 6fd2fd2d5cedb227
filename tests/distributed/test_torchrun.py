"""The command line under torchrun: one result and one record, and a process that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
