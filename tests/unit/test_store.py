"""Encoded data sets on disk are reused, complete or absent, and refused if damaged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from samples import EMBEDDED, FIELDS, LATEST, ROOT
from samples import make_data as options

from cki_rec.config import Data, Partition, Split, UserError
from cki_rec.data.columns import ColumnFile, Ragged
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset, prepare
from cki_rec.data.encoding.summary import summary_lines
from cki_rec.data.raw import source
from cki_rec.data.test_labels import all_labels


def make_data(raw: Path = LATEST, **changes) -> Data:
    return options(**{"raw": str(raw), "fields": FIELDS, **changes})


def folders(encoded_dir: Path) -> list[str]:
    return sorted(path.name for path in encoded_dir.iterdir() if path.is_dir())


def error_of(data: Data, encoded_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare(data, encoded_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def dataset(tmp_path) -> EncodedDataset:
    return prepare(make_data(), tmp_path / "encoded")


def test_columns_are_memory_mapped(dataset):
    mapped = [all_labels(dataset), dataset.split, dataset.timestamp, dataset.group, dataset.ids]
    assert all(isinstance(column, np.memmap) for column in mapped)
    assert isinstance(dataset.column("item").base, np.memmap)
    assert isinstance(dataset.column("history").values, np.memmap)
    assert isinstance(dataset.rows("train").base, np.memmap)


def test_every_row_is_in_exactly_one_split(dataset):
    rows = np.concatenate([dataset.rows(split) for split in ("train", "valid", "test")])
    assert sorted(rows.tolist()) == list(range(20))
    assert [len(dataset.rows(split)) for split in ("train", "valid", "test")] == [12, 4, 4]


def test_manifest_states_source_counts_and_shares(dataset):
    manifest = dataset.manifest
    assert [entry["name"] for entry in manifest["source"]] == ["ratings.csv", "movies.csv"]
    assert manifest["published"] == {"ratings.csv": None}
    assert manifest["source"][0]["size"] == (LATEST / "ratings.csv").stat().st_size
    assert manifest["synthetic"] is False
    assert manifest["skipped"] == {}
    for split in ("train", "valid", "test"):
        rows = dataset.rows(split)
        assert manifest["splits"][split]["rows"] == len(rows)
        assert manifest["splits"][split]["positive_rate"] == all_labels(dataset)[rows].mean()
    for name in ("valid", "test"):
        share = (dataset.column("year")[dataset.rows(name)] == 1).mean()
        assert manifest["unseen_share"]["year"][name] == share


def test_skipped_rows_are_in_manifest_and_summary(tmp_path):
    raw = Path(shutil.copytree(LATEST, tmp_path / "raw"))
    with (raw / "ratings.csv").open("a") as file:
        file.write("1,1,4.0\n1,555,4.0,1\n1,1\n")
    dataset = prepare(make_data(raw, on_bad_row="skip"), tmp_path / "encoded")
    skipped = dataset.manifest["skipped"]
    assert {reason: entry["count"] for reason, entry in skipped.items()} == {
        "missing field": 2,
        "unknown movie": 1,
    }
    text = "\n".join(summary_lines(dataset))
    assert "bad rows left out: 3" in text
    assert "missing field: 2, e.g. " in text


def test_summary_names_rows_fields_and_rates(dataset):
    text = "\n".join(summary_lines(dataset))
    assert "20 rows, 6 fields" in text
    rate = all_labels(dataset)[dataset.rows("train")].mean()
    assert f"12 rows, {rate:.2%} positive" in text
    assert all(f"  {name}" in text for name in FIELDS)
    assert "rows/s), peak memory" in text


def test_second_preparation_reads_no_raw_row(tmp_path, monkeypatch):
    first = prepare(make_data(), tmp_path)
    monkeypatch.setattr(store, "encode", None)
    monkeypatch.setattr(source, "file_digest", None)
    assert prepare(make_data(), tmp_path).hash == first.hash


def test_part_and_partition_need_no_new_encoding(tmp_path):
    first = prepare(make_data(), tmp_path)
    other = make_data(part=1, partition=Partition(by="user", parts=2, seed=9))
    assert prepare(other, tmp_path).folder == first.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"fields": ["user", "item"]},
        {"label_threshold": 3.0},
        {"history_length": 2},
        {"min_count": 2},
        {"split": Split(by="random", fractions=[0.6, 0.2, 0.2], seed=1)},
        {"split": Split(by="time", fractions=[0.6, 0.2, 0.2], seed=0)},
    ],
)
def test_changed_option_gives_a_new_folder_and_hash(tmp_path, changes):
    first = prepare(make_data(), tmp_path)
    other = prepare(make_data(**changes), tmp_path)
    assert other.folder != first.folder
    assert other.hash != first.hash


def test_changed_raw_content_gives_a_new_folder(tmp_path):
    raw = Path(shutil.copytree(LATEST, tmp_path / "raw"))
    first = prepare(make_data(raw), tmp_path / "encoded")
    path = raw / "ratings.csv"
    path.write_bytes(path.read_bytes().replace(b"1,1,4.0,", b"1,1,1.0,", 1))  # same size
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    other = prepare(make_data(raw), tmp_path / "encoded")
    assert other.folder != first.folder
    assert all_labels(other)[0] != all_labels(first)[0]


def test_hash_depends_on_content_alone(tmp_path):
    raw = Path(shutil.copytree(LATEST, tmp_path / "elsewhere"))
    first = prepare(make_data(), tmp_path / "a")
    other = prepare(make_data(raw, name="other_name"), tmp_path / "b")
    assert first.hash == other.hash
    assert first.folder.name.split("-")[1] == other.folder.name.split("-")[1]


def test_broken_digest_cache_is_rebuilt(tmp_path):
    first = prepare(make_data(), tmp_path)
    (tmp_path / "digests.json").write_text("{broken")
    assert prepare(make_data(), tmp_path).folder == first.folder
    assert json.loads((tmp_path / "digests.json").read_text())


COLUMNS = ("label", "split", "timestamp", "group", "item_index", "ids")
PIECES = ("values", "starts", "lengths")
STORED = [
    *(f"{column}.npy" for column in COLUMNS),
    *(f"field.genres.{piece}.npy" for piece in PIECES),
    "vocabulary.item.txt",
    "manifest.json",
]


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("damage", ["missing", "cut", "grown", "replaced"])
def test_damaged_file_is_named(tmp_path, name, damage):
    path = prepare(make_data(), tmp_path).folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-3])
    elif damage == "grown":
        path.write_bytes(content + b"\0")
    else:
        path.write_bytes(
            content.replace(b"'shape': (", b"'shape': [").replace(b'"schema"', b'"s"')
            if not name.endswith(".txt")
            else content[::-1]
        )
    message = error_of(make_data(verify="full"), tmp_path)
    assert message.startswith(f"{path}: damaged: ")
    assert f"delete the folder {path.parent}" in message


def test_wrong_shape_of_right_size_is_named(tmp_path):
    path = prepare(make_data(), tmp_path).folder / "label.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"'shape': (20,)} ", b"'shape': (20,1)}"))
    assert f"{path}: damaged: uint8 [20, 1], expected uint8 [20]" in error_of(
        make_data(), tmp_path
    )


def test_changed_vocabulary_is_named(dataset):
    path = dataset.folder / "vocabulary.year.txt"
    path.write_text("1900\n")
    with pytest.raises(UserError, match="its hash differs"):
        dataset.vocabulary("year")


@pytest.mark.parametrize("fails_at", ["append", "rename"])
def test_full_disk_names_path_and_leaves_nothing(tmp_path, monkeypatch, fails_at):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (ColumnFile, "append") if fails_at == "append" else (Path, "rename")
    monkeypatch.setattr(*target, fail)
    message = error_of(make_data(), tmp_path)
    assert str(tmp_path) in message
    assert "cannot be written: No space left on device" in message
    assert folders(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ColumnFile, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_data(), tmp_path)
    assert folders(tmp_path) == []
    monkeypatch.undo()
    assert len(prepare(make_data(), tmp_path)) == 20


def test_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(make_data(), tmp_path / "file" / "encoded")
    assert f"{tmp_path / 'file' / 'encoded'}: cannot be written" in message
    assert "runtime.encoded" in message


def test_bad_rows_leave_no_folder(tmp_path):
    raw = Path(shutil.copytree(LATEST, tmp_path / "raw"))
    with (raw / "ratings.csv").open("a") as file:
        file.write("1,1,4.0\n")
    assert "line 22: missing field" in error_of(make_data(raw), tmp_path / "encoded")
    assert folders(tmp_path / "encoded") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": "movielense"},
            "data.format=movielense: expected one of criteo",
        ),
        ({"raw": "/absent/raw.zip"}, "/absent/raw.zip: no such file or folder"),
    ],
)
def test_impossible_option_is_named(tmp_path, changes, message):
    assert message in error_of(make_data(**changes), tmp_path)


CHILD = """
import os, pathlib, signal, sys, time
sys.path[:0] = {tests!r}
import test_store
from cki_rec.data.encoding import store
write = store._write_manifest
def stopped_write(*args):
    pathlib.Path({reached!r}).touch()
    {body}
    write(*args)
store._write_manifest = stopped_write
print(store.prepare(test_store.make_data(), {encoded!r}).hash)
"""


def start_child(reached: Path, encoded: Path, body: str) -> subprocess.Popen:
    """Start a process that prepares the sample, and does ``body`` in the middle of it."""
    code = CHILD.format(
        tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
        reached=str(reached),
        encoded=str(encoded),
        body=body,
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.slow
@pytest.mark.dist
def test_second_process_waits_for_the_first(tmp_path, caplog):
    caplog.set_level("INFO")
    reached, encoded = tmp_path / "reached", tmp_path / "encoded"
    child = start_child(reached, encoded, "time.sleep(1)")
    while not reached.exists():
        assert child.poll() is None
        time.sleep(0.01)
    dataset = prepare(make_data(), encoded)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert output.strip() == dataset.hash
    assert "waiting: another process" in caplog.text
    assert "encoding" not in [record.message.split()[0] for record in caplog.records]
    assert folders(encoded) == [dataset.folder.name]


@pytest.mark.dist
def test_killed_preparation_is_cleaned_by_the_next(tmp_path):
    encoded = tmp_path / "encoded"
    child = start_child(tmp_path / "reached", encoded, "os.kill(os.getpid(), signal.SIGKILL)")
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    (left,) = folders(encoded)
    assert ".tmp-" in left
    (encoded / "sample-other.tmp-1").mkdir()  # not of this data set: stays
    dataset = prepare(make_data(), encoded)
    assert len(dataset) == 20
    assert folders(encoded) == [dataset.folder.name, "sample-other.tmp-1"]


def test_lock_is_free_after_an_error(tmp_path):
    error_of(make_data(label_threshold=9.0), tmp_path)
    started = time.monotonic()
    with FileLock(tmp_path / "sample.lock", timeout=1):
        assert time.monotonic() - started < 1


def count_by_hand(dataset: EncodedDataset, rows, schema) -> dict[str, list[int]]:
    counts = {table: [0] * size for table, size in schema.table_sizes.items()}
    for feature in schema.features:
        column = dataset.column(feature.name)
        for row in rows:
            if isinstance(column, Ragged):
                ids = column.values[column.starts[row] :][: column.lengths[row]]
            else:
                ids = [column[row]]
            for i in ids:
                counts[feature.table][i] += 1
    return counts


@pytest.mark.parametrize("has_histories", [True, False])
def test_row_counts_equal_counting_by_hand(dataset, has_histories):
    schema = dataset.schema if has_histories else dataset.schema.without_histories()
    rows = dataset.rows("train")
    counts = dataset.row_counts(schema)
    want = count_by_hand(dataset, rows, schema)
    assert {table: count.tolist() for table, count in counts.items()} == want
    assert counts["item"].sum() > len(rows) if has_histories else counts["item"].sum() == len(rows)
    assert counts["item"][0] == 0


def test_rows_of_parts_divide_the_rows_of_a_split(tmp_path):
    data = make_data(split=Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0))
    data.raw = str(EMBEDDED)
    dataset = prepare(data, tmp_path)
    partition = Partition(by="user", parts=2, seed=1)
    for split in ("train", "valid", "test"):
        parts = [dataset.rows(split, partition, part) for part in (0, 1)]
        assert np.array_equal(np.sort(np.concatenate(parts)), dataset.rows(split))
        users = [set(dataset.group[rows].tolist()) for rows in parts]
        assert not users[0] & users[1]
    assert np.array_equal(dataset.rows("train", partition, None), dataset.rows("train"))
    assert dataset.manifest["splits"]["train"]["rows"] == 80_669


def test_part_that_does_not_exist_is_refused(dataset):
    with pytest.raises(UserError, match=r"data\.part=2: data.partition has 2"):
        dataset.rows("train", Partition(by="user", parts=2, seed=0), 2)
    with pytest.raises(UserError, match=r"data\.part=1: data.partition has 1"):
        dataset.rows("train", Partition(by="none", parts=2, seed=0), 1)


def test_part_without_a_row_of_the_split_is_refused(tmp_path):
    data = make_data(split=Split(by="time", fractions=[0.6, 0.2, 0.2], seed=0))
    dataset = prepare(data, tmp_path)
    with pytest.raises(UserError, match="has no test row"):
        dataset.rows("test", Partition(by="time", parts=2, seed=0), 0)
