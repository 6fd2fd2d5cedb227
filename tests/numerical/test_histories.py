"""SASRec, GRU4Rec and DLRM equal plain references in float64; encoders are causal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from networks import (
    MIXED,
    SCHEMAS,
    bags_of,
    build,
    draw_batch,
    embed,
    make_case,
)

from cki_rec.config import UserError
from cki_rec.models.gru4rec import GRU

ENCODED = ["sasrec", "sasrec of two blocks", "gru4rec", "gru4rec of two layers"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain(state):
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def normalized(x, state, name):
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-5)
    return centered / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def self_attention(ids, state, encoder):
    """Return the state of one history ``(l, W)``: loops over positions and heads."""
    num, width = ids.shape
    positions = state["positions"][np.arange(num)[::-1]]
    x = ids * width**0.5 + positions
    for layer, block in enumerate(encoder.blocks):
        name, heads = f"blocks.{layer}", block.attention.heads
        size = width // heads
        y = normalized(x, state, f"{name}.attention_norm")
        query, key, value = (
            y @ state[f"{name}.attention.{part}.weight"].T for part in ("query", "key", "value")
        )
        mixed = np.zeros_like(x)
        for place in range(num):
            for head in range(heads):
                columns = slice(head * size, (head + 1) * size)
                score = key[: place + 1, columns] @ query[place, columns] / size**0.5
                weight = np.exp(score - score.max())
                mixed[place, columns] = weight @ value[: place + 1, columns] / weight.sum()
        output = f"{name}.attention.output"
        x = x + mixed @ state[f"{output}.weight"].T + state[f"{output}.bias"]
        y = normalized(x, state, f"{name}.norm")
        inner = np.maximum(y @ state[f"{name}.inner.weight"].T + state[f"{name}.inner.bias"], 0)
        x = x + inner @ state[f"{name}.outer.weight"].T + state[f"{name}.outer.bias"]
    last = x[-1] if num else np.zeros(width)
    return normalized(last, state, "norm")


def recurrent(ids, state, encoder):
    """Return the state of one history ``(l, W)``: the equations of a GRU, step by step."""
    x, size = ids, encoder.output.in_features
    for layer in range(len(encoder.layers)):
        h, outputs = np.zeros(size), []
        for step in x:
            of_input, of_state = (
                v @ state[f"layers.{layer}.weight_{side}"].T + state[f"layers.{layer}.bias_{side}"]
                for v, side in ((step, "ih"), (h, "hh"))
            )
            r, z = sigmoid((of_input + of_state)[: 2 * size]).reshape(2, size)
            candidate = np.tanh(of_input[2 * size :] + r * of_state[2 * size :])
            h = (1 - z) * candidate + z * h
            outputs.append(h)
        x = np.array(outputs)
    last = x[-1] if len(ids) else np.zeros(size)
    return last @ state["output.weight"].T + state["output.bias"]


@pytest.mark.parametrize("title", [*ENCODED, "sasrec pairs", "gru4rec pairs"])
def test_states_equal_a_reference(title):
    network, schema = make_case(title, "mixed")
    batch = draw_batch(schema, 7)
    emb, network = embed(network, schema, batch), network.double().eval()
    reference = self_attention if title.startswith("sasrec") else recurrent
    for pair, encoder in zip(network.pairs, network.encoders, strict=True):
        keys = torch.cat([emb.histories[name] for name in pair.histories], 2)
        mask, state = emb.masks[pair.histories[0]], plain(encoder.state_dict())
        assert not mask[0].any()
        assert mask.all(1).any()  # a history that is cut
        expected = [
            reference(ids[valid].numpy(), state, encoder)
            for ids, valid in zip(keys, mask, strict=True)
        ]
        actual = encoder(keys, mask).detach().numpy()
        np.testing.assert_allclose(actual, np.array(expected), rtol=1e-10, atol=1e-12)


def test_logits_are_products_and_the_mlp():
    network, schema = make_case("gru4rec of two layers", "mixed")
    batch = draw_batch(schema, 7)
    emb, network = embed(network, schema, batch), network.double().eval()
    states = [
        encoder(emb.histories[pair.histories[0]], emb.masks[pair.histories[0]])
        for pair, encoder in zip(network.pairs, network.encoders, strict=True)
    ]
    expected = network.mlp(torch.cat([emb.fields_BFD.flatten(1), *states], 1))
    for number, (pair, state) in enumerate(zip(network.pairs, states, strict=True)):
        target = emb.fields_BFD[:, network.sparse.fields.index(pair.targets[0])]
        expected = expected + network.products.weight[number] * (state * target).sum(1)
    torch.testing.assert_close(network.interact(emb), expected)


@pytest.mark.parametrize("title", ENCODED)
def test_later_ids_do_not_change_earlier_states(title):
    network, _ = make_case(title, "mixed")
    encoder = network.double().eval().encoders[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randn(5, 4, 8, generator=draw, dtype=torch.float64)
    mask = torch.ones(5, 4, dtype=torch.bool)
    before = encoder.states(ids, mask)
    for place in range(4):
        other = ids.clone()
        other[:, place] += torch.randn(5, 8, generator=draw, dtype=torch.float64)
        changed = (encoder.states(other, mask) - before).abs().amax((0, 2))
        assert (changed[:place] < 1e-14).all()
        assert (changed[place:] > 1e-3).all()


@pytest.mark.parametrize("title", ENCODED)
def test_empty_positions_do_not_matter(title):
    network, _ = make_case(title, "mixed")
    encoder = network.double().eval().encoders[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randn(5, 4, 8, generator=draw, dtype=torch.float64)
    mask = torch.arange(4) < torch.arange(5)[:, None]
    expected = encoder(ids * mask[:, :, None], mask)
    torch.testing.assert_close(encoder(ids, mask), expected, rtol=0, atol=0)
    bias = encoder.norm.bias if hasattr(encoder, "norm") else encoder.output.bias
    torch.testing.assert_close(expected[0], bias)


def test_steps_are_those_of_torch():
    layer, theirs = GRU(3, 5, length=4), torch.nn.GRU(3, 5, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    theirs.load_state_dict({f"{name}_l0": value for name, value in layer.state_dict().items()})
    x = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), theirs(x)[0])


@pytest.mark.parametrize("title", ENCODED)
def test_the_latest_ids_are_read(title):
    network, schema = make_case(title, "short")
    batch = draw_batch(schema, 9, longest=8)
    bags = bags_of(batch, schema)["clicked"]
    cut = [ids[-network.sparse.length :] for ids in bags]
    shorter = dataclasses.replace(
        batch,
        values=torch.cat([batch.values[: len(batch)], *cut]),
        lengths=torch.tensor([*[1] * len(batch), *map(len, cut)], dtype=torch.int32),
    )
    assert max(map(len, bags)) > network.sparse.length
    assert torch.equal(network.eval()(batch), network(shorter))


@pytest.mark.parametrize("key", ["mixed", "plain", "numbers"])
@pytest.mark.parametrize("title", ["dlrm", "dlrm tanh"])
def test_dlrm_equals_a_reference(title, key):
    network, schema = make_case(title, key)
    batch = draw_batch(schema, 6)
    emb, network = embed(network, schema, batch), network.double().eval()
    num = len(schema.lookups)
    expected = []
    for row in emb.fields_BFD:
        vectors = list(row[:num])
        parts = []
        if len(row) > num:
            bottom = network.bottom(row[None, num:].flatten(1))[0]
            vectors, parts = [bottom, *vectors], [bottom]
        pairs = [(a @ b)[None] for place, a in enumerate(vectors) for b in vectors[:place]]
        expected.append(network.mlp(torch.cat([*parts, *pairs])[None]))
    torch.testing.assert_close(network.interact(emb), torch.cat(expected))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dlrm", {"bottom": None}, r"model\.bottom=null: dlrm needs the widths"),
        ("sasrec", {"sequence": None}, r"model\.sequence=null: sasrec needs"),
        ("sasrec", {"sequence__heads": 3}, r"sequence\.heads=3: must divide .*, 8"),
        ("gru4rec", {"histories": False}, r"histories=false: gru4rec reads histories"),
        ("sasrec", {"sequence__pairs": [["itme", "clicked"]]}, r"^model\.sequence\.pairs: itme"),
    ],
)
def test_options_that_do_not_fit(name, changes, message):
    with pytest.raises(UserError, match=message):
        build(MIXED, name=name, **changes)


def test_dlrm_needs_two_vectors():
    with pytest.raises(UserError, match=r"^data\.fields: dlrm needs two fields"):
        build(SCHEMAS["one"], name="dlrm")
