"""``align`` on plain modules: planted elements of all symmetries are found again."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from plain_modules import (
    DIN,
    DLRM,
    ROWS,
    Encoder,
    NeuMF,
    OneTable,
    Recurrent,
    Residual,
    Tied,
    TwoTowers,
    floats,
    ids,
    mlp,
)
from torch import nn

from cki_rec.merging.activations import unit_moments
from cki_rec.merging.aligning import align
from cki_rec.merging.discovery import find_symmetries
from cki_rec.merging.params import MergeError, generator
from cki_rec.merging.symmetry import Slice, Symmetry, random_element, transform


class DeepFM(nn.Module):
    def __init__(self, fields=3, dim=4):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, dim) for _ in range(fields))
        self.deep = mlp(fields * dim, 8, 1, norm=nn.BatchNorm1d)

    def forward(self, x):
        e = torch.stack([table(x[:, f]) for f, table in enumerate(self.tables)], 1)
        fm = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
        return fm + self.deep(e.flatten(1))


class Cross(nn.Module):
    """DCN (one weight per coordinate) or DCNv2 (a matrix)."""

    def __init__(self, version, fields=3, dim=4):
        super().__init__()
        width = fields * dim
        self.tables = nn.ModuleList(nn.Embedding(ROWS, dim) for _ in range(fields))
        self.cross = nn.Linear(width, 1 if version == 1 else width)
        self.deep, self.out = nn.Linear(width, 8), nn.Linear(width + 8, 1)

    def forward(self, x):
        x = torch.cat([table(x[:, f]) for f, table in enumerate(self.tables)], 1)
        return self.out(torch.cat([x * self.cross(x) + x, F.relu(self.deep(x))], 1))


class SASRec(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.item, self.pos = nn.Embedding(ROWS, dim), nn.Embedding(5, dim)
        self.norm, self.feed = nn.LayerNorm(dim), mlp(dim, 6, dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x):
        h = self.item(x) + self.pos.weight
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        h = h + self.attention(self.norm(h), h, h, attn_mask=mask)[0]
        return (h + self.feed(h)) @ self.item.weight.T


class TwoLayers(nn.Module):
    """A transformer encoder of two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Encoder(), Encoder()
        self.second.emb, self.first.out = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.second(self.first(x))


class LSTM(nn.Module):
    def __init__(self, dim=4, hidden=6):
        super().__init__()
        self.emb, self.out = nn.Embedding(ROWS, dim), nn.Linear(hidden, 1)
        self.rnn = nn.LSTM(dim, hidden, 2, batch_first=True)

    def forward(self, x):
        return self.out(self.rnn(self.emb(x))[0][:, -1])


class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.first = nn.Embedding(ROWS, 4), nn.Conv1d(4, 8, 3, padding=1)
        self.norm, self.second, self.out = nn.BatchNorm1d(8), nn.Conv1d(8, 6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = F.relu(self.norm(self.first(self.emb(x).mT)))
        return self.out(F.relu(self.second(h)).mean(2))


def rows(*shape):
    return lambda seed: (ids(32, *shape, seed=seed),)


def pairs(seed):
    return ids(32, seed=seed), ids(32, seed=seed + 50)


def numbers(seed):
    return (floats(32, 5, seed=seed),)


def bags(seed):
    offsets = torch.arange(0, 64, 2).repeat(3, 1)
    return floats(32, 5, seed=seed), ids(3, 64, seed=seed), offsets


def visits(seed):
    return *pairs(seed), ids(32, 4, seed=seed + 90)


NETWORKS = {
    "MLP": (lambda: mlp(5, 12, 8, 1), numbers),
    "MLP with batch norm": (lambda: mlp(5, 12, 8, 1, norm=nn.BatchNorm1d), numbers),
    "residual MLP": (Residual, numbers),
    "two towers": (TwoTowers, pairs),
    "GMF": (lambda: NeuMF(("gmf",)), pairs),
    "NCF-MLP": (lambda: NeuMF(("mlp",)), pairs),
    "NeuMF": (NeuMF, pairs),
    "DeepFM": (DeepFM, rows(3)),
    "one table": (OneTable, rows(3)),
    "DCN": (lambda: Cross(1), rows(3)),
    "DCNv2": (lambda: Cross(2), rows(3)),
    "DIN": (DIN, visits),
    "DLRM": (DLRM, bags),
    "SASRec": (SASRec, rows(5)),
    "encoder": (TwoLayers, rows(5)),
    "GRU": (Recurrent, rows(5)),
    "LSTM": (LSTM, rows(5)),
    "tied tables": (Tied, pairs),
    "convolutions": (Channels, rows(7)),
}
QUICK = ("MLP with batch norm", "GMF", "DIN", "encoder", "GRU", "tied tables")
every_network = pytest.mark.parametrize("title", NETWORKS)
some_quickly = pytest.mark.parametrize(
    "title", [pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in NETWORKS]
)


@functools.lru_cache
def found(title):
    """Return a network in float64, its state and its symmetries."""
    make, draw = NETWORKS[title]
    torch.manual_seed(0)
    module = make()
    symmetries = find_symmetries(module, draw(0))
    assert symmetries
    module = module.double().eval()
    noise = generator(1, title)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():  # no zeros and ones of a fresh network
                change = 0.1 * torch.randn(tensor.shape, generator=noise).double()
                tensor.add_(change.abs() if name.endswith("running_var") else change)
    return module, module.state_dict(), symmetries


def batches(title, number=8):
    wide = [NETWORKS[title][1](seed) for seed in range(number)]
    return [tuple(x.double() if x.is_floating_point() else x for x in batch) for batch in wide]


def planted(title, seed, noise=0.0):
    """Return the network after random elements of all symmetries, and noise."""
    _, state, symmetries = found(title)
    draw = generator(seed, "planted")
    moved = transform(state, symmetries, [random_element(s, draw) for s in symmetries])
    for name, tensor in moved.items():
        if noise and tensor.is_floating_point() and tensor.numel() > 1:
            change = noise * tensor.std() * torch.randn(tensor.shape, generator=draw).double()
            moved[name] = tensor + (change.abs() if name.endswith("running_var") else change)
    return moved | ({"out.weight": moved["table.weight"]} if title == "tied tables" else {})


def distance(left, right):
    names = [name for name in left if left[name].is_floating_point()]
    apart = sum(float((left[name] - right[name]).square().sum()) for name in names)
    return (apart / sum(float(right[name].square().sum()) for name in names)) ** 0.5


@every_network
def test_the_original_is_found_by_weights(title):
    _, state, symmetries = found(title)
    other = planted(title, 0)
    assert distance(other, state) > 0.3
    before = {name: tensor.clone() for name, tensor in other.items()}
    aligned = align([state, other], symmetries, anchor=0)
    assert distance(aligned.models[1], state) < 1e-9
    assert aligned.agreement == pytest.approx(1)
    assert aligned.agreement > aligned.agreement_before
    assert all(torch.equal(aligned.models[0][name], state[name]) for name in state)
    assert all(torch.equal(other[name], before[name]) for name in other)


@pytest.mark.slow
@every_network
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_original_is_found_whatever_the_draw(title, seed):
    _, state, symmetries = found(title)
    aligned = align([state, planted(title, seed)], symmetries, anchor=0, seed=seed)
    assert distance(aligned.models[1], state) < 1e-9


@some_quickly
def test_the_original_is_found_by_activations(title):
    module, state, symmetries = found(title)
    aligned = align(
        [state, planted(title, 3)],
        symmetries,
        by="activations",
        module=module,
        batches=batches(title),
        anchor=0,
    )
    assert distance(aligned.models[1], state) < 1e-9


@some_quickly
def test_three_models_share_a_basis_and_noise_is_borne(title):
    _, state, symmetries = found(title)
    exact = align([state, planted(title, 4), planted(title, 5)], symmetries)
    assert exact.agreement == pytest.approx(1)
    assert distance(exact.models[1], exact.models[0]) < 1e-9
    assert distance(exact.models[2], exact.models[0]) < 1e-9
    noisy = align([state, planted(title, 6, 0.1)], symmetries, anchor=1)
    assert noisy.agreement > max(0.9, noisy.agreement_before + 0.3)


@pytest.mark.parametrize("title", ["GMF", "SASRec"])
def test_elements_reproduce_the_aligned_models(title):
    _, state, symmetries = found(title)
    models = [state, planted(title, 7, 0.1), planted(title, 8, 0.1)]
    aligned = align(models, symmetries)
    for model, elements, copy in zip(models, aligned.elements, aligned.models, strict=True):
        assert all(
            torch.equal(tensor, copy[name])
            for name, tensor in transform(model, symmetries, elements).items()
        )


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_independent_models_keep_their_outputs(by):
    module, _, symmetries = found("encoder")
    torch.manual_seed(5)
    other = TwoLayers().double().eval()
    sample = batches("encoder", 2)
    aligned = align([module, other], symmetries, by=by, module=module, batches=sample)
    assert by == "activations" or aligned.agreement > aligned.agreement_before
    expected = other(*sample[1])
    other.load_state_dict(aligned.models[1])
    torch.testing.assert_close(other(*sample[1]), expected)


def test_activations_decide_where_weights_mislead():
    """Unit 0 is read with a large weight in both models, but it is not the same unit."""
    module, state, symmetries = found("MLP")
    models = [dict(state), planted("MLP", 2)]
    for model in models:
        model["2.weight"] = model["2.weight"].clone()
        model["2.weight"][:, 0] = 1e3
    by_weights = align(models, symmetries, anchor=0)
    assert not torch.allclose(by_weights.models[1]["0.weight"], state["0.weight"])
    how = {"by": "activations", "module": module, "batches": batches("MLP")}
    by_activations = align(models, symmetries, anchor=0, **how)
    torch.testing.assert_close(by_activations.models[1]["0.weight"], state["0.weight"])
    assert by_activations.agreement < by_weights.agreement


def test_float32_models_and_integers_stay_as_they_are():
    net = mlp(5, 12, 8, 1, norm=nn.BatchNorm1d)
    other = mlp(5, 12, 8, 1, norm=nn.BatchNorm1d)
    other[1].num_batches_tracked += 7
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    symmetries = find_symmetries(net, numbers(0))
    aligned = align([net, other], symmetries, anchor=0)
    for name, tensor in aligned.models[1].items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(
            tensor.abs().flatten().sort()[0], before[name].abs().flatten().sort()[0]
        )
        assert torch.equal(other.state_dict()[name], before[name])
    assert aligned.models[1]["1.num_batches_tracked"] == 7


def test_tied_tensors_stay_tied():
    module, _, symmetries = found("tied tables")
    aligned = align([module, planted("tied tables", 2)], symmetries)
    for model in aligned.models:
        assert model["out.weight"] is model["table.weight"]


def test_rows_that_one_model_never_saw_do_not_count():
    table = torch.randn(20, 3, generator=generator(0, "table")).double()
    rotation = Symmetry("rotation", 3, (Slice("t", 1),))
    element = random_element(rotation, generator(1, "rotation"))
    other = table @ element
    other[10:] = 100 * torch.randn(10, 3, generator=generator(2, "noise")).double()
    counts = [{"t": [1] * 20}, {"t": [3] * 10 + [0] * 10}]
    aligned = align([{"t": table}, {"t": other}], [rotation], counts=counts, anchor=0)
    torch.testing.assert_close(aligned.models[1]["t"][:10], table[:10])
    plain = align([{"t": table}, {"t": other}], [rotation], anchor=0)
    assert float((plain.models[1]["t"][:10] - table[:10]).abs().max()) > 0.1


def test_tall_matrices_are_compared_by_products():
    table = torch.randn(3000, 3, generator=generator(0, "tall")).double()
    rotation = Symmetry("rotation", 3, (Slice("t", 1),))
    other = table @ random_element(rotation, generator(1, "rotation"))
    noise = 0.1 * torch.randn(3000, 3, generator=generator(2, "noise")).double()
    models = [{"t": table}, {"t": other + noise}]
    tall = align(models, [rotation], anchor=0)
    cut = align([{"t": m["t"][:1000]} for m in models], [rotation], anchor=0)
    assert tall.agreement == pytest.approx(cut.agreement, abs=0.01)
    assert distance(tall.models[1], models[0]) < 0.11


def test_heads_with_few_rows_are_left_to_weights():
    module, state, symmetries = found("encoder")
    few, many = ([(ids(1, length),)] for length in (5, 40))
    heads = {("first.q.weight", 0), ("first.v.weight", 0), ("first.o.weight", 1)}
    assert not heads & set(unit_moments(module, [state, state], few, symmetries))
    assert heads <= set(unit_moments(module, [state, state], many, symmetries))
    aligned = align(
        [state, planted("encoder", 1)],
        symmetries,
        by="activations",
        module=module,
        batches=few,
        anchor=0,
    )
    assert aligned.agreement > aligned.agreement_before


@pytest.mark.parametrize("form", [dict, tuple, list])
def test_batches_of_every_form(form):
    module, state, symmetries = found("two towers")
    names = ("u", "i")
    forms = {dict: lambda b: dict(zip(names, b, strict=True)), tuple: tuple, list: list}
    sample = [forms[form](batch) for batch in batches("two towers", 3)]
    models = [state, planted("two towers", 1)]
    aligned = align(models, symmetries, by="activations", module=module, batches=sample, anchor=0)
    assert distance(aligned.models[1], state) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "data"}, "by='data': one of weights, activations"),
        ({"by": "activations"}, "needs a module and batches"),
        ({"anchor": 2}, "anchor=2: there are 2 models; use 0 to 1"),
        ({"starts": 0}, "starts=0: must be at least 1"),
        ({"tables": ["nothing.weight"]}, "nothing.weight: named in tables"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_mistakes_are_named(options, message):
    _, state, symmetries = found("GMF")
    with pytest.raises(MergeError, match=message):
        align([state, planted("GMF", 1)], symmetries, **options)


def test_a_wrong_symmetry_is_noticed():
    module, state, _ = found("GMF")
    wrong = Symmetry("rotation", 6, (Slice("user_gmf.weight", 1), Slice("item_gmf.weight", 1)))
    other = transform(state, [wrong], [random_element(wrong, generator(0, "wrong"))])
    with pytest.raises(MergeError, match=r"source 1: alignment changed its scores"):
        align([state, other], [wrong], module=module, batches=batches("GMF", 1), anchor=0)
