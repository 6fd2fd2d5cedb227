"""What models declare leaves logits as they are; everything a little beyond it does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import (
    CASES,
    MIXED,
    ON_MIXED,
    SLOW,
    act,
    build,
    draw_batch,
    embed,
    fitting,
    make_case,
    options,
    random_element,
    titles,
)
from samples import slow_but

from cki_rec.config import parse
from cki_rec.engine.embeddings import build as build_sharded
from cki_rec.merging.repair import recalibrate
from cki_rec.merging.symmetry import Slice, Symmetry
from cki_rec.models import model_schema
from cki_rec.models.symmetries import separate_bases

ALL = [*CASES, *ON_MIXED]


class Subject:
    """A network in float64, its parameters and its logits for some rows."""

    def __init__(self, title, key="mixed"):
        self.network, self.schema = make_case(title, key)
        self.network = self.network.double().eval()
        self.batch = draw_batch(self.schema, 16)
        self.state = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.logit_B = self.score(self.state)
        self.symmetries = self.network.symmetries()

    @torch.no_grad()
    def score(self, state):
        self.network.load_state_dict(state)
        return self.network.interact(embed(self.network, self.schema, self.batch, state))

    def change(self, symmetry, seed=0):
        """Return the largest change of a logit under a random element."""
        element = random_element(symmetry, torch.Generator().manual_seed(seed))
        changed_B = self.score(act(self.state, symmetry, element)) - self.logit_B
        return changed_B.nan_to_num(nan=1.0).abs().max().item()  # a variance below zero


@titles
def test_logit_is_scaled_and_shifted(title):
    subject = Subject(title)
    how = subject.network.logit_scale()
    assert how.degrees[how.shift] == 1
    assert subject.state[how.shift].numel() == 1
    scaled = recalibrate(subject.state, how, 0.8, 0.3)
    torch.testing.assert_close(subject.score(scaled), 0.8 * subject.logit_B + 0.3)
    with pytest.raises(ValueError, match="not positive"):
        recalibrate(subject.state, how, -1.0, 0.0)


def of_table(symmetries, name):
    """Return the symmetry that moves the columns of a table."""
    (actual,) = [
        s for s in symmetries if any(f"bags.{name}.weight" in part.parameter for part in s.slices)
    ]
    return actual


@fitting()
def test_logits_do_not_change(title, key):
    subject = Subject(title, key)
    assert subject.logit_B.std() > 1e-3
    draw = torch.Generator().manual_seed(1)
    state = subject.state
    for symmetry in subject.symmetries:
        element = random_element(symmetry, draw)
        alone = act(subject.state, symmetry, element)
        torch.testing.assert_close(
            subject.score(alone), subject.logit_B, rtol=1e-10, atol=1e-10, msg=str(symmetry)
        )
        if symmetry.size > 1:
            assert any(not torch.equal(alone[k], v) for k, v in subject.state.items()), symmetry
        state = act(state, symmetry, element)
    torch.testing.assert_close(subject.score(state), subject.logit_B, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("title", slow_but([t for t in ALL if t not in (*SLOW, "sasrec")], ALL))
def test_no_slice_is_superfluous(title):
    subject = Subject(title)
    for symmetry in subject.symmetries:
        for part in symmetry.slices:
            rest = tuple(other for other in symmetry.slices if other is not part)
            fewer = dataclasses.replace(symmetry, slices=rest)
            assert subject.change(fewer) > 1e-7, part


def holds_rotations(symmetry, symmetries):
    """Return whether rotations act inside the units of a permutation: heads of attention."""
    places = {(part.parameter, part.axis) for part in symmetry.slices}
    inside = [
        other
        for other in symmetries
        if other.kind == "rotation" and {(p.parameter, p.axis) for p in other.slices} <= places
    ]
    return {other.size for other in inside} == {symmetry.slices[0].width}


@titles
def test_no_larger_group_acts(title):
    """Of permutations none may carry signs, of signed ones none may be a rotation."""
    subject = Subject(title)
    larger = {"permutation": "signed_permutation", "signed_permutation": "rotation"}
    for symmetry in subject.symmetries:
        if symmetry.kind == "rotation" or symmetry.size == 1:
            continue
        slices = symmetry.slices
        if symmetry.kind == "signed_permutation":
            slices = tuple(dataclasses.replace(part, signed=True) for part in slices)
        if symmetry.kind == "permutation" and holds_rotations(symmetry, subject.symmetries):
            continue  # signs of whole units are among the rotations inside
        wider = Symmetry(larger[symmetry.kind], symmetry.size, slices)
        assert subject.change(wider) > 1e-7, symmetry


@titles
def test_signs_that_do_not_pass_matter(title):
    subject = Subject(title)
    for symmetry in subject.symmetries:
        for part in symmetry.slices:
            if symmetry.kind == "signed_permutation" and part.parameter.count("running_var") == 0:
                other = dataclasses.replace(part, signed=not part.signed)
                slices = tuple(other if p is part else p for p in symmetry.slices)
                assert subject.change(dataclasses.replace(symmetry, slices=slices)) > 1e-7, part


@titles
def test_names_and_sizes_are_those_of_the_state(title):
    subject = Subject(title)
    for symmetry in subject.symmetries:
        for part in symmetry.slices:
            shape = subject.state[part.parameter].shape
            assert 0 <= part.axis < len(shape)
            assert part.start + symmetry.size * part.width <= shape[part.axis]
            assert all(axis != part.axis and stop <= shape[axis] for axis, _, stop in part.within)
            assert part.signed or symmetry.kind != "rotation"


@pytest.mark.parametrize("title", ["fm", "deepfm"])
def test_rotations_of_one_table_break_inner_products(title):
    subject = Subject(title)
    readers = ["mlp.layers.0.weight"] if title == "deepfm" else []
    own = separate_bases(subject.network.sparse, readers)
    assert len(own) == 6
    assert all(subject.change(symmetry) > 1e-3 for symmetry in own)


def test_a_rotation_reaches_every_field_of_its_table():
    subject = Subject("dnn")
    user = of_table(subject.symmetries, "user")
    assert [part.start for part in user.slices[1:]] == [
        8 * subject.network.sparse.fields.index(name) for name in ("user", "friend")
    ]
    half = dataclasses.replace(user, slices=user.slices[:2])  # the other field of the table
    assert subject.change(half) > 1e-3


def test_products_in_din_forbid_rotations_of_asked_tables_only():
    subject = Subject("din pairs")
    kinds = {
        name: of_table(subject.symmetries, name).kind
        for name in ("item", "brand", "user", "genres")
    }
    assert kinds == {
        "item": "signed_permutation",
        "brand": "signed_permutation",
        "user": "rotation",
        "genres": "rotation",
    }
    item = of_table(subject.symmetries, "item")
    assert item.slices[0].parameter == "sparse.sequences.item.embedding_bags.item.weight"
    assert [part.parameter for part in item.slices if not part.signed] == [
        "attention.0.mlp.layers.0.weight",
        "attention.1.mlp.layers.0.weight",
    ]


def test_gates_forbid_rotations():
    gated, plain = Subject("final_mlp"), Subject("final_mlp plain")
    assert of_table(gated.symmetries, "item").kind == "signed_permutation"
    assert of_table(plain.symmetries, "item").kind == "rotation"


def test_heads_move_as_a_whole_or_within_themselves():
    subject = Subject("final_mlp contexts")
    (heads,) = [s for s in subject.symmetries if s.slices[-1].parameter == "fusion.forms"][-1:]
    assert (heads.kind, heads.size) == ("permutation", 4)
    assert {part.width for part in heads.slices} == {1, 2, 3}
    whole = Symmetry(
        "permutation",
        8,
        (
            Slice("mlp.layers.1.weight", 0),
            Slice("mlp.layers.1.bias", 0),
            Slice("fusion.first.weight", 1),
        ),
    )
    assert subject.change(whole) > 1e-3


@pytest.mark.parametrize(
    ("title", "kinds"),
    [
        ("lr", {}),
        ("fm", {"rotation": 1}),
        ("dnn", {"rotation": 6, "signed_permutation": 2}),
        ("wide_deep", {"rotation": 6, "permutation": 2}),
        ("deepfm", {"rotation": 1, "permutation": 2}),
        ("dcn", {"rotation": 6, "permutation": 2}),
        ("dcn without MLP", {"rotation": 6}),
        ("dcnv2", {"signed_permutation": 6, "permutation": 2}),
        ("dcnv2 stacked", {"signed_permutation": 6, "permutation": 2}),
        ("dcnv2 of low rank", {"signed_permutation": 6 + 2 * 2, "permutation": 2}),
        ("dcnv2 mixture", {"signed_permutation": 6 + 2 * 2 * 2, "permutation": 1 + 1}),
        ("din", {"signed_permutation": 2, "rotation": 4, "permutation": 2 + 3}),
        ("din pairs", {"signed_permutation": 2, "rotation": 4, "permutation": 2 + 2}),
        # learned contexts; hidden units of gates, of the first stream, of heads, and heads
        (
            "final_mlp",
            {"signed_permutation": 6, "rotation": 2, "permutation": 2 + 1 + 2 * 2 + 1},
        ),
        ("final_mlp plain", {"rotation": 6, "signed_permutation": 1 + 2}),
        # tables with the bottom's output, hidden units of both MLPs, numbers, signs of tables
        ("dlrm", {"permutation": 1 + 1 + 2, "rotation": 2, "signs": 4}),
        ("dlrm tanh", {"signed_permutation": 1 + 2, "rotation": 2, "signs": 4}),
        # tables in histories, other tables and numbers; two rotations a head, heads, hidden units
        ("sasrec", {"permutation": 2 + 3 * 2 + 2, "rotation": 4 + 3 * 2 * 2}),
        ("gru4rec", {"rotation": 6, "signed_permutation": 3, "permutation": 2}),
        ("gru4rec of two layers", {"rotation": 6, "signed_permutation": 3 * 2}),
    ],
)
def test_every_table_number_and_hidden_layer_has_its_symmetry(title, kinds):
    actual = [symmetry.kind for symmetry in Subject(title).symmetries]
    assert {kind: actual.count(kind) for kind in set(actual)} == kinds


def test_numbers_move_one_row():
    (age,) = [s for s in Subject("dnn").symmetries if s.slices[0].within == ((0, 0, 1),)]
    assert age.slices[0] == Slice("sparse.numbers", 1, within=((0, 0, 1),))
    assert len(age.slices) == 2
    assert [f.name for f in MIXED.numbers] == ["age", "price"]


def test_padding_columns_take_no_part():
    network = build(MIXED, name="dnn", embedding_dim=6)
    assert network.state_dict()["sparse.collection.embedding_bags.item.weight"].shape[1] == 8
    assert {s.size for s in network.symmetries()} == {6, 16, 8}


@pytest.mark.parametrize("embeddings", ["fused", "dense"])
def test_names_and_symmetries_outlive_sharding(compose, embeddings):
    overrides = ("runtime.device=cpu", "runtime.threads=1", f"train.embeddings={embeddings}")
    config = parse(compose(*overrides))
    for title, (name, changes) in {**CASES, **ON_MIXED}.items():
        model, plain = options(name, **changes), build(MIXED, name=name, **changes)
        sharded = build_sharded(model_schema(MIXED, model), model, config.train, config.runtime)
        assert set(sharded.module.state_dict()) == set(plain.state_dict()), title
        assert sharded.network.symmetries() == plain.symmetries(), title
