"""Parts of a training step against their definitions: penalty, clipping, average, Adam."""

from __future__ import annotations

import pytest
import torch
from training import equal, options, plain, state_of, step

from cki_rec.data.schema import Batch, Feature, FeatureSchema
from cki_rec.engine.embeddings import build, initialize, local_tensors
from cki_rec.engine.optimization import (
    MOMENTS,
    Average,
    TableL2,
    clip,
    initialized_adam,
    moments,
)

SCHEMA = FeatureSchema(
    features=(
        Feature("user", "user", "categorical"),
        Feature("price", "", "numeric"),
        Feature("item", "item", "categorical"),
        Feature("tags", "tags", "multi"),
        Feature("clicked", "item", "history"),
    ),
    table_sizes={"user": 9, "item": 11, "tags": 7},
    vocabulary_hashes={name: name for name in ("user", "item", "tags", "price")},
)
ROWS, L2 = 12, 0.3
TABLES = "sparse.collection.embedding_bags."


def draw(seed: int = 0, rows: int = ROWS) -> Batch:
    """Draw rows of ``SCHEMA``; the first has no tag and no history, others up to 5."""
    noise = torch.Generator().manual_seed(seed)
    values, lengths = [], []
    for feature in SCHEMA.lookups:
        sizes = torch.ones(rows, dtype=torch.int32)
        if feature.kind in ("multi", "history"):
            sizes = torch.randint(0, 6, (rows,), generator=noise, dtype=torch.int32)
            sizes[0] = 0
        size = SCHEMA.table_sizes[feature.table]
        lengths.append(sizes)
        values.append(torch.randint(1, size, (int(sizes.sum()),), generator=noise))
    label = torch.randint(0, 2, (rows,), generator=noise).float()
    numbers = torch.randn(rows, 1, generator=noise)
    return Batch(torch.cat(values), torch.cat(lengths), label, numbers)


def started(*words: str):
    config = options(*words)
    model = build(SCHEMA, config.model, config.train, config.runtime)
    initialize(model, 1, 0.3)
    return model


def lookups_of(model, batch: Batch, scale: float, l2: float) -> list[torch.Tensor]:
    """Return the gradients that the penalty adds to every lookup of the network."""
    penalty = TableL2(model, l2)
    penalty.scale = scale
    actual = model.sparse(batch)
    penalty.remove()
    values = [actual.fields_BFD, *actual.histories.values()]
    return list(torch.autograd.grad(sum(value.sum() for value in values), values))


def gradients_of(model, batch: Batch, l2: float) -> list[torch.Tensor]:
    """Return the gradient of ``l2 * sum ||e||^2 / rows`` at the lookups, by autograd."""
    actual = model.sparse(batch)
    values = [actual.fields_BFD, *actual.histories.values()]
    leaves = [value.detach().requires_grad_() for value in values]
    fields, *histories = leaves
    looked_up = [fields[:, : len(model.sparse.looked_up)], *histories]
    term = l2 * sum((value**2).sum() for value in looked_up) / len(batch)
    return list(torch.autograd.grad(term, leaves))


@pytest.mark.parametrize("name", ["deepfm", "din"])
def test_fused_penalty_is_the_gradient_of_its_term(name):
    """Numbers, whose vectors Adam trains, are left out; attended histories are not."""
    model, batch = started(f"model={name}", "model.histories=true"), draw()
    assert len(model.sparse.fields) > len(model.sparse.looked_up)
    actual = lookups_of(model, batch, 1 / ROWS, L2)
    want = gradients_of(model, batch, L2)
    assert len(actual) == {"deepfm": 1, "din": 2}[name]
    for one, other in zip(actual, want, strict=True):
        torch.testing.assert_close(one - 1, other, rtol=1e-5, atol=1e-6)  # the sum gives ones
        assert other.any()
    assert not want[0][:, len(model.sparse.looked_up) :].any()


@pytest.mark.parametrize("l2", [0.0, L2])
def test_penalty_scales_with_processes_and_is_off_without_l2(l2):
    model, batch = started(), draw()
    one, three = (lookups_of(model, batch, scale / ROWS, l2)[0] - 1 for scale in (1, 3))
    torch.testing.assert_close(three, 3 * one, rtol=1e-4, atol=1e-5)
    assert one.any() == (l2 > 0)


def test_penalty_is_not_computed_in_evaluation():
    model, batch = started(), draw()
    penalty = TableL2(model, L2)
    with torch.no_grad():
        actual = model.sparse(batch)
    penalty.remove()
    assert not actual.fields_BFD.requires_grad


@pytest.mark.parametrize("embeddings", ["fused", "dense"])
def test_a_removed_penalty_is_gone(embeddings):
    model, batch = started(f"train.embeddings={embeddings}"), draw()
    TableL2(model, L2).remove()
    values = model.sparse(batch).fields_BFD
    (actual,) = torch.autograd.grad(values.sum(), values)
    assert torch.equal(actual, torch.ones_like(actual))


@pytest.mark.parametrize("name", ["deepfm", "din"])
def test_dense_penalty_is_the_gradient_of_half_the_norm_of_whole_tables(name):
    words = (f"model={name}", "model.histories=true", "train.embeddings=dense")
    model, batch = started(*words), draw()
    parameters = model.dense_parameters()
    model.module(batch).sum().backward()
    before = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    TableL2(model, L2).add_to_dense()
    penalized = {n for n in parameters if n in model.tables or n.startswith("sparse.numbers")}
    term = L2 / 2 * sum((parameters[n] ** 2).sum() for n in penalized)
    want = dict(
        zip(penalized, torch.autograd.grad(term, [parameters[n] for n in penalized]), strict=True)
    )
    assert penalized == {n for n in before if "sparse." in n}
    for n, gradient in before.items():
        added = parameters[n].grad - gradient
        torch.testing.assert_close(
            added, want.get(n, torch.zeros_like(added)), rtol=1e-4, atol=1e-5
        )
    looked_up = before[f"sparse.{model.sparse.sources['user']}"]
    assert not looked_up.any(1).all()  # rows that no batch looks up decay too


def test_clip_is_that_of_torch():
    model = started("train.embeddings=dense")
    model.module(draw()).sum().backward()
    parameters = model.dense_parameters()
    before = {name: p.grad.clone() for name, p in parameters.items()}
    clip(model, None)
    assert all(torch.equal(p.grad, before[n]) for n, p in parameters.items())
    norm = torch.cat([g.flatten() for g in before.values()]).norm()
    clip(model, float(norm) * 2)
    assert all(torch.equal(p.grad, before[n]) for n, p in parameters.items())
    clip(model, 0.01)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, before[name] * (0.01 / norm), rtol=1e-4, atol=0)


EMBEDDINGS = pytest.mark.parametrize("embeddings", ["fused", "dense"])


@EMBEDDINGS
@pytest.mark.parametrize("batch_norm", ["false", "true"])
def test_average_is_that_of_its_formula(embeddings, batch_norm):
    words = (f"train.embeddings={embeddings}", f"model.batch_norm={batch_norm}")
    model, schedule = started(*words), options(*words).train
    adam = initialized_adam(model, 0.05)
    average, own = Average(model, 0.8), state_of(model)
    buffers = {name for name in own if "running_" in name or "num_batches" in name}
    assert bool(buffers) == (batch_norm == "true")
    assert set(average.state) == set(own) - buffers
    for seed in range(4):
        step(model, draw(seed), schedule, adam)
        average.update()
        own = {n: 0.8 * own[n] + 0.2 * new for n, new in state_of(model).items()}
    state = state_of(model)
    for name, value in average.state.items():
        torch.testing.assert_close(plain(value), own[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(plain(value), state[name]), name


class Interruption(BaseException):
    """What is no Exception."""


@EMBEDDINGS
@pytest.mark.parametrize("raised", [None, ValueError, Interruption])
def test_average_is_applied_within_the_block_only(embeddings, raised):
    words = (f"train.embeddings={embeddings}",)
    model, schedule = started(*words), options(*words).train
    average = Average(model, 0.5)
    step(model, draw(), schedule)
    average.update()
    mean, own = {n: plain(v) for n, v in average.state.items()}, state_of(model)
    logits = model.module(draw(9))

    def use() -> None:
        with average.applied():
            assert equal(state_of(model), mean)
            assert not torch.equal(model.module(draw(9)), logits)
            if raised is not None:
                raise raised

    if raised is None:
        use()
    else:
        with pytest.raises(raised):
            use()
    assert equal(state_of(model), own)
    assert equal({n: plain(v) for n, v in average.state.items()}, mean)
    assert torch.equal(model.module(draw(9)), logits)


@EMBEDDINGS
def test_the_initialized_state_equals_the_state_of_adam(embeddings):
    words = (f"train.embeddings={embeddings}",)
    states, actual = [], []
    for is_lazy in (False, True):
        model = started(*words)
        adam = initialized_adam(model, 0.01)
        assert set(moments(model, adam)) == {
            f"{moment}.{name}" for moment in MOMENTS for name in model.dense_parameters()
        }
        if is_lazy:
            adam = torch.optim.Adam(model.dense_parameters().values(), lr=0.01, fused=True)
        for seed in range(3):
            step(model, draw(seed), options(*words).train, adam)
        states.append(state_of(model))
        actual.append(moments(model, adam))
    assert equal(*states)
    assert equal(*actual)
    assert all(value == 3 for name, value in actual[0].items() if name.startswith("step."))


def test_parts_of_a_table_are_the_tensors_in_use():
    model = started()
    name = f"{TABLES}user.weight"
    (part,) = local_tensors(model.module.state_dict()[name])
    with torch.no_grad():
        part.fill_(2.0)
    assert (state_of(model)[name] == 2.0).all()
