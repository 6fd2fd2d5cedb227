"""Lists of runs under a name: several sweeps, repeated jobs, single runs."""

import json
import os

import pytest
from test_record import finished

from cki_rec import COMMAND_VARIABLE, JOB_VARIABLE
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.sweeps import add_to_sweep, drop_sweep, list_of, start_sweep, sweep_runs


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv(COMMAND_VARIABLE, "cki-rec evaluate -m seed=1,2")
    monkeypatch.delenv(JOB_VARIABLE, raising=False)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Function (command, number of jobs) -> function (job, run or None) that lists a job."""

    def start(command, num_jobs):
        monkeypatch.setenv(COMMAND_VARIABLE, command)
        identity = start_sweep(tmp_path, "n", num_jobs)

        def job(number, run):
            monkeypatch.setenv(JOB_VARIABLE, f"{identity} {number}")
            add_to_sweep(tmp_path, "n", run)
            monkeypatch.delenv(JOB_VARIABLE)

        return job

    return start


def found(tmp_path):
    runs, num_missing = sweep_runs(tmp_path, "n")
    return [run.path.name for run in runs], num_missing


def test_sweep_lists_each_finished_run_once_in_order(tmp_path):
    runs = {name: finished(tmp_path, name) for name in ("e-2", "e-1", "e-3")}
    start_sweep(tmp_path, "n", 5)
    for name in ("e-2", "e-1", "e-2", "e-3"):
        add_to_sweep(tmp_path, "n", runs[name])
    with open_run(tmp_path, "e-4") as unfinished:
        add_to_sweep(tmp_path, "n", unfinished)
    add_to_sweep(tmp_path, "n", Run(tmp_path / "e-deleted"))
    actual, num_missing = sweep_runs(tmp_path, "n")
    assert [run.path.name for run in actual] == ["e-2", "e-1", "e-3"]
    assert num_missing == 2
    add_to_sweep(tmp_path, "n", None)  # a job that has nothing to do is not missing
    with (tmp_path / "sweeps" / "n" / "members.jsonl").open("a") as file:
        file.write('{"run_id": "e-')  # a process was killed here
    assert sweep_runs(tmp_path, "n")[1] == 1


def test_single_runs_alone_miss_nothing(tmp_path):
    run = finished(tmp_path, "e-1")
    add_to_sweep(tmp_path, "n", run)
    add_to_sweep(tmp_path, "n", run)
    assert found(tmp_path) == (["e-1"], 0)
    assert sweep_runs(tmp_path, "other") == ([], 0)


def test_a_second_sweep_of_a_name_adds_to_the_first(tmp_path, sweep):
    add_to_sweep(tmp_path, "n", finished(tmp_path, "single"))
    for command, name in (("merge=average", "e-1"), ("merge=slerp", "e-2")):
        sweep(command, 1)(0, finished(tmp_path, name))
    assert found(tmp_path) == (["single", "e-1", "e-2"], 0)
    sweep("merge=ties", 2)
    assert found(tmp_path) == (["single", "e-1", "e-2"], 2)


def test_a_sweep_that_a_mistake_has_failed_is_not_missing(tmp_path, sweep, monkeypatch):
    sweep("merge=average", 1)(0, finished(tmp_path, "e-1"))
    monkeypatch.setenv(COMMAND_VARIABLE, "evaluate.bootstrap=50")
    failed = start_sweep(tmp_path, "n", 2)
    assert found(tmp_path) == (["e-1"], 2)
    drop_sweep(tmp_path, "n", failed)
    assert found(tmp_path) == (["e-1"], 0)


def test_the_same_command_begins_its_sweep_anew(tmp_path, sweep):
    """After a change of the data or of the release its runs have other names."""
    sweep("merge=slerp", 1)(0, finished(tmp_path, "e-other"))
    sweep("merge=average", 1)(0, finished(tmp_path, "e-old"))
    job = sweep("merge=average", 1)
    assert found(tmp_path) == (["e-other"], 1)
    job(0, finished(tmp_path, "e-new"))
    assert found(tmp_path) == (["e-other", "e-new"], 0)


def test_two_sweeps_of_a_name_started_together_are_both_listed(tmp_path, sweep):
    one, two = sweep("merge=average", 2), sweep("merge=slerp", 2)
    for number in (0, 1):
        one(number, finished(tmp_path, f"a-{number}"))
        two(number, finished(tmp_path, f"s-{number}"))
    assert found(tmp_path) == (["a-0", "s-0", "a-1", "s-1"], 0)


def test_jobs_with_one_result_are_all_counted(tmp_path, sweep):
    """``-m seed=1,1``, or a sweep over an option that changes no result."""
    job, run = sweep("seed=1,1", 2), finished(tmp_path, "e-1")
    job(0, run)
    assert found(tmp_path) == (["e-1"], 1)
    job(0, run)  # one job twice is one
    assert found(tmp_path) == (["e-1"], 1)
    job(1, run)
    assert found(tmp_path) == (["e-1"], 0)


def test_a_single_run_is_no_job_of_an_earlier_sweep_if_it_was_done_there(tmp_path, sweep):
    job, run = sweep("seed=1,2,3", 3), finished(tmp_path, "e-1")
    job(0, run)
    add_to_sweep(tmp_path, "n", run)
    job(1, None)
    assert found(tmp_path) == (["e-1"], 1)
    add_to_sweep(tmp_path, "n", finished(tmp_path, "e-3"))  # the job that failed, by itself
    assert found(tmp_path) == (["e-1", "e-3"], 0)


def test_lists_of_earlier_releases_are_read(tmp_path):
    runs = [finished(tmp_path, name) for name in ("e-1", "e-2")]
    lines = [{"jobs": 3}, *({"run_id": run.path.name} for run in runs)]
    path = list_of(tmp_path, "n")
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert found(tmp_path) == (["e-1", "e-2"], 1)
    assert JOB_VARIABLE not in os.environ
