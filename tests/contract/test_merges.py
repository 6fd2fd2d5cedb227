"""What baselines promise beyond the contract: ends of options, closed forms, real networks."""

from __future__ import annotations

import math

import pytest
import torch
from networks import draw_batch, make_case

from cki_rec.engine.fisher import fisher_diagonal
from cki_rec.merging.methods import METHODS
from cki_rec.merging.methods.average import simplex, weighted_average
from cki_rec.merging.methods.karcher import karcher
from cki_rec.merging.methods.model_stock import model_stock
from cki_rec.merging.methods.pruning import pruning
from cki_rec.merging.methods.slerp import combine, slerp
from cki_rec.merging.methods.soups import greedy_soup
from cki_rec.merging.methods.task_vectors import (
    SCALES,
    breadcrumbs,
    dare,
    della,
    task_arithmetic,
    ties,
)
from cki_rec.merging.mixing import mix
from cki_rec.merging.registry import MergeInputs
from cki_rec.merging.statistics import linear_moments

SHAPES = {"table": (40, 8), "weight": (5, 3), "bias": (5,), "one": (1,), "zero": ()}
STATISTICS = {"norm.running_mean": (5,), "norm.running_var": (5,)}
FROM_START = {
    "task_arithmetic": lambda models, start, **o: task_arithmetic(models, start, None, **o),
    "ties": lambda models, start, **o: ties(models, start, None, **o),
    "dare": lambda models, start, **o: dare(models, start, None, 1, **o),
    "della": lambda models, start, **o: della(models, start, None, 1, **o),
    "breadcrumbs": lambda models, start, **o: breadcrumbs(models, start, None, **o),
}
WITH_DENSITY = ["ties", "dare", "della", "breadcrumbs"]


def draw(seed, scale=1.0, shapes=SHAPES):
    noise = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=noise) for name, shape in shapes.items()}


def with_statistics(model, seed):
    noise = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=noise) for name, shape in STATISTICS.items()}
    drawn["norm.running_var"] = drawn["norm.running_var"].abs() + 1e-3
    return {**model, **drawn}


def assert_equal(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if tolerance:
            torch.testing.assert_close(tensor, right[name], **tolerance, msg=name)
        else:
            assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", FROM_START)
def test_scale_0_gives_the_start(name):
    start, models = with_statistics(draw(0), 9), [with_statistics(draw(k), k) for k in (1, 2)]
    assert_equal(FROM_START[name](models, start, scale=0.0), start)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_density_0_gives_the_start(name):
    assert_equal(FROM_START[name]([draw(1), draw(2)], draw(0), density=0.0, scale=1.0), draw(0))


@pytest.mark.parametrize("name", FROM_START)
@pytest.mark.parametrize("scale", [0.3, 1.0, 1.5])
def test_sources_equal_to_the_start_change_nothing(name, scale):
    start = draw(0)
    copies = [{n: t.clone() for n, t in start.items()} for _ in range(2)]
    assert_equal(FROM_START[name](copies, start, scale=scale), start)
    assert_equal(model_stock(copies, start), start)


@pytest.mark.parametrize("name", FROM_START)
@pytest.mark.parametrize("scale", [0.4, 1.5])
def test_variances_stay_between_start_and_mean(name, scale):
    start = with_statistics(draw(0), 9)
    models = [with_statistics(draw(k), k) for k in (1, 2, 3)]
    merged = FROM_START[name](models, start, scale=scale)["norm.running_var"]
    mean = torch.stack([m["norm.running_var"] for m in models]).mean(0)
    bounds = torch.stack([start["norm.running_var"], mean])
    assert bool((merged >= bounds.amin(0) - 1e-6).all())
    assert bool((merged <= bounds.amax(0) + 1e-6).all())


@pytest.mark.parametrize("merge", [karcher, lambda models: slerp(models, 0.3)])
def test_statistics_are_averaged_on_the_sphere_too(merge):
    models = [with_statistics(draw(k), k) for k in (1, 2)]
    merged, last = merge(models)["norm.running_var"], models[1]["norm.running_var"]
    share = 0.5 if merge is karcher else 0.3
    torch.testing.assert_close(merged, models[0]["norm.running_var"].lerp(last, share))


def test_task_arithmetic_is_the_formula():
    start, models = draw(0), [draw(k) for k in (1, 2, 3)]
    expected = {n: s + 0.4 * sum(m[n] - s for m in models) for n, s in start.items()}
    assert_equal(task_arithmetic(models, start, None, 0.4), expected, rtol=1e-5, atol=1e-6)


def test_ties_by_hand():
    start = {"w": torch.zeros(5)}
    models = [
        {"w": torch.tensor([4.0, -3.0, 2.0, 1.0, 0.0])},
        {"w": torch.tensor([2.0, 5.0, -1.0, 4.0, 0.5])},
    ]
    merged = ties(models, start, None, density=0.6, scale=1.0)["w"]
    # trimmed: [4, -3, 2, 0, 0] and [2, 5, 0, 4, 0]; signs: + + + + 0
    assert merged.tolist() == [3.0, 5.0, 2.0, 4.0, 0.0]


def test_model_stock_is_the_formula():
    start = {"w": torch.tensor([1.0, 1.0, 1.0])}
    models = [
        {"w": start["w"] + torch.tensor(tau)} for tau in ([2.0, 0, 0], [1.0, 1, 0], [1.0, 0, 1])
    ]
    cosine = (2 / math.sqrt(2) + 0.5 * 1.0) / 3
    t = 3 * cosine / (1 + 2 * cosine)
    mean = sum(model["w"] for model in models) / 3
    torch.testing.assert_close(model_stock(models, start)["w"], t * mean + (1 - t) * start["w"])


def test_model_stock_goes_back_to_the_start_where_changes_are_orthogonal_or_opposite():
    start = {"w": torch.zeros(2), "v": torch.zeros(2), "unmoved": torch.zeros(2)}
    one = {"w": torch.tensor([1.0, 0.0]), "v": torch.tensor([1.0, 0.0]), "unmoved": torch.ones(2)}
    two = {
        "w": torch.tensor([0.0, 1.0]),
        "v": torch.tensor([-2.0, 0.0]),
        "unmoved": torch.zeros(2),
    }
    assert_equal(model_stock([one, two], start), start)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_stays_on_the_circle(t):
    angle = 1.1
    models = [
        {"w": torch.tensor([1.0, 0.0])},
        {"w": torch.tensor([math.cos(angle), math.sin(angle)])},
    ]
    expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)])
    torch.testing.assert_close(slerp(models, t)["w"], expected)


@pytest.mark.parametrize(
    "pair", [([0.0, 0], [2.0, 1]), ([1.0, 2], [2.0, 4]), ([1.0, 2], [-1.0, -2])]
)
def test_spherical_merges_take_the_chord_where_there_is_no_circle(pair):
    a, b = (torch.tensor(vector) for vector in pair)
    torch.testing.assert_close(slerp([{"w": a}, {"w": b}], 0.25)["w"], a + 0.25 * (b - a))
    torch.testing.assert_close(karcher([{"w": a}, {"w": b}])["w"], (a + b) / 2)


def test_karcher_of_two_is_the_middle_of_the_circle():
    one, two = draw(1), draw(2, 3.0)
    merged = karcher([one, two])
    for name in ("table", "weight", "bias"):
        unit = [model[name] / model[name].norm() for model in (one, two)]
        middle = slerp([{name: unit[0]}, {name: unit[1]}])[name]
        size = (one[name].norm() + two[name].norm()) / 2
        torch.testing.assert_close(merged[name], middle * size, rtol=1e-4, atol=1e-5)


def test_karcher_of_many_has_no_gradient():
    models = [draw(k) for k in range(5)]
    mean = karcher(models)["table"].double().flatten()
    mean = mean / mean.norm()
    total = torch.zeros_like(mean)
    for model in models:
        unit = model["table"].double().flatten()
        unit = unit / unit.norm()
        cosine = unit @ mean
        total += cosine.arccos() / (1 - cosine**2).sqrt() * (unit - cosine * mean)
    assert float(total.norm()) < 1e-5


def test_pruning_leaves_vectors_and_prunes_matrices():
    model = with_statistics(draw(1), 2)
    merged = pruning([draw_like(model), model], None, density=0.25, source=1)
    assert int((merged["table"] != 0).sum()) == 80
    assert int((merged["weight"] != 0).sum()) == 4
    kept = merged["table"] != 0
    assert model["table"][kept].abs().min() > model["table"][~kept].abs().max()
    assert torch.equal(merged["table"][kept], model["table"][kept])
    for name in ("bias", "one", "zero", *STATISTICS):
        assert torch.equal(merged[name], model[name])
    assert float(pruning([model], None, density=0.0)["table"].abs().sum()) == 0


def draw_like(model):
    return {name: torch.full_like(tensor, math.nan) for name, tensor in model.items()}


def test_pruning_and_soups_choose_by_score():
    models = [draw(k) for k in range(3)]

    def score(params):
        return -float((params["table"] - models[2]["table"]).square().sum())

    assert_equal(pruning(models, score, density=1.0), models[2])
    assert_equal(mix(models, greedy_soup(models, score)), models[2])
    assert_equal(mix(models, weighted_average(models, score)), models[2])
    assert_equal(mix(models, weighted_average(models, score, [0.0, 1.0, 0.0])), models[1])


def test_greedy_soup_keeps_sources_that_do_not_lower_the_score():
    models = [{"w": torch.tensor([value])} for value in (1.0, -0.9, 5.0)]
    weights = greedy_soup(models, lambda params: -abs(float(params["w"][0])))
    assert weights["w"].flatten().tolist() == [0.5, 0.5, 0.0]
    same = greedy_soup(models, lambda _: 0.5)
    assert same["w"].flatten().tolist() == pytest.approx([1 / 3] * 3)


def test_scale_is_chosen_by_score():
    start, models = draw(0), [draw(1), draw(2)]
    wanted = task_arithmetic(models, start, None, SCALES[3])

    def score(params):
        return -float((params["table"] - wanted["table"]).square().sum())

    assert_equal(task_arithmetic(models, start, score), wanted)


@pytest.mark.parametrize(("num_sources", "count"), [(2, 21), (3, 22), (4, 21), (8, 9), (21, 22)])
def test_grids_are_small_and_begin_even(num_sources, count):
    points = list(simplex(num_sources, 21))
    assert points[0] == [1 / num_sources] * num_sources
    assert len(points) == len({tuple(point) for point in points}) == count
    assert all(sum(point) == pytest.approx(1) for point in points)
    for k in range(num_sources):
        assert [float(k == j) for j in range(num_sources)] in points


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: weighted_average(m, None, [0.5, 0.6]), r"weights=\[0.5, 0.6\]: .*sum 1"),
        (lambda m, s: weighted_average(m, None, [1.5, -0.5]), "none negative"),
        (lambda m, s: weighted_average(m, None, [1.0]), r"one per source \(2\)"),
        (lambda m, s: weighted_average(m, None), "weights=null.*needs a score"),
        (lambda m, s: weighted_average(m, None, trials=1), "trials=1"),
        (lambda m, s: greedy_soup(m, None), "needs a score"),
        (lambda m, s: pruning(m, None), "source=null"),
        (lambda m, s: pruning(m, None, source=2), "source=2: sources are 0 to 1"),
        (lambda m, s: pruning(m, None, density=1.1, source=0), "density=1.1: must be in"),
        (lambda m, s: slerp(m, 1.5), "t=1.5"),
        (lambda m, s: slerp([*m, s]), "takes 2 models, not 3"),
        (lambda m, s: ties(m, s, None, density=-0.1, scale=1.0), "density=-0.1"),
        (lambda m, s: ties(m, s, None), "scale=null"),
        (lambda m, s: ties(m, s, None, scale=-1.0), "scale=-1.0"),
        (lambda m, s: della(m, s, None, 1, window=2.0, scale=1.0), "window=2.0"),
        (lambda m, s: breadcrumbs(m, s, None, skipped=-1.0, scale=1.0), "skipped=-1.0"),
        (lambda m, s: model_stock(m, {}), "the base .*does not fit: .*only in source 0: table"),
        (lambda m, s: ties(m, {**s, "bias": torch.zeros(2)}, None), "the base .*: bias: shapes"),
    ],
)
def test_impossible_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call([draw(1), draw(2)], draw(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if not method.returns_weights]
)
def test_entries_that_are_no_numbers_are_refused_by_name(name, value):
    models = [draw(1), draw(2)]
    models[1]["weight"][2, 1] = value
    method = METHODS[name]
    options = {"scale": 1.0} if "scale" in method.options else {}
    options = {"source": 1} if name == "pruning" else options
    inputs = inputs_with(base=draw(0))
    with pytest.raises(ValueError, match="weight: source 1 has NaN or infinite entries"):
        method(models, inputs, **options)
    if "base" in method.inputs:
        with pytest.raises(ValueError, match="weight: the base has NaN or infinite entries"):
            method([draw(1), draw(2)], inputs_with(base=models[1]), **options)


def inputs_with(**changes):
    return MergeInputs(
        counts=[{}, {}],
        moments={"x": torch.zeros(2, 1, 2, 1)},
        score=lambda _: 0.5,
        **changes,
    )


def test_unused_sources_may_hold_nan():
    models = [draw(1), draw_like(draw(1))]
    assert_equal(slerp(models, 0.0), models[0])
    assert_equal(pruning(models, None, density=1.0, source=0), models[0])
    assert_equal(mix(models, weighted_average(models, None, [1.0, 0.0])), models[0])


def test_combine_of_coefficients_that_do_not_sum_to_1():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])]
    torch.testing.assert_close(combine(tensors, [0.5, 1.0]), torch.tensor([1.5, 5.0]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ties",
            {"densty": 1},
            "no option 'densty': did you mean 'density'[?] ties takes density",
        ),
        ("ties", {"density": "high"}, "density=high: must be a number; ties takes density=0.2"),
        ("ties", {"scale": True}, "scale=true: must be a number or null"),
        ("ties", {"density": math.nan}, "density=nan"),
        ("dare", {"elect": 1}, "elect=1: must be true or false"),
        ("pruning", {"source": 0.5}, "source=0.5: must be a whole number or null"),
        ("weighted_average", {"weights": [1, "a"]}, "weights=.*must be a list"),
        ("greedy_soup", {"x": 1}, "no option 'x': greedy_soup takes none"),
        ("cki", {"perspective": "both"}, "perspective=both: must be one of local, global, dual"),
        ("cki", {"kind": "full"}, "no option 'kind'"),
    ],
)
def test_options_are_checked_by_name_and_type(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].check(options)


def test_default_options_pass_their_own_check():
    for method in METHODS.values():
        method.check(method.options)


def test_needs_follow_options():
    needs = {name: method.needs for name, method in METHODS.items()}
    assert needs["weighted_average"]({}) == {"score"}
    assert needs["weighted_average"]({"weights": [0.5, 0.5]}) == set()
    assert needs["ties"]({"scale": 1.0}) == {"base"}
    assert needs["ties"]({}) == {"base", "score"}
    assert needs["cki"]({}) == set()
    assert needs["cki"]({"local": "evidence"}) == {"counts"}


NETWORKS = ["deepfm", "dcn", "dcnv2", "din"]
ON_NETWORKS = {
    name: dict.fromkeys(method.options.keys() & {"scale", "density"}, 1.0)
    | ({"temperature": 1e-3} if name == "ot_fusion" else {})
    for name, method in METHODS.items()
}


def run_on(name, network, batch, models, **changes):
    method = METHODS[name]
    before = {n: t.clone() for n, t in network.state_dict().items()}
    inputs = MergeInputs(
        fisher=[fisher_diagonal(network, model, [batch]) for model in models],
        moments=linear_moments(network, models, [batch]).second,
        symmetries=network.symmetries(),
        seed=1,
        counts=[{} for _ in models],
        base=models[0],
        score=lambda params: -float(sum(t.double().abs().sum() for t in params.values())),
        gates=dict.fromkeys(models[0]),
    )
    assert_equal(network.state_dict(), before)
    result = method(models, inputs, **{**ON_NETWORKS[name], **changes})
    return mix(models, result) if method.returns_weights else result


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    network, schema = make_case(request.param, "mixed")
    batch = draw_batch(schema, 16)
    state = {n: t.clone() for n, t in network.state_dict().items() if t.is_floating_point()}
    return network.eval(), batch, state


@pytest.mark.parametrize("name", ON_NETWORKS)
@torch.no_grad()
def test_a_network_merged_with_itself_is_itself(case, name):
    network, batch, state = case
    models = [state, {n: t.clone() for n, t in state.items()}]
    merged = run_on(name, network, batch, models)
    assert_equal(merged, state, rtol=1e-6, atol=1e-7)
    whole = {**network.state_dict(), **merged}
    logits = torch.func.functional_call(network, whole, (batch,))
    torch.testing.assert_close(logits, network(batch))


@pytest.mark.parametrize("name", ON_NETWORKS)
@torch.no_grad()
def test_merged_networks_have_finite_scores(case, name):
    network, batch, state = case
    noise = torch.Generator().manual_seed(1)
    other = {
        n: t.abs() * torch.rand(t.shape, generator=noise)
        if n.endswith("running_var")
        else t + torch.randn(t.shape, generator=noise)
        for n, t in state.items()
    }
    changes = {"scale": 1.5} if "scale" in ON_NETWORKS[name] else {}
    merged = run_on(name, network, batch, [state, other], **changes)
    assert all(bool((t >= 0).all()) for n, t in merged.items() if n.endswith("running_var"))
    logits = torch.func.functional_call(network, {**network.state_dict(), **merged}, (batch,))
    assert bool(logits.isfinite().all())
