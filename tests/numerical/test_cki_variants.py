"""Every variant of the paper's rule against its formula, written out with numpy."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from test_golden_cki import LAYERS, layer_tensors, reference_entropy

from cki_rec.merging.methods.cki.assessment import (
    Histogram,
    compute_global_terms,
    entropy,
    global_compatibility,
    histogram_bounds,
    language_shares,
    local_compatibility,
    signed_compatibility,
)
from cki_rec.merging.methods.cki.gate import (
    apply_gate,
    check_gate,
    initialize_gate,
    num_gate_parameters,
)
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.methods.filter_grafting import filter_grafting
from cki_rec.merging.mixing import mix


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(variant, a, b, gate, share):
    """Return the merged weight of a variant, in float64."""
    delta = a - b if variant == "signed" else np.abs(a - b)
    scale = {"v2": 5, "v4": 10}.get(variant, 1)
    local = sigmoid(scale * (delta @ gate.T))
    if variant == "signed":
        score_a = 1 - share * np.exp(-share * local)
        score_b = 1 - share * np.exp(share * local - 1)
        first = 1 / (1 + np.exp(score_b - score_a))
    elif variant == "v7":
        first = local
    elif variant in ("v8", "grafting"):
        first = np.full_like(a, share if variant == "v8" else round(share, 2))
    else:
        first = share * local + (1 - share)
        if variant == "v6":
            first = np.where(first > 1 - first, 1.0, 0.0)
    return first * a + (1 - first) * b


OPTIONS = {
    "signed": {"dual": "signed"},
    "v1": {"dual": "language"},
    "v2": {"dual": "language", "scale": 5.0},
    "v4": {"dual": "language", "scale": 10.0},
    "v6": {"dual": "language", "splice": "hard"},
    "v7": {"perspective": "local"},
    "v8": {"perspective": "global"},
}


def merge(variant, models, gate, **more):
    if variant == "grafting":
        weights = filter_grafting(models, more.pop("global_terms", None), **more)
    else:
        options = {"perspective": "dual", "splice": "soft", **OPTIONS[variant], **more}
        weights = cki_weights(models, gates={"weight": gate}, **options)
    return mix(models, weights)["weight"]


@pytest.mark.parametrize("variant", [*OPTIONS, "grafting"])
@pytest.mark.parametrize("layer", LAYERS)
def test_variants_on_the_golden_weights_follow_their_formula(layer, variant):
    golden = layer_tensors(layer)
    a, b, gate = golden["weight_a"], golden["weight_b"], golden["gate"]
    share = (
        0.4
        / np.pi
        * np.arctan(500 * (reference_entropy(a.numpy()) - reference_entropy(b.numpy())))
        + 0.5
    )
    wanted = reference(variant, *(t.double().numpy() for t in (a, b, gate)), share)
    models = [{"weight": w.double()} for w in (a, b)]
    terms = {"weight": global_compatibility([a, b])}
    merged = merge(variant, models, gate.double(), global_terms=terms)
    torch.testing.assert_close(merged, torch.from_numpy(wanted), atol=1e-12, rtol=0)
    single = merge(variant, [{"weight": a}, {"weight": b}], gate)
    torch.testing.assert_close(single.double(), merged, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dual", ["signed", "language"])
@pytest.mark.parametrize("rule", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["full", "affine", "low_rank", "diagonal", "scalar"])
def test_two_sources_give_the_pair_formula_bit_for_bit(dual, rule, kind):
    a, b = noise(6, 4, seed=1), noise(6, 4, seed=2)
    gate = initialize_gate((6, 4), kind, 1, "weight", rank=2)
    models = [{"weight": a}, {"weight": b}]
    share = compute_global_terms(models)["weight"][0].float()
    local = torch.sigmoid(1.0 * apply_gate(a - b if dual == "signed" else (a - b).abs(), gate))
    if dual == "signed":
        scores = [
            1 - share * torch.exp(-(share * local)),
            1 - share * torch.exp(share * local - 1),
        ]
        first, second = torch.softmax(torch.stack(scores), 0)
    else:
        first = share * local + (1 - share)
        scores = [first, 1 - first]
        second = 1 - first
    expected = a + second * (b - a) if rule == "soft" else torch.where(scores[1] > scores[0], b, a)
    options = {"perspective": "dual", "splice": rule, "dual": dual, "gates": {"weight": gate}}
    merged = mix(models, cki_weights(models, **options))["weight"]
    assert torch.equal(merged, expected)


def test_the_released_figures_of_the_unused_rule_and_the_language_rule():
    # cki.md a.7: at L = .5 load_param gives A .468 for G = .3 and .7; v1 .85, .75, .65
    half = torch.full((2, 1), 0.5, dtype=torch.float64)
    for share, signed, language in ((0.3, 0.468, 0.85), (0.5, None, 0.75), (0.7, 0.468, 0.65)):
        terms = torch.tensor([share, 1 - share], dtype=torch.float64)
        first = float(torch.softmax(signed_compatibility(terms, half), 0)[0])
        if signed:
            assert first == pytest.approx(signed, abs=6e-4)
        assert float(language_shares(terms, half)[0]) == pytest.approx(language)


def test_forms_for_more_sources_are_shares_and_hold_for_two():
    terms, local = torch.tensor([0.35, 0.6, 0.55], dtype=torch.float64), noise(3, 5).double()
    local = torch.sigmoid(local)
    shares = language_shares(terms, local)
    torch.testing.assert_close(shares[2], 0.45 * local[2] / 2)
    torch.testing.assert_close(shares.sum(0), torch.ones(5, dtype=torch.float64))
    assert float(shares.min()) >= 0
    pair = torch.tensor([0.35, 0.65], dtype=torch.float64)
    both = torch.stack([local[0], 1 - local[0]])
    torch.testing.assert_close(language_shares(pair, both)[1], (1 - pair[1]) * both[1])
    scores = signed_compatibility(terms, local)
    torch.testing.assert_close(scores[1], 1 - 0.6 * torch.exp(-0.6 * local[1]))
    assert language_shares(terms[:1], local[:1]).unique().tolist() == [1]


@pytest.mark.parametrize("shape", [(6, 5), (6,), ()])
def test_gates_of_low_rank_and_with_bias_are_what_they_stand_for(shape):
    size = shape[-1] if len(shape) > 1 else 1
    delta = noise(*shape)
    gate = initialize_gate(shape, "low_rank", 0, "w", rank=3)
    assert gate.shape == (2, size, min(3, size))
    whole = apply_gate(delta, gate[0] @ gate[1].T)
    torch.testing.assert_close(apply_gate(delta, gate), whole)
    affine = initialize_gate(shape, "affine", 0, "w")
    bias = affine[:, -1] if len(shape) > 1 else affine[0, -1]
    moved = apply_gate(delta, affine[:, :-1]) + bias
    torch.testing.assert_close(apply_gate(delta, affine), moved)
    for kind in ("low_rank", "affine"):
        drawn = initialize_gate(shape, kind, 0, "w", rank=3)
        assert drawn.numel() == num_gate_parameters(shape, kind, rank=3)
        check_gate("w", shape, drawn)


def test_initial_gates_of_low_rank_are_as_wide_as_full_ones():
    for rank in (1, 4, 64):
        u, v = initialize_gate((3, 64), "low_rank", 1, "w", rank)
        assert float((u @ v.T).square().mean()) == pytest.approx(1 / 64, rel=0.15)
    assert float(initialize_gate((3, 64), "affine", 1, "w").abs().max()) <= 1 / 8


@pytest.mark.parametrize("bad", [torch.ones(3, 2, 1), torch.ones(2, 3, 1), torch.ones(2, 4)])
def test_gates_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="w: a gate of shape"):
        check_gate("w", (4, 2), bad)


# ranges and noise


def test_ranges_cover_what_they_say():
    tensors = [torch.arange(1001.0), torch.arange(1001.0) * 2 - 500]
    assert [[float(e) for e in ends] for ends in histogram_bounds(tensors, "own")] == [
        [0, 1000],
        [-500, 1500],
    ]
    assert [[float(e) for e in ends] for ends in histogram_bounds(tensors, "shared")] == [
        [-500, 1500]
    ] * 2
    assert [[float(e) for e in ends] for ends in histogram_bounds(tensors, "quantile")] == [
        [-498, 1498]
    ] * 2
    # ten bins of 200 from -500: the first tensor lies in bins 2 to 7, 0 to 99 in the third
    shares = np.array([100, 200, 200, 200, 200, 101]) / 1001
    wanted = -(shares * np.log(shares)).sum()
    assert entropy(tensors[0], 10, histogram_bounds(tensors, "shared")[0]) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="histogram: 'all' is none of own, shared, quantile"):
        histogram_bounds(tensors, "all")


@pytest.mark.parametrize("histogram", get_args(Histogram))
def test_every_range_takes_edges(histogram):
    for shape in ((0, 3), (1,), (), (4, 2)):
        same = [torch.zeros(shape)] * 2
        assert global_compatibility(same, histogram=histogram).tolist() == [0.5, 0.5]
    bad = [torch.tensor([0.0, float("nan")]), torch.ones(2)]
    with pytest.raises(ValueError, match="NaN or infinite"):
        global_compatibility(bad, histogram=histogram)
    three = [noise(50, 4, seed=k) for k in range(3)]
    order = global_compatibility(three, histogram=histogram)
    torch.testing.assert_close(
        global_compatibility(three[::-1], histogram=histogram), order.flip(0)
    )


def test_the_range_reaches_the_weights():
    models = [{"w": noise(30, 4, seed=k) ** 3} for k in range(2)]
    terms = compute_global_terms(models, histogram="quantile")
    options = {"perspective": "global", "splice": "soft", "gates": {}}
    by_range = cki_weights(models, histogram="quantile", **options)["w"]
    assert torch.equal(by_range.flatten(), terms["w"].float())
    assert not torch.equal(by_range, cki_weights(models, **options)["w"])


def test_grafting_rounds_and_reuses_the_weights_of_a_layer():
    models = [
        {
            "a.weight": noise(9, 4, seed=k) ** (1 + 2 * k),
            "a.bias": noise(9, seed=5 - k),
            "b": noise(7),
        }
        for k in range(3)
    ]
    pair = models[:2]
    term = round(float(global_compatibility([m["a.weight"] for m in pair])[0]), 2)
    weights = filter_grafting(pair, None)
    assert weights["a.weight"].flatten().tolist() == pytest.approx([term, 1 - term])
    assert torch.equal(weights["a.bias"].flatten(), weights["a.weight"].flatten())
    assert weights["b"].flatten().tolist() == [0.5, 0.5]
    terms = global_compatibility([m["a.weight"] for m in models]).tolist()
    rounded = np.round(terms, 2)
    assert filter_grafting(models, None)["a.bias"].flatten().tolist() == pytest.approx(
        (rounded / rounded.sum()).tolist()
    )


def test_signs_matter_where_they_are_asked_for():
    a, b, gate = noise(3, 2), noise(3, 2, seed=1), noise(2, 2, seed=2)
    signed = local_compatibility([a, b], gate, signed=True, scale=5.0)
    torch.testing.assert_close(signed[0], torch.sigmoid(5 * (a - b) @ gate.T))
    triple = local_compatibility([a, b, a], gate, signed=True)
    torch.testing.assert_close(triple[1], torch.sigmoid((b - a) @ gate.T))
    with pytest.raises(ValueError, match="dual: 'sum' is none of released, signed, language"):
        cki_weights([{"w": a}], perspective="dual", splice="soft", gates={}, dual="sum")
