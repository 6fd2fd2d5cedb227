"""The search for symmetries: inputs it takes, axes it freezes, tables it does not copy."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from plain_modules import ODD, Between, NeuMF, floats, ids, independent_error, mlp
from torch import nn

from cki_rec.merging.discovery import Symmetries, find_symmetries, verify
from cki_rec.merging.discovery.parity import null_space
from cki_rec.merging.discovery.propose import Candidate, Member, NoSlices
from cki_rec.merging.discovery.trial import KINDS, Trial, draw
from cki_rec.merging.params import MergeError
from cki_rec.merging.symmetry import Slice, Symmetry


@pytest.fixture
def module():
    torch.manual_seed(0)
    return mlp(5, 4, 1)


HIDDEN = Symmetry(
    "permutation", 4, (Slice("0.weight", 0), Slice("0.bias", 0), Slice("2.weight", 1))
)


@dataclasses.dataclass(frozen=True)
class Rows:
    x: torch.Tensor
    label: str = "any"


class Reads(nn.Module):
    """Reads its inputs in different ways."""

    def __init__(self, read):
        super().__init__()
        self.mlp, self.read = mlp(5, 4, 1), read

    def forward(self, *args, **kwargs):
        return {"score": self.mlp(self.read(*args, **kwargs)), "name": "any"}


@pytest.mark.parametrize(
    ("read", "inputs"),
    [
        (lambda x: x, floats(6, 5)),
        (lambda x, y: x + y, (floats(6, 5), floats(6, 5))),
        (lambda *, x, y: x + y, {"x": floats(6, 5), "y": floats(6, 5)}),
        (lambda rows: rows.x, Rows(floats(6, 5))),
        (lambda rows: rows[0], [floats(6, 5)]),
        (lambda rows: rows[0].x, ([Rows(floats(6, 5))],)),
    ],
    ids=["a tensor", "a tuple", "a dict", "a dataclass", "a list", "a list of dataclasses"],
)
def test_inputs(read, inputs):
    (hidden,) = find_symmetries(Reads(read), inputs)
    assert (hidden.kind, hidden.size) == ("permutation", 4)
    assert {p.parameter for p in hidden.slices} == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight"}


def test_the_module_and_the_process_are_left_as_they_were():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    module[1].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = floats(6, 5)
    inputs = x.clone()
    expected = torch.get_rng_state()
    found = find_symmetries(module, x)
    verify(module, found, x)
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(x, inputs)
    assert [m.training for m in module] == [True, False, True, True]
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_the_same_seed_finds_the_same(module):
    first, second = (find_symmetries(module, floats(6, 5), seed=3) for _ in range(2))
    assert first == second
    assert first.errors == second.errors
    assert find_symmetries(module, floats(6, 5), seed=4) == first


def test_a_forward_that_writes_into_its_parameters():
    """Every trial starts from the same state."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.total = mlp(5, 4, 1), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            with torch.no_grad():
                self.total.add_(1)
            return self.mlp(x) + self.total

    module = Counts()
    found = find_symmetries(module, floats(6, 5))
    assert [(s.kind, s.size) for s in found] == [("permutation", 4)]
    assert torch.equal(module.total.detach(), torch.zeros(1))


def test_half_precision_is_searched_in_float64(module):
    found = find_symmetries(module.bfloat16(), floats(6, 5).bfloat16())
    assert len(found) == 1
    assert found.errors[0] < 1e-12


def test_casts_and_constants_of_a_shorter_type_stay_exact():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.scale = (
                nn.Linear(5, 4),
                nn.Linear(4, 1),
                floats(4, 4).float(),
            )

        def forward(self, x):
            return self.last((self.first(x).float() @ torch.ones(4, 4).half().float()).relu())

    found = find_symmetries(Mixed(), floats(6, 5))
    assert all(error < 1e-9 for error in found.errors)
    assert not any("fails" in reason for reason in found.frozen)


def test_a_constant_of_a_shorter_type_freezes_nothing():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.last(self.first(x).relu() * torch.FloatTensor([0.5]))

    found = find_symmetries(Scaled(), floats(6, 5))
    assert [(s.kind, s.size) for s in found] == [("permutation", 4)]
    assert not found.frozen


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3)])
def test_channels_pass_through_a_pooling(pool):
    module = nn.Sequential(nn.Conv2d(2, 5, 3), pool, nn.Flatten(), nn.Linear(45, 1))
    found = find_symmetries(module, floats(3, 2, 8, 8))
    assert [s.size for s in found] == [5]
    assert [(p.parameter, p.axis, p.width) for p in found[0].slices] == [
        ("0.weight", 0, 1),
        ("0.bias", 0, 1),
        ("3.weight", 1, 9),
    ]
    assert not found.frozen


class TestResult:
    def test_is_an_immutable_sequence(self, module):
        found = find_symmetries(module, floats(6, 5))
        assert isinstance(found, Symmetries)
        assert len(found) == 1
        assert list(found) == [found[0]]
        assert found[0:1] == (found[0],)
        with pytest.raises(TypeError):
            found[0] = HIDDEN

    def test_prints_a_table(self):
        torch.manual_seed(0)
        text = str(find_symmetries(NeuMF(), (ids(8), ids(8, seed=1))))
        header, *rows = text.splitlines()
        assert header.split() == ["class", "group", "size", "members"]
        assert any("mlp.0.weight axis 1 [6:12]" in row for row in rows)
        assert any(row.split()[1:3] == ["rotation", "6"] for row in rows)

    def test_prints_steps_rows_and_signs(self):
        slices = (
            Slice("a", 0, 1, 2, step=5),
            Slice("b", 1, starts=(4, 0, 7), within=((0, 2, 3),), signed=False),
        )
        text = str(Symmetries([Symmetry("signed_permutation", 3, slices)]))
        assert "signed permutation" in text
        assert "a axis 0 [1:13:5] by 2" in text
        assert "b axis 1 [4, 0, 7] of axis 0 [2:3] without signs" in text

    def test_counts_members_beyond_the_first(self):
        slices = tuple(Slice(name, 0) for name in "abcdefg")
        assert str(Symmetries([Symmetry("rotation", 3, slices)])).endswith("and 3 more")

    def test_nothing(self):
        assert str(find_symmetries(nn.Linear(3, 2), floats(4, 3))) == "no symmetries"


class TestFrozen:
    def test_operations_without_a_rule_are_named(self):
        found = find_symmetries(Between(lambda h: torch.fft.rfft(h).abs(), 9), floats(6, 5))
        (reason,) = found.frozen
        assert "first.weight axis 0" in reason
        assert "_fft_r2c" in reason
        assert {p.parameter for s in found for p in s.slices} == {
            *("last.0.weight", "last.0.bias", "last.2.weight")
        }

    def test_control_flow_that_depends_on_values_is_named(self):
        branch = Between(lambda h: h.sin() if h[:, 3].sum() > 2 else h.cos())
        found = find_symmetries(branch, floats(6, 5))
        assert any("control flow" in reason for reason in found.frozen)
        assert max(independent_error(branch, (floats(6, 5),), found, k) for k in range(4)) < 1e-9

    def test_a_failed_trace(self, module, monkeypatch):
        from cki_rec.merging.discovery import search

        def fail(graph):
            raise RuntimeError("no graph")

        monkeypatch.setattr(search, "candidates", fail)
        found = find_symmetries(module, floats(6, 5))
        assert not found
        assert found.frozen == ("everything: the trace failed (RuntimeError: no graph)",)

    def test_a_module_that_refuses_float64(self):
        def refuse(h):
            if h.dtype == torch.float64:
                raise TypeError("float32 only")
            return h

        found = find_symmetries(Between(refuse), floats(6, 5))
        assert not found
        assert "float32 only" in found.frozen[0]

    def test_refused_classes_are_named_and_split(self):
        """Half of the units have another function."""
        operation, width = ODD["half"]
        found = find_symmetries(Between(operation, width), floats(6, 5))
        assert found.frozen == (
            "first.weight axis 0 (16 units): no group leaves the outputs as they are",
        )
        assert [s.size for s in found] == [8, 8, 8]

    def test_classes_that_fail_together_are_dropped_later_first(self, module, monkeypatch):
        final, calls = Trial.final, []

        def spoiled(trial, symmetries, tolerance):
            calls.append(len(symmetries))
            return 1.0 if len(symmetries) > 1 else final(trial, symmetries, tolerance)

        monkeypatch.setattr(Trial, "final", spoiled)
        deep = mlp(5, 4, 6, 1)
        found = find_symmetries(deep, floats(6, 5))
        assert [s.size for s in found] == [4]
        assert any("fails with the others" in reason for reason in found.frozen)
        assert max(calls) == 2


class TestErrors:
    def test_a_module_that_fails_on_the_inputs(self, module):
        with pytest.raises(MergeError, match="fails on these inputs"):
            find_symmetries(module, floats(6, 4))

    def test_a_module_that_cannot_be_copied(self, module):
        module.lock = (x for x in ())
        with pytest.raises(MergeError, match="cannot be copied"):
            find_symmetries(module, floats(6, 5))

    def test_a_module_that_returns_no_tensor(self):
        with pytest.raises(MergeError, match="no tensor"):
            find_symmetries(Nothing(), floats(6, 5))


class Nothing(nn.Module):
    def forward(self, x):
        return float(x.sum())


class TestVerify:
    def test_right(self, module):
        errors = verify(module, [HIDDEN], floats(6, 5))
        assert len(errors) == 1
        assert errors[0] < 1e-12

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "rotation"},
            {"kind": "signed_permutation"},
            {"slices": HIDDEN.slices[:2]},
            {"kind": "signs"},
        ],
    )
    def test_wrong(self, module, change):
        wrong = dataclasses.replace(HIDDEN, **change)
        with pytest.raises(
            MergeError, match=r"symmetry 1 \(.* 0.weight axis 0 .*changes the outputs"
        ):
            verify(module, [HIDDEN, wrong], floats(6, 5))

    def test_names_that_the_module_lacks(self, module):
        wrong = dataclasses.replace(HIDDEN, slices=(*HIDDEN.slices, Slice("3.weight", 1)))
        with pytest.raises(MergeError, match=r"no parameter 3\.weight; it has 0\.bias, 0\.weight"):
            verify(module, [wrong], floats(6, 5))

    @pytest.mark.parametrize(
        "part", [Slice("0.bias", 1), Slice("0.bias", 0, 1), Slice("0.bias", 0, step=2)]
    )
    def test_shapes_that_do_not_fit(self, module, part):
        with pytest.raises(MergeError, match="does not fit the shape"):
            verify(module, [Symmetry("permutation", 4, (part,))], floats(6, 5))

    def test_tied_tensors_by_any_name(self):
        module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
        module[1].weight = module[0].weight
        for slices in ([Slice("1.weight", 1)], [Slice("0.weight", 1), Slice("1.weight", 1)]):
            assert verify(module, [Symmetry("rotation", 4, tuple(slices))], ids(5, rows=9))

    def test_rows_of_a_table_are_not_left_out(self):
        """A swap of rows changes the outputs, though rows are not units that the search moves."""
        module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        with pytest.raises(MergeError, match="changes the outputs"):
            verify(module, [Symmetry("permutation", 9, (Slice("0.weight", 0),))], ids(5, rows=9))


class TestElements:
    @pytest.mark.parametrize("kind", ["rotation", "signed_permutation", "permutation", "signs"])
    @pytest.mark.parametrize("how", KINDS)
    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_belong_to_the_group(self, kind, how, size):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            element = draw(Symmetry(kind, size, ()), how, generator)
            torch.testing.assert_close(element @ element.T, torch.eye(size).double())
            if kind != "rotation":
                assert torch.equal(element.abs(), element.abs().round())
            if kind == "permutation":
                assert bool((element >= 0).all())
            if kind == "signs":
                assert torch.equal(element.abs(), torch.eye(size).double())
            if how == "large" and kind != "rotation":
                assert not torch.equal(element, torch.eye(size).double())

    def test_rotations_reach_both_halves(self):
        generator = torch.Generator().manual_seed(0)
        dets = {
            round(float(draw(Symmetry("rotation", 3, ()), "uniform", generator).det()))
            for _ in range(20)
        }
        assert dets == {-1, 1}


@pytest.mark.parametrize("seed", range(10))
def test_null_space_over_two(seed):
    """Checked by trying all vectors."""
    draw = random.Random(seed)
    size = draw.randint(1, 7)
    equations = [draw.randrange(1 << size) for _ in range(draw.randint(0, 6))]
    basis = null_space(equations, size)
    span = {0}
    for vector in basis:
        span |= {vector ^ other for other in span}
    expected = {
        vector
        for vector in range(1 << size)
        if all((vector & equation).bit_count() % 2 == 0 for equation in equations)
    }
    assert span == expected
    assert len(span) == 1 << len(basis)


def test_more_atoms_than_a_search_over_patterns_could_try():
    """Twelve factors: eleven independent patterns."""

    class Product(nn.Module):
        def __init__(self, factors=12):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(5, 3) for _ in range(factors))

        def forward(self, i):
            product = self.tables[0](i)
            for table in itertools.islice(self.tables, 1, None):
                product = product * table(i)
            return product.sum(-1)

    found = find_symmetries(Product(), ids(6, rows=5))
    assert [s.kind for s in found] == ["permutation", *["signs"] * 11]


def test_units_in_different_rows_are_frozen_in_words(monkeypatch):
    rows = torch.tensor([[[0], [1]]])
    member = Member("table", 1, torch.zeros_like(rows), rows, 4)
    with pytest.raises(NoSlices, match="cannot describe units in different rows of table"):
        member.row(0)

    def refuse(*_):
        member.row(0)

    monkeypatch.setattr(Candidate, "symmetries", refuse)
    found = find_symmetries(mlp(5, 8, 1), floats(20, 5))
    assert "0.weight axis 0 (8 units): the search cannot describe" in "".join(found.frozen)


def test_a_module_that_cannot_train_is_named():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.norm = mlp(5, 8, 1), nn.BatchNorm1d(5)

        def forward(self, x):
            if self.training:
                raise NotImplementedError("only for inference")
            return self.mlp(self.norm(x))

    found = find_symmetries(Refuses(), floats(20, 5))
    assert any("fails in training mode (NotImplementedError: only for" in r for r in found.frozen)
