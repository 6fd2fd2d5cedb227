"""Our CKI against recorded outputs of the released formula and a float64 evaluation.

The committed file holds what fits 500 kB; the full one passes too (set CKI_GOLDEN to its path).
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cki_rec.merging.methods.ablations import first
from cki_rec.merging.methods.cki.assessment import entropy, global_compatibility
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.mixing import mix, override_weights

PATH = os.environ.get("CKI_GOLDEN", Path(__file__).parents[1] / "golden" / "cki_reference.npz")
with np.load(PATH) as archive:
    GOLDEN = {key: archive[key] for key in archive.files}
LAYERS = sorted({key.rsplit("/", 1)[0] for key in GOLDEN if "/layer" in key})
NUM_LAYERS = {"din_head": 3, "small": 2}
RUNS = sorted(
    run
    for run in {key.rsplit("/", 1)[0] for key in GOLDEN if key.endswith("/y")}
    if sum(layer.startswith(f"{run}/") for layer in LAYERS) == NUM_LAYERS[run.split("/")[0]]
)


def layer_tensors(layer):
    return {
        key.rsplit("/", 1)[1]: torch.from_numpy(value)
        for key, value in GOLDEN.items()
        if key.startswith(f"{layer}/")
    }


def official(model_a, model_b, gates, global_terms=None):
    biases = [name for name in model_a if name.endswith("bias")]
    models = [model_a, model_b]
    gates = gates | dict.fromkeys(biases)
    weights = cki_weights(
        models, perspective="dual", splice="soft", gates=gates, global_terms=global_terms
    )
    return mix(models, override_weights(weights, biases, first(models)))


def reference_entropy(weight):
    # bins in float32: whether the maximum falls in the last bin is a matter of rounding
    low, step = weight.min(), (weight.max() - weight.min()) / np.float32(10)
    edges = [low + np.float32(i) * step for i in range(11)]
    result = 0.0
    for left, right in pairwise(edges):
        share = np.mean((weight >= left) & (weight < right))
        result -= share * np.log(share) if share > 0 else 0.0
    return result


def reference_splice(weight_a, weight_b, gate):
    difference = reference_entropy(weight_a) - reference_entropy(weight_b)
    weight_a, weight_b, gate = (x.astype(np.float64) for x in (weight_a, weight_b, gate))
    share = 0.4 / np.pi * np.arctan(500 * difference) + 0.5
    local = 1 / (1 + np.exp(-np.abs(weight_a - weight_b) @ gate.T))
    score_a = share * (1 - np.exp(-share * local))
    score_b = (1 - share) * (1 - np.exp(-(1 - share) * (1 - local)))
    alpha = 1 / (1 + np.exp(score_b - score_a))
    return alpha * weight_a + (1 - alpha) * weight_b


def test_golden_file_covers_both_cases_and_all_seeds():
    assert {layer.rsplit("/", 1)[0] for layer in LAYERS} == {
        f"{case}/{seed}" for case in NUM_LAYERS for seed in range(3)
    }
    assert {"small/0", "small/1", "small/2", "din_head/0"} <= set(RUNS)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_matches_released_formula(layer):
    golden = layer_tensors(layer)
    a, b = golden["weight_a"], golden["weight_b"]
    assert entropy(a) == pytest.approx(float(golden["entropy_a"]), abs=1e-6)
    assert entropy(b) == pytest.approx(float(golden["entropy_b"]), abs=1e-6)
    terms = global_compatibility([a, b])
    assert float(terms[0]) == pytest.approx(float(golden["global_a"]), abs=1e-6)
    merged = official({"weight": a}, {"weight": b}, {"weight": golden["gate"]})["weight"]
    torch.testing.assert_close(merged, golden["spliced"], atol=1e-6, rtol=0)
    other = reference_splice(a.numpy(), b.numpy(), golden["gate"].numpy())
    torch.testing.assert_close(merged.double(), torch.from_numpy(other), atol=1e-6, rtol=0)
    exact = official(
        {"weight": a.double()},
        {"weight": b.double()},
        {"weight": golden["gate"].double()},
        {"weight": terms},
    )["weight"]
    torch.testing.assert_close(exact, torch.from_numpy(other), atol=1e-12, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_head_output_matches_released_formula(run):
    model_a, model_b, gates = {}, {}, {}
    num_layers = NUM_LAYERS[run.split("/")[0]]
    for i in range(num_layers):
        golden = layer_tensors(f"{run}/layer{i}")
        model_a |= {f"{i}.weight": golden["weight_a"], f"{i}.bias": golden["bias_a"]}
        unused_bias = torch.full_like(golden["bias_a"], 1e3)
        model_b |= {f"{i}.weight": golden["weight_b"], f"{i}.bias": unused_bias}
        gates[f"{i}.weight"] = golden["gate"]
    merged = official(model_a, model_b, gates)
    x = torch.from_numpy(GOLDEN[f"{run}/x"])
    for i in range(num_layers):
        x = torch.nn.functional.linear(x, merged[f"{i}.weight"], merged[f"{i}.bias"])
        x = torch.tanh(x) if i < num_layers - 1 else x
    torch.testing.assert_close(x, torch.from_numpy(GOLDEN[f"{run}/y"]), atol=1e-6, rtol=0)
