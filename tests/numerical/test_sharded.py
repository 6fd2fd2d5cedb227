"""Sharded tables against plain torch: the same logits, and the same updates in float64."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from training import TABLES, accumulators_of, load_params, options, reference_logit, state_of, step

from cki_rec.checkpoints import checkpoint
from cki_rec.config import UserError
from cki_rec.data.provenance import Provenance
from cki_rec.engine import checkpoint_io, distributed, embeddings
from cki_rec.engine.embeddings import ShardedModel, initial_rows, initialize, table_of
from cki_rec.engine.optimization import initialized_adam
from cki_rec.engine.restoration import restore
from cki_rec.models import build_model

SCHEDULE = options().train


def test_sharded_and_unsharded_give_the_same_logits(sharded, schema, make_batch):
    torch.manual_seed(0)
    network = build_model(schema, options().model, torch.device("cpu"))
    model = sharded()
    load_params(model, network.state_dict())
    batch = make_batch(40)
    torch.testing.assert_close(model.module(batch), network(batch), rtol=1e-6, atol=1e-6)
    expected, _ = reference_logit(
        {k: v.double() for k, v in network.state_dict().items()}, schema, batch
    )
    torch.testing.assert_close(model.module(batch).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table_l2", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_five_steps_equal_a_float64_reference(sharded, schema, make_batch, optimizer, table_l2):
    """Adagrad's accumulator adds g^2, row-wise its mean over the columns of the table.

    First-order tables have one column in use of four, so their mean is a quarter of g^2.
    """
    words = f"train.table_optimizer={optimizer}", f"train.table_l2={table_l2}"
    model, schedule = sharded(*words), options(*words).train
    params = {k: v.double().requires_grad_() for k, v in state_of(model).items()}
    is_table = {name: table_of(name) is not None for name in params}
    state = {n: torch.zeros_like(t.detach()) for n, t in params.items() if is_table[n]}
    adam = initialized_adam(model, schedule.learning_rate)
    own_adam = torch.optim.Adam([t for n, t in params.items() if not is_table[n]], lr=0.01)
    for number in range(5):
        batch = make_batch(16, seed=number)
        loss = step(model, batch, schedule, adam)
        own_adam.zero_grad()
        logit, emb_BFD = reference_logit(params, schema, batch)
        cross_entropy = binary_cross_entropy_with_logits(logit, batch.label.double())
        penalty = table_l2 * (emb_BFD**2).sum() / len(batch)
        (cross_entropy + penalty).backward()
        assert loss == pytest.approx(cross_entropy.item(), abs=1e-5)
        own_adam.step()
        with torch.no_grad():
            for name, accumulator in state.items():
                squared = params[name].grad ** 2
                if optimizer == "rowwise_adagrad":
                    squared = squared.mean(1, keepdim=True).expand_as(squared)
                accumulator += squared
                params[name] -= 0.05 * params[name].grad / (accumulator.sqrt() + 1e-8)
                params[name].grad = None
    actual = state_of(model)
    for name, tensor in params.items():
        torch.testing.assert_close(actual[name].double(), tensor.detach(), rtol=1e-5, atol=1e-5)
    for name, tensor in accumulators_of(model).items():
        want = state[name][:, 0] if optimizer == "rowwise_adagrad" else state[name]
        torch.testing.assert_close(tensor.double(), want, rtol=1e-4, atol=1e-7)
        assert tensor.any()


def test_l2_changes_the_tables(sharded, make_batch):
    states = []
    for table_l2 in (0.0, 0.3):
        words = (f"train.table_l2={table_l2}",)
        model = sharded(*words)
        step(model, make_batch(16), options(*words).train)
        states.append(state_of(model))
    assert not torch.equal(*(s[f"{TABLES}user.weight"] for s in states))
    first = f"{TABLES}user_first_order.weight"
    assert torch.equal(states[0][first], states[1][first])  # embeddings alone are penalized


def test_only_rows_of_the_batch_move(sharded, make_batch):
    model = sharded()
    before = state_of(model)
    batch = make_batch(2)
    step(model, batch, SCHEDULE)
    moved = (state_of(model)[f"{TABLES}user.weight"] != before[f"{TABLES}user.weight"]).any(1)
    assert set(moved.nonzero()[:, 0].tolist()) == set(batch.values[:2].tolist())


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_columns_that_pad_a_table_stay_zero(sharded, make_batch, optimizer):
    words = ("model.embedding_dim=6", f"train.table_optimizer={optimizer}", "train.table_l2=0.1")
    model = sharded(*words)
    for number in range(3):
        step(model, make_batch(16, seed=number), options(*words).train)
    for name, dim in (("item", 6), ("item_first_order", 1)):
        weight = state_of(model)[f"{TABLES}{name}.weight"]
        assert weight.shape[1] == {6: 8, 1: 4}[dim]
        assert weight[:, :dim].any(0).all()
        assert not weight[:, dim:].any()


BLOCK = embeddings.INITIAL_BLOCK


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (0, BLOCK), (5, 9), (BLOCK - 2, BLOCK + 3), (BLOCK, BLOCK + 1), (BLOCK + 7, None)],
)
def test_initial_rows_are_equal_for_any_slicing(start, stop):
    full = initial_rows(3, "t", 0, 2 * BLOCK + 10, 2)
    stop = stop or len(full)
    assert torch.equal(initial_rows(3, "t", start, stop, 2), full[start:stop])


def test_initial_rows_do_not_depend_on_the_size_of_the_table():
    assert torch.equal(initial_rows(3, "t", 0, 5, 4), initial_rows(3, "t", 0, 50, 4)[:5])


def test_initial_rows_depend_on_seed_and_name_and_are_normal():
    first = initial_rows(3, "t", 0, 2 * BLOCK, 4)
    assert not torch.equal(first, initial_rows(4, "t", 0, 2 * BLOCK, 4))
    assert not torch.equal(first, initial_rows(3, "u", 0, 2 * BLOCK, 4))
    assert not torch.equal(first[:BLOCK], first[BLOCK:])
    assert len(first.unique(dim=0)) == len(first)
    assert abs(first.mean().item()) < 0.03
    assert abs(first.std().item() - 1) < 0.03


def test_initial_parameters(sharded):
    state = state_of(sharded(seed=5))
    for name, tensor in state.items():
        if name.endswith("_first_order.weight") or tensor.ndim == 1:
            assert not tensor.any(), name
        elif table_of(name):
            assert torch.equal(tensor, initial_rows(5, name, 0, len(tensor), 8) * 0.1)
        else:
            bound = (6 / sum(tensor.shape)) ** 0.5
            assert 0.8 * bound < tensor.abs().max() <= bound
    again, other = state_of(sharded(seed=5)), state_of(sharded(seed=6))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert not torch.equal(other[f"{TABLES}user.weight"], state[f"{TABLES}user.weight"])
    assert not torch.equal(other["mlp.layers.0.weight"], state["mlp.layers.0.weight"])


def test_narrow_matrices_come_with_random_biases(sharded):
    model = sharded(seed=5)
    initialize(model, 5, 0.1, matrix_std=1e-3)
    state = state_of(model)
    assert state["mlp.layers.0.weight"].std() < 2e-3
    bound = state["mlp.layers.0.weight"].shape[1] ** -0.5
    assert 0 < state["mlp.layers.0.bias"].abs().max() <= bound
    assert state["mlp.layers.0.bias"].unique().numel() == len(state["mlp.layers.0.bias"])
    assert not state["mlp.layers.1.bias"].any()  # of the score
    initialize(model, 5, 0.1)
    assert not state_of(model)["mlp.layers.0.bias"].any()


def test_initialize_undoes_training(sharded, make_batch):
    model = sharded(seed=5)
    before = state_of(model)
    step(model, make_batch(16), SCHEDULE)
    initialize(model, 5, 0.1)
    assert all(torch.equal(state_of(model)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("through", ["0.5", "0.0"])
def test_learning_rate_takes_effect_at_the_next_step(sharded, make_batch, through):
    changed, constant = sharded(f"train.table_learning_rate={through}"), sharded()
    changed.set_table_learning_rate(0.05)
    for model in (changed, constant):
        step(model, make_batch(16), SCHEDULE)
    assert torch.equal(
        state_of(changed)[f"{TABLES}item.weight"], state_of(constant)[f"{TABLES}item.weight"]
    )


def test_setting_the_learning_rate_moves_nothing(sharded, make_batch):
    model = sharded()
    step(model, make_batch(16), SCHEDULE)
    before, accumulators = state_of(model), accumulators_of(model)
    model.set_table_learning_rate(10.0)
    assert all(torch.equal(state_of(model)[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(accumulators_of(model)[n], t) for n, t in accumulators.items())


def test_every_table_is_trained_by_the_fused_optimizer_and_by_no_other(sharded, make_batch):
    model = sharded()
    names = {name for name in state_of(model) if ".embedding_bags." in name}
    assert len(names) == 8
    assert model.tables == names == set(model.accumulators())
    sizes = {name: len(tensor) for name, tensor in accumulators_of(model).items()}
    assert sizes == {
        name: len(tensor) for name, tensor in state_of(model).items() if name in names
    }
    assert set(model.dense_parameters()) == set(state_of(model)) - names
    model.set_table_learning_rate(0.0)
    before = state_of(model)
    for number in range(2):
        step(model, make_batch(16, seed=number), SCHEDULE)
    for name, tensor in state_of(model).items():
        assert torch.equal(tensor, before[name]) == (name in names), name


def test_table_of():
    assert table_of("sparse.collection.embedding_bags.user.weight") == "user"
    assert table_of("sparse.collection.embedding_bags.user_first_order.weight") == "user"
    assert table_of("mlp.layers.0.weight") is None


def test_loading_without_accumulators_keeps_them(sharded, make_batch):
    model = sharded()
    step(model, make_batch(16), SCHEDULE)
    before = accumulators_of(model)
    load_params(model, state_of(sharded(seed=8)))
    assert all(torch.equal(accumulators_of(model)[name], t) for name, t in before.items())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    load_params(model, {}, zeros)
    assert not any(tensor.any() for tensor in accumulators_of(model).values())


ALONE = """
import json, os
from pathlib import Path
import torch
from cki_rec.cli import compose_config
from cki_rec.config import parse, register_resolvers
from cki_rec.engine import distributed

def listening():
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            own.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") if Path(f"/proc/self/net/{name}").exists()
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in own]

register_resolvers()
runtime = parse(compose_config(["runtime.device=cpu", "runtime.threads=1"])).runtime
device = distributed.start(runtime)
assert distributed.start(runtime) == device
total = torch.ones(3)
torch.distributed.all_reduce(total)
print(json.dumps({"listening": listening(), "sum": total.sum().item(), "device": device.type,
                  "threads": torch.get_num_threads(),
                  "world": torch.distributed.get_world_size()}))
"""


@pytest.fixture(scope="module")
def alone():
    """What a process finds that has an unusable environment and starts the engine."""
    broken = {"MASTER_ADDR": "256.0.0.1", "MASTER_PORT": "none", "RANK": "7", "LOCAL_RANK": "x"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=broken, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.dist
def test_one_process_reads_no_environment(alone):
    assert [alone[key] for key in ("sum", "device", "threads", "world")] == [3.0, "cpu", 1, 1]


@pytest.mark.dist
def test_one_process_opens_no_port(alone):
    assert alone["listening"] == []


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        distributed.start(options("runtime.device=cuda").runtime)


def test_more_processes_than_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "local_position", lambda: (1, 2))
    with pytest.raises(UserError, match="2 processes for 1 CUDA devices on this machine"):
        distributed.start(options("runtime.device=cuda").runtime)


def test_a_process_without_some_tables_restores_those_that_it_has(
    sharded, schema, make_batch, tmp_path, monkeypatch
):
    """A plan by tables gives each process the accumulators of its own tables alone."""
    model, config = sharded(), options()
    step(model, make_batch(16), config.train)
    tensors = {"model": model.module.state_dict(), "accumulator": model.accumulators()}
    checkpoint_io.save(tmp_path / "saved", tensors, config.model, schema, Provenance("h"))
    whole = ShardedModel.accumulators
    held = [name for name in model.tables if "user" in name]
    monkeypatch.setattr(
        ShardedModel, "accumulators", lambda self: {n: whole(self)[n] for n in held}
    )
    saved = checkpoint.describe(tmp_path / "saved")
    words = (saved, tmp_path / "saved", config.train, config.runtime)
    found = accumulators_of(restore(*words, to_train=True))
    monkeypatch.undo()
    assert found.keys() == set(held)
    for name, tensor in found.items():
        assert tensor.equal(accumulators_of(model)[name])
        assert bool((tensor > 0).any())
