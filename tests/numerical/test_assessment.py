"""The assessment against recorded outputs, plain formulas, the method cki, and its properties."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from test_golden_cki import LAYERS, layer_tensors, reference_entropy
from torch import nn
from torch.func import functional_call

from cki_rec.merging import api, measures
from cki_rec.merging.assessment import assess
from cki_rec.merging.methods.cki.gate import initialize_gate
from cki_rec.merging.symmetry import Slice, Symmetry, random_element, transform

NET_SYMMETRIES = [
    Symmetry(
        "permutation",
        size,
        (Slice(f"{made}.weight", 0), Slice(f"{made}.bias", 0), Slice(f"{read}.weight", 1)),
    )
    for made, read, size in ((0, 2, 24), (2, 4, 12))
]


def net(seed):
    torch.manual_seed(seed)
    layers = nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 1)
    return nn.Sequential(*layers, nn.Flatten(0))


def random_models(num, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"table": (40, 8), "mlp.0.weight": (5, 8), "mlp.0.bias": (5,), "scalar": ()}
    return [
        {n: torch.randn(shape, generator=draw).to(dtype) for n, shape in shapes.items()}
        for _ in range(num)
    ]


def row_of(assessment, name, kind=None):
    rows = [r for r in assessment.rows if r["name"] == name and kind in (None, r["kind"])]
    assert len(rows) == 1, name
    return rows[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_paper_part_equals_recorded_values(layer):
    golden = layer_tensors(layer)
    names = ("weight_a", "weight_b", "gate")
    a, b, gate = (golden[name].double().numpy() for name in names)
    row = assess(
        [{"w": golden["weight_a"]}, {"w": golden["weight_b"]}], gates={"w": golden["gate"]}
    ).rows[0]
    recorded = [float(golden["entropy_a"]), float(golden["entropy_b"])]
    assert row["entropy"] == pytest.approx(recorded, abs=1e-6)
    term = float(golden["global_a"])
    assert row["global"] == pytest.approx([term, 1 - term], abs=1e-6)
    entropies = [reference_entropy(golden[name].numpy()) for name in ("weight_a", "weight_b")]
    term = 0.4 / np.pi * np.arctan(500 * (entropies[0] - entropies[1])) + 0.5
    local = 1 / (1 + np.exp(-np.abs(a - b) @ gate.T))
    scores = np.stack(
        [term * (1 - np.exp(-term * local)), (1 - term) * (1 - np.exp(-(1 - term) * (1 - local)))]
    )
    soft = np.exp(scores) / np.exp(scores).sum(0)
    hard = float((scores[0] >= scores[1]).mean())
    assert row["local"] == pytest.approx([local.mean(), 1 - local.mean()], abs=1e-5)
    assert row["dual"] == pytest.approx(scores.mean((1, 2)), abs=1e-5)
    assert row["soft"] == pytest.approx(soft.mean((1, 2)), abs=1e-5)
    assert row["hard"] == pytest.approx([hard, 1 - hard], abs=1e-6)
    ratio = (scores.min(0) / scores.max(0)).mean()
    assert row["compatibility"] == pytest.approx(ratio, abs=1e-5)
    assert row["global_compatibility"] == pytest.approx(min(term, 1 - term) / max(term, 1 - term))
    local_ratio = (np.minimum(local, 1 - local) / np.maximum(local, 1 - local)).mean()
    assert row["local_compatibility"] == pytest.approx(local_ratio, abs=1e-5)
    # the recorded model is that of these weights
    spliced = golden["spliced"].double().numpy()
    np.testing.assert_allclose(soft[0] * a + soft[1] * b, spliced, atol=1e-6)


@pytest.mark.parametrize("num_sources", [2, 3])
@pytest.mark.parametrize("gate", ["identity", "full", "low_rank", "none"])
def test_shares_are_those_of_the_method_cki(num_sources, gate):
    models = random_models(num_sources)
    options = {"gate": gate, "scale": 2.0, "a": 0.3, "bins": 7, "histogram": "shared"}
    assessment = assess(models, seed=3, **options)
    for splice in ("hard", "soft"):
        shares = api.merge(models, "cki", seed=3, splice=splice, **options).shares
        for name, expected in shares.items():
            assert row_of(assessment, name)[splice] == pytest.approx(expected, abs=1e-6)


def test_identical_models_are_compatible():
    model = net(0)
    batches = [torch.randn(50, 6), torch.randn(9, 6)]
    for num in (2, 3):
        for options in (
            {},
            {"loss": lambda output, batch: (output - batch[:, 0]).square().mean()},
            {"score": lambda params: float(params["0.weight"].sum())},
            {"symmetries": NET_SYMMETRIES},
        ):
            got = assess([model] * num, module=model, batches=batches, **options)
            for row in got.rows:
                for key in ("compatibility", "local_compatibility", "global_compatibility"):
                    assert row[key] == pytest.approx(1, abs=1e-12), (row["name"], key)
                assert row["distance"] == 0
                assert row["cosine"] == pytest.approx(1, abs=1e-12)
                assert row["hard"] == [1.0] + [0.0] * (num - 1)
                assert row["soft"] == pytest.approx([1 / num] * num)
            assert got.barrier["raw"] == pytest.approx(0, abs=1e-6)
            assert got.suggestion.startswith("The sources are equal")


@pytest.mark.parametrize("align", [None, "weights", "activations"])
def test_a_permuted_copy_agrees_after_alignment(align):
    model, draw = net(0), torch.Generator().manual_seed(5)
    elements = [random_element(s, draw) for s in NET_SYMMETRIES]
    copy = transform(model.state_dict(), NET_SYMMETRIES, elements)
    got = assess(
        [model, copy],
        symmetries=NET_SYMMETRIES,
        module=model,
        batches=[torch.randn(200, 6)],
        align=align,
    )
    for name in ("0.weight", "2.weight"):
        row = row_of(got, name)
        assert row["cosine"] < 0.3
        assert row["aligned_cosine"] == pytest.approx(1, abs=1e-9)
        assert row["aligned_distance"] == 0
        assert row["distance"] > 1
        assert row["compatibility"] == pytest.approx(1)
    assert got.barrier["raw"] > 0.1
    assert got.barrier["aligned"] == pytest.approx(0, abs=1e-9)
    assert got.suggestion.startswith("Align first")
    assert "without repair" in got.suggestion
    raw = assess([model, copy], symmetries=NET_SYMMETRIES, align="none")
    assert row_of(raw, "2.weight")["aligned_cosine"] is None
    assert row_of(raw, "2.weight")["compatibility"] < 1


def test_distances_are_those_of_plain_formulas():
    for num in (2, 3):
        models, base = random_models(num), random_models(1, seed=9)[0]
        got = assess(models, base=base)
        names = {"table": ["table"], "all parameters": list(base)}
        names["mlp.0"] = ["mlp.0.weight", "mlp.0.bias"]
        for title, members in names.items():
            flat = [torch.cat([m[n].double().reshape(-1) for n in members]) for m in models]
            start = torch.cat([base[n].double().reshape(-1) for n in members])
            pairs = list(combinations(flat, 2))
            distances = [float((a - b).norm() / ((a @ a + b @ b) / 2).sqrt()) for a, b in pairs]
            cosines = [float(torch.cosine_similarity(a, b, 0)) for a, b in pairs]
            tasks = [float(torch.cosine_similarity(a - start, b - start, 0)) for a, b in pairs]
            signs = torch.stack([(source - start).sign() for source in flat])
            conflicts = ((signs > 0).any(0) & (signs < 0).any(0)).double().mean()
            row = row_of(got, title)
            assert row["entries"] == len(start)
            assert row["distance"] == pytest.approx(np.mean(distances), abs=1e-6)
            assert row["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
            assert row["task_cosine"] == pytest.approx(np.mean(tasks), abs=1e-6)
            assert row["conflicts"] == pytest.approx(float(conflicts), abs=1e-9)


def test_groups_are_means_over_entries():
    got = assess(random_models(2))
    parts = [row_of(got, name) for name in ("mlp.0.weight", "mlp.0.bias")]
    layer = row_of(got, "mlp.0", "layer")
    for key in ("compatibility", "local_compatibility", "global_compatibility"):
        mean = sum(part[key] * part["entries"] for part in parts) / layer["entries"]
        assert layer[key] == pytest.approx(mean)
    for key in ("global", "local", "dual", "hard", "soft"):
        mean = sum(part[key][0] * part["entries"] for part in parts) / layer["entries"]
        assert layer[key][0] == pytest.approx(mean)
    assert [row["kind"] for row in got.rows] == ["tensor"] * 4 + ["layer", "model"]
    values = [row["compatibility"] for row in got.rows[:4]]
    assert values == sorted(values)
    assert len(set(values)) > 1


def test_blocks_change_nothing(monkeypatch):
    models, gate = random_models(3), initialize_gate((40, 8), "full", 1, "table")
    whole = assess(models, gates={"table": gate}, base=models[2])
    monkeypatch.setattr(measures, "BLOCK_ENTRIES", 20)
    blocks = assess(models, gates={"table": gate}, base=models[2])
    for one, other in zip(whole.rows, blocks.rows, strict=True):
        assert one["name"] == other["name"]
        for key, value in one.items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, abs=1e-5), key


def test_order_of_three_sources_only_orders_the_lists():
    models, order = random_models(3), [2, 0, 1]
    one, other = assess(models), assess([models[k] for k in order])
    for row in one.rows:
        twin = row_of(other, row["name"], row["kind"])
        for key in ("global", "local", "dual", "hard", "soft"):
            assert twin[key] == pytest.approx([row[key][k] for k in order], abs=1e-6)
        assert twin["distance"] == pytest.approx(row["distance"])


def test_half_precision_is_computed_in_float32():
    half = random_models(2, dtype=torch.bfloat16)
    wide = [{name: t.float() for name, t in model.items()} for model in half]
    one, other = assess(half).rows, assess(wide).rows
    assert one == other
    aligned = assess(
        [{n: t.bfloat16() for n, t in net(seed).state_dict().items()} for seed in (0, 1)],
        symmetries=NET_SYMMETRIES,
    )
    assert aligned.rows[-1]["aligned_cosine"] > aligned.rows[-1]["cosine"]


def test_seen_rows_are_counted():
    models = random_models(3)
    draw = torch.Generator().manual_seed(2)
    counts = [{"table": torch.randint(0, 3, (40,), generator=draw)} for _ in models]
    row = row_of(assess(models, counts=counts), "table")
    seen = torch.stack([count["table"] > 0 for count in counts])
    number = seen.sum(0)
    assert row["kind"] == "table"
    assert row["rows"] == 40
    assert row["rows_all"] == int((number == 3).sum())
    assert row["rows_some"] == int((number == 2).sum())
    assert row["rows_one"] == [int((seen[k] & (number == 1)).sum()) for k in range(3)]
    assert row["rows_none"] == int((number == 0).sum())
    assert row["rows_none"] > 0
    shares = api.merge(models, "evidence", counts=counts).shares["table"]
    assert row["evidence"] == pytest.approx(shares)
    other = row_of(assess(models, counts=counts), "mlp.0.weight")
    assert other["rows"] is other["rows_none"] is other["evidence"] is None


class Product(nn.Module):
    """f(x) = u v x: two models (u, v) and (-u, -v) are equal, and 0 in the middle."""

    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor([value])) for value in (u, v))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.u * self.v * x


def test_barrier_equals_the_closed_form():
    pair = [Product(1.5, 2.0), Product(-1.5, -2.0)]
    x = torch.randn(64)
    got = assess(pair, module=pair[0], batches=[x[:20], x[20:]], points=5).barrier
    scale = float(x.square().mean() / x.var(correction=0))
    for point, t in zip(got["points"], (0, 0.25, 0.5, 0.75, 1), strict=True):
        expected = ((1 - 2 * t) ** 2 - 1) ** 2 * scale
        assert point["fraction"] == t
        assert point["value"] == pytest.approx(expected, rel=1e-5)
    assert got["raw"] == pytest.approx(scale, rel=1e-5)
    assert got["aligned"] is None
    # with labels y = 3 x, the loss is the square of the distance
    loss = assess(
        *(pair,),
        module=pair[0],
        batches=[x[:20], x[20:]],
        loss=lambda output, batch: (output - 3 * batch).square().mean(),
        points=3,
    ).barrier
    assert loss["raw"] == pytest.approx(float((3 * x).square().mean()), rel=1e-5)
    score = assess(
        *(pair,),
        score=lambda p: -float((functional_call(pair[0], p, (x,)) - 3 * x).square().mean()),
        points=3,
    ).barrier
    assert score["raw"] == pytest.approx(loss["raw"], rel=1e-5)
    assert [score["measure"], loss["measure"]] == ["score", "loss"]


def test_a_network_that_is_linear_in_its_parameters_has_no_barrier():
    pair = [nn.Linear(4, 3), nn.Linear(4, 3)]
    got = assess(pair, module=pair[0], batches=[torch.randn(30, 4)])
    assert got.barrier["raw"] == pytest.approx(0, abs=1e-9)
    assert len(got.barrier["points"]) == 11


def test_barrier_of_three_sources_goes_to_their_mean():
    calls = []

    def score(params):
        calls.append(float(params["scalar"]))
        return -(calls[-1] ** 2)

    models = random_models(3)
    got = assess(models, score=score, points=5).barrier
    values = [float(model["scalar"]) for model in models]
    assert {point["line"] for point in got["points"]} == {"0-mean", "1-mean", "2-mean"}
    assert len(calls) == 3 + 3 * 3 + 1  # ends, points between, the mean once
    mean = sum(values) / 3
    for point in got["points"]:
        t, k = point["fraction"], int(point["line"][0])
        place = (1 - t) * values[k] + t * mean
        assert point["value"] == pytest.approx(-(place**2), abs=1e-5)
        ends = (1 - t) * values[k] ** 2 + t * sum(v**2 for v in values) / 3
        assert point["expected"] == pytest.approx(-ends, abs=1e-5)
    assert got["raw"] == pytest.approx(0, abs=1e-6)  # concave: never worse than expected
    assert min(point["excess"] for point in got["points"]) < -0.1
