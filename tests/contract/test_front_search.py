"""The search of the library, its methods and its reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import ROOT
from torch import nn

import cki_rec
from cki_rec.merging.api import merge
from cki_rec.merging.params import MergeError
from cki_rec.merging.registry import METHODS


def draw(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"table": (6, 3), "weight": (4, 3), "bias": (4,)}
    return {n: torch.randn(s, generator=noise).to(dtype) for n, s in shapes.items()}


PAIR = [draw(1), draw(2)]
ONE = PAIR[0]
COUNTS = [{"table": torch.ones(6)}] * 2


class Shared(nn.Module):
    """Two towers; its output has no form that layers could be fitted to."""

    def __init__(self, num_outputs):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, num_outputs)

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("is_worse", [False, True])
def test_auto_is_never_below_the_best_source(is_worse):
    torch.manual_seed(0)
    models = [Shared(1) for _ in range(3)]
    best = models[1].state_dict()
    sample = [torch.randn(100, 3) for _ in range(2)]

    def score(state):
        far = sum(float((state[n] - best[n]).abs().sum()) for n in best)
        return -far if is_worse else far

    stages = []
    result = merge(
        models,
        "auto",
        module=models[0],
        batches=sample,
        score=score,
        progress=lambda *facts: stages.append(facts),
    )
    assert len(result.scores) == 9
    assert result.scores[result.recipe] == max(result.scores.values()) == score(result.params)
    if is_worse:
        assert result.recipe == "source 1"
        assert all(torch.equal(result.params[n], best[n]) for n in best)
        assert all(share == [0, 1, 0] for share in result.shares.values())
    assert [done for _, done, _ in stages] == list(range(10))
    assert {total for *_, total in stages} == {9}
    assert result.recipe in result.report()


def test_auto_leaves_out_recipes_that_the_inputs_do_not_allow():
    torch.manual_seed(0)
    models = [Shared(4) for _ in range(2)]
    sample = [torch.randn(100, 3)]
    score = lambda state: float(state["last.bias"].sum())  # noqa: E731
    alone = merge([m.state_dict() for m in models], "auto", score=score)
    assert set(alone.scores) == {"average", "source 0", "source 1"}
    result = merge(models, "auto", score=score, module=models[0], batches=sample)
    assert "average, align=weights" in result.scores
    assert any("one number per row" in warning for warning in result.warnings)
    counted = merge(PAIR, "auto", counts=COUNTS, score=lambda s: float(s["bias"].sum()))
    assert "evidence" in counted.scores
    assert set(merge([ONE], "auto", score=lambda _: 1.0).scores) == {"average", "source 0"}


def test_recipes_are_those_of_the_preset():
    from omegaconf import OmegaConf

    from cki_rec.merging.search import RECIPES

    preset = OmegaConf.load(ROOT / "conf" / "merge" / "auto.yaml").recipes
    assert [
        {"align": r.get("align.by", "none"), "repair": r.get("repair", "none")} for r in preset
    ] == [{"align": r.align, "repair": r.repair} for r in RECIPES]
    assert {recipe.method for recipe in RECIPES} == {"evidence"}


@pytest.fixture
def registry():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_methods_of_users_are_checked(registry):
    @cki_rec.method(reference="here")
    def wrong_sum(models, *, by: float = 0.7) -> cki_rec.MixingWeights:
        return {n: torch.full((2, *[1] * t.ndim), by) for n, t in models[0].items()}

    with pytest.raises(MergeError, match=r"table: mixing weights must be .* sum to 1"):
        merge(PAIR, "wrong_sum")
    assert merge(PAIR, "wrong_sum", by=0.5).recipe == "wrong_sum, by=0.5"
    info = cki_rec.methods()["wrong_sum"]
    assert (info.needs, dict(info.options), info.reference) == ((), {"by": 0.7}, "here")
    with pytest.raises(ValueError, match="option align is an argument of merge"):

        @cki_rec.method()
        def clash(models, align: str = "x") -> cki_rec.Params:
            return models[0]

    with pytest.raises(ValueError, match="annotate its result"):

        @cki_rec.method()
        def untyped(models):
            return models[0]

    @cki_rec.method()
    def lossy(models) -> cki_rec.Params:
        return {"bias": models[0]["bias"]}

    with pytest.raises(MergeError, match="only in source 0: table, weight"):
        merge(PAIR, "lossy")


def test_methods_lists_all():
    listed = cki_rec.methods()
    assert set(listed) == set(METHODS)
    assert listed["ties"].needs == ("base",)
    assert listed["weighted_average"].needs == ("score",)
    assert "density=0.2" in str(listed["ties"])
    with pytest.raises(TypeError):
        listed["ties"].options["density"] = 1


def test_published_values_hold_without_a_score():
    result = merge(PAIR, "ties", base=draw(3), density=0.2)
    assert result.recipe == "ties, density=0.2, scale=1.0"
    assert "without a score: scale=1.0" in result.warnings[0]
    fixed = merge(PAIR, "ties", base=draw(3), density=0.2, scale=1.0)
    assert all(torch.equal(result.params[n], fixed.params[n]) for n in ONE)
    scored = merge(PAIR, "ties", base=draw(3), score=lambda s: -float(s["bias"].abs().sum()))
    assert not scored.warnings


def test_numpy_counts_are_counts():
    counts = [{"table": np.arange(6)}, {"table": np.ones(6)}]
    tensors = [{"table": torch.as_tensor(c["table"])} for c in counts]
    one, two = (merge(PAIR, "evidence", counts=c).params for c in (counts, tensors))
    assert torch.equal(one["table"], two["table"])


def test_the_report_is_text():
    result = merge(PAIR, "evidence", counts=COUNTS)
    text = result.report()
    assert text == str(result)
    assert "recipe: evidence" in text
    assert "50.0%" in text
    assert repr(result) == "MergeResult(recipe='evidence', 3 tensors)"
    many = {f"layer{k}": torch.ones(2) for k in range(60)}
    assert "and 20 more" in merge([many, many]).report()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda _: None, "odd returned a NoneType; return name -> tensor"),
        (
            lambda models: {name: [0.5] for name in models[0]},
            "0.weight: .* a list",
        ),
        (
            lambda models: {"0.weight": models[0]["0.weight"].zero_()},
            "0.weight: .* on a copy",
        ),
        (
            lambda models: {"x": models[0]["0.weight"]},
            "method odd .* only in source 1: x",
        ),
    ],
)
def test_results_of_methods_of_users_are_checked(result, message, registry):
    @cki_rec.method()
    def odd(models) -> cki_rec.Params:
        return result(models)

    with pytest.raises(MergeError, match=message):
        merge([torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2)], "odd")


@pytest.mark.parametrize("needs", [("tables",), ("counts",), "counts"])
def test_needs_of_a_method_are_its_parameters(needs, registry):
    with pytest.raises(ValueError, match="which is no parameter of it"):

        @cki_rec.method(needs=needs)
        def needy(models) -> cki_rec.Params:
            return models[0]


def test_a_method_takes_models(registry):
    with pytest.raises(ValueError, match="first parameter must be the models"):

        @cki_rec.method()
        def empty() -> cki_rec.Params:
            return {}


def test_numbers_of_numpy_are_options(registry):
    @cki_rec.method()
    def plain(models, *, size: int = 1, scale: float = 1.0) -> cki_rec.Params:
        return {name: tensor * float(scale * size) for name, tensor in models[0].items()}

    model = {"w": torch.ones(2)}
    result = merge([model], "plain", size=np.int64(2), scale=np.float32(0.5))
    assert torch.equal(result.params["w"], model["w"])
    with pytest.raises(MergeError, match="size=true: must be a whole number"):
        merge([model], "plain", size=True)
