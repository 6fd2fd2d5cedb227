"""Evidence from optimizer state: sums of squared gradients that stand in for row counts."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from cki_rec.merging.optimizer_state import squared_gradients

ROWS, DIM, STEPS = 200, 4, 400


def trained(make, **options):
    """Return the state of an optimizer of a table, and how often each row was looked up.

    Rows are looked up as in practice: few are popular, and most are rare.
    """
    torch.manual_seed(0)
    table, truth = nn.Embedding(ROWS, DIM), torch.randn(ROWS, DIM)
    optimizer = make(table.parameters(), **options)
    popularity, counts = 1 / torch.arange(1.0, ROWS + 1), torch.zeros(ROWS)
    squares = torch.zeros(ROWS, DIM)
    for _ in range(STEPS):
        ids = torch.multinomial(popularity, 16, replacement=True)
        noise = torch.randn(16, DIM)
        loss = (table(ids) - truth[ids] - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        squares += table.weight.grad.square()
        counts += torch.bincount(ids, minlength=ROWS)
        optimizer.step()
    return optimizer.state[table.weight], counts, squares


def test_adagrad_holds_the_sum_itself():
    state, counts, squares = trained(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5)
    found = squared_gradients(state, initial=0.5)
    assert torch.allclose(found, squares.double().mean(1), rtol=1e-4, atol=1e-6)
    assert torch.all(found[counts == 0] == 0)
    assert spearmanr(found, counts).statistic > 0.8


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_row_wise_adagrad(shape):
    sums = torch.rand(ROWS)
    found = squared_gradients({"momentum1": sums.reshape(shape)})
    assert torch.equal(found, sums.double())


def test_adam_estimates_the_sum():
    state, counts, _ = trained(torch.optim.Adam, lr=0.01)
    found = squared_gradients(state)
    assert torch.all(found[counts == 0] == 0)
    assert spearmanr(found, counts).statistic > 0.8
    step, gradient, beta = 7, 0.3, 0.99  # exact if the gradient is constant
    average = torch.full((3, 2), (1 - beta**step) * gradient**2)
    found = squared_gradients({"exp_avg_sq": average, "step": torch.tensor(7.0)}, beta=beta)
    assert torch.allclose(found, torch.full((3,), step * gradient**2).double(), rtol=1e-6)
    by_row = {"exp_avg_sq": average, "step": torch.tensor([7, 7, 0])}
    assert squared_gradients(by_row, beta=beta)[2] == 0


def test_other_state_is_no_evidence():
    assert squared_gradients({"momentum_buffer": torch.ones(3, 2)}) is None
    assert squared_gradients({"exp_avg_sq": torch.ones(3, 2)}) is None
    assert squared_gradients({}) is None
