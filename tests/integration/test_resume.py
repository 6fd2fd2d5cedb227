"""Trainings that are killed, stopped or damaged, and end like an unbroken one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.config import Config, Stopped, parse, with_delta
from cki_rec.engine.record import Run
from cki_rec.engine.resume import RESUME, Checkpointer, unfinished_checkpoints
from cki_rec.engine.steps import EVENTS, STEPS, StepLog
from cki_rec.pipelines import finetune, train

SMALL = (
    *("train.epochs=3", "train.patience=3", "train.batch_size=128", "train.learning_rate=0.01"),
    *("model.hidden=[8]", "model.embedding_dim=8", "model.dropout=0.3", "runtime.threads=1"),
    *("runtime.checkpoint_steps=4", "runtime.log_steps=1", "runtime.tensorboard=false"),
)
"""19 steps an epoch."""
DIN = ["model=din", "model.attention.dropout=0.2", "data.history_length=5"]
EPOCHS = 8
LONG = (f"train.epochs={EPOCHS}", f"train.patience={EPOCHS}", "train.batch_size=64")
"""The same for whom to kill: 304 steps."""


class Killed(BaseException):
    """Simulates the end of a process; no code catches it."""


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture
def words(raw_zip, folder_of_all, tmp_path):
    """Function (*more) -> the words of a training that writes to a folder of this test."""
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports")]
    shared = [f"data.raw={raw_zip}", f"runtime.encoded={folder_of_all / 'encoded'}"]
    return lambda *more: [*shared, *places, *SMALL, *more]


@pytest.fixture(scope="module")
def composed(raw_zip, folder_of_all, compose):
    """Function (*more) -> Config of a training that nothing interrupts, composed once."""
    places = [f"runtime.{key}={folder_of_all / key}" for key in ("out", "reports", "encoded")]
    return lru_cache(lambda *more: parse(compose(f"data.raw={raw_zip}", *places, *SMALL, *more)))


@pytest.fixture
def configured(composed, tmp_path):
    """Function (*more) -> the same Config with the folders of this test."""
    places = {f"runtime.{key}": str(tmp_path / key) for key in ("out", "reports")}
    return lambda *more: with_delta(composed(*more), places)


@pytest.fixture
def unbroken(composed):
    """Function (*more, pipeline=train) -> the run of a training that nothing interrupts."""
    return lambda *more, pipeline=train: pipeline.ensure(
        composed(*more, "runtime.checkpoint_steps=0")
    )


def kill_at(config: Config, step: int, pipeline=train) -> Path:
    """Run until a step is done and logged; return the folder of the unfinished run."""
    write, name = StepLog.step, pipeline.__name__.rpartition(".")[2]

    def end(log, number, *rest):
        write(log, number, *rest)
        if number == step and log._folder.name.startswith(name):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "step", end)
        with pytest.raises(Killed):
            pipeline.ensure(config)
    return unfinished(Path(config.runtime.out), name)


def unfinished(out: Path, pipeline: str = "train") -> Path:
    (folder,) = (path for path in out.glob(f"{pipeline}-*") if Run(path).record is None)
    return folder


def steps_kept(folder: Path) -> list[int]:
    paths = unfinished_checkpoints(folder / RESUME)
    return [int(path.name.removeprefix("step-")) for path in paths]


def lines_of(folder: Path) -> list[dict]:
    """Return the log without speeds."""
    lines = [json.loads(line) for line in (folder / STEPS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "rows_per_second"} for line in lines]


def check_equal(run: Run, unbroken: Run, resumed: int | None) -> None:
    """Check that two runs are one but for how they came about."""
    one, other = run.record, unbroken.record
    for key in ("run_id", "config", "data", "result", "fingerprint"):
        assert one[key] == other[key], key
    assert one["provenance"]["resumed_at_step"] == resumed
    assert other["provenance"]["resumed_at_step"] is None
    mine, theirs = (checkpoint.load(each.checkpoint) for each in (run, unbroken))
    for group in ("params", "accumulators", "counts"):
        actual, want = getattr(mine, group), getattr(theirs, group)
        assert actual.keys() == want.keys()
        assert all(tensor.equal(want[name]) for name, tensor in actual.items()), group
    assert not (run.path / RESUME).exists()
    assert not list(run.path.rglob("*.tmp*"))
    assert lines_of(run.path) == lines_of(unbroken.path)


@pytest.mark.parametrize(
    ("more", "step"),
    [
        pytest.param([], 5, marks=pytest.mark.slow),
        ([], 19),
        pytest.param([], 21, marks=pytest.mark.slow),
        (["train.embeddings=dense", "train.gradient_clip=0.5", "train.table_l2=1e-3"], 30),
        (["train.ema=0.9"], 27),
        pytest.param(["train.ema=0.9", "train.embeddings=dense"], 41, marks=pytest.mark.slow),
        (["train.table_optimizer=adagrad", "model.batch_norm=true"], 33),
        (["train.plateau_factor=0.5", "train.min_gain=0.5"], 45),
        pytest.param(DIN, 25, marks=pytest.mark.slow),
        (["train.precision=bf16", "model.histories=true"], 14),
    ],
)
def test_a_killed_training_ends_like_an_unbroken_one(configured, more, step, unbroken):
    want = unbroken(*more)
    config = configured(*more)
    folder = kill_at(config, step)
    last = (step - 1) // 4 * 4  # that of the step itself is not written any more
    assert steps_kept(folder) == [s for s in (last - 4, last) if s > 0]
    run = train.ensure(config)
    assert run.path == folder
    check_equal(run, want, last or None)


@pytest.mark.slow
def test_killed_again_and_again_with_other_intervals(configured, unbroken):
    for step, every in ((6, 4), (22, 3), (40, 5)):
        kill_at(configured(f"runtime.checkpoint_steps={every}"), step)
    check_equal(train.ensure(configured()), unbroken(), 35)


def test_the_legs_of_a_training_are_listed_and_their_seconds_summed(configured):
    """As after a training that was killed on two processes and ended on one."""
    config = configured()
    folder = kill_at(config, 10)
    path = folder / RESUME / "step-0000000008" / "checkpoint.json"
    saved = json.loads(path.read_text())
    (leg,) = saved["position"]["legs"]
    assert leg["seconds"] > 0
    leg |= {"world_size": 2, "seconds": 1000.0}
    path.write_text(json.dumps(saved))
    facts = train.ensure(config).record["provenance"]
    assert facts["world_size"] == 1
    first, last = facts["legs"]
    assert first == {"world_size": 2, "first_step": 1, "last_step": 8, "seconds": 1000.0}
    assert (last["world_size"], last["first_step"]) == (1, 9)
    assert facts["seconds"]["train"] == pytest.approx(1000 + last["seconds"], abs=0.5)


@pytest.mark.parametrize("kernels", ["torch", "fbgemm"])
def test_resuming_under_another_plan_changes_rounding_only(configured, unbroken, kernels):
    for step, plan in ((6, "table_wise"), (22, "row_wise"), (40, "planner")):
        kill_at(configured(f"runtime.sharding={plan}", f"runtime.kernels={kernels}"), step)
    run, want = train.ensure(configured()), unbroken()
    assert run.record["provenance"]["resumed_at_step"] == 36
    params = checkpoint.load(want.checkpoint).params
    for name, tensor in checkpoint.load(run.checkpoint).params.items():
        torch.testing.assert_close(tensor, params[name], rtol=1e-3, atol=1e-4)


def test_checkpoints_along_the_way_change_nothing(configured, unbroken):
    run = train.ensure(configured())
    check_equal(run, unbroken(), None)
    assert train.ensure(configured()).record == run.record  # finished: not run again


def test_without_checkpoints_a_killed_training_starts_again(configured, unbroken):
    want = unbroken()
    config = configured("runtime.checkpoint_steps=0")
    with pytest.raises(ValueError, match="not enough"):
        kill_at(config, 30)  # the folder is gone: there is nothing to go on from
    check_equal(train.ensure(config), want, None)


def test_minutes_between_checkpoints(configured):
    often = configured("runtime.checkpoint_steps=0", "runtime.checkpoint_minutes=1e-9")
    assert steps_kept(kill_at(often, 9)) == [7, 8]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(configured, keep):
    folder = kill_at(configured(f"runtime.keep={keep}"), 23)
    assert steps_kept(folder) == [12, 16, 20][-keep:]


def test_never_resume_starts_afresh(configured, unbroken):
    want = unbroken()
    folder = kill_at(configured(), 30)
    (folder / "left").touch()
    run = train.ensure(configured("runtime.resume=never"))
    assert not (folder / "left").exists()
    check_equal(run, want, None)


@pytest.mark.slow
def test_force_starts_afresh(configured, unbroken):
    folder = kill_at(configured(), 30)
    run = train.ensure(configured(), force=True)
    assert run.path == folder
    check_equal(run, unbroken(), None)


def flip(folder: Path) -> None:
    (path,) = (folder / checkpoint.TENSORS).glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tear(folder: Path) -> None:
    path = folder / checkpoint.DESCRIPTION
    path.write_text(path.read_text()[:100])


def empty(folder: Path) -> None:
    shutil.rmtree(folder / checkpoint.TENSORS)


@pytest.mark.parametrize("harm", [flip, tear, empty])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(configured, harm, unbroken):
    want = unbroken()
    folder = kill_at(configured(), 30)
    harm(unfinished_checkpoints(folder / RESUME)[-1])
    check_equal(train.ensure(configured()), want, 24)


def test_all_checkpoints_damaged_is_a_start(configured, unbroken):
    want = unbroken()
    folder = kill_at(configured(), 30)
    for path in unfinished_checkpoints(folder / RESUME):
        flip(path)
    check_equal(train.ensure(configured()), want, None)


def test_damaged_checkpoints_do_not_push_whole_ones_out(configured):
    """Resumed before step 28, whose checkpoint is damaged, the next one is at step 25."""
    folder = kill_at(configured("runtime.keep=2"), 30)
    flip(folder / RESUME / "step-0000000028")
    kill_at(configured("runtime.keep=1", "runtime.checkpoint_steps=25"), 26)
    assert steps_kept(folder) == [25]


def test_a_torn_line_and_lines_after_the_checkpoint_are_dropped(configured, unbroken):
    want = unbroken()
    config = configured()
    folder = kill_at(config, 30)
    assert lines_of(folder)[-1]["step"] == 30
    with (folder / STEPS).open("a") as file:
        file.write('{"step": 31, "train_lo')
    check_equal(train.ensure(config), want, 28)
    steps = [x["step"] for x in lines_of(folder) if "epoch" not in x]
    assert steps == list(range(1, 58))


def test_fine_tuning_resumes_too(configured, unbroken):
    more = ("suite=shards", "merge=average", "finetune=one_epoch", "train.epochs=1")
    want, config = unbroken(*more, pipeline=finetune), configured(*more)
    kill_at(config, 10, finetune)
    check_equal(finetune.ensure(config), want, 8)


def test_a_training_that_goes_on_from_another_resumes_too(configured, unbroken):
    more = ("train.start={seed: 7, train.epochs: 1}", "train.ema=0.9")
    want, config = unbroken(*more), configured(*more)
    train.ensure(configured("seed=7", "train.epochs=1", "train.ema=0.9"))
    kill_at(config, 10)
    check_equal(train.ensure(config), want, 8)


@pytest.mark.slow
def test_a_chain_resumes_where_its_start_was_killed(configured, unbroken):
    more = ("train.start={seed: 7}",)
    want, config = unbroken(*more), configured(*more)
    kill_at(config, 10)
    check_equal(train.ensure(config), want, None)
    (start,) = (run for run in config_runs(config) if run.path != train.ensure(config).path)
    assert start.record["provenance"]["resumed_at_step"] == 8


def config_runs(config: Config) -> list[Run]:
    return [Run(path) for path in Path(config.runtime.out).glob("train-*")]


def test_a_wish_to_stop_within_this_process(configured, words, capsys, monkeypatch, unbroken):
    """Its handler is there while a model trains, and never else."""
    before = signal.getsignal(signal.SIGTERM)
    write = StepLog.step

    def ask(log, step, *rest):
        write(log, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "step", ask)
    assert main(["train", *words()]) == 0
    shown = capsys.readouterr()
    assert signal.getsignal(signal.SIGTERM) == before
    folder = unfinished(Path(configured().runtime.out))
    assert f"cki-rec: stopped by the system after step 6; the state is saved in {folder}" in (
        shown.err
    )
    assert shown.err.count("\n") == 1
    assert "model: " not in shown.out
    assert steps_kept(folder) == [4, 6]
    monkeypatch.undo()
    assert main(["train", *words()]) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    check_equal(Run(folder), unbroken(), 6)


def test_stopping_needs_a_folder():
    with Checkpointer.none() as checkpointer:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        checkpointer.save_if_due(None, None)  # looks at neither
    assert not issubclass(Stopped, Exception)  # a sweep must not go on after it


def test_events_for_tensorboard_continue(configured, unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured("runtime.tensorboard=true")
    folder = kill_at(config, 10)
    run = train.ensure(config)
    events = EventAccumulator(str(folder / EVENTS)).Reload()
    assert [e.step for e in events.Scalars("train_loss")] == list(range(1, 58))
    assert [e.step for e in events.Scalars("valid_auc")] == [19, 38, 57]
    losses = {x["step"]: x["train_loss"] for x in lines_of(run.path) if "epoch" not in x}
    actual = {e.step: e.value for e in events.Scalars("train_loss")}
    assert actual == pytest.approx(losses, abs=1e-6)
    assert not (unbroken().path / EVENTS).exists()


# processes


def start_and_wait(words: list[str], out: Path, num_lines: int) -> subprocess.Popen:
    """Start a training; return once its log has so many lines."""
    command = [sys.executable, "-m", "cki_rec", "train", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        actual = list(out.glob(f"train-*/{STEPS}"))
        if actual and len(actual[0].read_text().splitlines()) >= num_lines:
            break
        time.sleep(0.002)
    assert process.poll() is None, "the training ended before it could be killed"
    return process


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "five times at random"])
def test_a_killed_process_resumes(words, configured, unbroken, how):
    points = np.sort(np.random.default_rng(5).integers(20, 280, size=5)).tolist()
    num_lines = [50] if how == "once" else points
    want, config = unbroken(*LONG), configured(*LONG)
    out = Path(config.runtime.out)
    for number in num_lines:
        process = start_and_wait(words(*LONG, "runtime.checkpoint_steps=3"), out, number)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    last = steps_kept(unfinished(out))[-1]
    assert last >= num_lines[-1] - 3 - len(num_lines) * EPOCHS
    check_equal(train.ensure(config), want, last)


@pytest.mark.dist
@pytest.mark.slow  # the same within this process: test_a_wish_to_stop_within_this_process
def test_a_process_asked_to_stop_keeps_its_work(words, configured, unbroken):
    want = unbroken(*LONG)
    config = configured(*LONG, "runtime.checkpoint_steps=0")
    out = Path(config.runtime.out)
    process = start_and_wait(words(*LONG, "runtime.checkpoint_steps=0"), out, 40)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    folder = unfinished(out)
    (step,) = steps_kept(folder)
    assert step >= 38
    assert f"stopped by the system after step {step}; the state is saved in {folder}" in error
    assert "Traceback" not in error
    check_equal(train.ensure(config), want, step)
