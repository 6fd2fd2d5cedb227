"""A merge from disk to disk gives the model of a merge in memory, and survives kills."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from merging_cases import SIZES, merge_sources, merged, of, write

from cki_rec.checkpoints import TENSORS, checkpoint, file_digests, read_tensors
from cki_rec.checkpoints.rows import RowReader
from cki_rec.checkpoints.tensors import ignore_dcp_warnings
from cki_rec.engine.block_writer import BlockWriter, write_metadata
from cki_rec.pipelines import stream_plan

TABLE = "sparse.collection.embedding_bags.item.weight"
QUICK = {
    "aligned": ("merge=aligned_weights",),
    "cki": ("merge=cki_dual_soft",),
}
CASES = {
    **QUICK,
    "average": ("merge=average",),
    "evidence": ("merge=evidence",),
    "ties": ("merge=ties", "merge.options={scale: 0.7}"),
    "slerp": ("merge=slerp",),
    "random": ("merge=random_splice",),
    "scope": ("merge=average", "merge.tables=evidence", "merge.scope=head"),
    "dare": ("merge=dare", "merge.options={scale: 0.7}"),
    "della": ("merge=della", "merge.options={scale: 0.7}"),
    "breadcrumbs": ("merge=breadcrumbs", "merge.options={scale: 0.7}"),
    "task_arithmetic": ("merge=task_arithmetic", "merge.options={scale: 0.7}"),
    "weighted": ("merge=weighted_average", "merge.options={weights: [0.3, 0.7]}"),
    "first": ("merge=first", "merge.learn.what=none"),
    "model_stock": ("merge=model_stock",),
    "karcher": ("merge=karcher",),
    "pruning": ("merge=pruning", "merge.options={source: 1}"),
    "filter_grafting": ("merge=filter_grafting",),
    "ot_fusion": ("merge=ot_fusion",),
    "sequential": ("merge=sequential",),
}
"""Every method that reads no rows of data."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b", "start")):
        write(folder, name, seed)
    return folder


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream_plan, "BLOCK", 8)
    monkeypatch.setattr(stream_plan, "SMALLEST", 1)


def words(sources, *more):
    return (
        of(*(str(sources / n) for n in "ab")),
        f"merge.base={{path: {sources / 'start'}}}",
        *more,
    )


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_streamed_model_is_that_of_memory(sources, tmp_path, small_blocks, case):
    how = CASES[case]
    assert merge_sources(tmp_path, "memory", *words(sources, *how)) == (0, "")
    assert merge_sources(tmp_path, "disk", *words(sources, *how, "merge.memory_gb=2")) == (0, "")
    one, many = merged(tmp_path, "memory"), merged(tmp_path, "disk")
    assert one.name == many.name
    expected, found = (read_tensors(run / "checkpoint" / TENSORS) for run in (one, many))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    plain = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    with ignore_dcp_warnings():
        dcp.load(plain, checkpoint_id=many / "checkpoint" / TENSORS, no_dist=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())
    assert checkpoint.load(many / "checkpoint").schema.table_sizes == SIZES
    assert {path.name for path in many.parent.iterdir()} == {many.name, "locks"}


@pytest.mark.slow
def test_an_aligned_model_is_that_of_memory_bit_for_bit(sources, tmp_path):
    """Blocks are as large as they are by default, so sums round alike."""
    how = words(sources, "merge=cki_dual_soft", "merge.align.by=weights")
    assert merge_sources(tmp_path, "memory", *how) == (0, "")
    assert merge_sources(tmp_path, "disk", *how, "merge.memory_gb=2") == (0, "")
    folders = (merged(tmp_path, case) / "checkpoint" for case in ("memory", "disk"))
    one, many = map(checkpoint.load, folders)
    assert all(torch.equal(many.params[name], tensor) for name, tensor in one.params.items())


def streamed(folder, sources, *more):
    """Return exit code and message of a streamed merge in ``folder``."""
    return merge_sources(folder, "disk", *words(sources, "merge.memory_gb=2", *more))


def digests(folder) -> dict[str, str]:
    run = merged(folder, "disk")
    files = json.loads((run / "checkpoint" / checkpoint.DESCRIPTION).read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".distcp")}


class Kill(BaseException):
    """The end of a process, without a chance to tidy up."""


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_merge_goes_on_and_gives_the_same_digests(
    sources, tmp_path, small_blocks, monkeypatch, kills
):
    """In one process, at the writes; ``test_kills_of_processes`` ends whole processes."""
    case, noise = "merge=aligned_weights", torch.Generator().manual_seed(kills)
    assert streamed(tmp_path / "whole", sources, case) == (0, "")
    expected, append = digests(tmp_path / "whole"), BlockWriter._append
    total, left = 0, [0]

    def limited(self, *block):
        left[0] -= 1
        if left[0] == 0:
            raise Kill
        append(self, *block)

    monkeypatch.setattr(BlockWriter, "_append", limited)
    for _ in range(kills):
        left[0] = int(torch.randint(2, 12, (), generator=noise))
        try:
            assert streamed(tmp_path / "killed", sources, case) == (0, "")
        except Kill:
            total += 1
            assert not list((tmp_path / "killed" / "disk").glob("merge-*/checkpoint"))
            assert list((tmp_path / "killed" / "disk" / "partial").glob("merge-*"))
        else:
            assert digests(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
    left[0] = -1
    assert streamed(tmp_path / "killed", sources, case) == (0, "")
    assert digests(tmp_path / "killed") == expected
    assert total >= kills / 2
    assert not (tmp_path / "killed" / "disk" / "partial").exists()


MISTAKES = {
    "small": ("b", ("merge.memory_gb=0.1",), "merge.memory_gb=0.1 is below the smallest block: 1"),
    "larger": ("larger", (), "item.weight: float32 (101, 8), in"),
    "nan": ("bad", (), f"{TABLE} of"),
    "rows": ("b", ("merge=fisher",), "but merge.method=fisher needs whole models or rows of data"),
    "auto": ("b", ("merge=auto",), "but merge.method=auto needs whole models"),
    "steps": ("mixed", (), "damaged checkpoint, the file has changed"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(sources, tmp_path, case):
    other, more, message = MISTAKES[case]
    write(sources, "larger", 1, {**SIZES, "item": 102})
    write(sources, "bad", 1, change=lambda params: params[TABLE][7:9].fill_(torch.nan))
    write(sources, "mixed", 1)
    file = f"{TENSORS}/__0_0.distcp"
    shutil.copy(sources / "a" / file, sources / "mixed" / file)
    how = ["merge=average", "merge.memory_gb=2", *more]
    named = of(str(sources / "a"), str(sources / other))
    code, said = merge_sources(tmp_path, "disk", named, *how)
    assert (code, len(said.splitlines())) == (2, 1)
    assert message in said
    assert case != "nan" or "rows 7, 8 have NaN" in said
    assert not [*(tmp_path / "disk").glob("merge-*"), *(tmp_path / "disk").glob("partial")]


def test_a_source_that_changes_is_noticed(sources, tmp_path, monkeypatch):
    write(sources, "changing", 1)
    path, append = sources / "changing" / TENSORS / "__0_0.distcp", BlockWriter._append

    def touch(self, *block):
        append(self, *block)
        os.utime(path)

    monkeypatch.setattr(BlockWriter, "_append", touch)
    how = (of(str(sources / "a"), str(sources / "changing")), "merge=average")
    code, said = merge_sources(tmp_path, "disk", *how, "merge.memory_gb=2")
    assert code == 2
    assert said.count("\n") == 1
    assert "has changed while" in said
    assert not [*(tmp_path / "disk").glob("merge-*"), *(tmp_path / "disk").glob("partial")]


def test_a_full_disk_is_one_line_and_the_merge_goes_on(
    sources, tmp_path, small_blocks, monkeypatch
):
    case, append, written, most = "merge=aligned_weights", BlockWriter._append, [], [10**6]

    def limited(self, *block):
        if len(written) == most[0]:
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        append(self, *block)
        written.append(block[0])

    monkeypatch.setattr(BlockWriter, "_append", limited)
    assert streamed(tmp_path / "whole", sources, case) == (0, "")
    total = len(written)
    most[0] = total + 9
    code, said = streamed(tmp_path / "full", sources, case)
    assert (code, said.count("\n")) == (2, 1)
    assert "cannot write there: No space left on device; free space there, then run" in said
    assert not [*(tmp_path / "full" / "disk").glob("merge-*")]
    most[0] = 10**6
    assert streamed(tmp_path / "full", sources, case) == (0, "")
    assert len(written) == 2 * total  # no block twice
    assert digests(tmp_path / "full") == digests(tmp_path / "whole")
    assert not (tmp_path / "full" / "disk" / "partial").exists()


def test_threads_do_not_change_the_digests(sources, tmp_path, small_blocks):
    for number in (1, 3):
        how = ("merge=cki_dual_soft", "merge.align.by=weights", f"runtime.threads={number}")
        assert streamed(tmp_path / str(number), sources, *how) == (0, "")
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_a_streamed_model_is_that_of_memory(sources, tmp_path, small_blocks, dtype):
    narrow = torch.float32 if dtype == "bfloat16" else torch.bfloat16

    def change(params):
        params.update({name: tensor.to(narrow) for name, tensor in params.items()})

    for seed, name in enumerate(("narrow a", "narrow b")):
        write(sources, name, seed, change=change)
    named = of(*(f"'{sources / n}'" for n in ("narrow a", "narrow b")))
    how = (named, "merge=cki_dual_soft", f"merge.dtype={dtype}")
    assert merge_sources(tmp_path, "memory", *how) == (0, "")
    assert merge_sources(tmp_path, "disk", *how, "merge.memory_gb=2") == (0, "")
    runs = [merged(tmp_path, case) for case in ("memory", "disk")]
    one, many = (checkpoint.load(run / "checkpoint").params for run in runs)
    for name, tensor in one.items():
        assert many[name].dtype == tensor.dtype == getattr(torch, dtype)
        slack = 1e-2 if dtype == "bfloat16" else 1e-6
        torch.testing.assert_close(many[name], tensor, rtol=slack, atol=slack, msg=name)
    results = [json.loads((run / "record.json").read_text())["result"]["types"] for run in runs]
    assert results[0] == results[1] == [dtype]


def test_the_plan_of_a_streamed_merge_is_printed(sources, tmp_path, capfd):
    assert streamed(tmp_path, sources, "merge=cki_dual_soft", "check_only=true") == (0, "")
    said = capfd.readouterr().out
    assert "streams tables in blocks of 65,536 rows; they are read 3 times" in said
    assert "GB of memory, the budget is 2.00 GB" in said
    assert not (tmp_path / "disk").exists()


def test_blocks_of_any_shape_and_type_are_read_by_torch_and_by_rows(tmp_path):
    noise, folder = torch.Generator().manual_seed(0), tmp_path / "checkpoint" / TENSORS
    folder.mkdir(parents=True)
    shapes = {"scalar": (), "empty": (0, 3), "vector": (7,), "table": (20, 3)}
    types = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
    tensors = {
        f"{name}.{dtype}": (8 * torch.randn(shape, generator=noise)).to(dtype)
        for name, shape in shapes.items()
        for dtype in types
    }
    with BlockWriter(folder, 0, resume=False) as writer:
        for name, tensor in tensors.items():
            for first in range(0, len(tensor), 7) if name.startswith("table") else [0]:
                part = tensor[first : first + 7] if tensor.ndim else tensor
                writer.write(name, first, part)
        writer.finish()
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        write_metadata(folder, writer.written, forms)
    plain = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    with ignore_dcp_warnings():
        dcp.load(plain, checkpoint_id=folder, no_dist=True)
    with RowReader(folder.parent, "it") as reader:
        for name, tensor in tensors.items():
            assert torch.equal(plain[name], tensor)
            assert torch.equal(reader.read(name), tensor)
            if name.startswith("table"):
                assert torch.equal(reader.read(name, 5, 15), tensor[5:15])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_tables_stored_in_parts_are_read(sources, tmp_path, small_blocks, split):
    """As row-wise and column-wise plans write them."""
    whole = read_tensors(sources / "a" / TENSORS)
    folder = tmp_path / "parts"
    shutil.copytree(sources / "a", folder)
    shutil.rmtree(folder / TENSORS)
    (folder / TENSORS).mkdir()
    parts = {}
    for name, tensor in whole.items():
        axis = int(split == "columns" and tensor.ndim > 1)
        sizes = [tensor.shape[axis] // 3, tensor.shape[axis] - tensor.shape[axis] // 3]
        is_cut = name.endswith(".weight") and tensor.ndim > 0 and sizes[0] > 0
        pieces = tensor.split(sizes, axis) if is_cut else [tensor]
        places = [0, sizes[0]] if is_cut else [0]
        parts[name] = [
            ([place if each == axis else 0 for each in range(tensor.ndim)], piece.clone())
            for place, piece in zip(places, pieces, strict=True)
        ]
    with BlockWriter(folder / TENSORS, 0, resume=False) as writer:
        for name, pieces in parts.items():
            for offsets, piece in pieces:
                writer._append(name, offsets, piece, None)
        writer.finish()
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()}
        write_metadata(folder / TENSORS, writer.written, shapes)
    (tmp_path / "journal-0.jsonl").unlink()
    description = json.loads((folder / checkpoint.DESCRIPTION).read_text())
    description["files"] = file_digests(folder / TENSORS)
    (folder / checkpoint.DESCRIPTION).write_text(json.dumps(description))
    assert all(torch.equal(read_tensors(folder / TENSORS)[n], t) for n, t in whole.items())
    results = []
    for case, first in (("whole", sources / "a"), ("parts", folder)):
        how = (of(str(first), str(sources / "b")), "merge=cki_dual_soft", "merge.memory_gb=2")
        assert merge_sources(tmp_path, case, *how) == (0, "")
        results.append(checkpoint.load(merged(tmp_path, case) / "checkpoint").params)
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


@pytest.mark.slow
def test_kills_of_processes(sources, tmp_path, small_blocks):
    """Thirty processes are killed at random moments; each time the next one goes on."""
    noise, fork = torch.Generator().manual_seed(0), multiprocessing.get_context("fork")
    how = words(sources, "merge=aligned_weights", "merge.memory_gb=2")

    def start(folder):
        process = fork.Process(target=merge_sources, args=(folder, "disk", *how))
        process.start()
        return process

    begun, process = time.monotonic(), start(tmp_path / "whole")
    process.join()
    seconds, kills, resumed = time.monotonic() - begun, 0, 0
    expected = digests(tmp_path / "whole")
    while kills < 30:
        process = start(tmp_path / "killed")
        time.sleep(float(torch.rand((), generator=noise)) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        resumed += (tmp_path / "killed" / "disk" / "partial").exists()
        for run in (tmp_path / "killed" / "disk").glob("merge-*"):
            if (run / "checkpoint").exists():  # never half-written
                assert digests(tmp_path / "killed") == expected
                checkpoint.load(run / "checkpoint")
        if process.exitcode == 0:
            shutil.rmtree(tmp_path / "killed")
    process = start(tmp_path / "killed")
    process.join()
    assert digests(tmp_path / "killed") == expected
    assert resumed >= 5
