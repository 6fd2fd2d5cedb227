"""Sources in one frame: planted symmetries are found again, and nothing else changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import CASES, MIXED, SLOW, act, draw_batch, make_case
from pairs import moved_tables
from samples import slow_but
from torch.func import functional_call

from cki_rec.data.schema import random_batch
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.alignment import agreement, align, table_products
from cki_rec.merging.methods.average import average
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, generator
from cki_rec.merging.statistics import linear_moments
from cki_rec.merging.symmetry import Slice, Symmetry, check_scores, random_element, transform

MODELS = ["deepfm", "dcn", "dcnv2", "din"]
all_cases = pytest.mark.parametrize("case", slow_but([c for c in CASES if c not in SLOW], CASES))
LONG = ("dlrm", "sasrec", "gru4rec")
"""Networks whose search takes seconds."""
four_models = pytest.mark.parametrize("case", MODELS)


class Subject:
    """A random network, its parameters, and moved copies of them."""

    def __init__(self, case):
        network, self.schema = make_case(case, "mixed")
        self.network = network.eval()
        self.params = {n: t.detach().clone() for n, t in network.state_dict().items()}
        self.symmetries = network.symmetries()
        self.tables = moved_tables(self.symmetries)
        self.batch = draw_batch(self.schema, 64)

    def moved(self, seed):
        """Return the parameters after random elements of all symmetries."""
        draw = generator(seed, "planted")
        return transform(
            self.params, self.symmetries, [random_element(s, draw) for s in self.symmetries]
        )

    @torch.no_grad()
    def score(self, params, batch=None):
        return functional_call(self.network, params, (batch or self.batch,))

    def align(self, models, **options):
        found = align(models, self.symmetries, table_products(models, self.tables), **options)
        pairs = zip(models, found.elements, strict=True)
        return found, [transform(m, self.symmetries, elements) for m, elements in pairs]

    def moments(self, models):
        batches = [draw_batch(self.schema, 512, seed) for seed in range(4)]
        return linear_moments(self.network, models, batches).second


def is_close(left, right, tolerance=1e-5):
    return all(torch.allclose(left[n], right[n], atol=tolerance, rtol=tolerance) for n in left)


@all_cases
def test_transform_is_the_action_of_the_symmetry(case):
    subject = Subject(case)
    for seed, symmetry in enumerate(subject.symmetries):
        element = random_element(symmetry, generator(seed, "one"))
        moved = transform(subject.params, [symmetry], [element])
        wide = {n: t.double() for n, t in subject.params.items()}
        expected = act(wide, symmetry, element)
        assert all(torch.allclose(moved[n].double(), expected[n], atol=1e-6) for n in moved)


@all_cases
def test_moved_models_score_as_before(case):
    subject = Subject(case)
    moved = subject.moved(1)
    check_scores(subject.score(moved), subject.score(subject.params), "source 0")
    batch = random_batch(subject.schema, 32, 0)
    check_scores(subject.score(moved, batch), subject.score(subject.params, batch), "source 0")


@all_cases
def test_transform_leaves_its_input_alone_and_permutes_bit_for_bit(case):
    subject = Subject(case)
    before = {name: tensor.clone() for name, tensor in subject.params.items()}
    moved = subject.moved(2)
    assert all(torch.equal(subject.params[name], before[name]) for name in before)
    for symmetry in subject.symmetries:
        if symmetry.kind != "rotation":
            for part in symmetry.slices:
                old, new = before[part.parameter], moved[part.parameter]
                rotates = any(
                    p.parameter == part.parameter and s.kind == "rotation"
                    for s in subject.symmetries
                    for p in s.slices
                )
                if not rotates:
                    assert torch.equal(
                        old.abs().flatten().sort()[0], new.abs().flatten().sort()[0]
                    )


@pytest.mark.parametrize(
    "case", slow_but([c for c, (name, _) in CASES.items() if name not in LONG], CASES)
)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_planted_elements_are_found(case, seed):
    subject = Subject(case)
    found, (first, second) = subject.align([subject.params, subject.moved(seed)], starts=16)
    assert is_close(first, subject.params, 0)
    if case == "dcnv2 mixture":  # groups inside a group: the search may end before the optimum
        assert found.agreement > found.agreement_before
        return
    assert found.agreement == pytest.approx(1, abs=1e-6)
    assert is_close(second, first)


@four_models
def test_planted_elements_are_found_by_activations(case):
    subject = Subject(case)
    models = [subject.params, subject.moved(3)]
    _, (first, second) = subject.align(models, moments=subject.moments(models), starts=4)
    torch.testing.assert_close(subject.score(second), subject.score(first))
    dead = {n for n in first if not torch.allclose(first[n], second[n], atol=1e-5)}
    for name in dead:  # units that are constant on all rows may stand in any order
        assert torch.allclose(
            first[name].flatten().sort()[0], second[name].flatten().sort()[0], atol=1e-4
        )


@all_cases
def test_equal_models_stay_as_they_are(case):
    subject = Subject(case)
    found, moved = subject.align([subject.params, dict(subject.params)])
    assert all(torch.equal(model[n], subject.params[n]) for model in moved for n in model)
    assert found.agreement_before == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("case", slow_but(["deepfm"], MODELS))
def test_three_models_come_into_one_frame_whatever_their_order(case):
    subject = Subject(case)
    models = [subject.params, subject.moved(4), subject.moved(5)]
    found, _ = subject.align(models, starts=4)
    assert found.agreement == pytest.approx(1, abs=1e-5)
    noise = torch.Generator().manual_seed(0)
    noisy = [
        {n: t + 0.02 * torch.randn(t.shape, generator=noise).to(t) for n, t in m.items()}
        for m in models
    ]
    for model in noisy:
        for name in model:
            if name.endswith("running_var"):
                model[name] = model[name].abs()
    scores = []
    for order in ([0, 1, 2], [2, 0, 1]):
        _, aligned = subject.align([noisy[k] for k in order], starts=4)
        scores.append(subject.score(mix(aligned, average(aligned))))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


UNITS = Symmetry("permutation", 4, (Slice("a.weight", 0), Slice("b.weight", 1)))


def small_models(seed, num_sources=3):
    """Return models with one layer of four units, and random moments of what reads them."""
    noise = torch.Generator().manual_seed(seed)
    models = [
        {
            "a.weight": torch.randn(4, 3, generator=noise),
            "b.weight": torch.randn(1, 4, generator=noise),
        }
        for _ in range(num_sources)
    ]
    seen = torch.randn(50, num_sources, 5, generator=noise, dtype=torch.float64)
    seen[..., -1] = 1
    return models, {"b.weight": torch.einsum("bki,bjm->kijm", seen, seen) / 50}


@pytest.mark.parametrize("seed", range(20))
def test_no_source_alone_could_agree_more_with_the_others(seed):
    models, _ = small_models(seed)
    found = align(models, [UNITS], {})
    moved = [transform(m, [UNITS], e) for m, e in zip(models, found.elements, strict=True)]
    for k, order in itertools.product(range(3), itertools.permutations(range(4))):
        other = list(moved)
        other[k] = transform(moved[k], [UNITS], [torch.eye(4, dtype=torch.float64)[list(order)]])
        assert agreement(other, [UNITS], {}) <= found.agreement + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_by_activations_no_unit_could_correlate_more_and_weights_decide_nothing(seed):
    models, moments = small_models(seed)
    second = moments["b.weight"]
    mean = second[:, :4, 0, 4]
    covariance = second[:, :4, :, :4] - torch.einsum("ki,jm->kijm", mean, mean)
    deviation = torch.einsum("kiki->ki", covariance).sqrt()
    correlation = torch.einsum("ki,kijm,jm->kjim", 1 / deviation, covariance, 1 / deviation)

    def total(elements):
        pairs = itertools.permutations(range(3), 2)
        return sum(
            float((elements[k].T @ correlation[k, j] @ elements[j]).trace()) for k, j in pairs
        )

    found = [e[0] for e in align(models, [UNITS], {}, moments, starts=3).elements]
    for k, order in itertools.product(range(3), itertools.permutations(range(4))):
        other = list(found)
        other[k] = torch.eye(4, dtype=torch.float64)[list(order)]
        assert total(other) <= total(found) + 1e-9
    others, _ = small_models(seed + 100)
    again = [e[0] for e in align(others, [UNITS], {}, moments, starts=3).elements]
    assert total(again) == pytest.approx(total(found))


@four_models
def test_alignment_never_lowers_the_agreement_and_reads_only(case):
    subject, other = Subject(case), Subject(case)
    draw = torch.Generator().manual_seed(9)
    other.params = {n: torch.randn(t.shape, generator=draw).abs() for n, t in other.params.items()}
    before = [{n: t.clone() for n, t in m.items()} for m in (subject.params, other.params)]
    found, moved = subject.align([subject.params, other.params])
    again, _ = subject.align([subject.params, other.params])
    assert found.agreement > found.agreement_before
    assert found.agreement == again.agreement
    torch.testing.assert_close(subject.score(moved[1]), subject.score(other.params))
    for model, old in zip((subject.params, other.params), before, strict=True):
        assert all(torch.equal(model[n], old[n]) for n in old)


def test_one_model_needs_no_frame():
    subject = Subject("deepfm")
    found, (moved,) = subject.align([subject.params])
    assert found.agreement == 1
    assert all(torch.equal(moved[n], subject.params[n]) for n in moved)


def test_rows_that_one_source_never_saw_have_no_say():
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    other = table.clone()
    other[3:] = 100.0
    counts = [{"t": torch.tensor([2, 1, 4, 7, 0])}, {"t": torch.tensor([1, 3, 2, 0, 5])}]
    products = table_products([{"t": table}, {"t": other}], ["t"], counts)["t"]
    weight = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0]).double()
    expected = (table.double() * weight[:, None]).T @ other.double()
    torch.testing.assert_close(products[0, 1], expected)
    torch.testing.assert_close(products[1, 0], expected.T)
    parts = [
        table_products(
            [{"t": table[rows]}, {"t": other[rows]}],
            ["t"],
            [{"t": count["t"][rows]} for count in counts],
        )["t"]
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), products)  # shards of rows add up


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_by_name(bad):
    subject = Subject("deepfm")
    broken = {name: tensor.clone() for name, tensor in subject.params.items()}
    broken["mlp.layers.0.weight"][0, 0] = bad
    with pytest.raises(ValueError, match=r"mlp\.layers\.0\.weight"):
        subject.align([subject.params, broken])
    broken = {name: tensor.clone() for name, tensor in subject.params.items()}
    broken[subject.tables[0]][0, 0] = bad
    with pytest.raises(ValueError, match=r"embedding_bags"):
        subject.align([subject.params, broken])


def test_false_symmetries_are_noticed():
    subject = Subject("dcnv2")
    lie = Symmetry("rotation", 8, (Slice(subject.tables[0], 1),))
    moved = transform(subject.params, [lie], [random_element(lie, generator(1, "lie"))])
    with pytest.raises(MergeError, match=r"source 1: alignment changed its scores"):
        check_scores(subject.score(moved), subject.score(subject.params), "source 1")


def test_zeros_and_one_unit_do_not_matter():
    subject = Subject("deepfm")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in subject.params.items()}
    found, moved = subject.align([zeros, dict(zeros)])
    assert all(not tensor.any() for tensor in moved[1].values())
    assert found.agreement == 1
    single = Symmetry("permutation", 1, (Slice("w", 0),))
    one = {"w": torch.ones(1)}
    assert align([one, {"w": -torch.ones(1)}], [single], {}).elements[1][0].tolist() == [[1.0]]


def test_mixed_schema_has_every_kind_of_field():
    assert {feature.kind for feature in MIXED.features} == {
        "categorical", "multi", "history", "numeric",
    }  # fmt: skip
    assert all(table_of(name) for name in Subject("din").tables)
