"""Lookups of every field: tables, first-order weights, padding, histories that are attended to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import MIXED, bags_of, draw_batch, make_schema, randomize

from cki_rec.data.schema import Batch
from cki_rec.models.embeddings import FieldEmbeddings

DIM = 8
HISTORIES = ("clicked", "clicked_brands", "skipped")


def build(schema=MIXED, dim=DIM, first_order=True, attended=(), length=1):
    layer = FieldEmbeddings(schema, dim, first_order, attended, length, torch.device("cpu"))
    return randomize(layer)


def table(layer, field):
    return layer.state_dict()[layer.sources[field]]


@pytest.mark.parametrize("dim", [1, 4, 6, 8])
@pytest.mark.parametrize("first_order", [True, False])
def test_ids_are_pooled_by_mean_whatever_the_width(dim, first_order):
    layer, batch = build(dim=dim, first_order=first_order), draw_batch(MIXED, 9)
    emb = layer(batch)
    assert emb.fields_BFD.shape == (9, 10, dim)
    assert emb.histories == {}
    for name, rows in bags_of(batch, MIXED).items():
        weight = table(layer, name)
        assert weight.shape[1] == -(-dim // 4) * 4
        means = [weight[ids, :dim].mean(0) if len(ids) else torch.zeros(dim) for ids in rows]
        actual = emb.fields_BFD[:, layer.fields.index(name)]
        torch.testing.assert_close(actual, torch.stack(means))


def test_fields_leave_table_by_table_and_keep_their_sources():
    layer = build()
    assert layer.fields == [
        *("user", "friend", "item", "clicked", "skipped", "brand", "clicked_brands"),
        *("genres", "age", "price"),
    ]
    assert layer.sources["friend"] == "collection.embedding_bags.user.weight"
    assert layer.sources["price"] == "numbers"
    attended = build(attended=["skipped"])
    item = "sequences.item.embedding_bags.item.weight"
    assert {attended.sources[f] for f in ("item", "clicked", "skipped")} == {item}
    assert set(layer.sources) == set(attended.sources) == {f.name for f in MIXED.features}
    for each in (layer, attended):
        assert set(each.sources.values()) <= set(each.state_dict())


def test_empty_bags_give_zeros():
    layer, batch = build(), draw_batch(MIXED, 20)
    emb = layer(batch)
    is_empty = torch.tensor([not len(ids) for ids in bags_of(batch, MIXED)["clicked"]])
    place = layer.fields.index("clicked")
    assert is_empty.any()
    assert not emb.fields_BFD[is_empty, place].any()
    assert (emb.fields_BFD[~is_empty, place] != 0).all()


def test_first_order_weight_is_column_0():
    layer, batch = build(), draw_batch(MIXED, 20)
    state = layer.state_dict()
    assert state["collection.embedding_bags.user_first_order.weight"].shape[1] == 4
    expected = batch.numbers @ state["numbers_first_order"][:, 0]
    for name, rows in bags_of(batch, MIXED).items():
        source = layer.sources[name].replace(".weight", "_first_order.weight")
        expected += torch.stack(
            [state[source][ids, 0].mean() if len(ids) else torch.zeros(()) for ids in rows]
        )
    torch.testing.assert_close(layer(batch).first_order_B, expected)


def test_first_order_can_be_left_out():
    layer = build(first_order=False)
    assert not layer(draw_batch(MIXED, 3)).first_order_B.any()
    assert not [name for name in layer.state_dict() if "first_order" in name]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    ],
)
def test_columns_beyond_the_width_stay_zero(make):
    layer, batch = build(dim=6, attended=["clicked"], length=3), draw_batch(MIXED, 20)
    used = {
        name: 1 if "_first_order" in name else 6
        for name in layer.state_dict()
        if "embedding_bags" in name
    }
    for name, width in used.items():
        layer.state_dict()[name][:, width:] = 0
    before = {name: layer.state_dict()[name].clone() for name in used}
    optimizer = make(layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        emb = layer(batch)
        terms = (emb.fields_BFD, emb.first_order_B, emb.histories["clicked"])
        sum(term.square().sum() for term in terms).backward()
        optimizer.step()
    for name, width in used.items():
        after = layer.state_dict()[name]
        assert not after[:, width:].any(), name
        assert not torch.equal(after[:, :width], before[name][:, :width]), name


@pytest.mark.parametrize("dim", [6, 8])
@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("attended", [["clicked"], ["skipped", "clicked"], list(HISTORIES)])
def test_attended_histories_are_their_latest_ids(dim, length, attended):
    layer, batch = build(dim=dim, attended=attended, length=length), draw_batch(MIXED, 12)
    emb, bags = layer(batch), bags_of(batch, MIXED)
    assert set(emb.histories) == set(emb.masks) == set(attended)
    assert not set(attended) & set(layer.fields)
    for name in attended:
        assert emb.histories[name].shape == (12, length, dim)
        assert emb.masks[name].dtype == torch.bool
        for row, ids in enumerate(bags[name]):
            latest = ids[-length:]
            assert emb.masks[name][row].tolist() == [
                place < len(latest) for place in range(length)
            ]
            expected = torch.zeros(length, dim)
            expected[: len(latest)] = table(layer, name)[latest, :dim]
            assert torch.equal(emb.histories[name][row], expected)
    assert max(len(ids) for ids in bags["clicked"]) == 6  # longer than some of the lengths


def test_attending_changes_nothing_else():
    pooled, batch = build(first_order=False), draw_batch(MIXED, 7)
    attending = build(first_order=False, attended=["clicked"], length=2)
    state = pooled.state_dict()
    attending.load_state_dict(
        {
            name: state[name.replace("sequences.item.", "collection.")]
            for name in attending.state_dict()
        }
    )
    one, other = pooled(batch), attending(batch)
    for place, name in enumerate(attending.fields):
        expected = one.fields_BFD[:, pooled.fields.index(name)]
        torch.testing.assert_close(other.fields_BFD[:, place], expected)


def test_attended_histories_have_no_first_order_weights():
    attending = build(attended=HISTORIES, length=2)
    batch = draw_batch(MIXED, 7)
    other = dataclasses.replace(batch, values=batch.values.clone(), lengths=batch.lengths.clone())
    bags, start = bags_of(batch, MIXED), 0
    for name, rows in bags.items():
        size = sum(len(ids) for ids in rows)
        if name in HISTORIES:
            other.values[start : start + size] = 1
        start += size
    assert torch.equal(attending(other).first_order_B, attending(batch).first_order_B)
    assert not torch.equal(
        attending(other).histories["clicked"], attending(batch).histories["clicked"]
    )


@pytest.mark.parametrize("attended", [(), ("clicked",), HISTORIES])
@pytest.mark.parametrize("longest", [0, 6])
def test_a_share_is_filled_up_to_the_largest(attended, longest):
    layer, batch = build(attended=attended, length=3), draw_batch(MIXED, 5, longest=longest)
    plain, filled = layer(batch), layer(dataclasses.replace(batch, stride=8))
    assert torch.equal(plain.fields_BFD, filled.fields_BFD)
    assert torch.equal(plain.first_order_B, filled.first_order_B)
    for name in attended:
        assert torch.equal(plain.histories[name], filled.histories[name])
        assert torch.equal(plain.masks[name], filled.masks[name])
        assert longest or not plain.histories[name].any()


def test_all_shares_look_up_equally_many_bags():
    layer = build(attended=["clicked"], length=3)
    for rows in (1, 5, 8):
        batch = dataclasses.replace(draw_batch(MIXED, rows), stride=8)
        assert layer.to_bags(batch).stride() == 8
        assert layer.to_bags_of_item(batch).stride() == 8 * (1 + 3 + 1)


def test_a_share_without_rows():
    layer = build(attended=["clicked"], length=3)
    no_ids, no_lengths = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    emb = layer(Batch(no_ids, no_lengths, torch.zeros(0), torch.zeros(0, 2), stride=4))
    assert emb.fields_BFD.shape == (0, 9, DIM)
    assert emb.histories["clicked"].shape == (0, 3, DIM)
    (emb.fields_BFD.sum() + emb.first_order_B.sum()).backward()


def test_gradients_of_a_history_are_those_of_its_latest_ids():
    layer, batch = build(attended=["clicked"], length=2), draw_batch(MIXED, 9)
    layer(batch).histories["clicked"].sum().backward()
    counts = torch.zeros(len(table(layer, "clicked")))
    for ids in bags_of(batch, MIXED)["clicked"]:
        counts += torch.bincount(ids[-2:], minlength=len(counts))
    (grad,) = [p.grad for name, p in layer.named_parameters() if name == layer.sources["clicked"]]
    assert torch.equal(grad, counts[:, None].expand(-1, DIM))


def test_lengths_may_be_left_out_beside_histories_of_one_id():
    schema = make_schema(("item", "item", "categorical"), ("clicked", "item", "history"))
    layer = build(schema, attended=["clicked"], length=2)
    values = torch.tensor([1, 2, 3, 4, 5, 6])
    batch = Batch(values, None, torch.zeros(3))
    given = dataclasses.replace(batch, lengths=torch.ones(6, dtype=torch.int32))
    one, other = layer(batch), layer(given)
    assert torch.equal(one.fields_BFD, other.fields_BFD)
    assert torch.equal(one.histories["clicked"], other.histories["clicked"])
    assert one.masks["clicked"].tolist() == [[True, False]] * 3
