"""Closed forms and edges of the functions behind the methods."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cki_rec.merging.methods.ablations import first, random
from cki_rec.merging.methods.average import average
from cki_rec.merging.methods.cki.assessment import (
    compute_global_terms,
    dual_compatibility,
    entropy,
    global_compatibility,
    local_compatibility,
)
from cki_rec.merging.methods.cki.gate import (
    KINDS,
    apply_gate,
    check_gate,
    initialize_gate,
    num_gate_parameters,
)
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.methods.evidence import evidence, row_weights
from cki_rec.merging.mixing import harden, mix, override_weights, soften, source_shares
from cki_rec.merging.params import generator

cheap = hypothesis.settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
finite = st.floats(-1e6, 1e6, width=32)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# entropy and global term


def test_entropy_drops_the_maximum_and_uses_natural_logs():
    # 0..10: ten bins of one entry each, and the maximum in none
    assert entropy(torch.arange(11.0)) == pytest.approx(-10 / 11 * math.log(1 / 11), abs=1e-12)
    assert entropy(torch.tensor([0.0, 1.0, 1.0, 1.0])) == pytest.approx(math.log(4) / 4)


def test_entropy_keeps_the_maximum_where_the_last_edge_rounds_above_it():
    high = next(h for h in torch.linspace(1, 2, 99) if 10 * (h / 10) > h)
    assert entropy(torch.stack([torch.zeros(()), high])) == pytest.approx(math.log(2))
    assert entropy(torch.tensor([0.0, 1.0])) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("value", [torch.zeros(3, 2), torch.full((5,), -2.5), torch.ones(1)])
def test_entropy_of_constant_is_zero(value):
    assert entropy(value) == 0
    assert entropy(torch.empty(0, 4)) == 0


def test_entropy_of_large_tensors_is_binned_in_chunks(monkeypatch):
    weight = noise(1000)
    whole = entropy(weight)
    monkeypatch.setattr("cki_rec.merging.methods.cki.assessment._CHUNK", 7)
    assert entropy(weight) == whole


@cheap
@hypothesis.given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 20))
def test_entropy_is_bounded(values, bins):
    result = entropy(torch.tensor(values), bins)
    assert 0 <= result <= math.log(bins) + 1 / math.e  # shares sum to less than 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entropy_refuses_what_has_no_histogram(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        entropy(torch.tensor([0.0, bad]))
    models = [{"w": torch.tensor([0.0, bad])}] * 2
    with pytest.raises(ValueError, match=r"^w: "):
        compute_global_terms(models)
    with pytest.raises(ValueError, match="bins"):
        entropy(torch.ones(2), bins=0)


def test_global_terms_of_two_sum_to_one_and_follow_the_formula():
    a, b = noise(8, 4), torch.ones(8, 4).fill_diagonal_(0)
    expected = 0.3 / math.pi * math.atan(2 * (entropy(a) - entropy(b))) + 0.5
    assert global_compatibility([a, b], a=0.3, c=2).tolist() == [expected, 1 - expected]


def test_global_terms_of_three_compare_with_the_mean_of_the_others():
    tensors = [noise(30, seed=k) ** (2 * k + 1) for k in range(3)]
    h = [entropy(t) for t in tensors]
    expected = [
        0.4 / math.pi * math.atan(500 * (h[k] - (sum(h) - h[k]) / 2)) + 0.5 for k in range(3)
    ]
    torch.testing.assert_close(
        global_compatibility(tensors), torch.tensor(expected, dtype=torch.float64)
    )
    assert global_compatibility(tensors[:1]).tolist() == [0.5]
    with pytest.raises(ValueError, match="between 0 and 1"):
        global_compatibility(tensors, a=1.5)


# gate and local term


def test_gates_agree_where_they_describe_the_same_matrix():
    delta, diagonal = noise(5, 3).abs(), torch.tensor([1.0, -2.0, 0.5])
    full = apply_gate(delta, torch.diag(diagonal))
    torch.testing.assert_close(apply_gate(delta, diagonal), full)
    torch.testing.assert_close(
        apply_gate(delta, torch.tensor(3.0)), apply_gate(delta, torch.eye(3) * 3)
    )
    gate = noise(3, 3)
    torch.testing.assert_close(apply_gate(delta, gate)[1, 2], (delta[1] * gate[2]).sum())
    assert apply_gate(torch.ones(4), torch.tensor([[2.0]])).tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 5), (7,), ()])
def test_initial_gates_fit_and_have_the_announced_size(kind, shape):
    gate = initialize_gate(shape, kind, 0, "w")
    size = num_gate_parameters(shape, kind)
    if kind == "none":
        assert gate is None
        assert size == 0
        return
    check_gate("w", shape, gate)
    assert size == (0 if kind == "identity" else gate.numel())
    delta = torch.ones(shape)
    assert apply_gate(delta, gate).shape == delta.shape
    if kind not in ("full", "affine", "low_rank"):
        assert torch.equal(apply_gate(delta, gate), delta)


def test_full_gate_is_xavier_uniform_and_named_by_its_tensor():
    gate = initialize_gate((3, 64), "full", 1, "w")
    bound = math.sqrt(6 / 128)
    assert 0.95 * bound < float(gate.abs().max()) <= bound
    assert float(gate.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(gate, initialize_gate((3, 64), "full", 1, "w"))
    assert not torch.equal(gate, initialize_gate((3, 64), "full", 1, "v"))
    assert not torch.equal(gate, initialize_gate((3, 64), "full", 2, "w"))
    with pytest.raises(ValueError, match=r"w: .*'round'"):
        initialize_gate((3, 4), "round", 0, "w")


def test_generator_does_not_change_between_versions():
    drawn = torch.randint(1000, (3,), generator=generator(0, "w")).tolist()
    assert drawn == [899, 6, 242]


def test_local_terms_of_two_are_complementary_and_of_three_follow_the_formula():
    w, gate = [noise(4, 3, seed=k) for k in range(3)], noise(3, 3, seed=9)
    pair = local_compatibility(w[:2], gate)
    torch.testing.assert_close(pair[0], torch.sigmoid((w[0] - w[1]).abs() @ gate.T))
    assert torch.equal(pair[1], 1 - pair[0])
    triple = local_compatibility(w, gate)
    assert triple.shape == (3, 4, 3)
    torch.testing.assert_close(triple[1], torch.sigmoid((w[1] - (w[0] + w[2]) / 2).abs() @ gate.T))
    assert local_compatibility(w, None).unique().tolist() == [0.5]
    assert local_compatibility(w[:1], gate).unique().tolist() == [0.5]


def test_weights_are_differentiable_in_every_gate():
    models = [
        {"w": noise(3, 2, seed=k).double(), "b": noise(3, seed=k + 5).double()} for k in range(2)
    ]
    terms = compute_global_terms(models)

    def merged(full, scalar):
        gates = {"w": full, "b": scalar}
        weights = cki_weights(
            models, perspective="dual", splice="soft", gates=gates, global_terms=terms
        )
        return tuple(mix(models, weights).values())

    full = noise(2, 2, seed=3).double().requires_grad_()
    scalar = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merged, (full, scalar))
    gradients = torch.autograd.grad(merged(full, scalar)[0].sum(), full)
    assert float(gradients[0].abs().min()) > 0


def test_dual_score_follows_the_formula():
    terms, local = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([[0.2], [0.8]])
    scores = dual_compatibility(terms, local)
    assert scores.dtype == torch.float32
    expected = [g * (1 - math.exp(-g * x)) for g, x in ((0.3, 0.2), (0.7, 0.8))]
    torch.testing.assert_close(scores, torch.tensor(expected)[:, None])


# evidence


def test_row_weights_are_exact_shares():
    counts = torch.tensor([[10**12, 0, 0, 3], [1, 7, 0, 1]])
    weights = row_weights(counts)
    assert weights[:, 1].tolist() == [0, 1]
    assert weights[:, 2].tolist() == [0.5, 0.5]
    assert weights[:, 3].tolist() == [0.75, 0.25]
    assert weights[1, 0] == 1 / (10**12 + 1)


@cheap
@hypothesis.given(
    st.integers(1, 4).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(0, 10**12), min_size=k, max_size=k), min_size=1, max_size=8
        )
    )
)
def test_row_weights_are_shares_of_any_counts(rows):
    counts = torch.tensor(rows).T
    weights = row_weights(counts)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(len(rows), dtype=torch.float64))
    alone = (counts > 0).sum(dim=0) == 1
    assert torch.equal(weights[:, alone] == 1, counts[:, alone] > 0)


def test_evidence_takes_one_sided_rows_whole_and_averages_the_rest():
    models = [{"t": noise(4, 3, seed=k), "f": noise(4, seed=k), "w": noise(2)} for k in range(3)]
    counts = [
        {"t": torch.tensor(n), "f": torch.tensor(n)} for n in ([5, 0, 0, 2], [0, 0, 9, 2], [0] * 4)
    ]
    weights = evidence(models, counts)
    assert weights["t"].shape == (3, 4, 1)
    assert weights["f"].shape == (3, 4)
    assert weights["w"].shape == (3, 1)
    merged = mix(models, weights)["t"]
    assert torch.equal(merged[0], models[0]["t"][0])
    assert torch.equal(merged[2], models[1]["t"][2])
    torch.testing.assert_close(merged[1], sum(m["t"][1] for m in models) / 3)
    torch.testing.assert_close(merged[3], (models[0]["t"][3] + models[1]["t"][3]) / 2)


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        ([{"t": torch.ones(3)}], "1 sources for 2 models"),
        ([{"t": torch.ones(3)}, {}], "t: source 1 has no counts"),
        ([{"x": torch.ones(3)}] * 2, "x: has counts but is no parameter"),
        ([{"t": torch.ones(4)}] * 2, r"t: counts \(4,\)"),
        ([{"t": torch.tensor([1, -1, 1])}] * 2, "t: counts must be finite and not negative"),
        ([{"t": torch.tensor([1, math.inf, 1])}] * 2, "t: counts must be finite"),
    ],
)
def test_counts_that_do_not_fit_are_refused_by_name(counts, match):
    with pytest.raises(ValueError, match=match):
        evidence([{"t": noise(3, 2)}] * 2, counts)


def test_cki_takes_evidence_as_the_local_term_of_tables():
    models = [{"t": noise(3, 2, seed=k), "w": noise(3, 2, seed=k + 5)} for k in range(2)]
    counts = [{"t": torch.tensor(n)} for n in ([1, 0, 3], [1, 4, 1])]
    options = {"splice": "soft", "gates": {"w": torch.ones(())}, "counts": counts}
    local = cki_weights(models, perspective="local", **options)
    assert torch.equal(local["t"], evidence(models, counts)["t"])
    assert torch.equal(
        local["w"], local_compatibility([m["w"] for m in models], torch.tensor(1.0))
    )
    dual = cki_weights(models, perspective="dual", **options)
    terms = compute_global_terms(models)["t"]
    assert torch.equal(dual["t"], soften(dual_compatibility(terms, local["t"])))


# splicing


@cheap
@hypothesis.given(seeds, st.integers(1, 4), st.integers(1, 5))
def test_splice_equals_the_weighted_sum(seed, num_sources, size):
    models = [{"w": noise(size, 3, seed=seed + k)} for k in range(num_sources)]
    weight = torch.softmax(noise(num_sources, size, 1, seed=seed), 0)
    expected = sum(w * m["w"] for w, m in zip(weight, models, strict=True))
    torch.testing.assert_close(mix(models, {"w": weight})["w"], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_weight_one_returns_the_source_and_weight_zero_leaks_nothing(bad, source):
    models = [{"w": torch.full((4,), bad)} for _ in range(3)]
    models[source]["w"] = torch.tensor([1e-30, -0.0, 3.3, math.inf])
    weight = torch.zeros(3, 1)
    weight[source] = 1
    merged = mix(models, {"w": weight})["w"]
    assert torch.equal(merged.view(torch.int32), models[source]["w"].view(torch.int32))


@pytest.mark.parametrize("used", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_nan_of_unused_sources_does_not_reach_the_mix_of_the_others(used):
    models = [{"w": torch.tensor([k + 1.0 if k in used else math.nan])} for k in range(4)]
    weight = torch.tensor([[0.5 if k in used else 0.0] for k in range(4)])
    assert mix(models, {"w": weight})["w"].item() == sum(used) / 2 + 1
    assert mix(models, average(models))["w"].isnan().all()


def test_weight_one_wins_over_rounding_dust_of_another_source():
    models = [{"w": torch.zeros(1)}, {"w": torch.ones(1)}]
    assert mix(models, {"w": torch.tensor([[1.0], [1e-30]])})["w"].item() == 0


def test_hard_weights_are_one_hot_and_ties_go_to_the_first():
    scores = torch.tensor([[1.0, 2.0, 0.0], [1.0, 3.0, 5.0], [0.0, 3.0, 6.0]])
    assert harden(scores).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert soften(torch.zeros(2, 1)).tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 1, 1), (3, 1, 1), (2, 3, 2)])
def test_weights_that_do_not_fit_are_refused_by_name(shape):
    models = [{"w": noise(4, 2)}] * 2
    with pytest.raises(ValueError, match="w: weights of shape"):
        mix(models, {"w": torch.ones(shape)})
    with pytest.raises(ValueError, match="w: has no weights"):
        mix(models, {})
    with pytest.raises(ValueError, match="v: has weights"):
        mix(models, average(models) | {"v": torch.ones(2, 1)})


def test_source_shares_are_means_over_entries():
    models = [{"t": noise(4, 2), "w": noise(3)}] * 2
    share = torch.tensor([1.0, 0.0, 0.5, 0.5]).reshape(4, 1)
    weights = first(models) | {"t": torch.stack([share, 1 - share])}
    assert source_shares(weights, models) == {"t": [0.5, 0.5], "w": [1.0, 0.0]}


def test_override_replaces_named_weights_only():
    models = [{"w": noise(2, 2), "b": noise(2)}] * 2
    weights = average(models)
    changed = override_weights(weights, ["b"], first(models))
    assert changed["b"].tolist() == [[1], [0]]
    assert changed["w"] is weights["w"]
    assert weights["b"].tolist() == [[0.5], [0.5]]
    with pytest.raises(ValueError, match=r"^x: "):
        override_weights(weights, ["x"], first(models))


# random control, options


def test_random_weights_fill_their_range_and_depend_on_seed_and_name_only():
    models = [{"v": torch.zeros(50, 4), "w": torch.zeros(50, 4)}] * 2
    weights = random(models, seed=1)
    assert 0.41 <= float(weights["w"].min()) < 0.42
    assert 0.58 < float(weights["w"].max()) <= 0.59
    assert torch.equal(weights["w"][1], 1 - weights["w"][0])
    assert not torch.equal(weights["v"], weights["w"])
    assert not torch.equal(weights["w"], random(models, seed=2)["w"])
    alone = random([{"w": torch.zeros(50, 4)}] * 2, seed=1)
    assert torch.equal(alone["w"], weights["w"])
    triple = random([models[0]] * 3, seed=1)["w"]
    assert 0.41 / (0.41 + 2 * 0.59) <= float(triple.min())
    assert float(triple.max()) <= 0.59 / (0.59 + 2 * 0.41)
    assert float(triple.std()) > 0.01
    with pytest.raises(ValueError, match="low <= high"):
        random(models, seed=1, low=0.6, high=0.5)


def test_precomputed_global_terms_change_nothing_and_are_used():
    models = [{"w": noise(4, 3, seed=k)} for k in range(2)]
    options = {"perspective": "global", "splice": "soft", "gates": {}}
    plain = cki_weights(models, a=0.2, c=1.0, bins=5, **options)["w"]
    terms = compute_global_terms(models, a=0.2, c=1.0, bins=5)
    assert torch.equal(cki_weights(models, global_terms=terms, **options)["w"], plain)
    given = {"w": torch.tensor([0.25, 0.75])}
    used = cki_weights(models, global_terms=given, **options)["w"]
    assert used.flatten().tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"perspective": "both"}, "perspective: 'both'"),
        ({"splice": "semi"}, "splice: 'semi'"),
        ({"gates": {}}, "w: has no gate"),
        ({"gates": {"w": None, "x": None}}, "x: has a gate"),
        ({"gates": {"w": torch.ones(3, 3)}}, r"w: a gate of shape \(3, 3\)"),
        ({"gates": {"w": torch.ones(1)}}, r"w: a gate of shape \(1,\)"),
        ({"global_terms": {}}, "w: has no global term"),
        ({"global_terms": {"x": torch.ones(2)}}, "x: has a gate or a global term"),
    ],
)
def test_cki_options_that_do_not_fit_are_refused_by_name(options, match):
    models = [{"w": noise(4, 2, seed=k)} for k in range(2)]
    defaults = {"perspective": "dual", "splice": "soft", "gates": {"w": None}}
    with pytest.raises(ValueError, match=match):
        cki_weights(models, **(defaults | options))
