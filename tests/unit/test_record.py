"""Run directories: alone while written, finished by the record, never half there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cki_rec.config import UserError
from cki_rec.engine import record
from cki_rec.engine.record import RECORD, REMADE, Run, load_arrays, open_run, save_arrays
from cki_rec.files import write_atomically

ARGUMENTS = ({"seed": 1}, {"name": "d"}, {"auc": 0.75, "none": None})


def finished(out: Path, run_id: str, result=0.5) -> Run:
    with open_run(out, run_id) as run:
        run.finish({}, {}, {"auc": result})
    return run


def test_a_new_run_is_an_empty_folder(tmp_path):
    with open_run(tmp_path / "deep" / "out", "train-1") as run:
        assert run.path == tmp_path / "deep" / "out" / "train-1"
        assert list(run.path.iterdir()) == []
        assert run.record is None
        assert run.checkpoint.parent == run.path


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    left = tmp_path / "train-1" / "checkpoint.tmp-7"
    left.mkdir(parents=True)
    (left / "tensors").write_text("half")
    with open_run(tmp_path, "train-1") as run:
        assert list(run.path.iterdir()) == []


def test_a_failing_run_stays_unfinished(tmp_path):
    def fail():
        with open_run(tmp_path, "train-1") as run:
            (run.path / "x").touch()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert Run(tmp_path / "train-1").record is None
    with open_run(tmp_path, "train-1") as run:  # the lock is free, the leftovers go
        assert list(run.path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_a_finished_run_stays_unless_forced(tmp_path, force):
    first = finished(tmp_path, "train-1")
    (first.path / "kept").write_text("x")
    with open_run(tmp_path, "train-1", force) as run:
        assert (run.path / "kept").exists() == (not force)
        assert (run.record is None) == force


def test_a_forced_run_that_fails_keeps_the_finished_one(tmp_path):
    first = finished(tmp_path, "train-1")
    (first.path / "kept").write_text("x")

    def fail(error):
        with open_run(tmp_path, "train-1", force=True) as run:
            assert (tmp_path / "train-1" / RECORD).exists(), "others read the old run meanwhile"
            (run.path / "half").touch()
            raise error

    for error in (UserError("refused"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
        assert sorted(p.name for p in first.path.iterdir()) == ["kept", RECORD]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["locks", "train-1"]


def test_a_forced_run_replaces_the_finished_one_by_its_record(tmp_path):
    first = finished(tmp_path, "train-1", result=0.5)
    (first.path / "old").write_text("x")
    with open_run(tmp_path, "train-1", force=True) as run:
        (run.path / "new").write_text("x")
        run.finish({}, {}, {"auc": 0.6})
    assert run.path == first.path
    assert run.record["run_id"] == "train-1"
    assert run.record["result"] == {"auc": 0.6}
    assert sorted(p.name for p in run.path.iterdir()) == ["new", RECORD]


def test_a_forced_run_that_was_killed_after_its_record_takes_its_place(tmp_path):
    finished(tmp_path, "train-1", result=0.5)
    finished(tmp_path / REMADE, "train-1", result=0.6)  # killed before the exchange
    with open_run(tmp_path, "train-1") as run:
        assert run.record["result"] == {"auc": 0.6}


def test_a_forced_training_that_was_stopped_goes_on(tmp_path):
    finished(tmp_path, "train-1")
    for _ in range(2):
        with open_run(tmp_path, "train-1", force=True, resume="auto") as run:
            step = run.path / "resume" / "step-0000000003"
            step.mkdir(parents=True, exist_ok=True)
            (step / "checkpoint.json").touch()  # and no record: it was stopped
        assert Run(tmp_path / "train-1").record is not None
    assert (tmp_path / REMADE / "train-1" / "resume" / "step-0000000003").exists()


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_finished_run_with_a_damaged_file_is_made_again(tmp_path, caplog, how):
    def make(result):
        with open_run(tmp_path, "train-1") as run:
            if run.record is None:
                (run.path / "checkpoint").mkdir()
                (run.path / "checkpoint" / "x").write_text("whole")
                (run.path / "steps.jsonl").write_text("logs may go")
                (run.path / "mapped").mkdir()
                (run.path / "mapped" / "x").write_text("work in progress may go")
                run.finish({}, {}, {"auc": result})
        return run

    run = make(0.5)
    (run.path / "steps.jsonl").unlink()
    (run.path / "mapped" / "x").unlink()
    (run.path / "logits-1.npz").write_text("came later")
    assert make(0.6).record["result"] == {"auc": 0.5}
    assert not caplog.text
    file = run.path / "checkpoint" / "x"
    file.unlink() if how == "deleted" else file.write_text("who")
    assert make(0.7).record["result"] == {"auc": 0.7}
    assert file.read_text() == "whole"
    problem = "missing" if how == "deleted" else "damaged"
    assert f"{file} is {problem}; train-1 is made again" in caplog.text


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"run_id": "train-1"', "\xff"])
def test_an_empty_or_cut_record_counts_as_missing(tmp_path, text):
    run = finished(tmp_path, "train-1")
    (run.path / RECORD).write_bytes(text.encode("latin-1"))
    assert run.record is None
    with open_run(tmp_path, "train-1") as again:
        assert list(again.path.iterdir()) == []


@pytest.mark.parametrize("size", [None, 0, 30, -10])
def test_missing_or_cut_arrays_are_none(tmp_path, size):
    path = tmp_path / "x.npz"
    save_arrays(path, {"a": np.arange(500)})
    assert load_arrays(path)["a"].tolist() == list(range(500))
    path.write_bytes(path.read_bytes()[:size]) if size is not None else path.unlink()
    assert load_arrays(path) is None


def test_record_holds_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv(record.COMMAND_VARIABLE, "cki-rec train")
    with open_run(tmp_path, "train-1") as run:
        with run.phase("train"):
            time.sleep(0.02)
        with run.phase("train"):
            time.sleep(0.02)
        run.finish(*ARGUMENTS)
    saved = run.record
    assert saved["run_id"] == "train-1"
    assert [saved[key] for key in ("config", "data", "result")] == list(ARGUMENTS)
    where = saved["provenance"]
    assert where["command"] == "cki-rec train"
    assert where["seconds"]["train"] >= 0.04
    assert set(where["versions"]) >= {"python", "torch", "torchrec", "cki-rec"}
    assert where["peak_memory_mb"] > 1
    assert sorted(path.name for path in run.path.iterdir()) == ["record.json"]


def fingerprint(folder: Path, config, data, result) -> str:
    run = Run(folder)
    folder.mkdir(parents=True)
    run.finish(config, data, result)
    return run.record["fingerprint"]


def test_fingerprint_covers_config_data_and_result_only(tmp_path, monkeypatch):
    first = fingerprint(tmp_path / "a", *ARGUMENTS)
    monkeypatch.setattr(record, "provenance", lambda seconds: {"commit": "other"})
    turned = [dict(reversed(part.items())) for part in ARGUMENTS]
    assert fingerprint(tmp_path / "b", *turned) == first
    others = [
        fingerprint(tmp_path / str(i), *[{**p, "x": 1} if i == j else p for j, p in parts])
        for i, parts in enumerate([list(enumerate(ARGUMENTS))] * 3)
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_refused_before_writing(tmp_path, value):
    with open_run(tmp_path, "train-1") as run:
        with pytest.raises(ValueError, match="JSON"):
            run.finish({}, {}, {"auc": value})
        assert list(run.path.iterdir()) == []


def test_finish_replaces_at_once(tmp_path, monkeypatch):
    """Whoever looks while the record is written finds none, never a part of one."""
    run = Run(tmp_path)
    seen = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda s, t: (seen.append((run.record, s.read_bytes())), replace(s, t))
    )
    run.finish(*ARGUMENTS)
    ((before, whole),) = seen
    assert before is None
    assert json.loads(whole) == run.record


def test_write_leaves_nothing_behind_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"old")

    def fail(self, data):
        Path.open(self, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_arrays_come_back(tmp_path):
    arrays = {"a/b": np.arange(3), "c": np.zeros((2, 2))}
    save_arrays(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as loaded:
        assert {name: loaded[name].tolist() for name in loaded.files} == {
            name: array.tolist() for name, array in arrays.items()
        }
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_objects_are_not_pickled(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        save_arrays(tmp_path / "x.npz", {"a": np.array([{}], dtype=object)})
    assert list(tmp_path.iterdir()) == []


CHILD = """
import os, signal, sys, time
from pathlib import Path
from cki_rec.engine.record import open_run
out, reached = map(Path, sys.argv[1:])
with open_run(out, "train-1") as run:
    reached.touch()
    time.sleep(0.7)
    run.finish({}, {}, {"by": "child"})
with open_run(out, "train-2"):
    reached.with_name("again").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_a_second_process_waits_and_a_killed_one_gives_the_lock_back(tmp_path):
    reached, out = tmp_path / "reached", tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", CHILD, out, reached])
    while not reached.exists():
        assert child.poll() is None
        time.sleep(0.01)
    with open_run(out, "other-1"):
        assert child.poll() is None  # another run does not wait
    with open_run(out, "train-1") as run:
        assert run.record["result"] == {"by": "child"}
    assert child.wait(timeout=30) == -signal.SIGKILL
    assert (tmp_path / "again").exists()
    with open_run(out, "train-2") as run:
        assert run.record is None


def test_commit_is_null_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record._commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert record._commit() == {"commit": None, "dirty": None}


def test_hardware_in_words():
    assert f"{os.cpu_count()} cores" in record.hardware()
