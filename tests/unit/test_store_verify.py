"""Damage is detected on opening; parts of the data are written once, whole or not at all."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samples import FIELDS, LATEST, ROOT, make_data

from cki_rec.config import Data, Partition, Split, UserError
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.store import PREPARATION, prepare

BY_USER = Partition(by="user", parts=2, seed=3)
VERIFIED = [
    "label.npy", "split.npy", "timestamp.npy", "group.npy", "item_index.npy", "ids.npy",
    *(f"field.{name}.{piece}.npy" for name in ("genres", "history")
      for piece in ("values", "starts", "lengths")),
    *(f"vocabulary.{table}.txt" for table in ("user", "item", "genres", "year", "hour")),
]  # fmt: skip


def sample(**changes) -> Data:
    return make_data(raw=str(LATEST), fields=FIELDS, **changes)


def error_of(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of one byte, and nothing else."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare(sample(), tmp_path_factory.mktemp("prepared")).folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """Return a copy of the data set that is prepared once."""
    return shutil.copytree(prepared.parent, tmp_path / "encoded") / prepared.name


def test_manifest_lists_every_file(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(entry["file"] for entry in listed.values()) == sorted(VERIFIED)
    others = {"manifest.json", PREPARATION, "parts-none", "parts-none.lock"}
    assert {path.name for path in folder.iterdir()} == {*VERIFIED, *others}


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_full_verification_finds_one_changed_byte(folder, name, place):
    path = folder / name
    start = 128 if name.endswith(".npy") else 0
    size = path.stat().st_size
    flip(path, {"first": start, "middle": (start + size) // 2, "last": size - 1}[place])
    EncodedDataset(folder)  # sizes and types are as they were
    message = error_of(lambda: EncodedDataset(folder, "full"))
    assert message.startswith(f"{path}: damaged: its content has changed since it was written")
    assert f"delete the folder {folder}" in message
    message = error_of(lambda: prepare(sample(verify="full"), folder.parent))
    assert message.startswith(f"{path}: damaged")


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize("verify", ["fast", "full"])
def test_changed_size_is_detected_by_both_modes(folder, name, verify):
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    size = path.stat().st_size
    message = error_of(lambda: EncodedDataset(folder, verify))
    assert message.startswith(f"{path}: damaged: {size:,} bytes, expected {size - 1:,}")


def test_fast_verification_reads_no_content(folder, monkeypatch):
    def fail(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cki_rec.data.stored.file_digest", fail)
    assert len(EncodedDataset(folder)) == 20
    with pytest.raises(ZeroDivisionError):
        EncodedDataset(folder, "full")


def test_undamaged_data_passes(folder):
    assert len(EncodedDataset(folder, "full")) == 20
    assert prepare(sample(verify="full"), folder.parent).folder == folder


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_folder_that_was_deleted_is_prepared_again(folder, verify):
    hash_before = EncodedDataset(folder).hash
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert prepare(sample(verify=verify), folder.parent).hash == hash_before


def test_damage_of_one_data_set_leaves_others_usable(folder):
    other = prepare(sample(min_count=2), folder.parent)
    flip(folder / "ids.npy")
    assert len(EncodedDataset(other.folder, "full")) == 20


def test_changed_vocabulary_of_same_size_is_detected_when_read(folder):
    flip(folder / "vocabulary.year.txt", 0)
    dataset = EncodedDataset(folder)
    message = error_of(lambda: dataset.vocabulary("year"))
    assert message.startswith(f"{folder / 'vocabulary.year.txt'}: damaged: its hash differs")
    assert dataset.vocabulary("item")


def test_parts_are_written_on_first_use(folder, monkeypatch):
    dataset = EncodedDataset(folder)
    made = folder / "parts-user-2-3"
    assert not made.exists()
    parts = dataset.parts(BY_USER)
    assert parts.folder == made
    names = {f"counts.{name}.npy" for name in FIELDS} | {"part.npy", "order.npy", "parts.json"}
    assert {path.name for path in made.iterdir()} == names
    assert not list(folder.glob("*.tmp-*"))
    assert dataset.parts(BY_USER) is parts
    monkeypatch.setattr("cki_rec.data.dataset.write_parts", None)
    again = EncodedDataset(folder).parts(BY_USER)
    assert np.array_equal(again.part, parts.part)


def test_parts_that_were_asked_for_come_with_the_data_set(tmp_path):
    dataset = prepare(sample(partition=BY_USER), tmp_path)
    assert (dataset.folder / "parts-user-2-3").is_dir()
    later = EncodedDataset(prepare(sample(), tmp_path).folder)
    assert later.folder == dataset.folder


def test_partitions_do_not_share_a_folder(folder):
    dataset = EncodedDataset(folder)
    ways = [Partition(by=by, parts=parts, seed=seed) for by in ("user", "item", "time", "random")
            for parts in (2, 3) for seed in (0, 1)]  # fmt: skip
    result = {dataset.parts(way).folder.name for way in ways}
    assert len(result) == 2 * (2 * 3 + 1)  # windows of time have no seed
    same = [dataset.parts(replace(way, seed=9)).part for way in ways if way.by == "time"]
    assert np.array_equal(same[0], same[1])


@pytest.mark.parametrize("fails", ["numpy.save", "cki_rec.data.parts.sort_rows",
                                   "pathlib.Path.rename"])  # fmt: skip
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt()])  # fmt: skip
def test_parts_that_fail_leave_nothing(folder, monkeypatch, fails, error):
    def fail(*_, **__):
        raise error

    before = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(fails, fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            EncodedDataset(folder).parts(BY_USER)
    if isinstance(error, OSError):
        message = str(caught.value)
        assert message.startswith(f"{folder / 'parts-user-2-3'}: cannot be written: No space left")
        assert "runtime.encoded" in message
    left = {path.name for path in folder.iterdir()} - {"parts-user-2-3.lock"}
    assert left == before
    assert len(EncodedDataset(folder).parts(BY_USER).part) == 20


def test_leftovers_of_a_killed_process_are_removed(folder):
    (folder / "parts-user-2-3.tmp-1").mkdir()
    (folder / "parts-user-2-3.tmp-1" / "part.npy").write_bytes(b"half")
    (folder / "parts-item-2-3.tmp-1").mkdir()  # of another: stays
    EncodedDataset(folder).parts(BY_USER)
    assert [path.name for path in folder.glob("*.tmp-*")] == ["parts-item-2-3.tmp-1"]


def test_impossible_parts_leave_nothing(folder):
    before = sorted(path.name for path in folder.iterdir())
    many = Partition(by="user", parts=1000, seed=0)
    assert "more parts than users" in error_of(lambda: EncodedDataset(folder).parts(many))
    gc.collect()
    left = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    assert left == [name for name in before if not name.endswith(".lock")]


def test_more_parts_than_their_type_holds(tmp_path):
    raw = tmp_path / "raw.csv"
    raw.write_text("label,x\n" + "".join(f"{row % 2},{row % 7}\n" for row in range(80_000)))
    split = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)
    data = make_data("default", format="csv", raw=str(raw), fields=["x"], split=split)
    dataset = prepare(data, tmp_path / "encoded")
    partition = Partition(by="random", parts=70_000, seed=0)
    try:
        parts = dataset.parts(partition)
    except UserError as error:
        assert "data.partition.parts" in str(error)  # noqa: PT017 either is fine
        return
    assert np.bincount(parts.part).tolist() == [2] * 10_000 + [1] * 60_000


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-3], "replaced": b"x" * len(content)}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "replaced"])
@pytest.mark.parametrize("name", ["part.npy", "order.npy", "parts.json", "counts.item.npy"])
def test_damaged_file_of_parts_is_named(folder, name, how):
    EncodedDataset(folder).parts(BY_USER)
    path = folder / "parts-user-2-3" / name
    damage(path, how)

    def use() -> None:
        dataset = EncodedDataset(folder)
        dataset.rows("train", BY_USER, 0)
        dataset.row_counts(dataset.schema, BY_USER, 0)

    message = error_of(use)
    assert message.startswith(f"{path}: damaged: ")
    assert f"delete the folder {path.parent}" in message


def test_parts_of_a_deleted_folder_are_written_again(folder):
    first = np.array(EncodedDataset(folder).parts(BY_USER).order)
    for path in (folder / "parts-user-2-3").iterdir():
        path.unlink()
    (folder / "parts-user-2-3").rmdir()
    assert np.array_equal(EncodedDataset(folder).parts(BY_USER).order, first)


CHILD = """
import pathlib, sys, time
from cki_rec.config import Partition
from cki_rec.data import dataset as module
folder, ready, go = map(pathlib.Path, sys.argv[1:])
dataset, write = module.EncodedDataset(folder), module.write_parts
def slow_write(*args):
    print("wrote", end=" ")
    time.sleep(0.3)
    write(*args)
module.write_parts = slow_write
ready.touch()
while not go.exists():
    time.sleep(0.001)
parts = dataset.parts(Partition(by="user", parts=2, seed=3))
counts = dataset.row_counts(dataset.schema, Partition(by="user", parts=2, seed=3), 1)
print(parts.part.tolist(), parts.order.tolist(), parts.ends, counts["item"].tolist())
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_make_the_same_parts_once(folder, tmp_path):
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{number}" for number in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(path), str(go)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ,
        )
        for path in ready
    ]  # fmt: skip
    while not all(path.exists() for path in ready):
        assert all(child.poll() is None for child in children)
    go.touch()
    texts = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(text.startswith("wrote ") for text in texts) == [False, True]
    assert texts[0].removeprefix("wrote ") == texts[1].removeprefix("wrote ")
    assert not list(folder.glob("*.tmp-*"))
