"""The Fisher diagonal against gradients of one row at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from networks import FITTING, draw_batch, embed, fitting, make_case, select

from cki_rec.engine import fisher
from cki_rec.engine.fisher import fisher_diagonal


def by_rows(network, schema, state, batch):
    """Return F by its definition: autograd row by row, through plain lookups."""
    names = [name for name, _ in network.named_parameters()]
    total = {name: torch.zeros_like(state[name]) for name in names}
    for row in range(len(batch)):
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in state.items()}
        one = select(batch, [row])

        class Scores(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = network

            def forward(self, emb):
                return self.network.interact(emb)

        emb = embed(network, schema, one, leaves)
        dense = {f"network.{k}": v for k, v in leaves.items() if not k.startswith("sparse.")}
        logit = torch.func.functional_call(Scores(), dense, (emb,)).squeeze()
        p = logit.sigmoid().item()
        gradients = torch.autograd.grad(logit, [leaves[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total[name] += p * (1 - p) * gradient.square() / len(batch)
    return total


def subject(title, key, rows=7):
    network, schema = make_case(title, key)
    params = {k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()}
    return network.eval(), schema, params, draw_batch(schema, rows)


@fitting([pair for pair in FITTING if pair[1] != "one"])
def test_fisher_is_its_definition(title, key):
    network, schema, params, batch = subject(title, key)
    actual = fisher_diagonal(network, params, [batch], torch.float64)
    state = {name: tensor.double() for name, tensor in params.items()}
    expected = by_rows(network.double(), schema, state, batch)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.max()) or 1.0
        torch.testing.assert_close(
            actual[name].double(), value, rtol=2e-5, atol=1e-7 * scale + 1e-15, msg=name
        )


@pytest.mark.parametrize("title", ["deepfm", "din"])
def test_batches_and_chunks_do_not_matter(title, monkeypatch):
    network, _, params, batch = subject(title, "mixed")
    whole = fisher_diagonal(network, params, [batch], torch.float64)
    parts = [select(batch, [0, 1, 2]), select(batch, [3, 4, 5, 6])]
    monkeypatch.setattr(fisher, "LARGEST", 1)
    for name, value in fisher_diagonal(network, params, parts, torch.float64).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-9)


def test_an_id_read_twice_in_a_row_is_squared_once():
    """A history of one id n times has its gradients summed, then squared."""
    network, schema, params, batch = subject("din", "short", rows=3)
    batch.values[:] = 3
    actual = fisher_diagonal(network, params, [batch], torch.float64)
    state = {name: tensor.double() for name, tensor in params.items()}
    expected = by_rows(network.double(), schema, state, batch)
    (name,) = [n for n in actual if "embedding_bags" in n]
    torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-5, atol=1e-9)
    assert bool((actual[name][4:] == 0).all())
    assert float(actual[name][3].sum()) > 0


def test_no_rows_give_zeros_and_inputs_stay():
    network, _, params, batch = subject("deepfm", "mixed")
    before = {name: tensor.clone() for name, tensor in params.items()}
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert all(not value.any() for value in fisher_diagonal(network, params, []).values())
    fisher_diagonal(network, params, [batch])
    assert all(torch.equal(params[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in own.items())
