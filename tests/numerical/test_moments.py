"""What models compute on rows: references, empty places, constant inputs, order."""

from __future__ import annotations

import pytest
import torch
from networks import CASES as NETWORKS
from networks import MIXED, SCHEMAS, build, draw_batch
from pairs import HALVES, Pair, all_cases
from torch.func import functional_call
from torch.nn import Linear

from cki_rec.merging.repair import fit_layers
from cki_rec.merging.statistics import ActivationStatistics, linear_moments, output_gradients


@all_cases
def test_moments_are_those_of_the_inputs(case):
    pair = Pair(case)
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(f"{name}.weight", []).append(x[0])
        )
        for name, module in pair.network.named_modules()
        if isinstance(module, Linear)
    ]
    for model in pair.models:
        pair.logits(model)
    for hook in hooks:
        hook.remove()
    moments = linear_moments(pair.network, pair.models, pair.batches)
    num_batches = len(pair.batches)
    for name, inputs in seen.items():
        is_constant = len(inputs[0]) == 1
        if len(inputs) != 2 * num_batches or is_constant:  # used in several places, or not by rows
            assert name not in moments.second
            continue
        half = num_batches
        x, y = (torch.cat([i.flatten(0, -2) for i in part]).double()
                for part in (inputs[:half], inputs[half:]))  # fmt: skip
        x, y = (pair.valid(name, values) for values in (x, y))
        expected = torch.cat([x, torch.ones(len(x), 1)], 1).T @ y / len(x)
        torch.testing.assert_close(moments.second[name][0, :, 1, :-1], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(moments.second[name][1, :-1, 0], expected.T, atol=1e-6, rtol=0)
        assert moments.second[name][0, -1, 1, -1] == pytest.approx(1)
    for name, product in moments.logit.items():
        assert not name.startswith("attention.")
        mean = torch.stack([pair.logits(m) for m in pair.models], 1).double().mean(0)
        torch.testing.assert_close(product[0, -1], mean, atol=1e-6, rtol=0)


def test_empty_places_of_histories_have_no_say():
    """Moments and fitted models are the same, however many places no history fills."""
    actual, fitted = [], []
    for length in (4, 9):
        pair = Pair("din")
        changes = {**NETWORKS["din"][1], "attention__length": length}
        pair.network = build(SCHEMAS["mixed"], name="din", **changes).eval()
        pair.batches = [draw_batch(pair.schema, 64, seed, longest=4) for seed in range(4)]
        observe = ActivationStatistics(pair.network, pair.batches)
        actual.append(observe(pair.models).second)
        fitted.append(fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries))
    for short, long in (actual, fitted):
        assert short.keys() == long.keys()
        for name in short:
            torch.testing.assert_close(short[name], long[name], rtol=1e-4, atol=1e-5)


@all_cases
def test_gradients_are_those_of_the_bias_row_by_row(case):
    pair = Pair(case)
    batches = pair.batches[:2]
    layers = list(linear_moments(pair.network, pair.models, batches).logit)
    actual = output_gradients(pair.network, pair.models, batches, layers)
    assert set(actual) == set(layers)
    for name in layers:
        bias = name.removesuffix("weight") + "bias"
        if bias not in pair.average:
            continue
        g = torch.stack([
            torch.cat([
                torch.autograd.functional.jacobian(
                    lambda b, batch=batch, model=model, bias=bias: functional_call(
                        pair.network, model | {bias: b}, (batch,)
                    ),
                    model[bias],
                )
                for batch in batches
            ])
            for model in pair.models
        ]).double()  # fmt: skip
        expected = torch.einsum("kbo,jbp->kojp", g, g) / g.shape[1]
        torch.testing.assert_close(actual[name], expected, atol=1e-6, rtol=1e-4)


def test_layers_of_constant_inputs_are_left_out_whatever_the_batches():
    pair = Pair("final_mlp")
    for batches in (pair.batches, [*pair.batches, draw_batch(pair.schema, 1)]):
        moments = linear_moments(pair.network, pair.models, batches)
        gates = [name for name in pair.readers() if name.startswith("gates.")]
        assert gates
        assert not set(gates) & set(moments.second)
        assert output_gradients(pair.network, pair.models, batches, gates) == {}


def test_layers_stay_in_order_when_histories_begin_late():
    pair = Pair("din")
    names = list(linear_moments(pair.network, pair.models, pair.batches).second)
    batches = [draw_batch(pair.schema, 64, longest=0), *pair.batches]
    assert list(linear_moments(pair.network, pair.models, batches).second) == names
    observe = ActivationStatistics(pair.network, batches)
    fitted = fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries, True)
    assert pair.error(fitted) < pair.error(pair.average)


def test_layers_of_positions_have_no_gradients_per_row():
    network = build(MIXED, name="sasrec")
    models, batches = [dict(network.state_dict())] * 2, [draw_batch(MIXED, 16)]
    layers = [f"encoders.0.blocks.0.{name}.weight" for name in ("inner", "outer")]
    assert set(layers) <= set(linear_moments(network, models, batches).second)
    assert output_gradients(network, models, batches, layers) == {}
