"""Worker processes and Ray: the same bytes, the same first error, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from samples import ROOT, make_data, one_line_error
from test_streaming import CHOICES, criteo, digests

from cki_rec.config import Split, UserError
from cki_rec.data.encoding import engines, store
from cki_rec.data.encoding.engines import in_order, processes, threads
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.reading import Reading

PID = "__import__('os').getpid()"


@pytest.fixture
def small_blocks(monkeypatch):
    """Let readers read little text at a time, so that there are many chunks."""

    def reading(on_bad_row: str, _: int, **others) -> Reading:
        return Reading(on_bad_row, 30_000, **others)

    monkeypatch.setattr(store, "Reading", reading)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_end(pids: list[int]) -> None:
    for _ in range(200):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.05)
    pytest.fail(f"still running: {pids}")


def quoted_csv(path: Path, num_rows: int = 2000) -> Path:
    """Write a csv with quotes, newlines in quotes and some bad rows."""
    rows = [
        f'{n % 3 == 0:d},u{n % 50},"item ""{n % 20}""\nof {n % 4}",{n}.5' for n in range(num_rows)
    ]
    for bad in (700, 1300):
        rows[bad] = f"yes,u1,x,{bad}"
    path.write_text("\n".join(["click,user,item,price", *rows, ""]))
    return path


def csv_of(path: Path, **changes):
    split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
    fields = ["user", "item", {"name": "price", "kind": "numeric", "transform": "quantile"}]
    options = {"label": "click", "fields": fields, "split": split, **changes}
    return make_data("csv", raw=str(path), **options)


def test_results_come_in_order_and_errors_in_their_place():
    def fails(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        if number == 7:
            raise UserError("seven")
        return number

    def tasks():
        yield from range(9)
        raise ValueError("the source")

    with threads(4) as run:
        taken = run(fails, tasks())
        assert [next(taken) for _ in range(7)] == list(range(7))
        with pytest.raises(UserError, match="seven"):
            next(taken)
    with pytest.raises(ValueError, match="the source"):
        list(in_order(lambda task: lambda: task, tasks(), 4))


@pytest.mark.dist
def test_two_processes_give_the_same_bytes_and_the_same_error(tmp_path, small_blocks):
    path = quoted_csv(tmp_path / "a.csv")
    want = prepare(csv_of(path, on_bad_row="skip"), tmp_path / "one")
    result = prepare(csv_of(path, on_bad_row="skip"), tmp_path / "two", workers=2)
    assert digests(result.folder) == digests(want.folder)
    assert result.manifest["skipped"]["not a number"]["count"] == 2
    alone = one_line_error(prepare, csv_of(path), tmp_path / "bad")
    assert "a.csv, line 1402: not a number" in alone
    assert one_line_error(prepare, csv_of(path), tmp_path / "bad", workers=2) == alone
    assert not [p for p in (tmp_path / "bad").iterdir() if p.is_dir()]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("choice", CHOICES)
def test_workers_give_the_same_bytes(choice, workers, tmp_path, small_blocks):
    data = CHOICES[choice](tmp_path / "raw", 10_000)
    want = digests(prepare(data, tmp_path / "one").folder)
    assert digests(prepare(data, tmp_path / "many", workers=workers).folder) == want


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("function", "task", "how"),
    [(os._exit, 3, "exit code 3"), (signal.raise_signal, signal.SIGKILL, "killed by signal 9")],
)
def test_a_lost_worker_is_one_line_and_ends_the_others(function, task, how):
    with processes(2) as run:
        pids = list(run(eval, [PID] * 8))
        assert os.getpid() not in pids
        message = one_line_error(list, run(function, [task]))
    assert f"a worker process of the encoding ended ({how})" in message
    assert "fewer runtime.workers" in message
    wait_for_end(pids)


@pytest.mark.slow
@pytest.mark.dist
def test_workers_that_do_not_start_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "WORKER", [sys.executable, "-c", "import sys; sys.exit(5)"])
    message = one_line_error(prepare, criteo(tmp_path / "raw", 500), tmp_path / "out", workers=2)
    assert "ended (exit code 5)" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


@pytest.mark.slow
@pytest.mark.dist
def test_workers_end_with_a_killed_parent():
    code = f"""
import sys, time
from cki_rec.data.encoding.engines import processes
with processes(2) as run:
    print(*run(eval, [{PID!r}] * 8), flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(word) for word in child.stdout.readline().split()]
    assert all(map(is_running, pids))
    child.kill()
    child.wait()
    child.stdout.close()
    wait_for_end(pids)


@pytest.mark.slow
@pytest.mark.dist
def test_an_interrupt_leaves_nothing(tmp_path):
    words = [f"data.raw={tmp_path / 'raw'}", "data.synthetic.rows=300000", "runtime.workers=2"]
    words += ["data=synthetic_criteo", "runtime.chunk_mb=1", f"runtime.encoded={tmp_path / 'out'}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "cki_rec", "prepare", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ids = []
    for _ in range(1200):
        folders = [p for p in (tmp_path / "out").glob("*.tmp-*") if (p / "ids.npy").exists()]
        if folders and (folders[0] / "ids.npy").stat().st_size > 1_000_000:
            break
        time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(child.pid):
                ids.append(int(path.name))
        except OSError:
            continue
    assert len(ids) >= 2
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in output
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    wait_for_end(ids)


def test_ray_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    data = replace(criteo(tmp_path / "raw", 500))
    message = one_line_error(prepare, data, tmp_path / "out", engine="ray")
    assert message.startswith("runtime.engine=ray: ray is not installed; ")
    assert "pip install 'cki-rec[ray]'" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_of_two_gives_the_same_bytes(tmp_path, small_blocks):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'cki-rec[ray]'")
    path = quoted_csv(tmp_path / "a.csv")
    for name, data in {
        "csv": csv_of(path, on_bad_row="skip"),
        "movielens": CHOICES["movielens"](tmp_path / "raw", 5000),
    }.items():
        want = prepare(data, tmp_path / "one" / name)
        result = prepare(data, tmp_path / "ray" / name, workers=2, engine="ray")
        assert digests(result.folder) == digests(want.folder), name
    alone = one_line_error(prepare, csv_of(path), tmp_path / "bad")
    message = one_line_error(prepare, csv_of(path), tmp_path / "bad", workers=2, engine="ray")
    assert message == alone
