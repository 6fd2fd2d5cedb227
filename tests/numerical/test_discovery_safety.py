"""No wrong symmetry is found in random graphs, also when proposals are broken on purpose.

The check shares no code with the search: other states, inputs and elements, entry by entry.
"""

from __future__ import annotations

import pytest
import torch
from plain_modules import ODD, Between, Experts, Random, floats, ids, independent_error

from cki_rec.merging.discovery import find_symmetries
from cki_rec.merging.discovery.trace import Tracer

fix, pair = Tracer.fix, Tracer.pair


def fix_nothing(tracer, *labels):
    pass


def drop_unions(tracer, store, a, b):
    if store is not tracer.unions or torch.rand(()) < 0.7:
        pair(tracer, store, a, b)


def drop_blocks(tracer, store, a, b):
    if store is tracer.unions:
        pair(tracer, store, a, b)


def drop_both(tracer, store, a, b):
    if store is tracer.unions:
        drop_unions(tracer, store, a, b)


BROKEN = {
    "sound": (fix, pair),
    "nothing is fixed": (fix_nothing, pair),
    "3 of 10 unions dropped": (fix, drop_unions),
    "no blocks, no tags": (fix, drop_blocks),
    "all three": (fix_nothing, drop_both),
}
broken = pytest.mark.parametrize("how", BROKEN)


def check(module, inputs, seed):
    """Search, check every group alone and all together, and return their number."""
    symmetries = find_symmetries(module, inputs)
    for symmetry in symmetries:
        for k in range(4):
            assert independent_error(module, inputs, [symmetry], seed + k) < 1e-7, symmetry
    assert independent_error(module, inputs, symmetries, seed) < 1e-7
    return len(symmetries)


@pytest.fixture
def break_proposals(monkeypatch):
    def apply(how):
        monkeypatch.setattr(Tracer, "fix", BROKEN[how][0])
        monkeypatch.setattr(Tracer, "pair", BROKEN[how][1])

    return apply


def check_random(seeds):
    return sum(check(Random(seed), (ids(7, 2, rows=30, seed=seed),), seed) for seed in seeds)


@pytest.mark.parametrize(("how", "count"), [("sound", 6), ("all three", 4)])
def test_random_graphs(break_proposals, how, count):
    break_proposals(how)
    assert check_random(range(count)) >= count


@pytest.mark.slow
@broken
def test_many_random_graphs(break_proposals, how):
    break_proposals(how)
    assert check_random(range(200)) > 100


@pytest.mark.parametrize("title", ["argmax", "branch", "slice", "roll"])
def test_odd_operations(title):
    operation, width = ODD[title]
    check(Between(operation, width), (floats(6, 5),), 0)


@pytest.mark.slow
@broken
@pytest.mark.parametrize("title", ODD)
def test_all_odd_operations(break_proposals, how, title):
    break_proposals(how)
    operation, width = ODD[title]
    check(Between(operation, width), (floats(6, 5),), 0)


@broken
@pytest.mark.parametrize(("experts", "hidden"), [(3, 4), (6, 3)])
def test_stacked_parameters(break_proposals, how, experts, hidden):
    break_proposals(how)
    check(Experts(experts, hidden, biases=True), (floats(6, 5),), 0)
