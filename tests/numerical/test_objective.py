"""Objectives of the training loop: a teacher's logits instead of labels, and refinement."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from training import equal, options, state_of

from cki_rec.data.encoding import store
from cki_rec.data.random_rows import RandomRows
from cki_rec.engine.embeddings import build, initialize
from cki_rec.engine.evaluator import predict
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.steps import StepLog
from cki_rec.engine.trainer import Objective, Stepper, cosine, fit
from cki_rec.models import model_schema

LOSSES = ("labels", "teacher", "both")


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_against_numpy(sharded, make_batch, loss):
    model, batch = sharded(), make_batch(16)
    with torch.no_grad():
        logit = model.module(batch).double().numpy()
    label, target = batch.label.double().numpy(), np.linspace(-2, 2, 16, dtype=np.float32)
    batch.target = torch.from_numpy(target)
    cross_entropy = np.logaddexp(0, logit) - label * logit
    squared = (logit - target) ** 2
    expected = {"labels": cross_entropy, "teacher": squared, "both": cross_entropy + squared}
    schedule = options().train
    adam = initialized_adam(model, schedule.learning_rate)
    with Stepper(model, adam, schedule, Objective(loss)) as step:
        assert step(batch) == pytest.approx(expected[loss].mean(), rel=1e-6)
        assert step(batch) < expected[loss].mean()


def test_batches_carry_their_target(make_batch):
    batch = make_batch(4)
    assert batch.to(torch.device("cpu")).target is None
    batch.target = torch.arange(4.0)
    assert batch.to(torch.device("cpu")).target.equal(batch.target)


def test_the_cosine_falls_from_1_to_0():
    assert [cosine(step, 4) for step in range(5)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    )
    assert cosine(9, 4) == 0


@pytest.fixture(scope="module")
def config(run_config, tmp_path_factory):
    words = ("train.epochs=3", "train.batch_size=512", "model.dropout=0.5", "train.patience=1")
    return run_config(tmp_path_factory.mktemp("objective"), *words)


@pytest.fixture(scope="module")
def dataset(config):
    return store.prepare(config.data, config.runtime.encoded)


class Refining:
    """A refinement to fixed logits, and all that it reports."""

    def __init__(self, config, dataset, values, data=None, **changes):
        self.config, self.dataset, self.data = config, dataset, data
        self.schedule = dataclasses.replace(config.train, **changes)
        self.model = build(dataset.schema, config.model, config.train, config.runtime)
        initialize(self.model, 1, config.model.init_std)
        self.start = state_of(self.model)
        self.saved, self.rates, remaining = [], [], iter(values)

        class Log(StepLog):
            def step(log, step, loss, rows, rate):
                self.rates.append(rate)

        self.history = fit(
            *(self.model, dataset, model_schema(dataset.schema, config.model)),
            *(np.arange(len(data)) if data else dataset.rows("train"), dataset.rows("valid")),
            *(self.schedule, 1, lambda *_: {"monitor": next(remaining)}),
            *(lambda: self.saved.append(state_of(self.model)), "a title", None, Log.none()),
            Objective("teacher", self.targets, data, refines=True),
        )

    def targets(self, rows):
        return np.cos(rows).astype(np.float32)


def test_a_refinement_begins_with_the_start_and_falls_by_a_cosine(config, dataset):
    values = [0.5, 0.6, 0.7, 0.8]
    run = Refining(config, dataset, values)
    first, *rest = run.history
    assert first == {"epoch": 0, "step": 0, "train_loss": None, "valid_monitor": 0.5,
                     "is_best": True}  # fmt: skip
    assert equal(run.saved[0], run.start)
    assert [entry["valid_monitor"] for entry in rest] == values[1:]
    total, rate = len(run.rates), run.schedule.learning_rate
    assert total == rest[-1]["step"] == 3 * rest[0]["step"]
    assert run.rates == pytest.approx([rate * cosine(step, total) for step in range(total)])
    assert rest[-1]["learning_rate"] == pytest.approx(0, abs=1e-12)
    assert rest[-1]["train_loss"] < rest[0]["train_loss"] < 1
    assert len(run.saved) == 4


@pytest.mark.parametrize(
    ("values", "saved"),
    [
        ([0.5, 0.4, 0.9], [0]),  # the first epoch below the start is the last
        ([0.5, 0.6, 0.4, 0.9], [0, 1]),
        ([0.5, 0.6, 0.55, 0.9], [0, 1, 3]),  # one below the best is not
        ([0.5, 0.5, 0.5, 0.5], [0]),
    ],
)
def test_the_start_or_the_best_epoch_is_saved_last(config, dataset, values, saved):
    run = Refining(config, dataset, values)
    assert [entry["epoch"] for entry in run.history if entry["is_best"]] == saved
    below = [value < 0.5 for value in values]
    assert len(run.history) == (below.index(True) + 1 if any(below) else 4)
    assert len(run.saved) == len(saved)
    assert equal(run.saved[-1], run.start) == (saved == [0])


def test_a_refinement_draws_no_dropout(config, dataset):
    """Its loss is then the mean squared difference of the logits that are served."""
    rates = {"learning_rate": 0.0, "table_learning_rate": 0.0, "epochs": 1}
    run = Refining(config, dataset, [0.5, 0.5], **rates)
    rows = dataset.rows("train")
    schema = model_schema(dataset.schema, config.model)
    logits = predict(run.model.module, dataset, schema, rows, torch.device("cpu"))
    expected = np.square(logits - np.cos(rows)).mean()
    assert run.history[1]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert equal(state_of(run.model), run.start)


def test_random_rows_are_fitted_too(config, dataset):
    schema = model_schema(dataset.schema, config.model)
    counts = dataset.row_counts(schema, config.data.partition, None)
    rows = RandomRows(schema, counts, 512, seed=1)
    run = Refining(config, dataset, [0.1, 0.2, 0.3, 0.4], rows)
    assert run.history[-1]["train_loss"] < run.history[1]["train_loss"]
