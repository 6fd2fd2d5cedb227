"""Refinement without labels: what it fits, and what it leaves alone.

Shape legend: K sources, B rows of a batch, V rows of a table.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from refined import BATCHES, COUNTS, SOURCES, batch, net, refine
from torch import nn

import cki_rec


@torch.no_grad()
def outputs(model: nn.Module, params, inputs) -> torch.Tensor:
    model = copy.deepcopy(model).eval()
    model.load_state_dict(params)
    return model(**inputs)


def loss(params, teacher=lambda _, outputs_KB: outputs_KB.mean(0)) -> float:
    """Return the mean squared distance to a teacher on all batches."""
    errors = []
    for inputs in BATCHES:
        sources = torch.stack([outputs(m, m.state_dict(), inputs) for m in SOURCES])
        errors.append(outputs(SOURCES[0], params, inputs) - teacher(inputs, sources))
    return float(torch.cat(errors).square().mean())


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(tensor.equal(b[name]) for name, tensor in a.items())


def test_equal_models_are_returned_as_they_are():
    result = refine([SOURCES[0], copy.deepcopy(SOURCES[0])])
    assert same(result.params, SOURCES[0].state_dict())
    assert result.recipe == "refine=mean, steps=8"
    assert (result.scores, result.warnings, result.shares) == ({}, [], None)


def test_linear_models_reach_their_exact_mean():
    torch.manual_seed(0)
    models = [nn.Linear(3, 2).double() for _ in range(3)]
    batches = [torch.randn(32, 3).double() for _ in range(4)]
    words = {"module": models[0], "batches": batches, "steps": 600, "learning_rate": 0.05}
    params = cki_rec.refine(models, **words).params
    for name, tensor in params.items():
        mean = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stages", [("all",), ("maps",), ("maps", "all")])
def test_every_stage_comes_nearer_to_the_teacher(stages):
    params = refine(steps=150, stages=stages, learning_rate=0.02).params
    assert loss(params) < 0.3 * loss(SOURCES[0].state_dict())


def test_statistics_buffers_ties_and_inputs_stay():
    models, module = [net(1), net(2)], net(3)
    module.mlp[1].train(mode=False)
    modes = [part.training for part in module.modules()]
    everything = [copy.deepcopy(m.state_dict()) for m in (*models, module)]
    batches = copy.deepcopy(BATCHES)
    start = {name: t.clone() for name, t in models[1].state_dict().items()}
    state = torch.get_rng_state()
    result = refine(models, module=module, start=start, share=0.5, counts=COUNTS, teacher="router")
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in module.modules()] == modes
    for model, before in zip((*models, module), everything, strict=True):
        assert same(model.state_dict(), before)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert same(start, everything[1])
    assert all(same(a, b) for a, b in zip(batches, BATCHES, strict=True))
    for name, tensor in result.params.items():
        is_fixed = "running" in name or name in ("ids", "mlp.1.num_batches_tracked")
        assert tensor.equal(start[name]) == is_fixed, name
        assert tensor.data_ptr() not in {t.data_ptr() for m in models for t in m.parameters()}
    assert result.params["tied.weight"].data_ptr() == result.params["last.weight"].data_ptr()
    assert not module.user._forward_hooks


@pytest.mark.parametrize("stages", [("all",), ("maps", "all")])
def test_copies_of_tied_tensors_stay_equal(stages):
    """State dicts read from files hold a tied tensor twice."""
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in SOURCES]
    read = refine(states, stages=stages).params
    assert torch.equal(read["tied.weight"], read["last.weight"])
    tied = refine(stages=stages).params
    for name, tensor in tied.items():
        torch.testing.assert_close(read[name], tensor)


class Tied(nn.Module):
    """A table that is an output layer first, and two lookups."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.item = nn.Linear(4, 5, bias=False), nn.Embedding(5, 4)
        self.history = nn.Embedding(5, 4)
        self.item.weight = self.history.weight = self.out.weight

    def forward(self, item, history):
        return self.out(self.item(item) + self.history(history).mean(1))


def test_a_table_with_several_names_routes_by_all_its_lookups():
    models = [Tied(), Tied()]
    counts = [{"item.weight": [8, 0, 0, 0, 2]}, {"item.weight": [0, 0, 4, 4, 0]}]
    x = {"item": torch.tensor([0, 2, 1]), "history": torch.tensor([[2, 2], [2, 3], [0, 1]])}
    expected = {0: [8 / 16, 0.0, 1.0], 1: [8 / 16, 1.0, 0.0]}  # 0, 2, 2 / 2, 2, 3 / 1, 0, 1

    def teacher(_, outputs_KB):
        return sum(torch.tensor(expected[k])[:, None] * outputs_KB[k] for k in expected)

    words = {"module": models[0], "batches": [x], "steps": 3, "stages": ("maps", "all")}
    routed = cki_rec.refine(models, teacher="router", counts=counts, **words).params
    own = cki_rec.refine(models, teacher=teacher, **words).params
    for name, tensor in own.items():
        torch.testing.assert_close(routed[name], tensor)


def test_the_router_is_the_teacher_weighted_by_counts():
    counts_KV = torch.stack([source["user.weight"] for source in COUNTS]).double()

    def teacher(inputs, outputs_KB):
        seen_KB = counts_KV[:, inputs["user"]]
        total_B = seen_KB.sum(0)
        shares_KB = torch.where(total_B > 0, seen_KB / total_B, 0.5)
        return (shares_KB.float() * outputs_KB).sum(0)

    routed = refine(teacher="router", counts=COUNTS)
    assert same(routed.params, refine(teacher=teacher).params)
    assert routed.recipe == "refine=router, steps=8"
    named = {"counts": COUNTS, "teacher": "router", "route": "user.weight"}
    assert same(routed.params, refine(**named).params)


def test_the_rest_of_the_teacher_is_the_start():
    start = {n: (t + SOURCES[1].state_dict()[n]) / 2 if t.is_floating_point() else t
             for n, t in SOURCES[0].state_dict().items()}  # fmt: skip

    def teacher(inputs, outputs_KB):
        return 0.25 * outputs_KB.mean(0) + 0.75 * outputs(SOURCES[0], start, inputs)

    mixed, own = refine(start=start, share=0.25), refine(start=start, teacher=teacher)
    assert mixed.recipe == "refine=mean, share=0.25, steps=8"
    for name, tensor in own.params.items():
        torch.testing.assert_close(mixed.params[name], tensor)


def test_outputs_on_a_list_are_computed_once():
    calls = []

    def teacher(inputs, outputs_KB):
        calls.append(id(inputs))
        return outputs_KB.mean(0)

    refine(teacher=teacher, steps=9)
    assert calls == [id(inputs) for inputs in BATCHES]
    calls.clear()
    refine(teacher=teacher, steps=9, batches=itertools.cycle(BATCHES))
    assert len(calls) == 9


def test_results_do_not_depend_on_how_batches_are_passed_nor_on_the_call():
    first = refine(steps=6, stages=("maps", "all")).params
    assert same(first, refine(steps=6, stages=("maps", "all")).params)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    for batches in (tuple(BATCHES), itertools.cycle(BATCHES), loader):
        assert same(first, refine(steps=6, stages=("maps", "all"), batches=batches).params)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_make_no_difference(mode):
    words = {"stages": ("maps", "all"), "steps": 5}
    want = refine([net(1), net(2)], **words).params
    with mode():
        models, batches = [net(1), net(2)], [batch(seed) for seed in range(4)]
        fitted = refine(models, module=models[0], batches=batches, **words).params
        assert not torch.is_grad_enabled()
    assert same(fitted, want)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_types_of_sources(dtype, limit):
    models = [net(1, dtype), net(2, dtype)]
    wide = [net(1), net(2)]
    for one, other in zip(models, wide, strict=True):
        other.load_state_dict(one.state_dict())
    result = refine(models, module=net(3, dtype), stages=("maps", "all")).params
    want = refine(wide, stages=("maps", "all")).params
    for name, tensor in result.items():
        assert tensor.dtype == models[0].state_dict()[name].dtype
        torch.testing.assert_close(tensor.float(), want[name].float(), rtol=limit, atol=limit)
    asked = refine(models, module=net(3, dtype), dtype=torch.float16).params
    assert asked["user.weight"].dtype == torch.float16


def test_progress_is_told_of_every_step():
    seen = []
    refine(steps=3, stages=("maps", "all"), progress=lambda *now: seen.append(now))
    steps = [*(("maps", k, 6) for k in range(3)), *(("all", k, 6) for k in range(3, 6))]
    assert seen == [*steps, ("done", 6, 6)]


def test_sparse_gradients_of_tables():
    models = [nn.Embedding(6, 2, sparse=True) for _ in range(2)]
    dense = [nn.Embedding.from_pretrained(m.weight.detach(), freeze=False) for m in models]
    ids = [torch.arange(6)]
    params = cki_rec.refine(models, module=models[0], batches=ids, steps=5).params
    want = cki_rec.refine(dense, module=dense[0], batches=ids, steps=5).params
    assert same(params, want)


def test_renormalized_tables_of_sources_stay():
    models = [nn.Embedding(6, 2, max_norm=0.1) for _ in range(2)]
    before = [model.weight.detach().clone() for model in models]
    cki_rec.refine(models, module=models[0], batches=[torch.arange(6)], steps=2)
    assert all(m.weight.equal(old) for m, old in zip(models, before, strict=True))


def test_a_merge_within_no_grad_is_refined_too():
    words = {"module": SOURCES[0], "batches": BATCHES, "refine": "mean"}
    with torch.no_grad():
        merged = cki_rec.merge(SOURCES, "average", **words)
    assert loss(merged.params) < 0.1 * loss(cki_rec.merge(SOURCES, "average").params)


# scores


def test_the_best_model_by_score_is_returned():
    states = []

    def score(state):
        states.append({name: tensor.clone() for name, tensor in state.items()})
        return {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.9, 4: 0.3}.get(len(states) - 1, 0.35)

    result = refine(score=score, start=1, steps=8, stages=("maps", "all"))
    assert result.scores == {
        **{"start": 0.1, "maps 2": 0.2, "maps 4": 0.4, "maps 6": 0.9, "maps 8": 0.3},
        **{"all 2": 0.35, "all 4": 0.35, "all 6": 0.35, "all 8": 0.35},
    }
    assert same(result.params, states[3])
    assert same(states[0], SOURCES[1].state_dict())
    assert result.warnings == []
    assert "0.9  maps 6" in result.report()


def test_the_start_is_the_source_with_the_best_score():
    want = SOURCES[1].state_dict()["last.bias"]
    result = refine(score=lambda state: float(state["last.bias"].equal(want)))
    assert same(result.params, SOURCES[1].state_dict())


def test_a_score_that_falls_at_once_returns_the_start_and_stops():
    scores = (float(-number) for number in itertools.count())
    result = refine(score=lambda _: next(scores), start=SOURCES[1])
    assert same(result.params, SOURCES[1].state_dict())
    assert result.scores == {"start": 0.0, "all 2": -1.0, "all 4": -2.0}
    (warning,) = result.warnings
    assert "the start, which is returned" in warning
    assert warning in str(result)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_are_scored_up_to_the_last(steps):
    result = refine(score=lambda _: 0.5, steps=steps, start=0)
    assert list(result.scores)[-1] == f"all {steps}"
