"""The groups that are found in plain modules: kind, size and entries."""

from __future__ import annotations

import pytest
import torch
from plain_modules import (
    DIN,
    DLRM,
    ROWS,
    Encoder,
    Experts,
    NeuMF,
    OneTable,
    Recurrent,
    Residual,
    Tied,
    TwoTowers,
    floats,
    ids,
    independent_error,
    mlp,
    units_of,
)
from torch import nn

from cki_rec.merging.discovery import find_symmetries, verify

PAIR = (ids(8), ids(8, seed=1))
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
TWO_LAYERS = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
OFFSETS = torch.arange(0, 20, 5).repeat(3, 1)


def hidden(first, last, *more):
    """Return the entries of units between two linear layers: parameter -> axis."""
    return {f"{first}.weight": 0, f"{first}.bias": 0, f"{last}.weight": 1, **dict(more)}


# title -> module, inputs, and per group: kind, size, number of such groups, parameter -> axis
CASES = {
    "mlp with batch norm": (
        lambda: mlp(5, 8, 6, 1, norm=nn.BatchNorm1d),
        (floats(8, 5),),
        [
            (
                "signed_permutation",
                8,
                1,
                hidden("0", "3", *((f"1.{key}", 0) for key in BATCH_NORM)),
            ),
            (
                "signed_permutation",
                6,
                1,
                hidden("3", "6", *((f"4.{key}", 0) for key in BATCH_NORM)),
            ),
        ],
    ),
    "residual": (
        Residual,
        (floats(8, 5),),
        [
            (
                "signed_permutation",
                8,
                1,
                {
                    **dict.fromkeys(("first.weight", "first.bias"), 0),
                    **dict.fromkeys(("block.4.weight", "block.4.bias"), 0),
                    **{f"block.0.{key}": 0 for key in BATCH_NORM},
                    **dict.fromkeys(("last.weight", "block.2.weight"), 1),
                },
            ),
            ("signed_permutation", 6, 1, hidden("block.2", "block.4")),
        ],
    ),
    "two towers": (
        TwoTowers,
        PAIR,
        [
            ("rotation", 6, 1, {"user.weight": 1, "left.0.weight": 1}),
            ("rotation", 6, 1, {"item.weight": 1, "right.0.weight": 1}),
            ("permutation", 8, 1, hidden("left.0", "left.2")),
            ("permutation", 8, 1, hidden("right.0", "right.2")),
            (
                "rotation",
                6,
                1,
                dict.fromkeys(
                    ("left.2.weight", "left.2.bias", "right.2.weight", "right.2.bias"), 0
                ),
            ),
        ],
    ),
    "gmf": (
        lambda: NeuMF(("gmf",)),
        PAIR,
        [
            (
                "permutation",
                6,
                1,
                {"user_gmf.weight": 1, "item_gmf.weight": 1, "out.weight": 1},
            ),
            ("signs", 6, 2, None),
        ],
    ),
    "ncf mlp": (
        lambda: NeuMF(("mlp",)),
        PAIR,
        [
            ("rotation", 6, 1, {"user_mlp.weight": 1, "mlp.0.weight": 1}),
            ("rotation", 6, 1, {"item_mlp.weight": 1, "mlp.0.weight": 1}),
            ("permutation", 8, 1, hidden("mlp.0", "mlp.2")),
            ("permutation", 4, 1, hidden("mlp.2", "out")),
        ],
    ),
    "neumf": (
        NeuMF,
        PAIR,
        [
            (
                "permutation",
                6,
                1,
                {"user_gmf.weight": 1, "item_gmf.weight": 1, "out.weight": 1},
            ),
            ("signs", 6, 2, None),
            ("rotation", 6, 2, None),
            ("permutation", 8, 1, hidden("mlp.0", "mlp.2")),
            ("permutation", 4, 1, hidden("mlp.2", "out")),
        ],
    ),
    "dlrm": (
        DLRM,
        (floats(4, 5), ids(3, 20), OFFSETS),
        [
            (
                "rotation",
                4,
                1,
                {
                    **{f"bags.{f}.weight": 1 for f in range(3)},
                    **{"bottom.2.weight": 0, "bottom.2.bias": 0, "top.0.weight": 1},
                },
            ),
            ("permutation", 8, 1, hidden("bottom.0", "bottom.2")),
            ("permutation", 8, 1, hidden("top.0", "top.2")),
        ],
    ),
    "din": (
        DIN,
        (ids(8), ids(8, seed=1), ids(8, 5, seed=2)),
        [
            (
                "signed_permutation",
                4,
                1,
                {"item.weight": 1, "attention.0.weight": 1, "mlp.0.weight": 1},
            ),
            ("rotation", 4, 1, {"user.weight": 1, "mlp.0.weight": 1}),
            ("permutation", 6, 1, hidden("attention.0", "attention.2")),
            ("permutation", 8, 1, hidden("mlp.0", "mlp.2")),
        ],
    ),
    "transformer": (
        Encoder,
        (ids(4, 5),),
        [
            (
                "signed_permutation",
                8,
                1,
                {
                    **{"emb.weight": 1, "norm.weight": 0, "norm.bias": 0, "out.weight": 1},
                    **dict.fromkeys(("q.weight", "k.weight", "v.weight", "feed.0.weight"), 1),
                    **dict.fromkeys(("o.weight", "o.bias"), 0),
                    **dict.fromkeys(("feed.2.weight", "feed.2.bias"), 0),
                },
            ),
            ("rotation", 4, 2, {"q.weight": 0, "q.bias": 0, "k.weight": 0, "k.bias": 0}),
            ("rotation", 4, 2, {"v.weight": 0, "v.bias": 0, "o.weight": 1}),
            (
                "permutation",
                2,
                1,
                {f"{f}.{key}": 0 for f in "qkv" for key in ("weight", "bias")} | {"o.weight": 1},
            ),
            ("permutation", 12, 1, hidden("feed.0", "feed.2")),
        ],
    ),
    "gru": (
        Recurrent,
        (ids(4, 5),),
        [
            ("rotation", 4, 1, {"emb.weight": 1, "rnn.weight_ih_l0": 1}),
            ("permutation", 6, 1, None),
        ],
    ),
    "tied": (
        Tied,
        PAIR,
        [
            (
                "rotation",
                6,
                1,
                {
                    **{"table.weight": 1, "mlp.0.weight": 1},
                    **{"mlp.2.weight": 0, "mlp.2.bias": 0},
                },
            ),
            ("permutation", 8, 1, hidden("mlp.0", "mlp.2")),
        ],
    ),
    "one table": (
        OneTable,
        (ids(8, 3),),
        [
            ("rotation", 4, 1, {"table.weight": 1, "deep.0.weight": 1}),
            ("permutation", 8, 1, hidden("deep.0", "deep.2")),
        ],
    ),
    "experts": (
        Experts,
        (floats(8, 5),),
        [
            ("permutation", 4, 3, {"first": 2, "last": 1}),
            ("permutation", 3, 1, {"first": 0, "last": 0, "gate.weight": 0, "gate.bias": 0}),
        ],
    ),
    "more experts than units": (
        lambda: Experts(6, 3, biases=True),
        (floats(8, 5),),
        [
            ("permutation", 3, 6, {"first": 2, "last": 1, "inside": 1}),
            (
                *("permutation", 6, 1),
                dict.fromkeys(
                    ("first", "last", "inside", "outside", "gate.weight", "gate.bias"), 0
                ),
            ),
        ],
    ),
}


def axes_of(symmetry):
    """Return the parameters that a symmetry moves, with their axes."""
    return {part.parameter: part.axis for part in symmetry.slices}


@pytest.fixture(scope="module")
def searched():
    """Return title -> module, inputs, symmetries; each is searched once."""
    results = {}

    def search(title):
        if title not in results:
            torch.manual_seed(0)
            make, inputs, _ = CASES[title]
            module = make()
            results[title] = module, inputs, find_symmetries(module, inputs)
        return results[title]

    return search


@pytest.mark.parametrize("title", CASES)
def test_groups(searched, title):
    _, _, symmetries = searched(title)
    expected = CASES[title][2]
    for kind, size, count, axes in expected:
        alike = [
            s
            for s in symmetries
            if (s.kind, s.size) == (kind, size) and axes in (None, axes_of(s))
        ]
        assert len(alike) == count, (kind, size, axes, str(symmetries))
    assert len(symmetries) == sum(count for *_, count, _ in expected), str(symmetries)


@pytest.mark.parametrize("title", CASES)
def test_other_code_confirms_every_group(searched, title):
    module, inputs, symmetries = searched(title)
    flat = tuple(inputs)
    for symmetry in symmetries:
        assert independent_error(module, flat, [symmetry], 1) < 1e-9, symmetry
    assert independent_error(module, flat, symmetries, 2) < 1e-9
    assert max(symmetries.errors) < 1e-9
    assert not symmetries.frozen


@pytest.mark.parametrize("title", ["gmf", "transformer", "experts"])
def test_verify_agrees(searched, title):
    module, inputs, symmetries = searched(title)
    errors = verify(module, symmetries, inputs, seed=3)
    assert len(errors) == len(symmetries)
    assert max(errors) < 1e-9


def test_offsets_of_segments(searched):
    """The halves of the first layer belong to the two tables."""
    _, _, symmetries = searched("ncf mlp")
    tables = [s for s in symmetries if s.kind == "rotation"]
    assert len(tables) == 2
    for symmetry in tables:
        (reader,) = [p for p in symmetry.slices if p.parameter == "mlp.0.weight"]
        assert (reader.start, reader.step) == (
            6 * any("item" in p.parameter for p in symmetry.slices),
            0,
        )


def test_sign_patterns_of_a_product(searched):
    """The signs of two of three factors cancel: two independent patterns, no third."""
    _, _, symmetries = searched("gmf")
    patterns = {frozenset(axes_of(s)) for s in symmetries if s.kind == "signs"}
    assert len(patterns) == 2
    assert all(len(pattern) == 2 for pattern in patterns)


def test_signs_follow_one_pattern(searched):
    """A product of two coordinates keeps its sign where both change."""
    _, _, symmetries = searched("din")
    (item,) = [s for s in symmetries if s.kind == "signed_permutation"]
    unsigned = [p for p in item.slices if not p.signed]
    assert [(p.parameter, p.start) for p in unsigned] == [("attention.0.weight", 12)]
    (first, *_) = [s for s in searched("mlp with batch norm")[2] if s.size == 8]
    assert {p.parameter for p in first.slices if p.signed} == {
        *("0.weight", "0.bias", "1.weight", "1.running_mean")
    }


def test_a_layer_norm_has_signs_of_its_own(searched):
    """Its result changes sign with its weights, and the residual stream does not."""
    _, _, symmetries = searched("transformer")
    (stream,) = [s for s in symmetries if s.kind == "signed_permutation"]
    signed = {p.parameter for p in stream.slices if p.signed}
    assert signed == {"norm.weight", "norm.bias", "feed.0.weight"}


def test_heads_are_blocks(searched):
    """Rotations act inside heads, and heads change places as wide units."""
    _, _, symmetries = searched("transformer")
    (heads,) = [s for s in symmetries if s.size == 2]
    assert {p.width for p in heads.slices} == {4}
    inside = [s for s in symmetries if s.kind == "rotation" and "o.weight" in axes_of(s)]
    assert [p.start for s in inside for p in s.slices if p.axis == 1] == [0, 4]


def test_gates_of_a_recurrent_layer_move_together(searched):
    _, _, symmetries = searched("gru")
    (state,) = [s for s in symmetries if s.kind == "permutation"]
    starts = [(p.axis, p.start) for p in state.slices if p.parameter == "rnn.weight_hh_l0"]
    assert starts == [(0, 0), (0, 6), (0, 12), (1, 0)]


def test_tied_tables_go_by_one_name(searched):
    module, _, symmetries = searched("tied")
    assert module.out.weight is module.table.weight
    assert not any(p.parameter == "out.weight" for s in symmetries for p in s.slices)


def test_experts_have_units_of_their_own(searched):
    _, _, symmetries = searched("experts")
    inside = [s for s in symmetries if s.size == 4]
    assert [s.slices[0].within for s in inside] == [((0, e, e + 1),) for e in range(3)]
    assert all(len(u) == 2 for s in inside for u in units_of(s))


def test_no_row_of_a_table_moves(searched):
    for title in CASES:
        module, _, symmetries = searched(title)
        tables = {name for name, p in module.named_parameters() if len(p) >= ROWS}
        moved = {(p.parameter, p.axis) for s in symmetries for p in s.slices}
        assert not {(name, 0) for name in tables} & moved
