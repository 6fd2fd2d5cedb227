"""Bytes do not depend on chunks, threads, hash seeds or interruptions, nor memory on rows."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from samples import ROOT, make_data, slow_but

from cki_rec.config import Data, Partition, Split
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.raw.reading import Reading

TESTS = ROOT / "tests"
CRITEO_FIELDS = [
    {"name": "I1", "transform": "quantile"},
    {"name": "I2", "transform": "log1p"},
    {"name": "I3", "transform": "as_is"},
    *(f"I{i}" for i in range(4, 14)),
    "C1",
    {"name": "C2", "table": "shared"},
    {"name": "C3", "hash_size": 1000},
    {"name": "C4", "min_count": 3},
    {"name": "C5", "table": "shared"},
    *(f"C{i}" for i in range(6, 27)),
]
MOVIELENS_FIELDS = ["genres", {"name": "user", "hash_size": 500}, "item", "hour", "history"]


def criteo(raw: Path, rows: int = 40_000) -> Data:
    data = make_data("synthetic_criteo", raw=str(raw), fields=CRITEO_FIELDS, numeric_missing=None)
    synthetic = replace(data.synthetic, rows=rows, vocabulary=0.0005)
    return replace(data, synthetic=synthetic, partition=Partition(by="random", parts=3, seed=1))


def movielens(raw: Path, rows: int = 40_000) -> Data:
    split = Split(by="leave_last_out", fractions=[], seed=0)
    data = make_data("synthetic_movielens", raw=str(raw), fields=MOVIELENS_FIELDS, split=split)
    synthetic = replace(data.synthetic, rows=rows, vocabulary=0.2)
    partition = Partition(by="user", parts=2, seed=1)
    return replace(data, synthetic=synthetic, partition=partition, history_length=7, min_count=2)


CHOICES = {"criteo": criteo, "movielens": movielens}
CHILD = f"""
import sys
sys.path[:0] = [{str(TESTS / "unit")!r}, {str(TESTS)!r}]
import pathlib
import test_streaming
from cki_rec.data.encoding.store import prepare
def make(choice, encoded, **options):
    return prepare(test_streaming.CHOICES[choice](pathlib.Path(RAW), ROWS), encoded, **options)
"""


def start_child(code: str, raw: Path, rows: int = 40_000, **environment: str) -> subprocess.Popen:
    """Start another process in which ``make`` prepares one of the data sets."""
    text = CHILD.replace("RAW", repr(str(raw))).replace("ROWS", str(rows)) + code
    return subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, env={**os.environ, **environment}
    )


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file but those that say how the preparation went."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != store.PREPARATION and path.suffix != ".lock"
    }


def only_folder(encoded: Path, name: str) -> Path:
    (folder,) = [p for p in encoded.iterdir() if p.is_dir() and p.name.startswith(name)]
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def in_one_chunk(raw, tmp_path_factory) -> dict[str, dict[str, str]]:
    """Choice -> digests of what one chunk gives."""
    encoded = tmp_path_factory.mktemp("one_chunk")
    return {name: digests(prepare(CHOICES[name](raw), encoded, 64).folder) for name in CHOICES}


@pytest.fixture
def small_blocks(monkeypatch):
    """Function (bytes): let readers read so much text at a time."""

    def make(block_bytes: int) -> list[int]:
        sizes: list[int] = []

        def reading(on_bad_row: str, _: int, **others) -> Reading:
            sizes.append(block_bytes)
            return Reading(on_bad_row, block_bytes, **others)

        monkeypatch.setattr(store, "Reading", reading)
        return sizes

    return make


def test_data_set_has_the_tested_features(in_one_chunk):
    files = {name: set(result) for name, result in in_one_chunk.items()}
    assert {"manifest.json", "ids.npy", "numbers.npy", "vocabulary.shared.txt"} <= files["criteo"]
    assert {"parts-random-3-1/counts.C3.npy", "parts-none/order.npy"} <= files["criteo"]
    assert "vocabulary.C3.txt" not in files["criteo"]
    assert {"field.history.values.npy", "field.genres.starts.npy"} <= files["movielens"]
    assert not [name for result in files.values() for name in result if "tmp" in name]


@pytest.mark.parametrize("choice", CHOICES)
def test_one_megabyte_at_a_time_gives_the_same_bytes(choice, raw, in_one_chunk, tmp_path):
    dataset = prepare(CHOICES[choice](raw), tmp_path, chunk_mb=1)
    if choice == "criteo":
        assert dataset.manifest["source"][0]["size"] > 3 << 20  # so there were several chunks
    assert digests(dataset.folder) == in_one_chunk[choice]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("block_bytes", [pytest.param(70_001, marks=pytest.mark.slow), 400_000])
def test_small_chunks_give_the_same_bytes(
    choice, block_bytes, raw, in_one_chunk, small_blocks, tmp_path
):
    sizes = small_blocks(block_bytes)
    assert digests(prepare(CHOICES[choice](raw), tmp_path).folder) == in_one_chunk[choice]
    assert sizes == [block_bytes]


@pytest.mark.parametrize("choice", slow_but(["movielens"], CHOICES))
def test_chunks_smaller_than_a_line_give_the_same_bytes(choice, small_blocks, tmp_path):
    data = CHOICES[choice](tmp_path / "raw", 500)
    want = digests(prepare(data, tmp_path / "whole").folder)
    for block_bytes in (13, 1000):
        small_blocks(block_bytes)
        result = digests(prepare(data, tmp_path / f"encoded{block_bytes}").folder)
        assert result == want


@pytest.mark.slow
@pytest.mark.dist
def test_threads_and_hash_seeds_give_the_same_bytes(raw, in_one_chunk, tmp_path):
    children = [
        start_child(
            f"for choice in test_streaming.CHOICES: make(choice, {str(tmp_path / threads)!r})",
            raw,
            POLARS_MAX_THREADS=threads,
            PYTHONHASHSEED=threads,
        )
        for threads in ("1", "4")
    ]
    for child, threads in zip(children, ("1", "4"), strict=True):
        assert child.wait(timeout=120) == 0
        for name, want in in_one_chunk.items():
            result = digests(only_folder(tmp_path / threads, f"synthetic_{name}"))
            assert result == want, (threads, name)


KILLED_AT = {
    "text": ("from cki_rec.data import columns", "columns.ColumnFile.append", 6),
    "ids": ("from cki_rec.data import columns", "columns.ColumnFile.write", 2),
    "parts": ("import numpy", "numpy.save", 3),
}


@pytest.mark.slow
@pytest.mark.dist
def test_killed_preparation_gives_the_same_bytes_when_started_again(raw, in_one_chunk, tmp_path):
    children = {}
    for stage, (imported, function, calls) in KILLED_AT.items():
        code = f"""
import os, signal
{imported}
before, calls = {function}, [0]
def dies(*args, **options):
    calls[0] += 1
    if calls[0] == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **options)
{function} = dies
make("criteo", {str(tmp_path / stage)!r}, chunk_mb=1)
"""
        children[stage] = start_child(code, raw)
    for stage, child in children.items():
        encoded = tmp_path / stage
        assert child.wait(timeout=120) == -signal.SIGKILL
        left = only_folder(encoded, "synthetic_criteo")
        assert bool(re.search(r"\.tmp-\d+$", left.name)) == (stage != "parts"), stage
        assert list(left.iterdir())
        result = prepare(criteo(raw), encoded)
        assert digests(result.folder) == in_one_chunk["criteo"], stage
        assert only_folder(encoded, "synthetic_criteo") == result.folder


def peak_of(child: subprocess.Popen) -> int:
    """Wait for a process; return the most anonymous memory that it was seen to hold, in MB."""
    peak = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        result = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(result.group(1)) // 1024 if result else 0)
        time.sleep(0.005)
    assert child.wait(timeout=10) == 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_ten_times_the_rows_need_no_more_memory(choice, tmp_path):
    peaks = []
    for rows in (300_000, 3_000_000):
        raw, encoded = tmp_path / "raw", str(tmp_path / "encoded")
        FORMATS["synthetic"].files(CHOICES[choice](raw, rows))  # writes them
        peaks.append(peak_of(start_child(f"make({choice!r}, {encoded!r}, chunk_mb=4)", raw, rows)))
        shutil.rmtree(raw)
        shutil.rmtree(encoded)
    assert peaks[0] > 50  # it was seen
    assert peaks[1] < peaks[0] + 150  # a chunk is held in both; ids of all rows would add 300
