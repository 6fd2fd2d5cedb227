"""What every row of MODELS promises, for any schema that fits it."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from networks import (
    CASES,
    FITTING,
    MIXED,
    OF_HISTORIES,
    ON_MIXED,
    SCHEMAS,
    WITH_HISTORIES,
    build,
    draw_batch,
    embed,
    fitting,
    make_case,
    options,
    select,
    titles,
)
from samples import slow_but
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cki_rec.config import UserError
from cki_rec.models import MODELS, model_schema
from cki_rec.models.embeddings import Embedded, FieldEmbeddings


def rowwise(title):
    """Return a case without batch statistics in training, and its schema."""
    network, schema = make_case(title, "mixed")
    return network.eval(), schema


class Interaction(nn.Module):
    """The dense network from plain tensors, as it is exported."""

    def __init__(self, network):
        super().__init__()
        self.network, self.attended = network, network.sparse.attended

    def forward(self, fields_BFD, first_order_B, histories, masks):
        histories = dict(zip(self.attended, histories, strict=True))
        masks = dict(zip(self.attended, masks, strict=True))
        return self.network.interact(Embedded(fields_BFD, first_order_B, histories, masks))


def inputs_of(network, batch):
    emb, names = network.sparse(batch), network.sparse.attended  # histories leave table by table
    histories, masks = ([part[name] for name in names] for part in (emb.histories, emb.masks))
    return emb.fields_BFD, emb.first_order_B, histories, masks


def test_every_model_has_a_case():
    assert {name for name, _ in CASES.values()} == set(MODELS)


@fitting()
def test_one_finite_logit_per_row_that_depends_on_it_alone(title, key):
    network, schema = make_case(title, key)
    network = network.eval()
    batch = draw_batch(schema, 9)
    logit_B = network(batch)
    assert logit_B.shape == (9,)
    assert logit_B.dtype == torch.float32
    assert torch.isfinite(logit_B).all()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    for rows in ([0], [8], order, [3, 3]):
        torch.testing.assert_close(
            network(select(batch, rows)), logit_B[rows], rtol=1e-4, atol=1e-5
        )


@fitting()
def test_lookups_are_those_of_plain_torch(title, key):
    network, schema = make_case(title, key)
    batch = draw_batch(schema, 9)
    emb = embed(network, schema, batch)
    actual, network = network.sparse(batch), network.double().eval()
    torch.testing.assert_close(actual.fields_BFD.double(), emb.fields_BFD, rtol=1e-5, atol=1e-6)
    for name in emb.histories:
        assert torch.equal(actual.masks[name], emb.masks[name])
        assert torch.equal(actual.histories[name].double(), emb.histories[name])
    torch.testing.assert_close(
        network.interact(emb).float(), network.float()(batch), rtol=1e-4, atol=1e-4
    )


@fitting([case for case in FITTING if case != ("fm", "one")])
def test_gradient_reaches_every_parameter(title, key):
    network, schema = make_case(title, key)
    batch = draw_batch(schema, 64)
    binary_cross_entropy_with_logits(network.train()(batch), batch.label).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        is_before_norm = network.mlp.norms if hasattr(network, "mlp") else False
        is_shift = "softmax" in title and re.fullmatch(
            r"attention\.\d\.mlp\.layers\.1\.bias", name
        )
        if not (is_before_norm and name.endswith(".bias") and "layers" in name) and not is_shift:
            assert parameter.grad.any(), name


@titles
def test_columns_that_only_fill_up_get_no_gradient(title):
    name, changes = {**CASES, **ON_MIXED}[title]
    network = build(MIXED, name=name, **changes, embedding_dim=6)
    batch = draw_batch(model_schema(MIXED, options(name, **changes)), 32)
    network(batch).square().sum().backward()
    used = network.sparse.embedding_dim
    for key, parameter in network.named_parameters():
        if "embedding_bags" in key:
            width = 1 if key.endswith("_first_order.weight") else used
            assert parameter.shape[1] % 4 == 0
            assert parameter.grad[:, :width].any(), key
            assert not parameter.grad[:, width:].any(), key


@titles
def test_a_share_that_is_filled_up_gives_the_same(title):
    network, schema = rowwise(title)
    batch = draw_batch(schema, 5)
    filled = dataclasses.replace(batch, stride=8)
    assert torch.equal(network(filled), network(batch))
    grads = []
    for each in (batch, filled):
        network.zero_grad()
        network(each).sum().backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@titles
def test_a_share_may_have_no_rows(title):
    network, schema = rowwise(title)
    empty = dataclasses.replace(select(draw_batch(schema, 5), []), stride=4)
    logit_B = network(empty)
    assert logit_B.shape == (0,)
    logit_B.sum().backward()
    grads = [parameter.grad for parameter in network.parameters()]
    assert not any(grad.any() for grad in grads)


@titles
def test_histories_change_the_logit_only_where_they_are_read(title):
    network, schema = rowwise(title)
    batch = draw_batch(schema, 20)
    start, other = 0, dataclasses.replace(batch, values=batch.values.clone())
    for feature, lengths in zip(
        schema.lookups, batch.lengths.view(-1, 20).sum(1).tolist(), strict=True
    ):
        if feature.kind == "history":
            ids = other.values[start : start + lengths]
            ids.copy_(1 + ids % (schema.table_sizes[feature.table] - 1))
        start += lengths
    places = [i for i, f in enumerate(schema.lookups) if f.kind == "history"]
    has_history = batch.lengths.view(-1, 20)[places].sum(0) > 0
    changed = network(batch) != network(other)
    assert changed[has_history].any()
    assert not changed[~has_history].any()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_HISTORIES])
def test_histories_can_be_left_out(name):
    network = build(MIXED, name=name, histories=False)
    assert not {"clicked", "clicked_brands", "skipped"} & set(network.sparse.fields)
    assert network(draw_batch(MIXED.without_histories(), 4)).shape == (4,)


@titles
def test_dropout_acts_in_training_only(title):
    if title in ("lr", "fm", "dcn without MLP"):
        return  # they have no dropout
    name, changes = {**CASES, **ON_MIXED}[title]
    rates = {f"{part}__dropout": 0.5 for part in ("streams", "attention", "sequence")}
    network = build(MIXED, name=name, **{**changes, **rates}, dropout=0.5)
    batch = draw_batch(model_schema(MIXED, options(name, **changes)), 16)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
    assert not torch.equal(network.train()(batch), network(batch))
    assert torch.equal(network.eval()(batch), network(batch))


@titles
def test_a_copy_is_the_same_and_apart(title):
    network, schema = rowwise(title)
    batch = draw_batch(schema, 8)
    twin = copy.deepcopy(network)
    assert torch.equal(twin(batch), network(batch))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(batch), network(batch))
    with torch.inference_mode():
        assert torch.equal(network(batch), network(batch))


@pytest.mark.parametrize(
    "name", slow_but([m for m in MODELS if m not in ("sasrec", "gru4rec")], MODELS)
)
def test_overfits_32_rows(name):
    network = build(MIXED, name=name, activation="relu")
    batch = draw_batch(MIXED, 32, seed=3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    for _ in range(80):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(network(batch), batch.label)
        loss.backward()
        optimizer.step()
    assert 0 < loss.item() < 0.1


@titles
def test_parameters_fit_the_rule_of_initial_weights(title):
    """Matrices are drawn, last words ``bias`` zeroed, other vectors stay as built."""
    name, changes = {**CASES, **ON_MIXED}[title]
    network = build(MIXED, name=name, **changes)
    for key, parameter in network.named_parameters():
        assert parameter.ndim == 1 or key.rpartition(".")[2] != "bias", key
    constants = {"weight": (1.0, 0.25), "alpha": (0.0,), "bias": (0.0,)}  # norm, PReLU; Dice
    for module in network.modules():
        if not isinstance(module, nn.Linear):
            for word, parameter in module.named_parameters(recurse=False):
                known = constants.get(word.partition("_")[0], ())  # bias_ih_l0 of a GRU
                assert parameter.ndim > 1 or parameter.unique().item() in known, word


@titles
def test_interaction_can_be_traced(title):
    class Lookups(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, FieldEmbeddings) or super().is_leaf_module(module, name)

    network, schema = rowwise(title)
    batch = draw_batch(schema, 6)
    for is_training in (True, False):
        graph = Lookups().trace(network.train(is_training))
    traced = torch.fx.GraphModule(network, graph)
    assert torch.equal(traced(batch), network(batch))


@pytest.mark.parametrize("title", ["deepfm", "dcnv2 mixture", "din softmax", "final_mlp contexts"])
def test_interaction_can_be_exported(title):
    network, schema = rowwise(title)
    network.requires_grad_(False)
    inputs = inputs_of(network, draw_batch(schema, 6))
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, {0: rows}, [{0: rows}] * len(inputs[2]), [{0: rows}] * len(inputs[3]))
    with torch.no_grad():
        program = torch.export.export(Interaction(network), inputs, dynamic_shapes=shapes)
        other = draw_batch(schema, 11, seed=1)
        actual = program.module()(*inputs_of(network, other))
        torch.testing.assert_close(actual, network(other))


TABLES = [f"sparse.collection.embedding_bags.{table}.weight" for table in ("site", "hour")]
FIRST_ORDER = [name.replace(".weight", "_first_order.weight") for name in TABLES]


def layers(*names):
    return [f"{name}.{key}" for name in names for key in ("weight", "bias")]


ITEMS = "sparse.sequences.item.embedding_bags.item.weight"
SASREC = ("attention_norm", "attention.output", "norm", "inner", "outer")
GOLDEN_NAMES = {
    "lr": ["bias", *TABLES],
    "fm": ["bias", *TABLES, *FIRST_ORDER],
    "dnn": [*TABLES, *layers("mlp.layers.0", "mlp.layers.1")],
    "wide_deep": [*TABLES, *FIRST_ORDER, *layers("mlp.layers.0", "mlp.layers.1")],
    "deepfm": ["bias", *TABLES, *FIRST_ORDER, *layers("mlp.layers.0", "mlp.layers.1")],
    "dcn": [
        *TABLES,
        *(f"cross.layers.{i}.{key}" for i in range(2) for key in ("map.weight", "bias")),
        *layers("mlp.layers.0", "score"),
    ],
    "dcnv2": [*TABLES, *layers("cross.layers.0", "cross.layers.1", "mlp.layers.0", "score")],
    "din": [
        ITEMS,
        *layers("attention.0.mlp.layers.0", "attention.0.mlp.layers.1"),
        *(
            f"attention.0.mlp.activations.0.{key}"
            for key in ("alpha", "norm.running_mean", "norm.running_var")
        ),
        *layers("mlp.layers.0", "mlp.layers.1"),
    ],
    "final_mlp": [
        *TABLES,
        *(
            f"gates.{i}.{key}"
            for i in range(2)
            for key in ("context", *layers("mlp.layers.0", "factors"))
        ),
        *layers("mlp.layers.0", "second.layers.0", "fusion.first"),
        "fusion.second.weight",
        "fusion.forms",
    ],
    "dlrm": [*TABLES, *layers("mlp.layers.0", "mlp.layers.1")],
    "sasrec": [
        ITEMS,
        "encoders.0.positions",
        *layers(*(f"encoders.0.blocks.0.{name}" for name in SASREC), "encoders.0.norm"),
        *(f"encoders.0.blocks.0.attention.{name}.weight" for name in ("query", "key", "value")),
        "products.weight",
        *layers("mlp.layers.0", "mlp.layers.1"),
    ],
    "gru4rec": [
        ITEMS,
        *(
            f"encoders.0.layers.0.{kind}_{side}"
            for kind in ("weight", "bias")
            for side in ("ih", "hh")
        ),
        *layers("encoders.0.output"),
        "products.weight",
        *layers("mlp.layers.0", "mlp.layers.1"),
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_names_of_parameters_are_stable(name):
    """A checkpoint of an older release must load: changing these is a breaking change."""
    schema = SCHEMAS["short" if name in OF_HISTORIES else "plain"]
    assert sorted(build(schema, name=name, hidden=[6]).state_dict()) == sorted(GOLDEN_NAMES[name])


def test_unknown_model():
    with pytest.raises(UserError, match=r"model\.name=depfm: did you mean 'deepfm'\? one of"):
        build(MIXED, name="depfm")


@pytest.mark.parametrize("key", [key for key in SCHEMAS if key not in WITH_HISTORIES])
def test_din_needs_histories(key):
    with pytest.raises(UserError, match=r"^data\.fields: din needs a field of kind history; add"):
        build(SCHEMAS[key], name="din")
    with pytest.raises(UserError, match=r"^model\.histories=false"):
        build(MIXED, name="din", histories=False)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([["itme", "clicked"]], r"itme is no categorical field; did you mean 'item'\?"),
        ([["item", "click"]], r"click is no history field; did you mean 'clicked'\?"),
        ([["genres", "clicked"]], "genres is no categorical field"),
        ([["item", "user"]], "user is no history field"),
        ([["item"]], r"\['item'\] is not \[targets, histories\]"),
        (["item"], r"item is not \[targets, histories\]"),
        ([[3, "clicked"]], "3 is no categorical field"),
        ([[["item", "brand"], "clicked"]], "as many targets as histories"),
        ([[[], []]], "as many targets as histories"),
        ([["user", "clicked"]], r"user and clicked have different tables \(user, item\)"),
    ],
)
def test_pairs_that_do_not_fit(pairs, message):
    with pytest.raises(UserError, match=message) as caught:
        build(MIXED, name="din", attention__pairs=pairs)
    assert str(caught.value).startswith("model.attention.pairs: ")
    assert "\n" not in str(caught.value)


def test_din_without_a_field_for_its_history():
    schema = dataclasses.replace(
        MIXED,
        features=tuple(
            f for f in MIXED.features if f.table in ("genres", "item") and f.name != "item"
        ),
    )
    with pytest.raises(UserError, match=r"no categorical field shares a table .*clicked, skipped"):
        build(schema, name="din")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams__contexts": [["uesr"], []]}, r"contexts: no field uesr; did you mean 'user'\?"),
        ({"streams__contexts": [[]]}, r"contexts=\[\[\]\]: use one list of fields per stream"),
        ({"streams__heads": 3}, r"heads=3: must divide the last width of model\.hidden=\[16, 8\]"),
        ({"streams__heads": 8}, r"heads=8: .* model\.streams\.hidden=\[12\]"),
        ({"hidden": []}, r"model\.hidden=\[\]: FinalMLP needs hidden layers"),
        ({"streams__hidden": []}, r"model\.streams\.hidden=\[\]: FinalMLP needs"),
    ],
)
def test_streams_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        build(MIXED, name="final_mlp", **changes)
