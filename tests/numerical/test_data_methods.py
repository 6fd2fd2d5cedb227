"""Methods that look at data: formulas, planted permutations, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from networks import act, draw_batch, make_case, random_element
from torch.func import functional_call

from cki_rec.merging.hidden_units import hidden_layers, unit_covariance
from cki_rec.merging.methods.fisher import fisher as merge_by_fisher
from cki_rec.merging.methods.ot_fusion import ot_fusion, sinkhorn
from cki_rec.merging.methods.regmean import regmean
from cki_rec.merging.methods.zipit import pair_up, zip_units, zipit
from cki_rec.merging.mixing import mix
from cki_rec.merging.statistics import linear_moments
from cki_rec.merging.symmetry import Slice, Symmetry

NETWORKS = [
    "deepfm",
    "dcn",
    "dcnv2",
    "dcnv2 stacked",
    "din",
    "dnn",
    "final_mlp contexts",
    "wide_deep",
]
TWO_LAYERS = [
    Symmetry("permutation", 2, (Slice("a.weight", 0), Slice("a.bias", 0), Slice("b.weight", 1)))
]


def draw(*shape, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=noise, dtype=torch.float64)


class Planted:
    """A network's parameters, and the same with its hidden units in another order."""

    def __init__(self, title, num_sources=2):
        self.network, schema = make_case(title, "mixed")
        self.network.eval()
        self.batch = draw_batch(schema, 256)
        state = self.network.state_dict()
        self.symmetries = self.network.symmetries()
        units = [s for s in self.symmetries if hidden_layers(state, [s])]
        assert units
        noise = torch.Generator().manual_seed(1)
        self.models = [{n: t.clone() for n, t in state.items()}]
        for _ in range(num_sources - 1):
            moved = dict(state)
            for symmetry in units:
                element = random_element(symmetry, noise).abs().float()  # no signs
                moved = act(moved, symmetry, element)
            self.models.append(moved)

    @torch.no_grad()
    def score(self, params):
        return functional_call(self.network, params, (self.batch,))

    def moments(self, models=None):
        return linear_moments(self.network, models or self.models, [self.batch]).second


def test_fisher_weights_are_the_formula():
    models = [{"w": draw(3, 2, seed=k)} for k in range(3)]
    fisher = [{"w": draw(3, 2, seed=k).square()} for k in range(3)]
    found = mix(models, merge_by_fisher(models, fisher, floor=0.0, normalize=False))["w"]
    above = sum(f["w"] * m["w"] for f, m in zip(fisher, models, strict=True))
    torch.testing.assert_close(found, above / sum(f["w"] for f in fisher))


def test_fisher_norms_do_not_count_but_when_asked_to():
    models = [{"w": draw(4, seed=k)} for k in range(2)]
    fisher = [{"w": draw(4, seed=k).square() + 0.1} for k in range(2)]
    louder = [fisher[0], {"w": 1e5 * fisher[1]["w"]}]
    same = [merge_by_fisher(models, f)["w"] for f in (fisher, louder)]
    torch.testing.assert_close(*same)
    one = merge_by_fisher(models, louder, normalize=False)["w"]
    assert float(one[1].min()) > 0.99
    assert bool((one != same[0]).all())


def test_fisher_floor_averages_what_matters_to_nobody():
    models, fisher = [{"w": draw(2)}] * 2, [{"w": torch.tensor([1.0, 0])}, {"w": torch.zeros(2)}]
    for floor in (0.0, 1e-6):
        weights = merge_by_fisher(models, fisher, floor=floor)["w"]
        assert weights[:, 1].tolist() == [0.5, 0.5]
        assert float(weights[0, 0]) == pytest.approx(1, abs=1e-5)


def test_buffers_without_fisher_are_averaged():
    models = [{"w": draw(2), "running_var": draw(2, seed=k)} for k in range(2)]
    weights = merge_by_fisher(models, [{"w": torch.ones(2)}] * 2)
    assert weights["running_var"].flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ([{"w": torch.ones(2)}], "of 1 sources for 2 models"),
        ([{"w": torch.ones(2)}, {}], "w: F of source 1 is none"),
        ([{"w": torch.ones(2)}, {"w": torch.ones(3)}], r"w: F of source 1 is \(3,\), not \(2,\)"),
        ([{"w": torch.ones(2)}, {"w": torch.tensor([1, math.nan])}], "w: the F of source 1 must"),
        ([{"w": torch.ones(2)}, {"w": torch.tensor([1, -1.0])}], "w: the F of source 1 must"),
    ],
)
def test_fisher_that_does_not_fit_is_named(fisher, message):
    with pytest.raises(ValueError, match=message):
        merge_by_fisher([{"w": draw(2)}] * 2, fisher)


@pytest.mark.parametrize("num_sources", [2, 3])
def test_regmean_is_least_squares_on_all_inputs(num_sources):
    inputs = draw(50, num_sources, 5)
    inputs[:, :, -1] = 1
    moments = {"a.weight": torch.einsum("bki,bjm->kijm", inputs, inputs) / len(inputs)}
    models = [
        {"a.weight": draw(3, 4, seed=k), "a.bias": draw(3, seed=9)} for k in range(num_sources)
    ]
    found = regmean(models, moments, [], correlation=1.0)
    left = torch.cat([inputs[:, k, :-1] for k in range(num_sources)])
    right = torch.cat([inputs[:, k, :-1] @ model["a.weight"].T for k, model in enumerate(models)])
    torch.testing.assert_close(found["a.weight"], torch.linalg.lstsq(left, right).solution.T)
    assert torch.equal(found["a.bias"], models[0]["a.bias"])


def test_regmean_of_no_correlation_weighs_columns():
    second = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    second[0, :, 0], second[1, :, 1] = draw(3, 3), draw(3, 3, seed=1)
    for k, squares in enumerate(([3.0, 1.0, 1.0], [1.0, 1.0, 1.0])):
        second[k, :, k].diagonal().copy_(torch.tensor(squares))
    models = [{"a.weight": draw(4, 2, seed=k)} for k in range(2)]
    found = regmean(models, {"a.weight": second}, [], correlation=0.0)["a.weight"]
    one, other = (model["a.weight"] for model in models)
    torch.testing.assert_close(found[:, 0], 0.75 * one[:, 0] + 0.25 * other[:, 0])
    torch.testing.assert_close(found[:, 1], 0.5 * (one + other)[:, 1])


def test_regmean_keeps_the_mean_where_there_are_no_inputs():
    models = [{"a.weight": draw(4, 2, seed=k)} for k in range(2)]
    found = regmean(models, {"a.weight": torch.zeros(2, 3, 2, 3)}, [])["a.weight"]
    torch.testing.assert_close(found, (models[0]["a.weight"] + models[1]["a.weight"]) / 2)


def test_regmean_weighs_rows_by_counts():
    models = [{"table": draw(3, 2, seed=k)} for k in range(2)]
    counts = [{"table": torch.tensor([3, 0, 0])}, {"table": torch.tensor([1, 5, 0])}]
    found = regmean(models, {}, counts)["table"]
    one, other = (model["table"] for model in models)
    torch.testing.assert_close(found[0], 0.75 * one[0] + 0.25 * other[0])
    assert torch.equal(found[1], other[1])
    torch.testing.assert_close(found[2], 0.5 * (one + other)[2])


@pytest.mark.parametrize("temperature", [1e-2, 0.1, 10.0])
def test_plans_are_doubly_stochastic(temperature):
    plan = sinkhorn(draw(6, 6).square(), temperature, 10_000)
    torch.testing.assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-3, rtol=0)


def test_plans_go_from_uniform_to_the_best_permutation():
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    points = draw(5, 3)
    cost = torch.cdist(points[order], points).square()
    cold, hot = sinkhorn(cost, 1e-3), sinkhorn(cost, 1e4)
    torch.testing.assert_close(cold, torch.eye(5, dtype=torch.float64)[order])
    torch.testing.assert_close(hot, torch.full_like(hot, 0.2), atol=1e-3, rtol=0)
    assert sinkhorn(torch.zeros(2, 2), 0.1).tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("title", NETWORKS)
@pytest.mark.parametrize("num_sources", [2, 3])
def test_transport_undoes_permutations(title, num_sources):
    case = Planted(title, num_sources)
    merged = ot_fusion(case.models, case.symmetries, temperature=1e-4)
    for name, tensor in case.models[0].items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    average = ot_fusion(case.models, [])
    assert not torch.allclose(case.score(average), case.score(case.models[0]), atol=1e-2)


@pytest.mark.parametrize("title", NETWORKS)
@pytest.mark.parametrize("num_sources", [2, 3])
def test_zipping_undoes_permutations(title, num_sources):
    """Units that never fire are alike to it, so scores are compared, not units."""
    case = Planted(title, num_sources)
    merged = zipit(case.models, case.symmetries, case.moments())
    own = case.score(case.models[0])
    torch.testing.assert_close(case.score(merged), own, rtol=1e-4, atol=1e-4)
    average = zipit(case.models, [], {})
    assert not torch.allclose(case.score(average), own, atol=1e-2)


def test_units_of_one_model_that_are_alike_become_one():
    """Each source has one unit twice; the merge has both units, so the mean output is exact."""
    models = []
    for k in range(2):
        unit = draw(1, 3, seed=k).expand(2, 3).clone()
        bias = draw(1, seed=5 + k).expand(2).clone()
        models.append({"a.weight": unit, "a.bias": bias, "b.weight": draw(1, 2, seed=8 + k)})
    rows = draw(200, 3, seed=3)

    def hidden(model):
        return torch.relu(rows @ model["a.weight"].T + model["a.bias"])

    inputs = torch.stack([hidden(model) for model in models], 1)
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], 2)
    moments = {"b.weight": torch.einsum("bki,bjm->kijm", inputs, inputs) / len(rows)}
    merged = zipit(models, TWO_LAYERS, moments)
    outputs = [hidden(model) @ model["b.weight"].T for model in (merged, *models)]
    torch.testing.assert_close(outputs[0], (outputs[1] + outputs[2]) / 2)


def test_pairs_are_made_greedily():
    correlation = torch.eye(4, dtype=torch.float64)
    for a, b, value in ((0, 3, 0.9), (1, 3, 0.95), (0, 2, 0.1), (0, 1, 0.8)):
        correlation[a, b] = correlation[b, a] = value
    assert pair_up(correlation).tolist() == [0, 1, 0, 1]
    assert pair_up(torch.zeros(6, 6)).tolist() == [0, 1, 2, 0, 1, 2]


def test_covariance_is_that_of_the_units():
    units_BKI = torch.cat([draw(200, 2, 5) + 3, torch.ones(200, 2, 1)], 2).double()
    second = torch.einsum("bki,bjm->kijm", units_BKI, units_BKI) / 200
    expected = torch.cov(units_BKI[:, :, 1:4].flatten(1).T, correction=0)
    found = unit_covariance(second, 1, 3)
    assert found.shape == (2, 3, 2, 3)
    torch.testing.assert_close(found.flatten(2).flatten(0, 1), expected)


def test_three_sources_weigh_the_same_in_a_group():
    units = draw(1000, 4)
    order = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1]), torch.tensor([3, 2, 1, 0])]
    seen = torch.cat(
        [units[:, o] + 0.1 * draw(1000, 4, seed=k) for k, o in enumerate(order, 1)], 1
    )
    group = zip_units(torch.cov(seen.T), 3)
    assert [g.tolist() for g in group] == [o.tolist() for o in order]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("title", ["deepfm", "din"])
def test_dtypes_stay_and_one_source_comes_back(title, dtype):
    case = Planted(title)
    models = [{n: t.to(dtype) for n, t in model.items()} for model in case.models]
    moments = case.moments()
    calls = [
        lambda m: ot_fusion(m, case.symmetries),
        lambda m: zipit(m, case.symmetries, moments),
        lambda m: regmean(m, moments, []),
    ]
    for call in calls:
        merged = call(models)
        assert all(merged[n].dtype == dtype and merged[n].isfinite().all() for n in models[0])
    for call in [calls[0], lambda m: zipit(m, case.symmetries, {}), lambda m: regmean(m, {}, [])]:
        assert all(torch.equal(t, models[1][n]) for n, t in call(models[1:]).items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ot_fusion(m, [], temperature=0.0), "temperature=0.0"),
        (lambda m: ot_fusion(m, [], iterations=0), "iterations=0"),
        (lambda m: regmean(m, {}, [], correlation=1.5), "correlation=1.5"),
        (lambda m: regmean(m, {"b.weight": torch.ones(2, 2, 2, 2)}, []), "b.weight: moments"),
        (lambda m: zipit(m, TWO_LAYERS, {"b.weight": torch.ones(3, 3, 3, 3)}), "b.weight: mom"),
        (lambda m: merge_by_fisher(m, [], floor=-1.0), "floor=-1.0"),
    ],
)
def test_mistakes_are_named(call, message):
    models = [
        {"a.weight": draw(2, 3), "a.bias": draw(2), "b.weight": draw(1, 2)} for _ in range(2)
    ]
    with pytest.raises(ValueError, match=message):
        call(models)
