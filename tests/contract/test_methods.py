"""The contract of every registered method, for every kind of model it may meet."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from cki_rec.merging.methods import METHODS
from cki_rec.merging.methods.cki.assessment import compute_global_terms
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.mixing import mix, source_shares
from cki_rec.merging.params import MixingWeights, Params, check_weights
from cki_rec.merging.registry import MergeInputs, method
from cki_rec.merging.symmetry import Slice, Symmetry

SHAPES = {"table": (6, 4), "tower.weight": (3, 4), "tower.bias": (3,), "one": (1,), "zero": ()}
SYMMETRIES = [
    Symmetry("permutation", 3, (Slice("tower.weight", 0), Slice("tower.bias", 0))),
    Symmetry("rotation", 4, (Slice("table", 1), Slice("tower.weight", 1))),
]
KINDS = ["normal", "zeros", "constant", "one_sided"]


def draw_models(num_sources, kind="normal", dtype=torch.float32):
    noise = torch.Generator().manual_seed(num_sources)
    models = []
    for k in range(num_sources):
        scale = {"normal": 1.0, "zeros": 0.0, "constant": 0.0, "one_sided": float(k == 0)}[kind]
        shift = float(k + 1) if kind == "constant" else 0.0
        models.append(
            {
                name: (scale * torch.randn(shape, generator=noise) + shift).to(dtype)
                for name, shape in SHAPES.items()
            }
        )
    return models


def draw_counts(num_sources):
    counts = torch.arange(6 * num_sources).reshape(num_sources, 6) * 10**10
    counts[:, 0] = 0
    counts[1:, 1] = 0
    return [{"table": row} for row in counts]


def draw_gates(full):
    noise = torch.Generator().manual_seed(5)
    gates = {name: None for name in SHAPES}
    if full:
        gates["table"] = torch.randn(4, 4, generator=noise)
        gates["tower.weight"] = torch.randn(4, generator=noise)
        gates["tower.bias"] = torch.randn(1, 1, generator=noise)
        gates["one"] = torch.tensor(2.0)
    return gates


def cki_case(perspective, splice, full=True, dual="released", local="gate"):
    options = {"perspective": perspective, "splice": splice, "dual": dual, "local": local}
    return ("cki", lambda _: options, lambda _: {"gates": draw_gates(full)})


CASES = {
    "average": ("average", lambda _: {}),
    "weighted_average": ("weighted_average", lambda _: {}),
    "weighted_average_given": (
        "weighted_average",
        lambda num_sources: {"weights": [1 - (num_sources - 1) / 8] + [1 / 8] * (num_sources - 1)},
    ),
    "greedy_soup": ("greedy_soup", lambda _: {}),
    "random": ("random", lambda _: {}),
    "first": ("first", lambda _: {}),
    "filter_grafting": ("filter_grafting", lambda _: {}),
    "evidence": ("evidence", lambda _: {}),
    "sequential": ("sequential", lambda _: {}),
    "sequential_decay": ("sequential", lambda _: {"newest": 0.8, "decay": 0.5}),
    "fisher": ("fisher", lambda _: {}),
    "fisher_as_it_is": ("fisher", lambda _: {"floor": 0.0, "normalize": False}),
    **{
        f"cki_{perspective}_{rule}": cki_case(perspective, rule)
        for perspective in ("local", "global", "dual")
        for rule in ("soft", "hard")
    },
    **{
        f"cki_{dual}_{rule}": cki_case("dual", rule, dual=dual)
        for dual in ("signed", "language")
        for rule in ("soft", "hard")
    },
    "cki_language_evidence": cki_case("dual", "soft", dual="language", local="evidence"),
    "cki_no_gate": cki_case("dual", "soft", full=False),
    "cki_evidence": cki_case("dual", "soft", local="evidence"),
    "cki_evidence_hard": cki_case("local", "hard", local="evidence"),
    "cki": ("cki", lambda _: {}),
}
"""Methods that return mixing weights: title -> name, options, and inputs of its own."""
MERGES = {
    "pruning": ("pruning", lambda _: {"density": 1.0}),
    "slerp": ("slerp", lambda _: {"t": 0.3}),
    "karcher": ("karcher", lambda _: {}),
    "task_arithmetic": ("task_arithmetic", lambda num_sources: {"scale": 1 / num_sources}),
    "ties": ("ties", lambda _: {"density": 1.0, "scale": 1.0}),
    "dare": ("dare", lambda num_sources: {"density": 1.0, "scale": 1 / num_sources}),
    "dare_elect": ("dare", lambda _: {"density": 1.0, "scale": 1.0, "elect": True}),
    "della": ("della", lambda _: {"density": 1.0, "scale": 1.0}),
    "breadcrumbs": (
        "breadcrumbs",
        lambda num_sources: {"density": 1.0, "skipped": 0.0, "scale": 1 / num_sources},
    ),
    "model_stock": ("model_stock", lambda _: {}),
    "regmean": ("regmean", lambda _: {}),
    "regmean_diagonal": ("regmean", lambda _: {"correlation": 0.0}),
    "ot_fusion": ("ot_fusion", lambda _: {"temperature": 1e-3}),
    "zipit": ("zipit", lambda _: {}),
}
"""Methods that return parameters, with options that return equal sources unchanged."""
BY_DIFFERENCES = {
    *("task_arithmetic", "ties", "dare", "dare_elect", "della", "breadcrumbs"),
    *("ot_fusion",),  # a plan is never quite a permutation
}
"""Those that return them up to rounding: base + (source - base)."""
BOTH = {**CASES, **MERGES}
all_cases = pytest.mark.parametrize("case", BOTH)
weighing_cases = pytest.mark.parametrize("case", CASES)
any_number = pytest.mark.parametrize("num_sources", [1, 2, 3])


def score(params):
    return -sum(float((tensor.double() - 0.1).square().sum()) for tensor in params.values())


def draw_inputs(models, **changes):
    base = draw_models(4)[3]
    base = {n: base[n].to(t.dtype) for m in models[:1] for n, t in m.items() if n in base}
    return MergeInputs(
        **{
            "seed": 3,
            "counts": draw_counts(len(models)),
            "base": base,
            "score": score,
            "fisher": draw_fisher(len(models)),
            "moments": draw_moments(len(models)),
            "symmetries": SYMMETRIES,
            **changes,
        }
    )


def draw_fisher(num_sources):
    """Return an F with a row that matters to no source, and one that matters to the first."""
    models = draw_models(num_sources)
    fisher = [{name: tensor.square() for name, tensor in model.items()} for model in models]
    for k, source in enumerate(fisher):
        source["table"][0] = 0
        source["table"][1] *= k == 0
    return fisher


def draw_moments(num_sources):
    noise = torch.Generator().manual_seed(num_sources)
    inputs = torch.randn(9, num_sources, 5, generator=noise, dtype=torch.float64)
    inputs[:, :, -1], inputs[:, :, 0] = 1, 0  # an input that is always 0
    return {"tower.weight": torch.einsum("bki,bjm->kijm", inputs, inputs) / 9}


def call(case, models, **changes):
    name, options, *more = BOTH[case]
    inputs = {**(more[0](len(models)) if more else {}), **changes}
    return METHODS[name](models, draw_inputs(models, **inputs), **options(len(models)))


def merge(case, models, **changes):
    result = call(case, models, **changes)
    return mix(models, result) if METHODS[BOTH[case][0]].returns_weights else result


def skip_unfitting(case, num_sources):
    most = METHODS[BOTH[case][0]].max_models
    if most is not None and num_sources > most:
        pytest.skip(f"takes {most} models")


def equal_bits(left, right):
    left, right = (tensor.detach().reshape(-1).contiguous() for tensor in (left, right))
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


def test_every_method_is_tested():
    assert {name for name, *_ in BOTH.values()} == set(METHODS)
    assert all(METHODS[name].returns_weights for name, *_ in CASES.values())
    assert not any(METHODS[name].returns_weights for name, *_ in MERGES.values())


def test_declarations_are_complete():
    known = {field.name for field in fields(MergeInputs)}
    for name, declared in METHODS.items():
        assert all((declared.summary, declared.reference, declared.cost)), name
        assert not declared.summary.endswith("."), name
        assert declared.needs({}) <= set(declared.inputs) <= known, name


def test_a_missing_input_is_named():
    for name, declared in METHODS.items():
        for need in declared.needs({}):
            empty = () if need in ("counts", "fisher") else {} if need == "moments" else None
            inputs = draw_inputs(draw_models(2), **{need: empty})
            with pytest.raises(ValueError, match=f"method {name} needs"):
                declared(draw_models(2), inputs)


def test_a_method_of_ones_own_is_registered_with_its_options():
    @method(needs=("counts",), row_wise=True, reference="mine")
    def mine(models, *, counts, temperature: float = 1.0) -> MixingWeights:
        """Mix by counts."""
        return METHODS["evidence"].function(models, counts)

    try:
        declared = METHODS["mine"]
        assert (declared.summary, declared.returns_weights) == ("Mix by counts", True)
        assert dict(declared.options) == {"temperature": 1.0}
        assert declared.needs({}) == {"counts"}
        declared.check({"temperature": 2})
        with pytest.raises(ValueError, match="did you mean 'temperature'"):
            declared.check({"temperatur": 2})
        with pytest.raises(ValueError, match="parameter unknown is no input"):

            @method(reference="mine")
            def other(models, unknown) -> Params: ...

    finally:
        del METHODS["mine"]


@weighing_cases
@any_number
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_shares_and_result_is_finite(case, num_sources, kind):
    models = draw_models(num_sources, kind)
    weights = call(case, models)
    check_weights(weights, models)
    for weight in weights.values():
        assert bool((weight >= 0).all())
        torch.testing.assert_close(weight.sum(dim=0), torch.ones_like(weight[0]))
    for name, tensor in mix(models, weights).items():
        assert tensor.shape == models[0][name].shape
        assert bool(tensor.isfinite().all())
    for shares in source_shares(weights, models).values():
        assert sum(shares) == pytest.approx(1)


@all_cases
@any_number
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_identical_models_come_back_bit_for_bit(case, num_sources, dtype):
    model = draw_models(1, dtype=dtype)[0]
    model["table"][0, 0] = -0.0
    models = [model] + [{n: t.clone() for n, t in model.items()} for _ in range(num_sources - 1)]
    skip_unfitting(case, num_sources)
    for name, tensor in merge(case, models).items():
        if case in BY_DIFFERENCES:
            torch.testing.assert_close(tensor, model[name], rtol=1e-6, atol=1e-6)
        else:
            assert equal_bits(tensor, model[name]), name


@all_cases
@any_number
def test_inputs_are_untouched_and_not_aliased(case, num_sources):
    models = draw_models(num_sources)
    skip_unfitting(case, num_sources)
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    base = draw_inputs(models).base
    base_before = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in merge(case, models, base=base).values():
        tensor += 1
    assert all(torch.equal(base[name], old) for name, old in base_before.items())
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(model[name], old[name]) for name in old)


@all_cases
@pytest.mark.parametrize("num_sources", [2, 3])
def test_bfloat16_stays_bfloat16_and_is_computed_wider(case, num_sources):
    models = draw_models(num_sources, dtype=torch.bfloat16)
    skip_unfitting(case, num_sources)
    wide = [{name: tensor.float() for name, tensor in model.items()} for model in models]
    base = draw_inputs(models).base
    merged = merge(case, models, base=base)
    exact = merge(case, wide, base={name: tensor.float() for name, tensor in base.items()})
    for name, tensor in merged.items():
        assert equal_bits(tensor, exact[name].bfloat16()), name


@all_cases
def test_same_options_give_same_bits(case):
    models = draw_models(2)
    first, second = merge(case, models), merge(case, models)
    reordered = merge(case, [dict(reversed(model.items())) for model in models])
    for name, tensor in first.items():
        assert equal_bits(tensor, second[name])
        assert equal_bits(tensor, reordered[name])


@pytest.mark.parametrize(
    "case", [c for c, (name, *_) in BOTH.items() if not METHODS[name].is_ordered and name != "cki"]
)
def test_order_of_sources_does_not_matter(case):
    models, counts, fisher = draw_models(3), draw_counts(3), draw_fisher(3)
    order = [2, 0, 1]
    moments = {n: second[order][:, :, order] for n, second in draw_moments(3).items()}
    merged = merge(case, models)
    other = merge(
        case,
        [models[k] for k in order],
        counts=[counts[k] for k in order],
        fisher=[fisher[k] for k in order],
        moments=moments,
    )
    for key in merged:
        torch.testing.assert_close(other[key], merged[key])


@all_cases
@pytest.mark.parametrize("problem", ["shape", "dtype", "missing", "extra", "integer"])
def test_models_that_differ_are_refused_by_name(case, problem):
    models = draw_models(2)
    if problem == "shape":
        models[1]["tower.weight"] = torch.zeros(4, 3)
        match = r"tower\.weight.*\(3, 4\).*\(4, 3\)"
    elif problem == "dtype":
        models[1]["tower.weight"] = models[1]["tower.weight"].double()
        match = r"tower\.weight.*float32.*float64"
    elif problem == "missing":
        del models[1]["tower.weight"]
        match = r"tower\.weight"
    elif problem == "extra":
        models[1]["another"] = torch.zeros(2)
        match = "another"
    else:
        for model in models:
            model["tower.weight"] = torch.zeros(3, 4, dtype=torch.int64)
        match = r"tower\.weight.*int64"
    with pytest.raises(ValueError, match=match):
        merge(case, models)


@all_cases
def test_no_models_are_refused(case):
    name, options, *_ = BOTH[case]
    with pytest.raises(ValueError, match="no models"):
        METHODS[name]([], MergeInputs(base={"w": torch.zeros(1)}), **options(2))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_dual_weights_stay_near_one_half(full, kind):
    models = draw_models(2, kind)
    gates = {n: g * 1e4 if g is not None else None for n, g in draw_gates(full).items()}
    for weight in cki_weights(models, perspective="dual", splice="soft", gates=gates).values():
        assert float(weight.min()) >= 0.4127
        assert float(weight.max()) <= 0.5873


@pytest.mark.parametrize("perspective", ["local", "global", "dual"])
@pytest.mark.parametrize("rule", ["soft", "hard"])
def test_two_sources_give_the_pair_formula_bit_for_bit(perspective, rule):
    models, gate = draw_models(2), draw_gates(True)["table"]
    a, b = models[0]["table"], models[1]["table"]
    share_a = compute_global_terms(models)["table"][0]
    g_a, g_b = share_a.float(), (1 - share_a).float()
    l_a = torch.sigmoid((a - b).abs() @ gate.T)
    l_b = 1 - l_a
    if perspective == "dual":
        s_a, s_b = g_a * (1 - torch.exp(-g_a * l_a)), g_b * (1 - torch.exp(-g_b * l_b))
    elif perspective == "local":
        s_a, s_b = l_a, l_b
    else:
        s_a, s_b = g_a.expand(6, 4), g_b.expand(6, 4)
    alpha_b = torch.softmax(torch.stack([s_a, s_b]), 0)[1] if perspective == "dual" else s_b
    expected = a + alpha_b * (b - a) if rule == "soft" else torch.where(s_b > s_a, b, a)
    weights = call(f"cki_{perspective}_{rule}", models)
    assert equal_bits(mix(models, weights)["table"], expected)
