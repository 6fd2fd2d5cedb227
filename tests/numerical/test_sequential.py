"""Mixing weights of sources in sequence, against values computed by hand."""

from __future__ import annotations

import pytest
import torch

import cki_rec
from cki_rec.merging.methods.sequential import sequential

MODELS = [
    {"table": torch.full((3, 2), float(k)), "w": torch.full((2,), float(k))} for k in range(3)
]
COUNTS = [
    {"table": torch.tensor(counts)}
    for counts in ([8.0, 4.0, 0.0], [4.0, 0.0, 0.0], [2.0, 0.0, 0.0])
]


def test_older_counts_decay_with_every_later_source():
    weights = sequential(MODELS, COUNTS, newest=0.5, decay=0.5)
    table = weights["table"].squeeze(-1).T.tolist()
    assert table[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3])  # 8 / 4, 4 / 2, 2
    assert table[1] == [1, 0, 0]  # seen by the oldest source alone
    assert table[2] == [0, 0, 1]  # seen by none: of the newest
    assert weights["w"].flatten().tolist() == [0.25, 0.25, 0.5]


def test_without_decay_tables_are_those_of_the_newest():
    merged = cki_rec.merge(MODELS, "sequential", counts=COUNTS, newest=1.0).params
    assert all(torch.equal(merged[name], MODELS[2][name]) for name in merged)


def test_with_full_decay_tables_are_those_of_evidence():
    ours = cki_rec.merge(MODELS, "sequential", counts=COUNTS, decay=1.0).params["table"]
    theirs = cki_rec.merge(MODELS, "evidence", counts=COUNTS).params["table"]
    torch.testing.assert_close(ours[:2], theirs[:2])
