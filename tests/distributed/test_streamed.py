"""A merge from disk to disk gives the model of a merge in memory, and survives kills."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from merging_cases import SIZES, merge_sources, merged, of, write

from cki_rec.checkpoints import TENSORS, checkpoint, read_tensors
from cki_rec.checkpoints.tensors import ignore_dcp_warnings
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
    "first": ("merge=ablation_frozen", "merge.learn.what=none"),
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
