"""Numbers as fields, and batches whose lengths are left out."""

import pytest
import torch

from cki_rec.data.schema import Batch, Feature, FeatureSchema
from cki_rec.models.embeddings import FieldEmbeddings

NAMES = ("user", "age", "item", "price", "friend")
SCHEMA = FeatureSchema(
    features=(
        Feature("user", "user", "categorical"),
        Feature("age", "", "numeric"),
        Feature("item", "item", "categorical"),
        Feature("price", "", "numeric"),
        Feature("friend", "user", "categorical"),
    ),
    table_sizes={"user": 11, "item": 17},
    vocabulary_hashes={"user": "u", "item": "i"},
)
DIM = 8


def build(schema: FeatureSchema = SCHEMA, first_order: bool = True) -> FieldEmbeddings:
    torch.manual_seed(0)
    layer = FieldEmbeddings(schema, DIM, first_order, device=torch.device("cpu"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def draw_batch(num_rows: int, seed: int = 0, schema: FeatureSchema = SCHEMA) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(0, schema.table_sizes[f.table], (num_rows,), generator=draw)
        for f in schema.lookups
    ]
    numbers = torch.randn(num_rows, len(schema.numbers), generator=draw)
    return Batch(
        torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64),
        None,
        torch.zeros(num_rows),
        numbers if schema.numbers else None,
    )


def with_lengths(batch: Batch, num_features: int = 3) -> Batch:
    lengths = torch.ones(len(batch) * num_features, dtype=torch.int32)
    return Batch(batch.values, lengths, batch.label, batch.numbers)


def look_up(layer: FieldEmbeddings, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    emb = layer(batch)
    return emb.fields_BFD, emb.first_order_B


def table(layer: FieldEmbeddings, name: str) -> torch.Tensor:
    return layer.collection.embedding_bags[name].weight


@pytest.mark.parametrize("num_rows", [1, 2, 33])
def test_fields_are_looked_up_and_numbers_scale_their_vectors(num_rows):
    layer, batch = build(), draw_batch(num_rows)
    emb_BFD, first_B = look_up(layer, batch)
    assert layer.fields == ["user", "friend", "item", "age", "price"]
    user, item, friend = batch.values.view(3, num_rows)
    want = [
        table(layer, "user")[user],
        table(layer, "user")[friend],
        table(layer, "item")[item],
        *(batch.numbers[:, [i]] * layer.numbers[i] for i in range(2)),
    ]
    torch.testing.assert_close(emb_BFD, torch.stack(want, dim=1))
    weights = [table(layer, f"{n}_first_order")[:, 0] for n in ("user", "user", "item")]
    linear = sum(w[ids] for w, ids in zip(weights, (user, friend, item), strict=True))
    linear = linear + (batch.numbers @ layer.numbers_first_order)[:, 0]
    torch.testing.assert_close(first_B, linear)


def test_numbers_without_first_order_weights():
    layer, batch = build(first_order=False), draw_batch(5)
    emb_BFD, first_B = look_up(layer, batch)
    assert layer.numbers_first_order is None
    assert emb_BFD.shape == (5, 5, DIM)
    assert first_B.tolist() == [0] * 5


def test_gradient_reaches_numbers():
    layer, batch = build(), draw_batch(6)
    emb_BFD, first_B = look_up(layer, batch)
    (emb_BFD.sum() + first_B.sum()).backward()
    sums = batch.numbers.sum(0)
    torch.testing.assert_close(layer.numbers.grad, sums[:, None].expand(2, DIM))
    torch.testing.assert_close(layer.numbers_first_order.grad, sums[:, None])
    assert table(layer, "user").grad.abs().sum() > 0


def test_number_zero_adds_nothing():
    layer, batch = build(), draw_batch(4)
    batch.numbers.zero_()
    emb_BFD, first_B = look_up(layer, batch)
    assert (emb_BFD[:, 3:] == 0).all()
    lookups = FeatureSchema(SCHEMA.lookups, SCHEMA.table_sizes, SCHEMA.vocabulary_hashes)
    plain = build(lookups)
    plain.collection.load_state_dict(layer.collection.state_dict())
    without = look_up(plain, Batch(batch.values, None, batch.label))
    assert torch.equal(without[0], emb_BFD[:, :3])
    assert torch.equal(without[1], first_B)


@pytest.mark.parametrize("first_order", [True, False])
def test_left_out_lengths_are_ones_for_any_series_of_sizes(first_order):
    layer, fresh = build(first_order=first_order), build(first_order=first_order)
    fresh.load_state_dict(layer.state_dict())
    for seed, num_rows in enumerate([4, 4, 1, 64, 63, 4, 64, 2, 2]):
        batch = draw_batch(num_rows, seed)
        found, want = look_up(layer, batch), look_up(fresh, with_lengths(batch))
        for one, other in zip(found, want, strict=True):
            assert torch.equal(one, other)


def test_left_out_lengths_give_the_same_gradients():
    layer, other = build(), build()
    other.load_state_dict(layer.state_dict())
    for seed, num_rows in enumerate([5, 5, 3]):
        batch = draw_batch(num_rows, seed)
        for each, given in ((layer, batch), (other, with_lengths(batch))):
            emb_BFD, first_B = look_up(each, given)
            (emb_BFD.square().sum() + first_B.square().sum()).backward()
    grads = zip(layer.named_parameters(), other.named_parameters(), strict=True)
    for (name, one), (_, two) in grads:
        assert torch.equal(one.grad, two.grad), name


def test_ids_without_lengths_are_a_whole_jagged_tensor():
    layer, batch = build(), draw_batch(7)
    for _ in range(2):
        kjt = layer.to_bags(batch)
        explicit = layer.to_bags(with_lengths(batch))
        assert kjt.keys() == explicit.keys() == ["user", "item", "friend"]
        assert kjt.stride() == explicit.stride() == 7
        assert torch.equal(kjt.lengths(), explicit.lengths())
        assert torch.equal(kjt.offsets(), explicit.offsets().to(kjt.offsets().dtype))
        assert kjt.length_per_key() == explicit.length_per_key()
        assert kjt.offset_per_key() == explicit.offset_per_key()
        for key in kjt.keys():
            assert torch.equal(kjt[key].values(), explicit[key].values())
        batch = draw_batch(7, seed=1)


def test_lengths_and_offsets_are_made_once_per_size():
    layer = build()
    first, second = layer.to_bags(draw_batch(9)), layer.to_bags(draw_batch(9, seed=1))
    assert first.lengths().data_ptr() == second.lengths().data_ptr()
    assert first.offsets().data_ptr() == second.offsets().data_ptr()
    assert not torch.equal(first.values(), second.values())


def test_scoring_without_gradients_first_leaves_training_as_it_is():
    layer, batch = build(), draw_batch(5)
    with torch.inference_mode():
        layer(batch)
    emb_BFD, first_B = look_up(layer, batch)
    (emb_BFD.sum() + first_B.sum()).backward()
    assert table(layer, "user").grad.abs().sum() > 0


def test_batch_without_numbers_is_told():
    batch = draw_batch(3)
    with pytest.raises(AssertionError, match="the schema has numbers"):
        build()(Batch(batch.values, None, batch.label))
