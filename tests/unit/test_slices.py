"""Slices and kinds of symmetries act as their definition: checked entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch

from cki_rec.merging import symmetry as module
from cki_rec.merging.params import MergeError, generator
from cki_rec.merging.perturbation import permute
from cki_rec.merging.symmetry import (
    Slice,
    Symmetry,
    random_element,
    set_units,
    transform,
    units_of,
)

SLICES = {
    "first entries": (Slice("w", 1), 3),
    "from an entry on": (Slice("w", 1, 4, 2), 3),
    "on the first axis": (Slice("w", 0, 1, 2), 2),
    "on the last of three": (Slice("w", 2, 1), 4),
    "apart": (Slice("w", 1, 1, 1, step=4), 3),
    "apart, wide": (Slice("w", 1, 0, 2, step=5), 2),
    "apart, next to each other": (Slice("w", 1, 2, 2, step=2), 4),
    "apart, first axis": (Slice("w", 0, 1, step=2), 3),
    "anywhere": (Slice("w", 1, starts=(7, 0, 3, 10)), 4),
    "anywhere, wide": (Slice("w", 1, 0, 2, starts=(9, 0, 5)), 3),
    "anywhere, first axis": (Slice("w", 0, starts=(5, 0, 2)), 3),
    "inside": (Slice("w", 1, 0, 2, within=((0, 1, 3), (2, 2, 5))), 3),
    "inside, apart": (Slice("w", 1, 1, step=3, within=((0, 2, 3),)), 3),
    "inside, anywhere": (Slice("w", 1, starts=(8, 2, 5), within=((0, 1, 5), (2, 0, 2))), 3),
}
KINDS = ("rotation", "signed_permutation", "permutation", "signs")
slices = pytest.mark.parametrize(("part", "size"), SLICES.values(), ids=SLICES)
kinds = pytest.mark.parametrize("kind", KINDS)


def tensor(dtype=torch.float64, seed=0):
    return torch.randn(6, 11, 5, generator=generator(seed, "w"), dtype=dtype)


def starts_of(part, size):
    step = part.step or part.width
    return part.starts or [part.start + unit * step for unit in range(size)]


def by_definition(old, part, element):
    """Return x'[j] = sum of x[i] Q[i, j] over units, one entry at a time."""
    new, starts = old.clone(), starts_of(part, len(element))
    spans = {axis: range(start, stop) for axis, start, stop in part.within}
    rest = [axis for axis in range(old.ndim) if axis != part.axis]
    for place in itertools.product(*(spans.get(axis, range(old.shape[axis])) for axis in rest)):
        index = [0] * old.ndim
        for axis, entry in zip(rest, place, strict=True):
            index[axis] = entry
        for j, entry in itertools.product(range(len(element)), range(part.width)):
            total = 0.0
            for i in range(len(element)):
                index[part.axis] = starts[i] + entry
                total = total + old[tuple(index)] * element[i, j]
            index[part.axis] = starts[j] + entry
            new[tuple(index)] = total
    return new


@slices
@kinds
def test_an_element_moves_units_as_defined(part, size, kind):
    symmetry = Symmetry(kind, size, (part,))
    element = random_element(symmetry, generator(3, kind))
    old = tensor()
    moved = transform({"w": old}, [symmetry], [element])["w"]
    torch.testing.assert_close(moved, by_definition(old, part, element))
    assert torch.equal(old, tensor())


@slices
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rotation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutations_and_signs_are_exact(part, size, kind, dtype):
    symmetry = Symmetry(kind, size, (part,))
    element = random_element(symmetry, generator(4, kind))
    old = tensor(dtype)
    moved = transform({"w": old}, [symmetry], [element])["w"]
    assert moved.dtype == dtype
    assert torch.equal(moved.double(), by_definition(old.double(), part, element))
    again = transform({"w": moved}, [symmetry], [element.T])["w"]
    assert torch.equal(again, old)


@slices
def test_units_are_written_where_they_are_read(part, size):
    old = tensor()
    units = units_of(old, part, size).clone()
    assert units.shape[-2:] == (part.width, size)
    values = torch.arange(units.numel(), dtype=torch.float64).reshape(units.shape)
    set_units(old, part, values)
    assert torch.equal(units_of(old, part, size), values)
    changed = old != tensor()
    assert int(changed.sum()) == units.numel()  # every entry once, no other


def test_blocks_of_rows_change_nothing(monkeypatch):
    part, size = SLICES["inside, anywhere"]
    symmetry = Symmetry("rotation", size, (part,))
    element = random_element(symmetry, generator(5, "rotation"))
    expected = transform({"w": tensor()}, [symmetry], [element])["w"]
    monkeypatch.setattr(module, "BLOCK", 2)
    actual = transform({"w": tensor()}, [symmetry], [element])["w"]
    torch.testing.assert_close(actual, expected)


def test_the_wrong_number_of_starts_is_named():
    with pytest.raises(MergeError, match="w: a slice has 2 starts, its symmetry 3 units"):
        units_of(tensor(), Slice("w", 1, starts=(0, 4)), 3)


@kinds
def test_random_elements_are_of_their_group(kind):
    symmetry = Symmetry(kind, 6, (Slice("w", 0),))
    elements = [random_element(symmetry, generator(seed, kind)) for seed in range(8)]
    for element in elements:
        torch.testing.assert_close(element.T @ element, torch.eye(6).double())
        assert kind == "rotation" or bool(((element == 0).sum(0) == 5).all())
        assert kind != "permutation" or bool((element >= 0).all())
        assert kind != "signs" or torch.equal(element, element.diagonal().diag())
    different = {tuple(element.flatten().tolist()) for element in elements}
    assert len(different) == 8


def test_signs_and_permutations_act_in_the_order_of_the_list():
    part = Slice("w", 1)
    units = Symmetry("permutation", 3, (part,))
    signs = Symmetry("signs", 3, (part,))
    order = torch.eye(3, dtype=torch.float64)[[1, 2, 0]]
    flip = torch.tensor([-1.0, 1, 1]).double().diag()
    old = tensor()
    moved = transform({"w": old}, [units, signs], [order, flip])["w"]
    torch.testing.assert_close(moved, by_definition(old, part, order @ flip))
    other = transform({"w": old}, [signs, units], [flip, order])["w"]
    assert not torch.equal(other, moved)


def test_an_ablation_keeps_signs():
    params = {"w": tensor()}
    signs = Symmetry("signs", 4, (Slice("w", 1),))
    units = Symmetry("permutation", 4, (Slice("w", 1),))
    assert torch.equal(permute(params, [signs], 1)["w"], params["w"])
    moved = permute(params, [units, signs], 1)["w"]
    assert torch.equal(moved.flatten().sort()[0], params["w"].flatten().sort()[0])
    assert not torch.equal(moved, params["w"])
