"""What options of a training do to it: whole-table Adam, rules of epochs, precision, average."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from training import (
    accumulators_of,
    equal,
    options,
    plain,
    reference_logit,
    sharded_model,
    state_of,
    step,
)

from cki_rec.config import UserError
from cki_rec.data.encoding import store
from cki_rec.engine.embeddings import build, initialize
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.trainer import fit, set_learning_rates, step_seed
from cki_rec.evaluation.metrics import auc, grouped_auc, log_loss
from cki_rec.models import model_schema
from cki_rec.pipelines.train import monitored

L2 = 0.2
CLIP = 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_embeddings_equal_plain_torch(schema, make_batch, dtype):
    """Adam on whole tables, half their squared norm in the loss, all gradients clipped as one."""
    words = ("train.embeddings=dense", f"train.table_l2={L2}", f"train.gradient_clip={CLIP}")
    model, schedule = sharded_model(schema, *words), options(*words).train
    assert not model.accumulators()
    assert set(model.dense_parameters()) == set(state_of(model))
    params = {k: v.to(dtype).requires_grad_() for k, v in state_of(model).items()}
    adam = initialized_adam(model, schedule.learning_rate)
    own_adam = torch.optim.Adam(params.values(), lr=schedule.learning_rate)
    norms = []
    for number in range(5):
        batch = make_batch(16, seed=number)
        loss = step(model, batch, schedule, adam)
        own_adam.zero_grad()
        logit, _ = reference_logit(params, schema, batch)
        cross_entropy = binary_cross_entropy_with_logits(logit, batch.label.to(dtype))
        penalty = sum((t**2).sum() for n, t in params.items() if n in model.tables)
        (cross_entropy + L2 / 2 * penalty).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), CLIP))
        own_adam.step()
        assert loss == pytest.approx(cross_entropy.item(), abs=1e-5)
    assert min(norms) > 2 * CLIP
    for name, tensor in state_of(model).items():
        torch.testing.assert_close(tensor.to(dtype), params[name].detach(), rtol=1e-4, atol=1e-5)


def test_dense_and_fused_embeddings_start_equal_and_give_equal_logits(schema, make_batch):
    models = [sharded_model(schema, f"train.embeddings={e}") for e in ("fused", "dense")]
    assert equal(*map(state_of, models))
    batch = make_batch(30)
    logits = [model.module(batch) for model in models]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
    assert models[0].plan
    assert not models[1].plan


def test_rows_that_no_batch_looks_up_move_with_dense_embeddings_only(schema, make_batch):
    for embeddings, moves in (("fused", False), ("dense", True)):
        words = (f"train.embeddings={embeddings}", "train.table_l2=0.1")
        model = sharded_model(schema, *words)
        before, batch = state_of(model), make_batch(2)
        step(model, batch, options(*words).train)
        name = "sparse.collection.embedding_bags.user.weight"
        moved = (state_of(model)[name] != before[name]).any(1)
        unseen = [row for row in range(len(moved)) if row not in batch.values[:2].tolist()]
        assert moved[unseen].all() == moves
        assert moved[unseen].any() == moves


@pytest.mark.parametrize("embeddings", ["fused", "dense"])
def test_learning_rates_fall_no_lower_than_allowed(schema, make_batch, embeddings):
    words = (f"train.embeddings={embeddings}", "train.min_learning_rate=0.003")
    model, schedule = sharded_model(schema, *words), options(*words).train
    adam = initialized_adam(model, schedule.learning_rate)
    for scale, dense, table in ((1.0, 0.01, 0.05), (0.1, 0.003, 0.005), (0.01, 0.003, 0.003)):
        set_learning_rates(model, adam, schedule, scale)
        assert [group["lr"] for group in adam.param_groups] == pytest.approx([dense])
        actual = [group["lr"] for group in model.module.fused_optimizer.param_groups]
        assert actual == pytest.approx([table] * len(actual))
        assert bool(actual) == (embeddings == "fused")


# whole trainings


@pytest.fixture(scope="module")
def config(run_config, tmp_path_factory):
    return run_config(
        tmp_path_factory.mktemp("options"),
        *("model.dropout=0.2", "train.learning_rate=0.01", "train.table_learning_rate=0.05"),
    )


@pytest.fixture(scope="module")
def dataset(config):
    return store.prepare(config.data, config.runtime.encoded)


def by_auc(label, logits):
    return {"monitor": auc(label, logits)}


def train(config, dataset, metrics=by_auc, save=lambda _: None, **changes):
    """Return model and history of a training; ``save`` gets the model."""
    schedule = dataclasses.replace(config.train, **changes)
    model = build(dataset.schema, config.model, schedule, config.runtime)
    initialize(model, 1, config.model.init_std)
    schema = model_schema(dataset.schema, config.model)
    rows = [dataset.rows(split) for split in ("train", "valid")]
    history = fit(
        *(model, dataset, schema, *rows, schedule, 1, metrics, lambda: save(model), "a title")
    )
    return model, history


def scripted(*values):
    remaining = iter(values)
    return lambda *_: {"monitor": next(remaining)}


def test_a_gain_must_be_more_than_the_smallest(config, dataset):
    """The best value stays that of the last better epoch, so small gains add up."""
    values = (0.5, 0.51, 0.52, 0.53, 0.54, 0.55)
    _, history = train(
        config, dataset, scripted(*values), epochs=6, patience=9, min_gain=0.025,
        min_learning_rate=1e-4,
    )  # fmt: skip
    assert [e["epoch"] for e in history if e["is_best"]] == [1, 4]
    actual = [epoch["learning_rate"] for epoch in history]
    assert actual == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-4, 1e-4])
    _, short = train(config, dataset, scripted(*values), epochs=6, patience=2, min_gain=0.025)
    assert len(short) == 3


def test_monitor_is_a_weighted_sum_of_metrics(config, dataset):
    rows = dataset.rows("valid")
    label, group = dataset.labels(rows), dataset.group[rows]
    logits = np.random.default_rng(0).normal(size=len(rows)).astype(np.float32)
    want = {
        "auc": auc(label, logits),
        "log_loss": log_loss(label, logits),
        "gauc": grouped_auc(label, logits, group),
    }
    for weights in ((1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (0.0, -1.0, 0.0), (0.5, 0.0, 2.0)):
        monitor = dataclasses.replace(
            config.train.monitor, **dict(zip(want, weights, strict=True))
        )
        actual = monitored(monitor, dataset, rows)(label, logits)
        value = sum(w * v for w, v in zip(weights, want.values(), strict=True))
        assert actual.pop("monitor") == pytest.approx(value, abs=1e-12)
        assert actual == {k: v for k, v in want.items() if k != "gauc" or weights[2]}


def test_the_monitored_sum_chooses_the_epoch(config, dataset):
    """By AUC the second epoch is best, by AUC - LogLoss the first."""
    actual = iter([(0.70, 0.50), (0.72, 0.60)] * 2)

    def metrics(weight):
        def measure(*_):
            auc_value, loss = next(actual)
            return {"auc": auc_value, "monitor": auc_value + weight * loss}

        return measure

    for weight, best in ((0.0, [1, 2]), (-1.0, [1])):
        _, history = train(config, dataset, metrics(weight), epochs=2)
        assert [e["epoch"] for e in history if e["is_best"]] == best
        assert [e["valid_auc"] for e in history] == [0.70, 0.72]


def test_gauc_needs_users(config, dataset, monkeypatch):
    monitor = dataclasses.replace(config.train.monitor, gauc=1.0)
    monkeypatch.setattr(dataset, "group", None)
    with pytest.raises(UserError, match=r"train\.monitor\.gauc: the rows of this data"):
        monitored(monitor, dataset, dataset.rows("valid"))


@pytest.mark.parametrize("changes", [{"log_loss": -1.0}, {"gauc": 1.0}, {}])
def test_a_metric_that_is_undefined_stops_the_training(config, dataset, changes):
    rows = dataset.rows("valid")
    monitor = dataclasses.replace(config.train.monitor, **changes)
    measure = monitored(monitor, dataset, rows)
    ones = np.ones(len(rows), np.uint8)
    assert measure(ones, np.zeros(len(rows), np.float32))["monitor"] is None
    with pytest.raises(UserError, match="a title: a monitored metric is undefined on validation"):
        train(config, dataset, lambda _, logits: measure(ones, logits), epochs=1)


def test_bf16_trains_nearly_as_well(config, dataset):
    results = {
        precision: train(config, dataset, epochs=4, patience=4, precision=precision)
        for precision in ("fp32", "bf16")
    }
    best = {p: max(e["valid_monitor"] for e in h) for p, (_, h) in results.items()}
    assert best["fp32"] > 0.65
    assert best["bf16"] == pytest.approx(best["fp32"], abs=0.02)
    states = [state_of(model) for model, _ in results.values()]
    assert not equal(*states)
    assert {tensor.dtype for tensor in states[1].values()} == {torch.float32}


@pytest.mark.parametrize("embeddings", ["fused", "dense"])
def test_the_average_is_evaluated_and_saved_and_trains_nothing(config, dataset, embeddings):
    saved: dict[float | None, list] = {}
    models, histories = {}, {}
    for ema in (None, 0.9, 0.0):
        saved[ema] = []
        models[ema], histories[ema] = train(
            config, dataset, scripted(0.1, 0.2), lambda m, e=ema: saved[e].append(state_of(m)),
            epochs=2, ema=ema, embeddings=embeddings,
        )  # fmt: skip
    live = {ema: state_of(model) for ema, model in models.items()}
    assert equal(live[None], live[0.9])
    assert equal(live[None], saved[None][-1])
    assert [e["train_loss"] for e in histories[None]] == [e["train_loss"] for e in histories[0.9]]
    assert not any(
        torch.equal(tensor, live[0.9][name])
        for name, tensor in saved[0.9][-1].items()
        if tensor.any()
    )
    for name, tensor in saved[0.0][-1].items():  # without memory: the model itself
        torch.testing.assert_close(tensor, live[None][name], rtol=0, atol=1e-7)


def test_nothing_that_ran_before_changes_a_training(config, dataset):
    """Dropout of a step depends on (seed, step, process) alone."""
    results = []
    for number in (0, 7):
        torch.manual_seed(number)

        def metrics(label, logits, number=number):
            torch.rand(number)
            return by_auc(label, logits)

        model, history = train(config, dataset, metrics, epochs=2)
        results.append((state_of(model), accumulators_of(model), history))
    for one, other in zip(*results, strict=True):
        assert one == other if isinstance(one, list) else equal(one, other)


def test_seeds_of_steps_differ_in_seed_step_and_process():
    places = [(seed, n, rank) for seed in range(3) for n in range(50) for rank in range(4)]
    seeds = [step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [step_seed(*place) for place in places] == seeds


def test_a_model_with_batch_norm_and_dropout_repeats(config, dataset):
    network = dataclasses.replace(config.model, batch_norm=True)
    changed = dataclasses.replace(config, model=network)
    one, two = (train(changed, dataset, epochs=1)[0].module.state_dict() for _ in range(2))
    assert any("running_var" in name for name in one)
    assert equal({n: plain(v) for n, v in one.items()}, {n: plain(v) for n, v in two.items()})
