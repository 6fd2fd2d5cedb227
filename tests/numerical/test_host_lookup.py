"""Lookups by torch operations: they equal FBGEMM's CPU kernels and a reference in float64."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from networks import SCHEMAS, draw_batch
from training import accumulators_of, equal, options, sharded_model, state_of, step

from cki_rec.config import UserError
from cki_rec.engine.host_lookup import HostLookup
from cki_rec.engine.optimization import initialized_adam

TABLES = (("a", 50, 8), ("b", 7, 8), ("c", 30, 12), ("d", 50, 4), ("e", 7, 4))
FEATURES = (("f", "g"), ("h",), ("i",), ("f", "g"), ("h",))
"""Tables a and d are read by two features each; the widths 8 and 4 by the same ids."""
TABLE_OF = [table for table, names in enumerate(FEATURES) for _ in names]
BAGS, RATE, EPS, STEPS = 17, 0.1, 1e-8, 3
LONGEST = {"one id": (1, 1), "ragged": (0, 5), "one or none": (0, 2), "empty": (0, 1)}
OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
}


def fbgemm(optimizer: str, pooling: PoolingMode):
    """Return FBGEMM's module of ``TABLES`` with random weights."""
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, *place) for _, rows, width in TABLES],
        feature_table_map=TABLE_OF,
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=RATE,
        eps=EPS,
        pooling_mode=pooling,
        device=torch.device("cpu"),
        table_names=[name for name, _, _ in TABLES],
    )
    noise = torch.Generator().manual_seed(5)
    for weight in module.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=noise))
    return module


def inputs(lengths: str, noise: torch.Generator):
    """Return ids and offsets; features of one name have the same ids."""
    low, high = LONGEST[lengths]
    drawn, ids, counts = {}, [], []
    for table, names in enumerate(FEATURES):
        for name in names:
            if name not in drawn:
                number = (
                    torch.ones(BAGS, dtype=torch.long)
                    if low == high
                    else torch.randint(low, high, (BAGS,), generator=noise)
                )
                size = (int(number.sum()),)
                drawn[name] = torch.randint(TABLES[table][1], size, generator=noise), number
            ids.append(drawn[name][0])
            counts.append(drawn[name][1])
    return torch.cat(ids), torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))


class Reference:
    """Plain loops in float64."""

    def __init__(self, module, optimizer: str, pooling: PoolingMode) -> None:
        self.weights = [w.double() for w in module.split_embedding_weights()]
        self.is_row_wise, self.is_mean = optimizer != "adagrad", pooling == PoolingMode.MEAN
        self.moments = [
            torch.zeros(w.shape[0], 1 if self.is_row_wise else w.shape[1], dtype=torch.float64)
            for w in self.weights
        ]

    def bags(self, ids, offsets, factors):
        for feature, table in enumerate(TABLE_OF):
            for bag in range(BAGS):
                first, last = offsets[feature * BAGS + bag : feature * BAGS + bag + 2].tolist()
                share = torch.ones(last - first, dtype=torch.float64)
                if factors is not None:
                    share = factors[first:last].double()
                if self.is_mean:
                    share = share / max(last - first, 1)
                yield feature, bag, table, ids[first:last], share

    def forward(self, ids, offsets, factors):
        columns = [torch.zeros(BAGS, TABLES[table][2], dtype=torch.float64) for table in TABLE_OF]
        for feature, bag, table, rows, share in self.bags(ids, offsets, factors):
            columns[feature][bag] = (self.weights[table][rows] * share[:, None]).sum(0)
        return torch.cat(columns, 1)

    def backward(self, gradient, ids, offsets, factors):
        summed = [torch.zeros_like(weight) for weight in self.weights]
        columns = gradient.double().split([TABLES[table][2] for table in TABLE_OF], 1)
        for feature, bag, table, rows, share in self.bags(ids, offsets, factors):
            for row, factor in zip(rows.tolist(), share.tolist(), strict=True):
                summed[table][row] += factor * columns[feature][bag]
        for weight, moment, total in zip(self.weights, self.moments, summed, strict=True):
            squares = total.square()
            moment += squares.mean(1, keepdim=True) if self.is_row_wise else squares
            weight -= RATE * total / (moment.sqrt() + EPS)


@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("lengths", LONGEST)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bags_and_updates_equal_fbgemm_and_float64(optimizer, pooling, lengths, is_weighted):
    theirs, ours = fbgemm(optimizer, pooling), fbgemm(optimizer, pooling)
    ours.forward = HostLookup(ours, FEATURES)
    reference = Reference(ours, optimizer, pooling)
    noise, close = torch.Generator().manual_seed(7), {"rtol": 1e-5, "atol": 1e-5}
    # FBGEMM's updates of weighted means are not those of the mean
    has_opponent = not (is_weighted and pooling == PoolingMode.MEAN)
    for _ in range(STEPS):
        ids, offsets = inputs(lengths, noise)
        factors = 0.5 + torch.rand(len(ids), generator=noise) if is_weighted else None
        pair = [module(ids, offsets, factors) for module in (theirs, ours)]
        if has_opponent:
            torch.testing.assert_close(pair[1], pair[0], **close)
        torch.testing.assert_close(
            pair[1].double(), reference.forward(ids, offsets, factors), **close
        )
        gradient = torch.randn(pair[0].shape, generator=noise)
        for out in pair:
            out.backward(gradient)
        reference.backward(gradient, ids, offsets, factors)
        for weight, expected in zip(
            ours.split_embedding_weights(), reference.weights, strict=True
        ):
            torch.testing.assert_close(weight.double(), expected, **close)
        moments = torch.cat([moment.flatten() for moment in reference.moments])
        torch.testing.assert_close(ours.momentum1_host.double(), moments, **close)
        if has_opponent:
            torch.testing.assert_close(ours.weights_host, theirs.weights_host, **close)
            torch.testing.assert_close(ours.momentum1_host, theirs.momentum1_host, **close)


def test_gradients_of_weights_of_ids_are_those_of_autograd():
    module = fbgemm("adagrad", PoolingMode.MEAN)
    module.forward = HostLookup(module, FEATURES)
    noise = torch.Generator().manual_seed(3)
    ids, offsets = inputs("ragged", noise)
    factors = torch.rand(len(ids), generator=noise, requires_grad=True)
    other = factors.detach().double().requires_grad_()
    expected = Reference(module, "adagrad", PoolingMode.MEAN).forward(ids, offsets, other)
    gradient = torch.randn(expected.shape, generator=noise)
    module(ids, offsets, factors).backward(gradient)
    (wanted,) = torch.autograd.grad(expected, other, gradient.double())
    torch.testing.assert_close(factors.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_that_no_bag_reads_stay():
    module = fbgemm("rowwise_adagrad", PoolingMode.SUM)
    before = [weight.clone() for weight in module.split_embedding_weights()]
    module.forward = HostLookup(module, FEATURES)
    ids, offsets = inputs("one id", torch.Generator().manual_seed(1))
    module(ids, offsets).sum().backward()
    read = [set() for _ in TABLES]
    for feature, table in enumerate(TABLE_OF):
        read[table] |= set(ids[feature * BAGS : (feature + 1) * BAGS].tolist())
    for rows, old, new in zip(read, before, module.split_embedding_weights(), strict=True):
        moved = (old != new).any(1).nonzero().squeeze(1)
        assert set(moved.tolist()) == rows


@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("lengths", ["one id", "ragged"])
def test_an_id_outside_of_its_table_is_named(wrong, lengths):
    module = fbgemm("adagrad", PoolingMode.SUM)
    module.forward = HostLookup(module, FEATURES)
    ids, offsets = inputs(lengths, torch.Generator().manual_seed(2))
    ids[offsets[2 * BAGS + 3]] = wrong  # the feature h of table b
    with pytest.raises(
        UserError, match=f"table b: a batch reads row {wrong}, and there are 7 rows"
    ):
        module(ids, offsets)


CASES = {
    "deepfm": ("mixed", "model=deepfm", "model.histories=true", "train.table_l2=0.01"),
    "plain": ("plain", "model=dcnv2"),
    "din": ("mixed", "model=din", "model.attention.length=4"),
    "adagrad": ("mixed", "model=deepfm", "train.table_optimizer=adagrad"),
    "bf16": ("plain", "model=deepfm", "train.precision=bf16"),
}


@pytest.mark.parametrize("case", CASES)
def test_both_kernels_train_the_same_model(case):
    key, *words = CASES[case]
    states = []
    for kernels in ("torch", "fbgemm"):
        words_of_run = (*words, "model.init_std=0.1", f"runtime.kernels={kernels}")
        model = sharded_model(SCHEMAS[key], *words_of_run)
        schedule = options(*words_of_run).train
        adam = initialized_adam(model, schedule.learning_rate)
        for number in range(6):
            model.set_table_learning_rate(0.05 / (1 + number))
            step(model, draw_batch(SCHEMAS[key], 23, seed=number), schedule, adam)
        states.append(
            {**state_of(model), **{f"m {k}": v for k, v in accumulators_of(model).items()}}
        )
    tolerance = 1e-2 if case == "bf16" else 2e-5
    for name, value in states[0].items():
        torch.testing.assert_close(
            value, states[1][name], rtol=tolerance, atol=tolerance, msg=name
        )


def test_the_same_steps_give_the_same_bits():
    states = []
    for _ in range(2):
        model = sharded_model(SCHEMAS["mixed"], "model.histories=true")
        for number in range(3):
            step(model, draw_batch(SCHEMAS["mixed"], 23, seed=number), options().train)
        states.append({**state_of(model), **accumulators_of(model)})
    assert equal(*states)


def test_unknown_kernels_are_refused():
    with pytest.raises(UserError, match=r"runtime\.kernels.*torch"):
        options("runtime.kernels=triton")
