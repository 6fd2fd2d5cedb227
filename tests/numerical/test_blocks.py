"""Every block and every network against its formula, written here entry by entry in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from networks import MIXED, build, draw_batch, embed, options, randomize

from cki_rec.models import model_schema
from cki_rec.models.attention import ActivationUnit
from cki_rec.models.cross_network import CrossNet, CrossNetMix, CrossNetV2
from cki_rec.models.final_mlp import BilinearFusion, FeatureGate
from cki_rec.models.layers import ACTIVATIONS, MLP, Dice, fm_interaction


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random(module):
    return randomize(module).double().eval()


def relu(x):
    return x.clamp(min=0)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def mlp_of(state, name, x, scores=1, activation=relu):
    """Linear maps, each but a last one followed by ``activation``."""
    count = len([key for key in state if key.startswith(f"{name}.layers.") and "weight" in key])
    for layer in range(count):
        x = x @ state[f"{name}.layers.{layer}.weight"].T + state[f"{name}.layers.{layer}.bias"]
        x = activation(x) if layer < count - bool(scores) else x
    return x[:, 0] if scores == 1 else x


def dice_of(state, name):
    """Dice as the paper of DIN has it, on running statistics."""

    def function(x):
        mean, variance = state[f"{name}.norm.running_mean"], state[f"{name}.norm.running_var"]
        p = sigmoid((x - mean) / torch.sqrt(variance + 1e-8))
        return p * x + (1 - p) * state[f"{name}.alpha"] * x

    return function


@pytest.mark.parametrize("num_fields", [1, 2, 5])
def test_fm_interaction_is_the_sum_over_pairs(num_fields):
    emb_BFD = draw(7, num_fields, 4)
    pairs = itertools.combinations(range(num_fields), 2)
    expected = sum(((emb_BFD[:, i] * emb_BFD[:, j]).sum(1) for i, j in pairs), torch.zeros(7))
    torch.testing.assert_close(fm_interaction(emb_BFD), expected.double())


def test_fm_interaction_has_the_right_gradient():
    assert torch.autograd.gradcheck(fm_interaction, draw(2, 3, 2).requires_grad_())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scores", [0, 1, 3])
def test_mlp_is_linear_norm_activation(name, scores):
    mlp = random(MLP(3, [5, 4], 0.5, name, batch_norm=True, scores=scores))
    state, x = mlp.state_dict(), draw(6, 3)
    actual, width = mlp(x), scores or 4
    for layer in range(2):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
        mean, variance = (state[f"norms.{layer}.running_{key}"] for key in ("mean", "var"))
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        x = x * state[f"norms.{layer}.weight"] + state[f"norms.{layer}.bias"]
        if name == "prelu":
            x = relu(x) - state[f"activations.{layer}.weight"] * relu(-x)
        else:
            functions = {"relu": relu, "sigmoid": sigmoid, "tanh": torch.tanh}
            dice = dice_of(state, f"activations.{layer}") if name == "dice" else None
            x = (dice or functions[name])(x)
    if scores:
        x = x @ state["layers.2.weight"].T + state["layers.2.bias"]
    assert mlp.width == width
    torch.testing.assert_close(actual, x[:, 0] if scores == 1 else x)


@pytest.mark.parametrize(("scores", "width"), [(0, 3), (1, 1), (2, 2)])
def test_mlp_without_hidden_layers_is_linear(scores, width):
    mlp, x = random(MLP(3, [], 0.5, scores=scores)), draw(4, 3)
    expected = x @ mlp.layers[0].weight.T + mlp.layers[0].bias if scores else x
    assert mlp.width == width
    torch.testing.assert_close(mlp(x), expected[:, 0] if scores == 1 else expected)


def test_dice_in_training_uses_and_remembers_the_batch():
    dice, x = Dice(3).double().train(), draw(10, 3) * 3 + 1
    assert dice.alpha.tolist() == [0, 0, 0]
    alpha = torch.tensor([0.5, -0.2, 0.0], dtype=torch.float64)
    with torch.no_grad():
        dice.alpha.copy_(alpha)
    mean = x.sum(0) / 10
    variance = ((x - mean) ** 2).sum(0) / 10
    p = 1 / (1 + torch.exp(-(x - mean) / torch.sqrt(variance + 1e-8)))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * alpha * x)
    torch.testing.assert_close(dice.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(dice.norm.running_var, 0.9 + 0.1 * variance * 10 / 9)


def test_dice_in_evaluation_uses_running_statistics():
    dice, x = random(Dice(3)), draw(4, 3)
    torch.testing.assert_close(
        dice(x), dice_of({f"d.{k}": v for k, v in dice.state_dict().items()}, "d")(x)
    )
    torch.testing.assert_close(dice(x)[:1], dice(x[:1]))


def test_dice_is_prelu_where_the_bend_is_sharp():
    dice, x = Dice(2).double().eval(), draw(5, 2)
    dice.norm.running_var.fill_(1e-12)
    torch.nn.init.constant_(dice.alpha, 0.25)
    torch.testing.assert_close(dice(x), relu(x) - 0.25 * relu(-x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 3])
def test_cross_net(layers):
    cross, x0 = random(CrossNet(5, layers)), draw(4, 5)
    state = cross.state_dict()
    rows = []
    for x0_W in x0:
        x = x0_W
        for layer in range(layers):
            w, b = state[f"layers.{layer}.map.weight"][0], state[f"layers.{layer}.bias"]
            x = torch.outer(x0_W, x) @ w + b + x
        rows.append(x)
    torch.testing.assert_close(cross(x0), torch.stack(rows))


@pytest.mark.parametrize("layers", [1, 3])
def test_cross_net_of_matrices(layers):
    cross, x0 = random(CrossNetV2(5, layers)), draw(4, 5)
    state = cross.state_dict()
    rows = []
    for x0_W in x0:
        x = x0_W
        for layer in range(layers):
            W, b = state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]
            x = torch.diag(x0_W) @ (W @ x + b) + x
        rows.append(x)
    torch.testing.assert_close(cross(x0), torch.stack(rows))


@pytest.mark.parametrize("experts", [1, 3])
def test_cross_net_of_low_rank(experts):
    cross, x0 = random(CrossNetMix(5, 2, rank=2, experts=experts)), draw(4, 5)
    state = cross.state_dict()
    assert ("gate.weight" in state) == (experts > 1)
    rows = []
    for x0_W in x0:
        x = x0_W
        for layer in range(2):
            V, C, U, b = (state[f"layers.{layer}.{k}"] for k in ("down", "core", "up", "bias"))
            gates = torch.exp(state["gate.weight"] @ x) if experts > 1 else torch.ones(1)
            outputs = [
                x0_W * (U[i] @ torch.tanh(C[i] @ torch.tanh(V[i].T @ x)) + b)
                for i in range(experts)
            ]
            x = sum(g / gates.sum() * e for g, e in zip(gates, outputs, strict=True)) + x
        rows.append(x)
    torch.testing.assert_close(cross(x0), torch.stack(rows))


@pytest.mark.parametrize("softmax", [False, True])
def test_activation_unit(softmax):
    unit = random(ActivationUnit(3, [4], "dice", softmax=softmax))
    state = unit.state_dict()
    queries, keys, lengths = draw(5, 3), draw(5, 4, 3, seed=1), [0, 1, 4, 2, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    expected = []
    for q, row, length in zip(queries, keys, lengths, strict=True):
        seen = [torch.cat([q, k, q - k, q * k])[None] for k in row[:length]]
        activation = dice_of(state, "mlp.activations.0")
        weights = [mlp_of(state, "mlp", x, activation=activation)[0] for x in seen]
        if softmax:
            total = sum(math.exp(w) for w in weights)
            weights = [math.exp(w) / total for w in weights]
        expected.append(sum((w * k for w, k in zip(weights, row, strict=False)), torch.zeros(3)))
    assert not expected[0].any()
    torch.testing.assert_close(
        unit(queries, keys, mask), torch.stack([e.double() for e in expected])
    )
    other = keys.masked_fill(~mask.unsqueeze(2), 7.0)  # masked keys do not matter
    torch.testing.assert_close(unit(queries, other, mask), unit(queries, keys, mask))


@pytest.mark.parametrize("softmax", [False, True])
def test_activation_unit_has_finite_gradients_where_there_is_no_history(softmax):
    unit = random(ActivationUnit(2, [3], "relu", softmax=softmax))
    query, keys = draw(2, 2).requires_grad_(), draw(2, 3, 2).requires_grad_()
    unit(query, keys, torch.tensor([[False] * 3, [True, False, False]])).sum().backward()
    assert torch.isfinite(query.grad).all()
    assert not keys.grad[0].any()
    assert keys.grad[1, 0].any()


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_bilinear_fusion(heads):
    fusion, first, second = random(BilinearFusion(8, 4, heads)), draw(5, 8), draw(5, 4, seed=1)
    state = fusion.state_dict()
    expected = []
    for a, b in zip(first, second, strict=True):
        total = (
            state["first.bias"][0] + state["first.weight"][0] @ a + state["second.weight"][0] @ b
        )
        for k in range(heads):
            own_a, own_b = a.chunk(heads)[k], b.chunk(heads)[k]
            total = total + own_a @ state["forms"][k] @ own_b
        expected.append(total)
    torch.testing.assert_close(fusion(first, second), torch.stack(expected))


def test_one_head_holds_all_bilinear_forms_of_several():
    several, one = random(BilinearFusion(6, 4, 2)), random(BilinearFusion(6, 4, 1))
    one.first.load_state_dict(several.first.state_dict())
    one.second.load_state_dict(several.second.state_dict())
    with torch.no_grad():
        one.forms.copy_(torch.block_diag(*several.forms)[None])
    first, second = draw(5, 6), draw(5, 4, seed=1)
    torch.testing.assert_close(one(first, second), several(first, second))


@pytest.mark.parametrize("hidden", [[], [4]])
@pytest.mark.parametrize("is_learned", [False, True])
def test_feature_gate(hidden, is_learned):
    gate, context = random(FeatureGate(3, hidden, 5, is_learned)), draw(4, 3)
    state = gate.state_dict()
    x = mlp_of(state, "mlp", state["context"] if is_learned else context, scores=0)
    expected = 2 * sigmoid(x @ state["factors.weight"].T + state["factors.bias"])
    torch.testing.assert_close(gate(None if is_learned else context), expected)


def network_of(name, **changes):
    """Return a random network in float64, its parameters, and embeddings of 20 rows."""
    network = random(build(MIXED, name=name, **changes))
    schema = model_schema(MIXED, options(name, **changes))
    emb = embed(network, schema, draw_batch(schema, 20))
    return network, network.state_dict(), emb, emb.fields_BFD.flatten(1)


def test_lr():
    network, state, emb, x = network_of("lr")
    assert emb.fields_BFD.shape[2] == 1
    torch.testing.assert_close(network.interact(emb), state["bias"] + sum(x.T))


@pytest.mark.parametrize("name", ["fm", "wide_deep", "dnn", "deepfm"])
def test_sums_of_first_order_pairs_and_mlp(name):
    network, state, emb, x = network_of(name)
    expected = torch.zeros(20, dtype=torch.float64)
    if name != "dnn":
        expected = expected + emb.first_order_B
        assert emb.first_order_B.any()
    if name in ("fm", "deepfm"):
        pairs = itertools.combinations(emb.fields_BFD.unbind(1), 2)
        expected = expected + state["bias"] + sum((a * b).sum(1) for a, b in pairs)
    if name != "fm":
        expected = expected + mlp_of(state, "mlp", x)
    torch.testing.assert_close(network.interact(emb), expected)


@pytest.mark.parametrize("name", ["dcn", "dcnv2"])
@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("hidden", [[6, 5], []])
def test_cross_networks_and_mlps(name, structure, hidden):
    network, state, emb, x = network_of(name, cross__structure=structure, hidden=hidden)
    crossed = network.cross(x)
    if name == "dcnv2" and structure == "stacked":
        top = mlp_of(state, "mlp", crossed, scores=0)
    else:  # DCN has no stacked form
        top = torch.cat([crossed, mlp_of(state, "mlp", x, scores=0)][: 2 if hidden else 1], dim=1)
    expected = (top @ state["score.weight"].T + state["score.bias"])[:, 0]
    torch.testing.assert_close(network.interact(emb), expected)


@pytest.mark.parametrize("pairs", [[], [[["item", "brand"], ["clicked", "clicked_brands"]]]])
def test_din(pairs):
    network, state, emb, x = network_of(
        "din", attention__pairs=pairs, attention__activation="relu"
    )
    plain = ["user", "friend", "genres", "item", "brand", "age", "price"]
    read = pairs or [
        [["item"], ["clicked"]],
        [["brand"], ["clicked_brands"]],
        [["item"], ["skipped"]],
    ]
    attended = [name for _, histories in read for name in histories]
    pooled = [name for name in ("clicked", "clicked_brands", "skipped") if name not in attended]
    assert sorted(network.sparse.fields) == sorted([*plain, *pooled])
    place = network.sparse.fields.index
    parts = [x]
    for number, (targets, histories) in enumerate(read):
        q = torch.cat([emb.fields_BFD[:, place(name)] for name in targets], dim=1)
        total = torch.zeros_like(q)
        for step in range(4):
            k = torch.cat([emb.histories[name][:, step] for name in histories], dim=1)
            weight = mlp_of(state, f"attention.{number}.mlp", torch.cat([q, k, q - k, q * k], 1))
            total += (weight * emb.masks[histories[0]][:, step])[:, None] * k
        parts.append(total)
    expected = mlp_of(state, "mlp", torch.cat(parts, dim=1))
    torch.testing.assert_close(network.interact(emb), expected)


@pytest.mark.parametrize("contexts", [None, [[], []], [["item"], ["age", "clicked"]]])
def test_final_mlp(contexts):
    changes = {
        "streams__selection": contexts is not None,
        "streams__contexts": contexts or [[], []],
    }
    network, state, emb, x = network_of("final_mlp", **changes)
    streams = []
    for number, name in enumerate(("mlp", "second")):
        gated = x
        if contexts is not None:
            places = [network.sparse.fields.index(field) for field in contexts[number]]
            context = (
                emb.fields_BFD[:, places].flatten(1)
                if places
                else state[f"gates.{number}.context"]
            )
            hidden = mlp_of(state, f"gates.{number}.mlp", context, scores=0)
            factors = [state[f"gates.{number}.factors.{key}"] for key in ("weight", "bias")]
            gated = x * 2 * sigmoid(hidden @ factors[0].T + factors[1])
        streams.append(mlp_of(state, name, gated, scores=0))
    torch.testing.assert_close(network.interact(emb), network.fusion(*streams))
