"""The search finds every symmetry that a network declares by hand, or a larger group."""

from __future__ import annotations

import dataclasses

import pytest
from networks import CASES, ON_MIXED, draw_batch, make_case
from plain_modules import units_of

from cki_rec.merging.discovery import find_symmetries, verify
from cki_rec.merging.discovery.parity import null_space

TITLES = [*CASES, *ON_MIXED]
FAST = ("dnn", "final_mlp", "final_mlp contexts")


def entries_of(symmetry, network):
    """Return the entries of every unit; all rows of a parameter count as no limit to rows."""
    lengths = {name: len(tensor) for name, tensor in network.state_dict().items() if tensor.ndim}
    units = []
    for unit in units_of(symmetry):
        rows: dict = {}
        for name, axis, row, place, sign in unit:
            rows.setdefault((name, axis, place, sign), set()).add(row)
        units.append(
            frozenset(
                (name, axis, row, place, sign)
                for (name, axis, place, sign), found in rows.items()
                for row in ([None] if found == set(range(lengths[name])) else found)
            )
        )
    return units


def unsigned(unit):
    """Return the entries of a unit without their signs."""
    return frozenset(entry[:4] for entry in unit)


def signed(unit):
    """Return the entries of a unit that change sign."""
    return frozenset(entry[:4] for entry in unit if entry[4])


def is_sum(pattern, others):
    """Return whether a set is a symmetric difference of some of the others."""
    elements = sorted(pattern.union(*others), key=str)

    def bits(chosen):
        return sum(1 << place for place, element in enumerate(elements) if element in chosen)

    orthogonal = null_space([bits(other) for other in others], len(elements))
    return all((bits(pattern) & vector).bit_count() % 2 == 0 for vector in orthogonal)


def contains(found, symmetry, network):
    """Return whether one of the groups, with those of signs, contains a declared one."""
    units = entries_of(symmetry, network)
    entries = {unsigned(unit) for unit in units}
    patterns = [entries_of(s, network) for s in found if s.kind == "signs"]
    for other in found:
        there = {unsigned(unit): unit for unit in entries_of(other, network)}
        if set(there) != entries or other.kind == "signs":
            continue
        if symmetry.kind == "permutation" or other.kind == "rotation":
            return True
        if symmetry.kind == "signed_permutation":
            unit = units[0]
            mine = [signed(v) for vs in patterns for v in vs if unsigned(v) <= unsigned(unit)]
            if other.kind == "signed_permutation":
                mine.append(signed(there[unsigned(unit)]))
            if is_sum(signed(unit), mine):
                return True
    return False


def check(title):
    network, schema = make_case(title, "mixed")
    batch = draw_batch(schema, 8)
    found = find_symmetries(network, batch)
    declared = [symmetry for symmetry in network.symmetries() if symmetry.size > 1]
    missing = [symmetry for symmetry in declared if not contains(found, symmetry, network)]
    assert not missing, f"{missing}\n{found}"
    return network, batch, found


@pytest.mark.parametrize("title", FAST)
def test_declared_symmetries_are_found(title):
    network, batch, found = check(title)
    assert max(verify(network, found[:2], batch)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in TITLES if title not in FAST])
def test_all_declared_symmetries_are_found(title):
    check(title)


@pytest.mark.parametrize("title", ["fm"])
def test_declared_symmetries_pass_verification(title):
    network, schema = make_case(title, "mixed")
    assert verify(network, network.symmetries(), draw_batch(schema, 8))


def test_containment_is_strict():
    network, schema = make_case("dcn without MLP", "mixed")
    found = find_symmetries(network, draw_batch(schema, 8))
    (first, *_) = network.symmetries()
    others = [s for s in found if not contains([s], first, network)]
    assert len(others) == len(found) - 1
    assert not contains(others, first, network)
    weaker = [dataclasses.replace(s, kind="signed_permutation") for s in found]
    assert first.kind == "rotation"
    assert not contains(weaker, first, network)
    assert is_sum(frozenset("ab"), [frozenset("bc"), frozenset("ac")])
    assert not is_sum(frozenset("a"), [frozenset("bc"), frozenset("ac")])
