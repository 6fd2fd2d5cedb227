"""Gates at lookup time: the merged table's numbers, without the merged table."""

from __future__ import annotations

import pytest
import torch
from networks import (
    CASES,
    FITTING,
    MIXED,
    SCHEMAS,
    build,
    draw_batch,
    fitting,
    make_case,
    randomize,
)
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.data.schema import Batch
from cki_rec.engine import gating
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.gating import MergedAtLookup
from cki_rec.engine.lookups import rows_read
from cki_rec.merging.methods.cki.assessment import compute_global_terms
from cki_rec.merging.methods.cki.gate import initialize_gate
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix, override_weights

STATISTICS = ("running_mean", "running_var")


def draw_sources(network, num_sources=2):
    models = []
    for seed in range(num_sources):
        state = randomize(network, seed).state_dict()
        models.append({n: t.clone() for n, t in state.items() if t.is_floating_point()})
    return models


def draw_counts(models):
    draw = torch.Generator().manual_seed(3)
    return [
        {n: torch.randint(0, 5, t.shape[:1], generator=draw) for n, t in m.items() if table_of(n)}
        for m in models
    ]


def draw_gates(models, kind):
    gates = {}
    for name, tensor in models[0].items():
        gate = initialize_gate(tensor.shape, kind, 1, name, rank=2)
        is_fixed = gate is None or name.endswith(STATISTICS)
        gates[name] = None if is_fixed else (gate + 0.1).requires_grad_()
    return gates


def rule(models, counts=None):
    """Return ``weigh`` of the paper's rule, with evidence as local term of tables if counted."""
    terms = compute_global_terms(models)

    def weigh(parts, part_counts, gates):
        own = {name: terms[name] for name in parts[0]}
        return cki_weights(
            parts,
            perspective="dual",
            splice="soft",
            gates=gates,
            global_terms=own,
            counts=part_counts if counts else None,
        )

    return weigh


def gradients(logit_B, batch, gates):
    loss = binary_cross_entropy_with_logits(logit_B, batch.label)
    learned = [gate for gate in gates.values() if gate is not None]
    # tables with equal rows for the whole batch do not change the loss
    return torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)


def compare(network, schema, models, gates, weigh, counts=()):
    """Compare logits and gradients of one step with those by whole merged tables."""
    batch = draw_batch(schema, 12)
    torch.manual_seed(0)
    module = MergedAtLookup(network, models, counts, gates, weigh, {}, schema).train()
    logit_B = module(batch)
    torch.manual_seed(0)
    merged = mix(models, weigh(models, counts, gates))
    whole_B = functional_call(network, {n: t.clone() for n, t in merged.items()}, (batch,))
    torch.testing.assert_close(logit_B, whole_B, rtol=1e-6, atol=1e-6)
    actual, wanted = (gradients(logit, batch, gates) for logit in (logit_B, whole_B))
    assert sum(float(gradient.abs().sum()) for gradient in actual) > 0
    for own, whole in zip(actual, wanted, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-6, atol=1e-6)
    return batch


@pytest.mark.parametrize("kind", ["full", "affine", "diagonal", "low_rank", "scalar"])
@pytest.mark.parametrize("num_sources", [2, 3])
def test_one_step_is_that_of_the_merged_table(kind, num_sources):
    network, schema = make_case("din pairs", "mixed")
    models = draw_sources(network, num_sources)
    compare(network, schema, models, draw_gates(models, kind), rule(models))


@fitting([f for f in FITTING if f[0] in CASES])
def test_logits_are_those_of_the_merged_model(title, key):
    network, schema = make_case(title, key)
    models = draw_sources(network)
    gates, weigh = draw_gates(models, "scalar"), rule(models)
    batch = draw_batch(schema, 12)
    with torch.no_grad():
        module = MergedAtLookup(network, models, (), gates, weigh, {}, schema).eval()
        whole_B = functional_call(network, mix(models, weigh(models, (), gates)), (batch,))
        torch.testing.assert_close(module(batch), whole_B, rtol=1e-5, atol=1e-5)


def test_evidence_is_counted_on_the_rows_that_are_read():
    network, schema = make_case("dnn", "mixed")
    models = draw_sources(network)
    counts = draw_counts(models)
    gates = draw_gates(models, "scalar")
    batch = draw_batch(schema, 12)
    for weigh in (
        rule(models, counts),
        lambda parts, own, gates: override_weights(
            rule(parts)(parts, own, gates), own[0], evidence(parts, own)
        ),
    ):
        with torch.no_grad():
            module = MergedAtLookup(network, models, counts, gates, weigh, {}, schema).eval()
            merged = mix(models, weigh(models, counts, gates))
            torch.testing.assert_close(
                module(batch), functional_call(network, merged, (batch,)), rtol=1e-5, atol=1e-5
            )


def touched(monkeypatch, scale):
    """Return the rows that one step merges of each table, ``scale`` times as large as usual."""
    network = build(MIXED, name="dnn")
    batch = draw_batch(MIXED, 12)
    models = draw_sources(network)
    models = [
        {n: t.repeat(scale, 1) if table_of(n) else t for n, t in model.items()} for model in models
    ]
    seen = {}

    def counting(parts, weights):
        merged = mix(parts, weights)
        seen.update({n: (len(t), len(weights[n][0])) for n, t in merged.items() if table_of(n)})
        return merged

    monkeypatch.setattr(gating, "mix", counting)
    gates, weigh = draw_gates(models, "full"), rule(models)
    module = MergedAtLookup(network, models, (), gates, weigh, {}, MIXED)
    assert not seen  # nothing of a table is merged beforehand
    logit_B = module(batch)
    gradients(logit_B, batch, gates)
    return seen


def test_a_step_touches_the_rows_of_its_batch_however_large_tables_are(monkeypatch):
    small, large = touched(monkeypatch, 1), touched(monkeypatch, 5000)
    assert small == large
    batch = draw_batch(MIXED, 12)
    _, rows = rows_read(batch, MIXED)
    assert small == {name: (len(rows[table_of(name)]),) * 2 for name in small}
    assert {table_of(name) for name in small} == set(MIXED.table_sizes)


@pytest.mark.parametrize("key", SCHEMAS)
def test_places_stand_for_the_ids_they_replace(key):
    schema = SCHEMAS[key]
    batch = draw_batch(schema, 12)
    before = batch.values.clone()
    renumbered, rows = rows_read(batch, schema)
    assert torch.equal(batch.values, before)
    start = 0
    for place, feature in enumerate(schema.lookups):
        size = int(batch.lengths.view(-1, 12)[place].sum())
        own = renumbered.values[start : start + size]
        assert torch.equal(rows[feature.table][own], before[start : start + size])
        start += size
    for actual in rows.values():
        assert len(actual.unique()) == len(actual) > 0


def test_one_id_each_needs_no_lengths_and_an_unread_table_keeps_a_row():
    schema = SCHEMAS["plain"]
    batch = Batch(torch.tensor([3, 3, 5, 7]), None, torch.zeros(2))
    renumbered, rows = rows_read(batch, schema)
    assert renumbered.values.tolist() == [0, 0, 0, 1]
    assert {table: actual.tolist() for table, actual in rows.items()} == {
        "site": [3],
        "hour": [5, 7],
    }
    schema = SCHEMAS["short"].without_histories()
    empty = Batch(torch.empty(0, dtype=torch.int64), torch.zeros(2).int(), torch.zeros(2))
    assert rows_read(empty, schema)[1]["item"].tolist() == [0]


def test_a_trunk_is_looked_up_as_it_is_and_gets_gradients():
    network, schema = make_case("din", "mixed")
    models = draw_sources(network)
    names = [name for name in models[0] if not name.startswith("mlp.")]
    buffers = {name for name, _ in network.named_buffers()}
    moving = {name: models[0][name].clone() for name in names}
    for name in moving:
        moving[name].requires_grad_(name not in buffers)
    gates = draw_gates(models, "full") | dict.fromkeys(names)
    module = MergedAtLookup(network, models, (), gates, rule(models), moving, schema).train()
    batch = draw_batch(schema, 12)
    binary_cross_entropy_with_logits(module(batch), batch.label).backward()
    _, rows = rows_read(batch, schema)
    for name, tensor in moving.items():
        if name in buffers:  # statistics are of the rows that were seen
            assert not torch.equal(tensor, models[0][name])
        elif table_of(name):
            read = rows[table_of(name)]
            assert set(tensor.grad.abs().sum(1).nonzero()[:, 0].tolist()) <= set(read.tolist())
            assert float(tensor.grad.abs().sum()) > 0
    constant = [n for n in buffers if n.startswith("mlp.")]
    assert constant
    for name in constant:
        assert torch.equal(
            module.constant[name], mix(models, rule(models)(models, (), gates))[name]
        )
