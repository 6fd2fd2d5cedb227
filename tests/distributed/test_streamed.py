"""A merge from disk to disk gives the model of a merge in memory, and survives kills."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from merging_cases import SIZES, merge_sources, merged, of, write

from cki_rec.checkpoints import TENSORS, checkpoint, read_tensors
from cki_rec.checkpoints.tensors import ignore_dcp_warnings
from cki_rec.engine.block_writer import BlockWriter
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
