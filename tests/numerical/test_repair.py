"""Layers fitted to what sources compute: references, fixed points, and what must not change."""

from __future__ import annotations

import pytest
import torch
from networks import CASES as NETWORKS
from networks import SCHEMAS, build, draw_batch, make_case
from torch.func import functional_call
from torch.nn import BatchNorm1d, Linear

from cki_rec.engine.embeddings import table_of
from cki_rec.engine.moments import Observer, linear_moments, output_gradients
from cki_rec.integration.baselines import average_weights
from cki_rec.integration.evidence import evidence_weights
from cki_rec.integration.frames import reduce_frames, table_products
from cki_rec.integration.repair import _regress, choose, fit_layers, rescale
from cki_rec.integration.splicing import splice
from cki_rec.pipelines.matching import moved_tables, per_id

CASES = [
    "final_mlp batch norm",
    "deepfm",
    "dcn",
    "dcnv2",
    "dcnv2 mixture",
    "din",
    "dnn",
    "wide_deep",
    "final_mlp",
]
all_cases = pytest.mark.parametrize("case", CASES)
HALVES = [0.5, 0.5]


class Pair:
    """Two random models of one network, and what shows how they compute."""

    def __init__(self, case, num_sources=2):
        network, self.schema = make_case(case, "mixed")
        self.network = network.eval()
        self.symmetries = network.symmetries()
        self.batches = [draw_batch(self.schema, 256, seed) for seed in range(4)]
        self.observe = Observer(self.network, self.batches)
        self.models = []
        for seed in range(num_sources):
            draw = torch.Generator().manual_seed(seed)
            self.models.append(
                {
                    n: 0.3 * torch.randn(t.shape, generator=draw)
                    if not n.endswith("running_var")
                    else torch.rand(t.shape, generator=draw) + 0.5
                    for n, t in network.state_dict().items()
                }
            )
        self.average = splice(self.models, average_weights(self.models))

    @torch.no_grad()
    def logits(self, params):
        return torch.cat([functional_call(self.network, params, (b,)) for b in self.batches])

    def error(self, params):
        """Return the mean squared distance to the mean logit."""
        mean = torch.stack([self.logits(model) for model in self.models]).mean(0)
        return float((self.logits(params) - mean).square().mean())

    def valid(self, name, values):
        """Return what a module saw, without the empty places of histories."""
        if not name.startswith("attention."):
            return values
        history = self.network.pairs[int(name.split(".")[1])].histories[0]
        masks = [self.network.sparse(batch).masks[history] for batch in self.batches]
        return values[torch.cat(masks).flatten()]

    def readers(self):
        return {f"{n}.weight" for n, m in self.network.named_modules() if isinstance(m, Linear)}


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
    found, fitted = [], []
    for length in (4, 9):
        pair = Pair("din")
        changes = {**NETWORKS["din"][1], "attention__length": length}
        pair.network = build(SCHEMAS["mixed"], name="din", **changes).eval()
        pair.batches = [draw_batch(pair.schema, 64, seed, longest=4) for seed in range(4)]
        observe = Observer(pair.network, pair.batches)
        found.append(observe(pair.models).second)
        fitted.append(fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries))
    for short, long in (found, fitted):
        assert short.keys() == long.keys()
        for name in short:
            torch.testing.assert_close(short[name], long[name], rtol=1e-4, atol=1e-5)


def test_a_layer_that_sees_no_history_is_left_as_it_is():
    pair = Pair("din")
    batches = [draw_batch(pair.schema, 64, 0, longest=0)]
    observe = Observer(pair.network, batches)
    assert not any(name.startswith("attention.") for name in observe(pair.models).second)
    fitted = fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries)
    assert all(torch.equal(fitted[n], pair.average[n]) for n in fitted if n.startswith("attent"))
    assert all(bool(tensor.isfinite().all()) for tensor in fitted.values())


@all_cases
@pytest.mark.parametrize("choosing", [False, True])
def test_equal_sources_come_back(case, choosing):
    pair = Pair(case, 1)
    model = pair.models[0]
    # a network whose norms hold the statistics of these very rows, as training leaves them
    model = rescale(model, [model], [1.0], pair.observe, pair.symmetries)
    fitted = fit_layers(
        model, [model, dict(model)], HALVES, pair.observe, pair.symmetries, choosing
    )
    torch.testing.assert_close(pair.logits(fitted), pair.logits(model), atol=1e-4, rtol=1e-4)
    for name in model:
        if not choosing:
            torch.testing.assert_close(fitted[name], model[name], atol=1e-4, rtol=1e-4)


@all_cases
def test_fitting_comes_nearer_to_the_mean_logit(case):
    pair = Pair(case)
    before = pair.error(pair.average)
    for choosing in (False, True):
        fitted = fit_layers(
            pair.average, pair.models, HALVES, pair.observe, pair.symmetries, choosing
        )
        assert pair.error(fitted) < before
        assert list(fitted) == list(pair.average)
        for name, tensor in fitted.items():
            assert tensor.shape == pair.average[name].shape
            assert tensor.dtype == pair.average[name].dtype
            if table_of(name):
                assert tensor is pair.average[name]


@all_cases
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


@all_cases
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


@all_cases
def test_gradients_are_those_of_the_bias_row_by_row(case):
    pair = Pair(case)
    batches = pair.batches[:2]
    layers = list(linear_moments(pair.network, pair.models, batches).logit)
    found = output_gradients(pair.network, pair.models, batches, layers)
    assert set(found) == set(layers)
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
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", ["deepfm", "dcn", "fm"])
def test_reduced_frames_of_equal_sources_are_theirs(case):
    pair = Pair(case, 1)
    models = [pair.models[0], dict(pair.models[0])]
    products = table_products(models, moved_tables(pair.symmetries))
    weights = average_weights(models)
    reduced = reduce_frames(models[0], models, pair.symmetries, products, weights, pair.readers())
    torch.testing.assert_close(pair.logits(reduced), pair.logits(models[0]), atol=1e-4, rtol=1e-4)


def test_reduced_frames_keep_inner_products_better_than_the_average():
    pair = Pair("fm")
    tables = moved_tables(pair.symmetries)
    products = table_products(pair.models, tables)
    reduced = reduce_frames(
        pair.average, pair.models, pair.symmetries, products, average_weights(pair.models), ()
    )

    def gap(params):
        tables_of = [torch.cat([m[t] for t in tables]).double() for m in (*pair.models, params)]
        left, right, merged = (table @ table.T for table in tables_of)
        return float(((left + right) / 2 - merged).square().sum())

    assert gap(reduced) < gap(pair.average)
    assert all(reduced[n] is pair.average[n] for n in reduced if "first_order" in n)


def test_rows_of_one_owner_keep_their_length():
    pair = Pair("fm")
    tables = [n for n in pair.average if table_of(n)]
    counts = [
        {n: torch.arange(len(pair.average[n])) % 2 * 3 + (k == 0) for n in tables}
        for k in range(2)
    ]
    weights = evidence_weights(pair.models, counts)
    products = table_products(pair.models, moved_tables(pair.symmetries), counts)
    reduced = reduce_frames(
        splice(pair.models, weights), pair.models, pair.symmetries, products, weights, ()
    )
    assert all(bool(tensor.isfinite().all()) for tensor in reduced.values())


@pytest.mark.parametrize("lead", [0, 1])
def test_attention_comes_whole_from_one_source(lead):
    pair = Pair("din")
    whole = per_id(pair.network)
    assert whole == {n for n in pair.average if n.startswith("attention.")}
    tables = moved_tables(pair.symmetries)
    products = table_products(pair.models, tables)
    asked = next(s for s in pair.symmetries if {p.parameter for p in s.slices} & whole)
    (table,) = [p.parameter for p in asked.slices if p.parameter in products]
    # a table of one column cannot tell the other's
    pair.models[1 - lead][table][:, 1:] = 0
    products = table_products(pair.models, tables)
    counts = [{n: torch.ones(len(pair.average[n])) for n in tables} for _ in pair.models]
    counts[lead][table][-1] = 0  # a row that it never saw
    weights = average_weights(pair.models) | evidence_weights(pair.models, counts)
    reduced = reduce_frames(
        pair.average,
        pair.models,
        pair.symmetries,
        products,
        weights,
        pair.readers() - whole,
        whole,
    )
    assert torch.equal(reduced[table][:-1], pair.models[lead][table][:-1])
    assert torch.equal(reduced[table][-1], pair.average[table][-1])
    assert all(torch.equal(reduced[n], pair.models[lead][n]) for n in whole)
    fitted = fit_layers(reduced, pair.models, HALVES, pair.observe, pair.symmetries, True, whole)
    assert all(torch.equal(fitted[n], reduced[n]) for n in (*whole, table))
    assert pair.error(fitted) < pair.error(pair.average)


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
    observe = Observer(pair.network, batches)
    fitted = fit_layers(pair.average, pair.models, HALVES, observe, pair.symmetries, True)
    assert pair.error(fitted) < pair.error(pair.average)
