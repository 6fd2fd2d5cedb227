"""What every row of MODELS promises, and DeepFM against its formula in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from cki_rec.config import Model, UserError
from cki_rec.data.schema import Feature
from cki_rec.models import MODELS, build_model, model_schema
from cki_rec.models.layers import FIRST_ORDER_DIM, MLP, FieldEmbeddings, fm_interaction

TABLES = "sparse.collection.embedding_bags."


def options(name="deepfm", **changes) -> Model:
    values = {"embedding_dim": 8, "hidden": [16, 8], "dropout": 0.0, "histories": True}
    return Model(name=name, init_std=0.1, **{**values, **changes})


def build(schema, seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(schema, options(**changes), torch.device("cpu"))


def bags_of(batch, schema):
    """Return feature name -> (ids, offsets) of its bags, row by row."""
    values = batch.values.split(batch.lengths.view(len(schema.features), -1).sum(1).tolist())
    bags = {}
    for feature, ids, lengths in zip(
        schema.features, values, batch.lengths.view(len(schema.features), -1), strict=True
    ):
        bags[feature.name] = (ids, torch.cat([torch.zeros(1), lengths.cumsum(0)[:-1]]).long())
    return bags


def pooled(batch, schema, weights, suffix=""):
    """Return name -> mean of the rows of its table, with plain torch in float64."""
    bags = bags_of(batch, schema)
    return {
        f.name: embedding_bag(*bags[f.name][:1], weights[f.table + suffix], bags[f.name][1])
        for f in schema.features
    }


def double_tables(model, schema):
    state = model.state_dict()
    return {
        table + suffix: state[f"{TABLES}{table}{suffix}.weight"].double()
        for table in schema.table_sizes
        for suffix in ("", "_first_order")
    }


def reference_deepfm(model, schema, batch):
    """Equations 1 to 3 of the paper, pair by pair, in float64."""
    tables = double_tables(model, schema)
    first = pooled(batch, schema, tables, "_first_order")
    linear = sum(values.mean(1) for values in first.values())
    fields = pooled(batch, schema, tables)
    pairs = sum((a * b).sum(1) for a, b in itertools.combinations(fields.values(), 2))
    x = torch.cat([fields[name] for name in model.sparse.fields], dim=1)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    num_layers = len(model.mlp.layers)
    for i in range(num_layers):
        x = x @ state[f"mlp.layers.{i}.weight"].T + state[f"mlp.layers.{i}.bias"]
        x = x.clamp(min=0) if i < num_layers - 1 else x
    return state["bias"] + linear + pairs + x[:, 0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("histories", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_one_finite_logit_per_row(schema, make_batch, name, histories, num_rows):
    model = build(schema, name=name, histories=histories).eval()
    read = model_schema(schema, options(histories=histories))
    batch = make_batch(num_rows, schema=read)
    logit_B = model(batch)
    assert logit_B.shape == (num_rows,)
    assert logit_B.dtype == torch.float32
    assert torch.isfinite(logit_B).all()


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_see_each_other(schema, make_batch, name):
    model = build(schema, name=name).eval()
    batch = make_batch(9)
    bags = {
        feature: ids.tensor_split(offsets[1:])
        for feature, (ids, offsets) in bags_of(batch, schema).items()
    }
    for row in range(len(batch)):
        alone = dataclasses.replace(
            batch,
            values=torch.cat([bags[f.name][row] for f in schema.features]),
            lengths=torch.tensor(
                [len(bags[f.name][row]) for f in schema.features], dtype=torch.int32
            ),
            label=batch.label[row : row + 1],
        )
        torch.testing.assert_close(model(alone), model(batch)[row : row + 1])


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_parameter(schema, make_batch, name):
    model = build(schema, name=name)
    batch = make_batch(64)
    binary_cross_entropy_with_logits(model(batch), batch.label).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", MODELS)
def test_histories_change_the_logit_only_where_they_are_read(schema, make_batch, name):
    batch = make_batch(20)
    plain = schema.without_histories()
    start = sum(
        int(x) for x in batch.lengths.view(5, -1)[[i for i in range(3)]].sum(1)
    )  # values before the history
    length = int(batch.lengths.view(5, -1)[3].sum())
    other = dataclasses.replace(batch, values=batch.values.clone())
    other.values[start : start + length] = 1 + (other.values[start : start + length] % 14)
    model = build(schema, name=name).eval()
    changed = model(batch) != model(other)
    has_history = batch.lengths.view(5, -1)[3] > 0
    assert changed[has_history].any()
    assert not changed[~has_history].any()
    without = build(schema, name=name, histories=False)
    assert [f.name for f in plain.features] == without.sparse.features


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_only(schema, make_batch, name):
    model = build(schema, name=name, dropout=0.5, hidden=[32])
    batch = make_batch(16)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


@pytest.mark.parametrize("name", MODELS)
def test_overfits_32_rows(schema, make_batch, name):
    model = build(schema, name=name)
    batch = make_batch(32, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(batch), batch.label)
        loss.backward()
        optimizer.step()
    assert 0 < loss.item() < 0.02


def test_empty_bags_give_zeros(schema, make_batch):
    model = build(schema)
    batch = make_batch(20)
    emb_BFD, _ = model.sparse(batch)
    is_empty = batch.lengths.view(5, -1)[3] == 0
    position = model.sparse.fields.index("history")
    assert is_empty.any()
    assert not is_empty.all()
    assert not emb_BFD[is_empty, position].any()
    assert (emb_BFD[~is_empty, position] != 0).all()


def test_fields_that_share_a_table_keep_their_names(schema, make_batch):
    model = build(schema)
    batch = make_batch(20)
    emb_BFD, _ = model.sparse(batch)
    assert model.sparse.features == [feature.name for feature in schema.features]
    assert model.sparse.fields == ["user", "item", "history", "genres", "hour"]
    for name, expected in pooled(batch, schema, double_tables(model, schema)).items():
        found = emb_BFD[:, model.sparse.fields.index(name)].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_first_order_weight_is_the_mean_of_the_columns(schema, make_batch):
    model = build(schema)
    batch = make_batch(20)
    assert model.state_dict()[f"{TABLES}user_first_order.weight"].shape == (12, FIRST_ORDER_DIM)
    _, first_B = model.sparse(batch)
    values = pooled(batch, schema, double_tables(model, schema), "_first_order").values()
    expected = sum(value.mean(1) for value in values)
    torch.testing.assert_close(first_B.double(), expected, rtol=1e-5, atol=1e-6)


def test_first_order_can_be_left_out(schema, make_batch):
    sparse = FieldEmbeddings(schema, 8, first_order=False, device=torch.device("cpu"))
    emb_BFD, first_B = sparse(make_batch(3))
    assert emb_BFD.shape == (3, 5, 8)
    assert not first_B.any()
    assert not [name for name in sparse.state_dict() if "first_order" in name]


@pytest.mark.parametrize("hidden", [[16, 8], [4], []])
def test_deepfm_equals_its_formula(schema, make_batch, hidden):
    model = build(schema, hidden=hidden).eval()
    with torch.no_grad():
        model.bias.fill_(0.3)
    batch = make_batch(50)
    expected = reference_deepfm(model, schema, batch)
    torch.testing.assert_close(model(batch).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_fields", [1, 2, 5])
def test_fm_interaction_is_the_sum_over_pairs(num_fields):
    emb_BFD = torch.randn(
        7, num_fields, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    pairs = itertools.combinations(range(num_fields), 2)
    expected = sum(((emb_BFD[:, i] * emb_BFD[:, j]).sum(1) for i, j in pairs), torch.zeros(7))
    torch.testing.assert_close(fm_interaction(emb_BFD), expected.double())


def test_fm_interaction_has_the_right_gradient():
    emb_BFD = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fm_interaction, emb_BFD)


def test_mlp_without_hidden_layers_is_linear():
    mlp = MLP(3, [], 0.5)
    x = torch.randn(4, 3)
    torch.testing.assert_close(mlp(x), (x @ mlp.layers[0].weight.T + mlp.layers[0].bias)[:, 0])


def test_names_of_parameters_are_stable(schema):
    """A checkpoint of an older release must load: changing these is a breaking change."""
    tables = ["genres", "hour", "item", "user"]
    assert sorted(build(schema, hidden=[6]).state_dict()) == sorted(
        [
            "bias",
            "mlp.layers.0.bias",
            "mlp.layers.0.weight",
            "mlp.layers.1.bias",
            "mlp.layers.1.weight",
            *(f"sparse.collection.embedding_bags.{t}.weight" for t in tables),
            *(f"sparse.collection.embedding_bags.{t}_first_order.weight" for t in tables),
        ]
    )


def test_every_model_has_golden_names():
    assert list(MODELS) == ["deepfm"], "add the names of the new model's parameters above"


def test_unknown_model(schema):
    with pytest.raises(UserError, match=r"model\.name=depfm: did you mean 'deepfm'\? one of"):
        build(schema, name="depfm")


def test_a_schema_of_one_field(make_batch, schema):
    one = dataclasses.replace(schema, features=(Feature("user", "user", "categorical"),))
    assert build(one)(make_batch(4, schema=one)).shape == (4,)
