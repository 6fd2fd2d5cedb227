"""Wrapped and compiled modules give what plain ones give, though compiled code calls no hooks."""

from __future__ import annotations

import logging

import pytest
import torch
from plain_modules import floats, mlp
from torch import nn
from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torch.nn.parallel import DistributedDataParallel

from cki_rec.merging.aligning import align
from cki_rec.merging.api import merge
from cki_rec.merging.discovery import find_symmetries, verify
from cki_rec.merging.params import MergeError

BATCHES = [(floats(32, 5, seed=seed),) for seed in range(3)]


class Outer(nn.Module):
    """A module with a compiled part."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def run(module):
    """Run a module on a batch: compiled ones are compiled now, before hooks are added."""
    with torch.no_grad():
        module(*BATCHES[0])
    return module


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "compiled": lambda module: run(compiled(module)),
    "compiled in place": lambda module: run(compiled_in_place(module)),
    "compiled in parallel": lambda module: DistributedDataParallel(run(compiled(module))),
    "parallel compiled": lambda module: compiled(DistributedDataParallel(module)),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of this process alone; another test may have made it."""
    if is_initialized():
        yield
        return
    file = tmp_path_factory.mktemp("group") / "rendezvous"
    init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    destroy_process_group()


def nets():
    torch.manual_seed(0)
    return [Outer(mlp(5, 8, 6, 1, norm=nn.BatchNorm1d)).eval() for _ in range(2)]


def results(models):
    """Return symmetries, aligned copies and two merges of models."""
    module, words = models[0], {"module": models[0], "batches": BATCHES}
    symmetries = find_symmetries(module, BATCHES[0])
    assert max(verify(module, symmetries, BATCHES[0])) < 1e-9
    aligned = align(models, symmetries, by="activations", **words)
    merges = [
        merge(models, align="activations", repair=repair, symmetries=given, **words).params
        for repair, given in (("least_squares", symmetries), ("rescale", None))
    ]
    return list(symmetries), [*aligned.models, *merges]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_nothing(wrapper):
    symmetries, states = results(nets())
    assert {s.size for s in symmetries} == {8, 6}
    wrapped = [WRAPPERS[wrapper](net) for net in nets()]
    same, others = results(wrapped)
    assert same == symmetries
    for state, other in zip(states, others, strict=True):
        assert list(state) == list(other)
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_compiled_part_is_searched_as_it_is_written(caplog):
    plain = results(nets())
    symmetries, states = results([run(Outer(compiled(net.inner)).eval()) for net in nets()])
    renamed = [p.parameter.replace("_orig_mod.", "") for s in symmetries for p in s.slices]
    assert renamed == [part.parameter for symmetry in plain[0] for part in symmetry.slices]
    for state, other in zip(plain[1], states, strict=True):
        pairs = zip(state.values(), other.values(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("search", [find_symmetries, lambda m, x: verify(m, [], x)])
def test_a_state_dict_is_no_module(search):
    state = nets()[0].state_dict()
    with pytest.raises(MergeError, match="module is a OrderedDict; pass the network"):
        search(state, BATCHES[0])
