"""The rules by which an assessment suggests a recipe."""

from __future__ import annotations

import re

import pytest
import torch
from test_assessment_inputs import PAIR, SYMMETRIES

from cki_rec.merging.assessment import assess
from cki_rec.merging.suggestions import (
    ALIKE,
    EQUAL,
    FLAT,
    SHARED,
    UNEVEN,
    Facts,
    facts_of,
    suggest,
)

FACTS = {
    "distance": 1.0,
    "before": 0.9,
    "after": None,
    "uneven": None,
    "changes": None,
    "is_flat": None,
    "has_moved_tables": False,
}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"distance": EQUAL}, "The sources are equal"),
        ({}, "share a basis: merge=average."),
        ({"is_flat": True}, "share a basis: merge=average."),
        ({"is_flat": False}, "merge=average with repair=least_squares"),
        ({"before": None}, "share a basis: merge=average."),
        (
            {"before": 0.03, "after": 0.61, "uneven": 0.0, "has_moved_tables": True},
            "cosine 0.03 before and 0.61 after alignment; then merge=evidence with repair=project",
        ),
        ({"before": 0.0, "after": 0.6}, "then merge=average with repair=least_squares"),
        (
            {"before": 0.0, "after": 0.6, "is_flat": True},
            "then merge=average, without repair, because the aligned barrier is flat",
        ),
        ({"before": 0.0, "after": 0.6, "is_flat": False}, "with repair=least_squares"),
        ({"before": 0.88, "after": 0.95}, "Align first"),
        ({"before": 0.9, "after": 0.94}, "merge=average"),
        ({"before": SHARED - 0.01}, "find the symmetries of the network"),
        ({"before": SHARED}, "merge=average"),
        ({"before": 0.1, "after": 0.12}, "Do not average: layers agree with cosine 0.12 only"),
        ({"uneven": UNEVEN, "changes": -0.5}, "saw different rows (10% of the seen rows"),
        ({"uneven": UNEVEN - 0.01}, "merge=average"),
        ({"changes": -0.2}, "merge=ties"),
        ({"changes": 0.0}, "merge=task_arithmetic"),
        ({"changes": ALIKE}, "merge=average"),
    ],
)
def test_every_rule_of_the_suggestion(changes, part):
    sentence = suggest(Facts(**{**FACTS, **changes}))
    assert part in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_methods_that_are_suggested_exist():
    from cki_rec.merging.methods import METHODS
    from cki_rec.pipelines.references import REFERENCES

    numbers = (-0.5, 0.0, 0.1, 0.5, 1.0)
    named = set()
    for before in numbers:
        for after in (None, *numbers):
            for other in (None, *numbers):
                facts = {**FACTS, "before": before, "after": after}
                for key in ("uneven", "changes"):
                    named |= set(
                        re.findall(r"merge=(\w+)", suggest(Facts(**facts | {key: other})))
                    )
    assert len(named) == 5
    assert named <= {*METHODS, *REFERENCES}


def test_facts_come_from_the_rows():
    counts = [{"table.weight": torch.arange(30) < limit} for limit in (20, 10)]
    base = {name: torch.zeros_like(t) for name, t in PAIR[0].items()}
    got = assess(PAIR, counts=counts, symmetries=SYMMETRIES, base=base)
    facts = facts_of(got.rows, None, True)
    rows = {row["name"]: row for row in got.rows}
    layers = [rows["hidden.weight"], rows["out.weight"]]
    assert facts.before == pytest.approx(sum(row["cosine"] for row in layers) / 2)
    assert facts.after == pytest.approx(sum(row["aligned_cosine"] for row in layers) / 2)
    assert facts.changes == pytest.approx(facts.before)  # the base is zero
    assert facts.uneven == pytest.approx(0.5)
    assert facts.distance == rows["all parameters"]["distance"]
    assert facts.has_moved_tables
    assert facts.is_flat is None
    facts = facts_of(assess(PAIR).rows, None, False)
    assert facts.after is facts.uneven is facts.changes is None
    assert not facts.has_moved_tables


@pytest.mark.parametrize(
    ("measure", "height", "is_flat"),
    [("score", 0.79 * FLAT, True), ("score", 0.81 * FLAT, False), ("deviation", 0.9 * FLAT, True)],
)
def test_a_barrier_is_flat_relative_to_its_values(measure, height, is_flat):
    rows = assess(PAIR).rows
    points = [{"basis": basis, "expected": 0.8} for basis in ("raw", "aligned", "raw")]
    for raw, aligned in ((9.0, height), (height, None)):
        barrier = {"measure": measure, "raw": raw, "aligned": aligned, "points": points}
        assert facts_of(rows, barrier, False).is_flat == is_flat
