"""Repair of modules that are no recommenders: other orders of layers, other outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_modules import ROWS, TwoTowers, floats, ids, mlp
from torch import nn

from cki_rec.merging.api import merge
from cki_rec.merging.calling import call
from cki_rec.merging.discovery import find_symmetries
from cki_rec.merging.params import MergeError
from cki_rec.merging.symmetry import random_element, transform


def images(rows: int) -> torch.Tensor:
    return floats(rows, 3, 6, 6)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 10)

    def forward(self, x):
        return self.out(self.norm(torch.relu(self.conv(x))).mean((2, 3)))


MODULES = {
    "norm after relu": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.ReLU(),
            nn.Linear(6, 1),
        ),
        lambda: floats(400, 5),
    ),
    "images": (Images, lambda: images(400)),
    "ten outputs": (lambda: mlp(5, 8, 6, 10), lambda: floats(400, 5)),
    "probability": (lambda: nn.Sequential(mlp(5, 8, 6, 1), nn.Sigmoid()), lambda: floats(400, 5)),
    "two towers": (TwoTowers, lambda: (ids(400, rows=ROWS), ids(400, rows=ROWS, seed=1))),
    "two outputs": (lambda: nn.Sequential(mlp(5, 8, 2), Split()), lambda: floats(400, 5)),
}  # fmt: skip


class Split(nn.Module):
    def forward(self, x):
        return {"click": x[:, 0], "buy": x[:, 1]}


def trained(name: str, seed: int = 0):
    """Return a module whose batch norms hold the statistics of its rows, and the rows."""
    make, rows = MODULES[name]
    torch.manual_seed(seed)
    module, batch = make(), rows()
    for norm in (m for m in module.modules() if hasattr(m, "running_mean")):
        norm.momentum = None
    module.train()
    for _ in range(5):
        call(module, batch)
    return module.eval(), batch


def outputs(module, params, batch):
    result = call(module, batch, params)
    return torch.stack(list(result.values())) if isinstance(result, dict) else result


@pytest.mark.parametrize("repair", ["rescale", "least_squares", "select_units"])
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_model_and_its_copy_with_moved_units_give_the_model_back(name, repair):
    module, batch = trained(name)
    symmetries = find_symmetries(module, batch)
    draw = torch.Generator().manual_seed(3)
    state = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    moved = transform(state, symmetries, [random_element(s, draw) for s in symmetries])
    moved = {**module.state_dict(), **moved}
    words = {"module": copy.deepcopy(module), "batches": [batch], "symmetries": symmetries}
    if repair == "select_units" and name in ("images", "ten outputs", "two outputs"):
        if name == "images":
            return  # no hidden Linear layer
        with pytest.raises(MergeError, match=r"one number per row: use repair=least_squares"):
            merge([module, moved], align="weights", repair=repair, **words)
        return
    result = merge([module, moved], align="weights", repair=repair, **words)
    before = outputs(module, dict(module.state_dict()), batch)
    torch.testing.assert_close(outputs(module, result.params, batch), before, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("repair", ["rescale", "least_squares"])
@pytest.mark.parametrize("name", ["norm after relu", "images"])
@torch.no_grad()
def test_statistics_of_a_norm_are_those_of_its_inputs(name, repair):
    (one, batch), (two, _) = trained(name), trained(name, 1)
    words = {"module": one, "batches": [batch[:100], batch[100:]], "repair": repair}
    result = merge([one, two], **words)
    one.load_state_dict(result.params)
    seen = []
    norm, place = next((m, n) for n, m in one.named_modules() if hasattr(m, "running_mean"))
    norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].movedim(1, -1).flatten(0, -2)))
    one.eval()(batch)
    torch.testing.assert_close(result.params[f"{place}.running_mean"], seen[0].mean(0))
    torch.testing.assert_close(
        result.params[f"{place}.running_var"], seen[0].var(0, correction=0), atol=1e-4, rtol=1e-4
    )


def test_the_last_layer_is_fitted_to_the_logit_only_if_it_adds_to_it():
    """The last Linear that runs makes the item vector of two towers, not the logit."""
    (one, batch), (two, _) = trained("two towers"), trained("two towers", 1)
    words = {"module": one, "batches": [batch], "align": "activations"}
    plain, fitted = (merge([one, two], repair=how, **words).params
                     for how in ("none", "least_squares"))  # fmt: skip
    gap = fitted["right.2.weight"] - plain["right.2.weight"]
    assert float((gap - gap.mean(0)).abs().max()) > 1e-3  # not the same for all outputs


def test_a_repair_without_effect_is_reported():
    module = nn.Sequential(nn.Embedding(ROWS, 4), mlp(4, 6, 2))
    words = {"module": module, "batches": [ids(40, 7)], "repair": "least_squares"}
    result = merge([module, copy.deepcopy(module)], **words)
    assert any("changed nothing: no layer reads one input" in text for text in result.warnings)
