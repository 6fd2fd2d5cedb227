"""Nested symmetries: found from slices, composed in the order of the list, solved exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from cki_rec.merging.alignment import align
from cki_rec.merging.closest import polar
from cki_rec.merging.descent import Problem
from cki_rec.merging.nested import solve_jointly
from cki_rec.merging.nesting import Nest, compose, find_nests, joined
from cki_rec.merging.params import generator
from cki_rec.merging.symmetry import Slice, Symmetry, random_element, transform

GMF = [
    Symmetry("permutation", 4, (Slice("u", 1), Slice("v", 1), Slice("w", 1))),
    Symmetry("signs", 4, (Slice("v", 1), Slice("w", 1))),
    Symmetry("signs", 4, (Slice("u", 1), Slice("v", 1))),
]
HEADS = [
    *(
        Symmetry("rotation", 2, (Slice("q", 0, 2 * h), Slice("k", 0, 2 * h), Slice("c", 0, 2 * h)))
        for h in range(3)
    ),
    *(Symmetry("rotation", 2, (Slice("v", 0, 2 * h), Slice("o", 1, 2 * h))) for h in range(3)),
    Symmetry("permutation", 3, tuple(Slice(n, int(n == "o"), width=2) for n in "qkcvo")),
]
"""Attention: rotations of queries and keys (c: a bias), of values, and heads."""
STREAM = Symmetry("permutation", 5, (Slice("q", 1), Slice("k", 1), Slice("v", 1), Slice("o", 0)))
EXPERTS = [
    *(
        Symmetry(
            "signed_permutation",
            3,
            (Slice("a", 1, within=((0, e, e + 1),)), Slice("b", 0, 3 * e)),
        )
        for e in range(2)
    ),
    *(Symmetry("signs", 3, (Slice("b", 0, 3 * e),)) for e in range(2)),
    Symmetry("permutation", 2, (Slice("a", 0), Slice("b", 0, width=3))),
]
"""Experts with hidden units, some with signs: three levels."""
SHAPES = {
    "gmf": {"u": (7, 4), "v": (6, 4), "w": (1, 4)},
    "heads": {"q": (6, 5), "k": (6, 5), "c": (6,), "v": (6, 5), "o": (5, 6)},
    "experts": {"a": (2, 3, 4), "b": (6, 5)},
}
LISTS = {
    "signs last": ("gmf", GMF),
    "signs first": ("gmf", GMF[::-1]),
    "signs on both sides": ("gmf", [GMF[1], GMF[0], GMF[2]]),
    "heads last": ("heads", HEADS),
    "heads first": ("heads", HEADS[::-1]),
    "heads between": ("heads", [*HEADS[:3], HEADS[6], *HEADS[3:6]]),
    "heads and a stream": ("heads", [STREAM, *HEADS]),
    "experts last": ("experts", EXPERTS),
    "experts first": ("experts", EXPERTS[::-1]),
}
lists = pytest.mark.parametrize(("shapes", "symmetries"), LISTS.values(), ids=LISTS)


def model(shapes, seed=0):
    draw = generator(seed, shapes)
    return {n: torch.randn(s, generator=draw).double() for n, s in SHAPES[shapes].items()}


def elements_of(symmetries, seed):
    draw = generator(seed, "elements")
    return [random_element(s, draw) for s in symmetries]


def test_nests_follow_from_slices():
    nests, idle = find_nests(GMF)
    assert nests == {0: Nest(signs=(1, 2))}
    assert not idle
    nests, idle = find_nests(HEADS)
    assert nests == {6: Nest(inside=((0, 1, 2), (3, 4, 5)))}
    assert not idle
    nests, idle = find_nests(EXPERTS)
    signs = {0: Nest(signs=(2,)), 1: Nest(signs=(3,))}
    assert nests == {**signs, 4: Nest(inside=((0, 1), (2, 3)))}
    assert not idle
    assert find_nests([STREAM, HEADS[0]]) == ({}, set())  # other axes commute


@pytest.mark.parametrize(
    ("symmetries", "place"),
    [
        ([*HEADS[:2], HEADS[6]], 2),  # one head does not rotate
        ([HEADS[0], HEADS[6], *HEADS[1:3]], 1),  # rotations before and after their permutation
        ([HEADS[0], Symmetry("permutation", 2, (Slice("q", 0, 1),))], 1),  # half of a head
        ([Symmetry("permutation", 3, (Slice("q", 0),)), HEADS[0]], 0),
    ],
)
def test_permutations_that_cannot_be_composed_stay(symmetries, place):
    assert find_nests(symmetries) == ({}, {place})
    models = [model("heads"), model("heads", 1)]
    for elements in align(models, symmetries, {}).elements:
        assert torch.equal(elements[place], torch.eye(len(elements[place])).double())


@lists
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_composed_in_the_order_of_the_list(shapes, symmetries, seed):
    params = model(shapes)
    nests, _ = find_nests(symmetries)
    elements = elements_of(symmetries, seed)
    moved = transform(params, symmetries, elements)
    draw = generator(seed, "places")
    for turn in range(8):
        place = int(torch.randint(len(symmetries), (), generator=draw))
        step = random_element(symmetries[place], generator(turn, f"step {seed}"))
        moved = transform(moved, [symmetries[place]], [step])
        elements = compose(nests, elements, place, step)
        together = transform(params, symmetries, elements)
        torch.testing.assert_close(together, moved)


@lists
@pytest.mark.parametrize("seed", range(4))
def test_planted_elements_are_found(shapes, symmetries, seed):
    params = model(shapes)
    planted = transform(params, symmetries, elements_of(symmetries, seed))
    alignment = align([params, planted], symmetries, {}, anchor=0, starts=4)
    found = transform(planted, symmetries, alignment.elements[1])
    torch.testing.assert_close(found, params)
    assert alignment.agreement == pytest.approx(1)


def agreement_with(reference, view):
    return sum(float((reference[name] * view[name]).sum()) for name in view)


@pytest.mark.parametrize("kind", ["permutation", "signed_permutation"])
@pytest.mark.parametrize("seed", range(2))
def test_signs_and_permutation_are_the_best_of_all(kind, seed):
    outer = Symmetry(kind, 3, (Slice("u", 1), Slice("v", 1, signed=False), Slice("w", 1)))
    parts = [Symmetry("signs", 3, (Slice(a, 1), Slice(b, 1))) for a, b in ("uv", "vw")]
    symmetries = [outer, *parts]
    view, reference = ({n: t[:, :3] for n, t in model("gmf", s).items()} for s in (seed, seed + 9))
    nests, _ = find_nests(symmetries)
    scale = dict.fromkeys(view, 1.0)
    steps, gain = solve_jointly(symmetries, 0, nests[0], view, reference, scale)
    moved = view
    for place, step in steps:
        moved = transform(moved, [symmetries[place]], [step])
    best = agreement_with(reference, moved)
    assert gain == pytest.approx(best - agreement_with(reference, view))
    flips = [torch.tensor(f).double().diag() for f in itertools.product((1.0, -1.0), repeat=3)]
    orders = [torch.eye(3).double()[list(o)] for o in itertools.permutations(range(3))]
    own = flips if kind == "signed_permutation" else [torch.eye(3).double()]
    totals = [
        agreement_with(reference, transform(view, symmetries, [order @ sign, one, two]))
        for order, sign, one, two in itertools.product(orders, own, flips, flips)
    ]
    assert best == pytest.approx(max(totals))


@pytest.mark.parametrize("seed", range(3))
def test_heads_are_the_best_of_all(seed):
    view, reference = model("heads", seed), model("heads", seed + 9)
    nests, _ = find_nests(HEADS)
    steps, gain = solve_jointly(HEADS, 6, nests[6], view, reference, dict.fromkeys(view, 1.0))
    moved = view
    for place, step in steps:
        moved = transform(moved, [HEADS[place]], [step])
    assert agreement_with(reference, moved) == pytest.approx(
        agreement_with(reference, view) + gain
    )
    totals = []
    for order in itertools.permutations(range(3)):
        other = transform(view, HEADS[-1:], [torch.eye(3).double()[list(order)]])
        for symmetry in HEADS[:-1]:
            product = torch.zeros(2, 2, dtype=torch.float64)
            for part in symmetry.slices:
                left, right = (
                    m[part.parameter].narrow(part.axis, part.start, 2).movedim(part.axis, -1)
                    for m in (other, reference)
                )
                product += left.reshape(-1, 2).T @ right.reshape(-1, 2)
            other = transform(other, [symmetry], [polar(product)])
        totals.append(agreement_with(reference, other))
    assert agreement_with(reference, moved) == pytest.approx(max(totals))


def test_many_sign_patterns_are_found_by_turns():
    names = [f"t{n}" for n in range(12)]
    symmetries = [
        Symmetry("permutation", 5, tuple(Slice(name, 1) for name in names)),
        *(Symmetry("signs", 5, (Slice(name, 1), Slice("t11", 1))) for name in names[:-1]),
    ]
    draw = generator(0, "many")
    params = {name: torch.randn(6, 5, generator=draw).double() for name in names}
    planted = transform(params, symmetries, elements_of(symmetries, 2))
    alignment = align([params, planted], symmetries, {}, anchor=0)
    torch.testing.assert_close(transform(planted, symmetries, alignment.elements[1]), params)


def test_units_written_as_several_slices_are_joined():
    apart = Symmetry(
        "permutation",
        3,
        (*(Slice(n, 0, i, step=2) for n in "qk" for i in (1, 0)), Slice("o", 1, width=2)),
    )
    whole = joined(apart)
    assert [(p.parameter, p.width) for p in whole.slices] == [("k", 2), ("o", 2), ("q", 2)]
    element = random_element(apart, generator(1, "joined"))
    params = model("heads")
    moved = [transform(params, [s], [element]) for s in (apart, whole)]
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in params)
    assert joined(HEADS[0]) is HEADS[0]
    assert joined(STREAM) is STREAM


def test_no_step_lowers_the_objective():
    symmetries = EXPERTS
    models = [model("experts", seed) for seed in (1, 2)]
    problem = Problem.build(models, symmetries, {}, {})
    previous = problem.agreement([problem.identity()] * 2)
    assert align(models, symmetries, {}).agreement >= previous
