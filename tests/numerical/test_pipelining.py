"""TorchRec's pipeline, for CUDA, takes the very steps of the plain loop; here on the CPU."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch

from cki_rec.config import parse
from cki_rec.data.encoding import store
from cki_rec.data.loader import Loader
from cki_rec.engine.embeddings import build, initialize, local_tensors
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.pipelining import Pipeline
from cki_rec.engine.trainer import Stepper, step_seed
from cki_rec.models import model_schema

ROWS = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelining")


def start(compose, raw_zip, folder, *overrides):
    small = ["model.hidden=[8]", "model.embedding_dim=4", "model.attention.hidden=[8]"]
    places = [f"data.raw={raw_zip}", f"runtime.encoded={folder}", "runtime.threads=1"]
    words = [*small, *places, "model.histories=true", "train.gradient_clip=0.1", *overrides]
    config = parse(compose(*words))
    dataset = store.prepare(config.data, config.runtime.encoded)
    schema = model_schema(dataset.schema, config.model)
    model = build(dataset.schema, config.model, config.train, config.runtime)
    initialize(model, 1, 0.05)
    adam = initialized_adam(model, 0.01)
    model.module.train()
    loader = Loader(dataset, schema, dataset.rows("train")[:ROWS], 256, seed=1)
    return model, adam, Stepper(model, adam, config.train), loader


def piped(model, adam, step, loader, first):
    numbers = itertools.count(first)

    def forward(batch):
        torch.manual_seed(step_seed(1, next(numbers), 0))
        return step._forward(batch)

    return Pipeline(model, adam, forward, step._finish).steps(loader)


def state_of(model):
    return [
        tensor.clone()
        for value in [*model.module.state_dict().values(), *model.accumulators().values()]
        for tensor in local_tensors(value)
    ]


@pytest.mark.parametrize("name", ["deepfm", "dcnv2", "din"])
def test_pipeline_takes_the_same_steps(compose, raw_zip, folder, name):
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it misses the streams of CUDA
    actual = []
    for has_pipeline in (False, True):
        model, adam, step, loader = start(compose, raw_zip, folder, f"model={name}")
        losses = []
        for epoch in range(2):  # the second must not be empty
            first = epoch * 6
            steps = (
                piped(model, adam, step, loader, first)
                if has_pipeline
                else step.epoch(loader, 1, first)
            )
            losses.append(list(steps))
        with torch.no_grad():  # the model is its own again
            model.module.eval()
            logits = torch.cat([model.module(batch) for batch in loader])
        actual.append((losses, state_of(model), logits))
    assert [len(epoch) for epoch in actual[0][0]] == [6, 6]
    assert sum(rows for _, rows in actual[0][0][1]) == ROWS
    assert actual[0][0] == actual[1][0]
    assert all(torch.equal(a, b) for a, b in zip(actual[0][1], actual[1][1], strict=True))
    assert torch.equal(actual[0][2], actual[1][2])


def test_a_loss_that_is_not_finite_changes_nothing(compose, raw_zip, folder):
    model, adam, step, loader = start(compose, raw_zip, folder, "model=deepfm")
    with torch.no_grad():
        model.network.bias.fill_(math.nan)
    before = state_of(model)
    loss, _ = next(piped(model, adam, step, loader, 0))
    assert math.isnan(loss)
    pairs = zip(before, state_of(model), strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
