"""The training loops: reproducible, with the stated rules, and safe when the loss explodes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from training import equal, options, plain, state_of

from cki_rec.config import UserError
from cki_rec.data.encoding import store
from cki_rec.engine.embeddings import build, initialize, table_of
from cki_rec.engine.evaluator import predict
from cki_rec.engine.gating import train_gates
from cki_rec.engine.trainer import fit
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.methods.cki.assessment import compute_global_terms
from cki_rec.merging.methods.cki.gate import initialize_gate
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.models import build_model, model_schema

SCHEDULE = (
    *("train.epochs=2", "train.batch_size=512", "train.learning_rate=0.01"),
    *("train.table_learning_rate=0.05", "train.table_l2=1e-5", "train.patience=2"),
)


@pytest.fixture(scope="module")
def config(run_config, tmp_path_factory):
    return run_config(tmp_path_factory.mktemp("trainer"), "model.dropout=0.2", *SCHEDULE)


@pytest.fixture(scope="module")
def dataset(config):
    return store.prepare(config.data, config.runtime.encoded)


@pytest.fixture(scope="module")
def read_schema(config, dataset):
    return model_schema(dataset.schema, config.model)


def start(config, dataset, seed=1):
    model = build(dataset.schema, config.model, config.train, config.runtime)
    initialize(model, seed, config.model.init_std)
    return model


def scripted(values, before=lambda: None):
    """Return a metric that gives ``values`` one by one."""
    remaining = iter(values)

    def metric(label, logits):
        before()
        return next(remaining)

    return metric


def monitored(metric):
    return lambda label, logits: {"monitor": metric(label, logits)}


def train(config, dataset, schema, model=None, seed=1, metric=auc, save=lambda: None, **changes):
    schedule = dataclasses.replace(config.train, **changes)
    model = model or start(config, dataset)
    rows, valid = dataset.rows("train"), dataset.rows("valid")
    return fit(
        model, dataset, schema, rows, valid, schedule, seed, monitored(metric), save, "a title"
    )


def test_the_same_seed_gives_the_same_bits(config, dataset, read_schema):
    results = []
    for seed in (1, 1, 2):
        model = start(config, dataset)
        history = train(config, dataset, read_schema, model, seed=seed)
        torch.manual_seed(99)  # nothing outside reaches in
        results.append((state_of(model), history, model.accumulators()))
    assert results[0][1] == results[1][1]
    assert equal(results[0][0], results[1][0])
    for name, value in results[0][2].items():
        assert torch.equal(plain(value), plain(results[1][2][name]))
    assert not equal(results[0][0], results[2][0])
    assert results[0][1] != results[2][1]


def test_training_learns(config, dataset, read_schema):
    history = train(config, dataset, read_schema, epochs=6, patience=6)
    assert history[-1]["train_loss"] < history[0]["train_loss"] < 0.75
    assert max(epoch["valid_monitor"] for epoch in history) > 0.7


def test_plateau_and_early_stopping_follow_the_rules(config, dataset, read_schema):
    """Equal is not better; both rates fall after every stalled epoch; a better epoch resets."""
    values = [0.5, 0.6, 0.6, 0.7, 0.65, 0.6, 0.7, 0.99]
    saved = []
    model = start(config, dataset)
    table_rates = []

    def before():
        (rate,) = {group["lr"] for group in model.module.fused_optimizer.param_groups}
        table_rates.append(rate)

    history = train(
        *(config, dataset, read_schema, model),
        epochs=30,
        patience=3,
        metric=scripted(values, before),
        save=lambda: saved.append(len(table_rates)),
    )
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [epoch["valid_monitor"] for epoch in history] == values[:-1]
    assert [epoch["epoch"] for epoch in history if epoch["is_best"]] == [1, 2, 4] == saved
    scale = [1, 1, 1, 0.1, 0.1, 0.01, 0.001]
    assert [epoch["learning_rate"] for epoch in history] == pytest.approx(
        [0.01 * s for s in scale]
    )
    assert table_rates == pytest.approx([0.05 * s for s in scale])


def test_a_rate_of_zero_after_a_plateau_stops_every_parameter(config, dataset, read_schema):
    model = start(config, dataset)
    states = []
    train(
        *(config, dataset, read_schema, model),
        epochs=3,
        plateau_factor=0.0,
        patience=9,
        metric=scripted([0.5, 0.5, 0.5], lambda: states.append(state_of(model))),
    )
    assert not equal(states[0], states[1])
    assert equal(states[1], states[2])


def test_epochs_are_the_most_there_are(config, dataset, read_schema):
    history = train(config, dataset, read_schema, metric=scripted([0.1, 0.2, 0.3]))
    assert len(history) == config.train.epochs


def test_rows_come_in_another_order_every_epoch(config, dataset, read_schema, monkeypatch):
    from cki_rec.data.loader import Gather

    seen = []
    batch = Gather.__call__
    monkeypatch.setattr(Gather, "__call__", lambda s, rows: (seen.append(rows), batch(s, rows))[1])
    train(config, dataset, read_schema, metric=scripted([0.1, 0.2]))
    num = -(-len(dataset.rows("train")) // config.train.batch_size)
    epochs = [np.concatenate(seen[:num]), np.concatenate(seen[num + 1 : 2 * num + 1])]
    for order in epochs:
        assert sorted(order) == dataset.rows("train").tolist()
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("option", ["model.batch_norm=true", "model.activation=dice"])
def test_batches_of_one_row_with_batch_norm_are_refused_before_training(
    dataset, read_schema, option
):
    config = options("model=dnn", option, "train.batch_size=1")
    model = build(dataset.schema, config.model, config.train, config.runtime)
    initialize(model, 1, 0.1)
    before = state_of(model)
    with pytest.raises(UserError, match=r"train\.batch_size=1 with batch norm or Dice, which"):
        train(config, dataset, read_schema, model, save=lambda: pytest.fail("it saved"))
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_stops_before_any_update(config, dataset, read_schema, value):
    model = start(config, dataset)
    with torch.no_grad():
        model.module.state_dict()["bias"].fill_(value)
    before = state_of(model)
    with pytest.raises(UserError) as caught:
        train(config, dataset, read_schema, model, save=lambda: pytest.fail("it saved"))
    message = str(caught.value)
    assert "a title: the loss is" in message
    assert "in epoch 1; lower train.learning_rate or train.table_learning_rate" in message
    after = state_of(model)
    assert all(torch.equal(after[n].nan_to_num(), t.nan_to_num()) for n, t in before.items())
    assert not any(plain(value).any() for value in model.accumulators().values())


def test_predictions_are_in_the_order_of_the_rows(config, dataset, read_schema):
    model = start(config, dataset)
    train(config, dataset, read_schema, model)
    rows = dataset.rows("valid")
    device = torch.device("cpu")
    logits = predict(model.module, dataset, read_schema, rows, device)
    turned = predict(model.module, dataset, read_schema, rows[::-1].copy(), device)
    np.testing.assert_allclose(turned[::-1], logits, rtol=1e-5, atol=1e-6)
    assert len(np.unique(logits)) > len(rows) // 2
    assert predict(model.module, dataset, read_schema, rows[:0], device).shape == (0,)


# gates


@pytest.fixture(scope="module")
def sources(config, dataset, read_schema):
    models = []
    for seed in (1, 2):
        model = start(config, dataset, seed)
        train(config, dataset, read_schema, model, seed=seed)
        models.append(state_of(model))
    return models


def learn(config, dataset, schema, models, kind="full", trunk=(), metric=auc, epochs=2, **more):
    gates = {n: initialize_gate(t.shape, kind, 1, n) for n, t in models[0].items()}
    gates |= dict.fromkeys(trunk)
    terms = compute_global_terms(models, 0.4, 500.0, 10)

    def weigh(parts, _, gates):
        own = {name: terms[name] for name in parts[0]}
        return cki_weights(parts, perspective="dual", splice="soft", gates=gates, global_terms=own)

    trained = train_gates(
        build_model(dataset.schema, config.model, torch.device("cpu")),
        models,
        more.get("gates", gates),
        weigh,
        trunk,
        dataset,
        schema,
        dataset.rows("train"),
        dataset.rows("valid"),
        epochs,
        0.01,
        1024,
        more.get("seed", 1),
        metric,
        "a title",
    )
    return gates, trained


@pytest.mark.parametrize("kind", ["full", "affine", "diagonal", "low_rank", "scalar"])
def test_every_gate_learns_and_sources_stay(config, dataset, read_schema, sources, kind):
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in sources]
    gates, trained = learn(config, dataset, read_schema, sources, kind)
    assert all(equal(*pair) for pair in zip(before, sources, strict=True))
    assert not any(t.requires_grad or t.grad is not None for m in sources for t in m.values())
    assert set(trained.gates) == set(gates) == set(sources[0])
    for name, gate in trained.gates.items():
        assert not torch.equal(gate, gates[name]), name
        assert not gate.requires_grad
        initial = initialize_gate(sources[0][name].shape, kind, 1, name)
        assert torch.equal(gates[name], initial)  # the arguments are untouched, too
    assert trained.trunk == {}
    assert 1 <= trained.epoch <= 2
    assert 0.5 < trained.valid_metric < 1


def test_the_trunk_moves_and_nothing_else(config, dataset, read_schema, sources):
    trunk = [name for name in sources[0] if not name.startswith("mlp.")]
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in sources]
    _, trained = learn(config, dataset, read_schema, sources, trunk=trunk)
    assert all(equal(*pair) for pair in zip(before, sources, strict=True))
    assert list(trained.trunk) == trunk
    assert all(table_of(name) or name == "bias" for name in trunk)
    for name, tensor in trained.trunk.items():
        assert not torch.equal(tensor, sources[0][name]), name
        assert not torch.equal(tensor, sources[1][name]), name
        assert trained.gates[name] is None
        assert (tensor - sources[0][name]).abs().max() < 0.1  # it starts from the first source


def test_the_same_seed_gives_the_same_gates(config, dataset, read_schema, sources):
    results = [learn(config, dataset, read_schema, sources, seed=seed)[1] for seed in (1, 1, 2)]
    assert equal(results[0].gates, results[1].gates)
    assert results[0].valid_metric == results[1].valid_metric
    assert not equal(results[0].gates, results[2].gates)


@pytest.mark.parametrize(
    ("values", "epoch"),
    [
        ([0.5, 0.7, 0.6], 2),
        ([0.7, 0.7, 0.6], 1),
        ([0.5, 0.6, 0.7], 3),
        ([None, None, None], 1),
        ([None, 0.4, 0.3], 2),
        ([0.4, None, 0.3], 1),
    ],
)
def test_the_best_epoch_is_kept(config, dataset, read_schema, sources, values, epoch):
    kind, metric = "scalar", scripted(values)
    _, trained = learn(config, dataset, read_schema, sources, kind, metric=metric, epochs=3)
    assert trained.epoch == epoch
    assert trained.valid_metric == values[epoch - 1]
    rising = scripted([0.1, 0.2, 0.3])
    _, until = learn(config, dataset, read_schema, sources, kind, metric=rising, epochs=epoch)
    assert equal(trained.gates, until.gates)


def test_a_gate_that_explodes_is_reported(config, dataset, read_schema, sources):
    gates = {name: torch.tensor(float("nan")) for name in sources[0]}
    with pytest.raises(UserError, match=r"a title: the loss is nan; lower merge\.learn\.lear"):
        learn(config, dataset, read_schema, sources, gates=gates)
