"""Jobs of a sweep: short lines, every mistake once, killed processes named; closed pipes."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from cki_rec import cli, processes, sweep_jobs
from cki_rec.config import UserError
from cki_rec.engine.sweeps import list_of, sweep_runs


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("CKI_REC_COMMAND", "cki-rec train")
    monkeypatch.setenv(cli.SWEEP_VARIABLE, "0 0")
    ours = logging.getLogger("cki_rec")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    level = ours.level
    yield
    ours.setLevel(level)


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Function (run, *words) -> exit code, standard output, standard error of a sweep."""

    def start(run, *words):
        monkeypatch.setattr("cki_rec.pipelines.train.run", run)
        folders = [f"runtime.{name}={tmp_path}" for name in ("out", "encoded", "reports")]
        code = cli.main(["train", "-m", "name=n", *folders, *words])
        return (code, *capsys.readouterr())

    return start


def test_lines_of_a_sweep_name_the_swept_options_alone(sweep):
    words = ("seed=1,2", "model.hidden=[8]", "merge=ties", "merge.options.density=0.1,0.2")
    code, out, _ = sweep(lambda config: None, *words)
    assert code == 0
    lines = [line.partition("] ")[2] for line in out.splitlines()]
    assert lines[0] == "seed=1 merge.options.density=0.1"
    assert len(lines) == 4


def test_one_mistake_of_several_jobs_is_printed_once(sweep, tmp_path, capsys):
    def run(config):
        if config.seed != 2:
            raise UserError("the raw file is gone")

    code, out, error = sweep(run, "seed=1,2,3")
    assert code == 2
    assert out.count("the raw file is gone") == 1
    assert out.count("failed: the same mistake") == 1
    assert error == "cki-rec: 2 of 3 jobs failed: the raw file is gone\n"
    assert cli.main(["report", "name=n", f"runtime.out={tmp_path}"]) == 2
    assert "name=n: 2 of 2 jobs failed: the raw file is gone" in capsys.readouterr().err
    assert sweep(lambda config: None, "seed=1,2,3")[0] == 0  # the failures of before are gone


def test_a_sweep_whose_jobs_all_fail_leaves_none_missing(tmp_path, monkeypatch):
    def run(config):
        raise UserError("a mistake")

    monkeypatch.setattr("cki_rec.pipelines.evaluate.run", run)
    assert cli.main(["evaluate", "-m", "name=n", f"runtime.out={tmp_path}", "seed=1,2"]) == 2
    assert list_of(tmp_path, "n").exists()
    assert sweep_runs(tmp_path, "n") == ([], 0)


def test_a_killed_process_of_a_sweep_is_named_with_its_job(sweep, monkeypatch):
    monkeypatch.setattr(sweep_jobs, "unfinished", lambda *_: ["seed=2"])

    def run(config):
        raise BrokenProcessPool("The exit codes of the workers are {SIGKILL(-9)}")

    code, _, error = sweep(run, "seed=1,2")
    assert code == 1
    (line,) = [line for line in error.splitlines() if line.startswith("cki-rec: ")]
    assert "the process of job seed=2 was ended by the system (SIGKILL; too little" in line
    assert "hydra.launcher.n_jobs=1" in line


def test_the_mark_of_a_job_stays_only_if_its_process_is_killed(tmp_path):
    folder = tmp_path / "n"
    with sweep_jobs.running(folder, "1", 3, "seed=4"):
        assert sweep_jobs.unfinished(folder, "2") == []
        assert sweep_jobs.unfinished(folder, "1") == ["seed=4"]
    assert sweep_jobs.unfinished(folder, "1") == []


@pytest.mark.slow
def test_two_sweeps_of_a_name_at_once_keep_their_own_failures(sweep, tmp_path):
    def run(config):
        if config.seed == 1:  # another sweep of this name starts and fails meanwhile
            folder = sweep_jobs.folder_of(config)
            sweep_jobs.begin(folder, "other")
            sweep_jobs.add_failure(folder, "other", "seed=9", "the other mistake")
        if config.seed == 0:
            raise UserError("the raw file is gone")

    code, _, error = sweep(run, "seed=0,1")
    assert code == 2
    assert error == "cki-rec: 1 of 2 jobs failed: the raw file is gone\n"
    assert sweep(run, "seed=1,2")[0] == 0


def test_a_sweep_over_names_ends_with_all_its_failures(sweep):
    def run(config):
        if config.name == "b":
            raise UserError("the raw file is gone")

    code, _, error = sweep(run, "name=a,b")
    assert code == 2
    assert error == "cki-rec: 1 of 2 jobs failed: the raw file is gone\n"


@pytest.mark.slow
def test_sigkill_of_a_joblib_worker(tmp_path):
    """A real worker is killed while it trains: one line names the jobs, exit code 1."""
    folders = [f"runtime.{name}={tmp_path / name}" for name in ("out", "encoded", "reports")]
    words = ["train", "-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "cki_rec", *words, "train.epochs=1000", *folders]
    sweep = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert next(line for line in sweep.stdout if "train deepfm" in line)
    workers = [pid for pid in children_of(sweep.pid) if "LokyProcess" in command_of(pid)]
    os.kill(workers[0], signal.SIGKILL)
    _, error = sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    (line,) = [line for line in error.splitlines() if line.startswith("cki-rec: ")]
    assert "seed=" in line
    assert "Traceback" not in error


def children_of(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def command_of(pid):
    return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_into_a_closed_pipe_is_quiet(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cki_rec", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_list_of_methods_into_a_closed_pipe_is_quiet(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("cki_rec.pipelines.method_list.method_table", lambda **_: "a table")
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["merge", "--list"]) == 141
    assert capsys.readouterr().err == ""


def test_a_run_whose_reader_has_left_ends_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)

    def run(config):
        logging.getLogger("cki_rec").info("a line")
        pytest.fail("it went on")

    monkeypatch.setattr("cki_rec.pipelines.train.run", run)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["train"]) == 141
    assert capsys.readouterr().err == ""


def test_a_mistake_of_all_processes_is_printed_by_the_first(monkeypatch, capsys):
    events = []
    monkeypatch.setattr(processes.time, "sleep", events.append)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: events.append("signal"))
    assert cli.main(["trian"]) == 2
    assert events == []
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["trian"]) == 2
    assert events == ["signal", processes.SECONDS_FOR_FIRST]  # torchrun ends it meanwhile
    cli.start_log()
    logging.getLogger("cki_rec").warning("a warning that the first process prints")
    assert "a warning" not in capsys.readouterr().out
