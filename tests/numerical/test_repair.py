"""Layers fitted to what sources compute: references, fixed points, and what must not change."""

from __future__ import annotations

import pytest
import torch
from networks import draw_batch
from pairs import HALVES, Pair, din_is_slow
from torch.nn import BatchNorm1d

from cki_rec.engine.embeddings import table_of
from cki_rec.merging.repair import _regress, choose, fit_layers, rescale
from cki_rec.merging.statistics import ActivationStatistics


def test_a_layer_that_sees_no_history_is_left_as_it_is():
    pair = Pair("din")
    batches = [draw_batch(pair.schema, 64, 0, longest=0)]
    observe = ActivationStatistics(pair.network, batches)
    assert not any(name.startswith("attention.") for name in observe(pair.models).second)
    fitted = fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries)
    assert all(torch.equal(fitted[n], pair.average[n]) for n in fitted if n.startswith("attent"))
    assert all(bool(tensor.isfinite().all()) for tensor in fitted.values())


@din_is_slow
@pytest.mark.parametrize("selects_units", [False, True])
def test_equal_sources_come_back(case, selects_units):
    pair = Pair(case, 1)
    model = pair.models[0]
    # a network whose norms hold the statistics of these very rows, as training leaves them
    model = rescale(model, [model], [1.0], pair.observe, pair.symmetries)
    fitted = fit_layers(
        model, [model, dict(model)], HALVES, pair.observe, pair.symmetries, selects_units
    )
    torch.testing.assert_close(pair.logits(fitted), pair.logits(model), atol=1e-4, rtol=1e-4)
    for name in model:
        if not selects_units:
            torch.testing.assert_close(fitted[name], model[name], atol=1e-4, rtol=1e-4)


@din_is_slow
def test_fitting_comes_nearer_to_the_mean_logit(case):
    pair = Pair(case)
    before = pair.error(pair.average)
    for selects_units in (False, True):
        fitted = fit_layers(
            pair.average, pair.models, HALVES, pair.observe, pair.symmetries, selects_units
        )
        assert pair.error(fitted) < before
        assert list(fitted) == list(pair.average)
        for name, tensor in fitted.items():
            assert tensor.shape == pair.average[name].shape
            assert tensor.dtype == pair.average[name].dtype
            if table_of(name):
                assert tensor is pair.average[name]


@din_is_slow
def test_inputs_are_untouched_and_results_repeat(case):
    pair = Pair(case)
    everything = [pair.average, *pair.models]
    before = [{n: t.clone() for n, t in model.items()} for model in everything]
    arguments = (pair.average, pair.models, HALVES, pair.observe, pair.symmetries)
    first, second = fit_layers(*arguments, True), fit_layers(*arguments, True)
    scaled = rescale(*arguments)
    for tensor in [*first.values(), *scaled.values()]:
        assert bool(tensor.isfinite().all())
    assert all(torch.equal(first[n], second[n]) for n in first)
    for model, old in zip(everything, before, strict=True):
        assert all(torch.equal(model[n], old[n]) for n in old)


def test_last_layer_is_the_least_squares_one():
    pair = Pair("dnn")
    fitted = fit_layers(pair.average, pair.models, HALVES, pair.observe, pair.symmetries)
    inputs = []
    last = pair.network.mlp.layers[-1]
    hook = last.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    own = pair.logits(fitted).double()
    hook.remove()
    x = torch.cat(inputs).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    mean = torch.stack([pair.logits(m) for m in pair.models]).double().mean(0)
    best = x @ torch.linalg.lstsq(x, mean[:, None], driver="gelsd").solution[:, 0]
    assert float((own - mean).square().mean()) == pytest.approx(
        float((best - mean).square().mean()), rel=1e-3
    )


@pytest.mark.parametrize("case", ["deepfm", "dnn", "dcnv2", "wide_deep"])
def test_rescaled_units_have_the_mean_and_deviation_of_their_sources(case):
    pair = Pair(case)
    scaled = rescale(pair.average, pair.models, HALVES, pair.observe, pair.symmetries)

    def statistics(params):
        outputs = []
        layer = pair.network.mlp.layers[0]
        hook = layer.register_forward_hook(lambda _, x, y: outputs.append(y))
        pair.logits(params)
        hook.remove()
        values = torch.cat(outputs).double()
        return values.mean(0), values.std(0, unbiased=False)

    each = [statistics(model) for model in pair.models]
    for found, left, right in zip(statistics(scaled), *each, strict=True):
        torch.testing.assert_close(found, (left + right) / 2, atol=1e-4, rtol=1e-4)
    for name in scaled:
        if name.endswith("running_mean") and "mlp.norms.0" in name:
            torch.testing.assert_close(scaled[name].double(), statistics(scaled)[0], atol=1e-4,
                                       rtol=1e-4)  # fmt: skip


@din_is_slow
def test_running_statistics_are_those_of_the_rows(case):
    pair = Pair(case)
    makers = [p.parameter for s in pair.symmetries for p in s.slices]
    for repair in (rescale, fit_layers):
        params = repair(pair.average, pair.models, HALVES, pair.observe, pair.symmetries)
        inputs = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda _, x, name=name, inputs=inputs: inputs.setdefault(name, []).append(
                    x[0].flatten(0, -2)
                )
            )
            for name, module in pair.network.named_modules()
            if isinstance(module, BatchNorm1d) and f"{name}.running_mean" in makers
        ]
        pair.logits(params)
        for hook in hooks:
            hook.remove()
        for name, parts in inputs.items():
            if params[f"{name}.running_mean"] is pair.average[f"{name}.running_mean"]:
                continue  # of a layer that several share
            x = pair.valid(name, torch.cat(parts).double())
            mean, variance = x.mean(0).float(), x.var(0, unbiased=False).float()
            torch.testing.assert_close(params[f"{name}.running_mean"], mean, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(
                params[f"{name}.running_var"], variance, atol=2e-3, rtol=2e-3
            )


def test_a_layer_without_bias_is_regressed_without_a_constant():
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(300, 4, generator=draw, dtype=torch.float64) + 1
    y = torch.randn(300, 2, generator=draw, dtype=torch.float64) + 2
    wide = torch.cat([x, torch.ones(300, 1)], 1)
    for inputs, has_bias in ((wide, True), (x, False)):
        found = _regress(wide.T @ wide / 300, y.T @ wide / 300, has_bias)
        best = torch.linalg.lstsq(inputs, y).solution.T
        torch.testing.assert_close(found[:, : inputs.shape[1]], best, atol=1e-4, rtol=1e-4)
    assert not found[:, -1].any()


def test_choice_keeps_what_tells_the_targets():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 12, generator=draw, dtype=torch.float64)
    x = x - x.mean(0)
    targets = x[:, [7, 2, 10]] @ torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 1.0]]).double().T
    chosen = choose(x.T @ x / 200, x.T @ targets / 200, 3)
    assert sorted(chosen) == [2, 7, 10]
    assert chosen == sorted(chosen, key=lambda index: index % 3)
    twice = torch.cat([x[:, :6], x[:, :6]], 1)
    chosen = choose(twice.T @ twice, twice.T @ targets, 6)
    assert sorted(index % 6 for index in chosen) == list(range(6))  # copies bring nothing
    assert len(choose(torch.zeros(4, 4).double(), torch.zeros(4, 1).double(), 2)) == 2


def test_each_step_of_the_choice_loses_least():
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(300, 8, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(8, 8, generator=draw, dtype=torch.float64)
    targets = x @ torch.randn(8, 3, generator=draw, dtype=torch.float64)
    targets = targets + torch.randn(300, 3, generator=draw, dtype=torch.float64)

    def error(columns):
        best = torch.linalg.lstsq(x[:, columns], targets).solution
        return float((x[:, columns] @ best - targets).square().sum())

    left = list(range(8))
    for size in (7, 6, 5, 4):
        left = min(([i for i in left if i != gone] for gone in left), key=error)
        assert sorted(choose(x.T @ x / 300, x.T @ targets / 300, size)) == left


@pytest.mark.parametrize("case", ["final_mlp plain", "deepfm", "dcn", "din"])
def test_dead_units_do_not_put_others_out_of_order(case):
    pair = Pair(case, 1)
    model = pair.models[0]
    layer = "second.layers.0" if "second.layers.0.weight" in model else "mlp.layers.0"
    for name in (f"{layer}.weight", f"{layer}.bias"):
        model[name][:2] = 0
    model = rescale(model, [model], [1.0], pair.observe, pair.symmetries)
    fitted = fit_layers(model, [model, dict(model)], HALVES, pair.observe, pair.symmetries, True)
    torch.testing.assert_close(pair.logits(fitted), pair.logits(model), atol=1e-3, rtol=1e-3)
