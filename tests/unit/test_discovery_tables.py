"""Tables that are read by id only are replaced by the rows of the example ids, not copied."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_modules import OneTable, floats, ids, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cki_rec.merging.discovery import find_symmetries
from cki_rec.merging.discovery import twin as twins


def test_no_copy_of_a_large_table():
    torch.manual_seed(0)
    module = OneTable(fields=3, dim=4)
    module.table = nn.Embedding(200_000, 4)
    assert module.table.weight.numel() > twins.SHARED
    large: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for result in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(result, torch.Tensor) and result.numel() > twins.SHARED:
                    large.append(result.data_ptr())
            return out

    with Watch():
        found = find_symmetries(module, ids(6, 3))
    assert set(large) <= {module.table.weight.data_ptr()}
    assert [(s.kind, s.size) for s in found] == [("rotation", 4), ("permutation", 8)]


def test_runs_do_not_depend_on_the_number_of_rows():
    runs = set()
    for rows in (150, 100_000):
        torch.manual_seed(0)
        module = OneTable()
        module.table = nn.Embedding(rows, 4)
        runs.add(find_symmetries(module, ids(6, 3)).runs)
    assert len(runs) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda w, i: nn.functional.embedding(i, w),
        lambda w, i: nn.functional.embedding_bag(i[:, None], w, mode="sum"),
        lambda w, i: nn.functional.embedding_bag(i[:, None], w, padding_idx=3, mode="mean"),
        lambda w, i: w[i],
        lambda w, i: w.index_select(0, i),
    ],
)
def test_lookups_are_translated(read):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(floats(100, 4))

        def forward(self, i):
            return read(self.table, i)

    module, i = Lookup(), ids(7, rows=100)
    i[2] = 3
    rows = twins.rows_read(module, i)
    assert torch.equal(rows[id(module.table)], i.unique())
    with twins.exact(0):
        (actual,) = twins.Twin(module, rows).run(i)
    assert torch.equal(actual, module.double()(i))


def test_a_table_that_is_read_as_a_whole_stays_whole():
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    module[1].weight = module[0].weight
    assert not twins.rows_read(module, ids(5, rows=9))


def test_ids_that_depend_on_numbers():
    """A row that the first run does not read cannot be left out."""

    class Buckets(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mlp = nn.Embedding(1000, 4), mlp(4, 6, 1)

        def forward(self, x):
            return self.mlp(self.table((x * 100).long().abs() % 1000))

    found = find_symmetries(Buckets(), floats(6))
    assert [(s.kind, s.size) for s in found] == [("rotation", 4), ("permutation", 6)]


def test_a_forward_that_writes_into_its_table_does_not_reach_the_module():
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20_000, 4, max_norm=0.5), nn.Linear(4, 1)

        def forward(self, i):
            return self.out(self.table(i))

    module = Renormed()
    before = copy.deepcopy(module.state_dict())
    assert before["table.weight"].numel() > twins.SHARED
    find_symmetries(module, ids(6))
    assert torch.equal(module.table.weight, before["table.weight"])
