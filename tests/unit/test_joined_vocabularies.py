"""Tables on a joined vocabulary: the sources with a token determine its row."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import MIXED, draw_batch, make_case
from torch.func import functional_call

from cki_rec.config import UserError
from cki_rec.data.encoding import tokens as token_lists
from cki_rec.data.schema import FIRST_ID, OOV_ID
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import equal_weights
from cki_rec.merging.vocabulary import (
    from_owners,
    join_tokens,
    owned,
    restrict_weights,
    shared_rows,
    to_union,
)


def draws(seed):
    return torch.Generator().manual_seed(seed)


LISTS = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=4)


@given(LISTS)
def test_every_token_has_one_row_and_the_first_source_keeps_its_ids(lists):
    union, maps = join_tokens(lists, FIRST_ID)
    assert sorted(union) == sorted({token for original in lists for token in original})
    assert maps[0].tolist() == list(range(FIRST_ID + len(lists[0])))
    for original, rows in zip(lists, maps, strict=True):
        assert rows[:FIRST_ID].tolist() == list(range(FIRST_ID))
        assert [union[row - FIRST_ID] for row in rows[FIRST_ID:]] == original
    has = owned(maps, FIRST_ID + len(union))
    assert has.any(0).all()
    for k, original in enumerate(lists):
        assert {union[r - FIRST_ID] for r in has[k].nonzero()[FIRST_ID:, 0]} == set(original)


def two_sources():
    """Return two tables with tokens a b c and d b a, on their union, and who has which row."""
    noise = draws(1)
    lists = [list("abc"), list("dba")]
    union, maps = join_tokens(lists, FIRST_ID)
    tables = [{"t": torch.randn(5, 4, generator=noise)} for _ in lists]
    moved = [
        to_union(table, {"t": rows}, {"t": 6}, OOV_ID)
        for table, rows in zip(tables, maps, strict=True)
    ]
    return tables, moved, union, {"t": owned(maps, 6)}


def test_rows_that_a_source_lacks_are_its_unseen_row():
    tables, moved, union, owners = two_sources()
    assert union == list("abcd")
    assert owners["t"].tolist() == [[True] * 5 + [False], [True] * 4 + [False, True]]
    assert torch.equal(moved[0]["t"], tables[0]["t"][[0, 1, 2, 3, 4, 1]])
    assert torch.equal(moved[1]["t"], tables[1]["t"][[0, 1, 4, 3, 1, 2]])
    counts = to_union({"t": torch.tensor([0, 9, 3, 2, 1])}, {"t": torch.tensor([0, 1, 5, 3, 2])},
                      {"t": 6}, None)  # fmt: skip
    assert counts["t"].tolist() == [0, 9, 1, 2, 0, 3]


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 6, 1), (2, 6, 4)])
def test_rows_of_one_source_are_copied_and_shared_rows_are_merged(shape):
    _, moved, _, owners = two_sources()
    weight = torch.rand(shape, generator=draws(2))
    weights = {"t": weight / weight.sum(0)}
    merged = mix(moved, restrict_weights(weights, owners))["t"]
    assert torch.equal(merged[:4], mix(moved, weights)["t"][:4])
    assert torch.equal(merged[4], moved[0]["t"][4])
    assert torch.equal(merged[5], moved[1]["t"][5])


def test_weight_of_sources_without_a_row_goes_to_those_that_have_it():
    owners = {"t": torch.tensor([[True, True], [True, True], [True, False]])}
    hard = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])[:, :, None]
    assert restrict_weights({"t": hard}, owners)["t"][:, :, 0].T.tolist() == [
        [0.0, 0.0, 1.0],
        [0.5, 0.5, 0.0],
    ]
    soft = torch.tensor([[0.2, 0.2], [0.2, 0.2], [0.6, 0.6]])[:, :, None]
    result = restrict_weights({"t": soft}, owners)["t"][:, 1, 0]
    torch.testing.assert_close(result, torch.tensor([0.5, 0.5, 0.0]))


def test_a_row_of_one_source_is_copied_although_the_source_never_saw_it():
    _, moved, _, owners = two_sources()
    weights = evidence(moved, [{"t": torch.zeros(6)}] * 2)
    merged = mix(moved, restrict_weights(weights, owners))["t"]
    assert torch.equal(merged[5], moved[1]["t"][5])


def test_methods_without_weights_get_rows_of_owners():
    _, moved, _, owners = two_sources()
    anything = {"t": torch.full((6, 4), 7.0), "bias": torch.ones(1)}
    models = [{**m, "bias": torch.zeros(1)} for m in moved]
    merged = from_owners(anything, models, owners)
    assert torch.equal(merged["t"][:4], anything["t"][:4])
    assert torch.equal(merged["t"][4], moved[0]["t"][4])
    assert torch.equal(merged["t"][5], moved[1]["t"][5])
    assert torch.equal(merged["bias"], anything["bias"])


def test_whole_tables_are_compared_by_rows_that_all_have():
    _, moved, _, owners = two_sources()
    for whole, remaining in zip(moved, shared_rows(moved, owners), strict=True):
        assert torch.equal(remaining["t"], whole["t"][:4])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_model_and_itself_under_a_permuted_vocabulary_give_its_scores(order):
    network, _ = make_case("deepfm", "mixed")
    params = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    batch = draw_batch(MIXED, 40, seed=3)
    scores = functional_call(network.eval(), params, (batch,))
    sources, maps = [params, dict(params)], [{}, {}]
    for name in [name for name in params if table_of(name)]:
        size = len(params[name])
        others = FIRST_ID + torch.randperm(size - FIRST_ID, generator=draws(size))
        sources[1][name] = params[name][torch.cat([torch.arange(FIRST_ID), others])]
        lists = [list(range(FIRST_ID, size)), others.tolist()]
        _, result = join_tokens([[str(t) for t in lists[k]] for k in order], FIRST_ID)
        for k, rows in zip(order, result, strict=True):
            maps[k][name] = rows
    sizes = {name: len(rows) for name, rows in maps[0].items()}
    moved = [to_union(sources[k], maps[k], sizes, OOV_ID) for k in order]
    owners = {name: owned([maps[k][name] for k in order], sizes[name]) for name in sizes}
    weights = {name: equal_weights(tensor, 2) for name, tensor in params.items()}
    merged = mix(moved, restrict_weights(weights, owners))
    tables = {table_of(name): rows for name, rows in maps[0].items()}
    ids, start = batch.values.clone(), 0
    for feature, length in zip(MIXED.lookups, batch.lengths.reshape(-1, 40).sum(1), strict=True):
        span = slice(start, start + int(length))
        ids[span] = tables[feature.table][ids[span]]  # the same tokens in the joined vocabulary
        start = span.stop
    on_union = replace(batch, values=ids)
    assert torch.equal(functional_call(network, merged, (on_union,)), scores)


@pytest.fixture
def folder(tmp_path):
    token_lists.write_tokens(tmp_path, "item", ["b", "a", "\u00e9"])
    return tmp_path


def test_tokens_are_identified_by_their_hash(folder):
    digest = token_lists.hash_of(["b", "a", "\u00e9"])
    assert hashlib.sha256((folder / "vocabulary.item.txt").read_bytes()).hexdigest() == digest
    assert token_lists.read_tokens(folder, "item", digest) == ["b", "a", "\u00e9"]
    assert token_lists.find_tokens([folder / "no", folder], {"item": digest}) == folder
    assert token_lists.find_tokens([folder], {"item": "another"}) is None


def error_of(*arguments):
    with pytest.raises(UserError) as caught:
        token_lists.read_tokens(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_tokens_are_refused(folder):
    assert "vocabulary.item.txt: differs from the tokens that the model was trained" in error_of(
        folder, "item", "x"
    )
    assert "vocabulary.user.txt: missing" in error_of(folder, "user", "x")


def test_a_truncated_file_of_an_encoded_data_set_is_refused(folder):
    path = folder / "vocabulary.item.txt"
    digest = token_lists.hash_of(["b", "a", "\u00e9"])
    files = {"vocabulary.item": {"sha256": digest}}
    manifest = {"schema": {"vocabulary_hashes": {"item": digest}}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(path.read_bytes()[:-3])
    assert f"{path}: damaged" in error_of(folder, "item", digest)


def test_ranges_of_numbers_are_not_joined(folder):
    digest = token_lists.hash_of(["b", "a", "\u00e9"])
    files = {"vocabulary.item": {"sha256": digest}}
    manifest = {"schema": {"vocabulary_hashes": {"item": "with edges"}}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "ranges of numbers" in error_of(folder, "item", "with edges")


def test_rows_must_be_those_of_the_vocabulary():
    with pytest.raises(ValueError, match=r"t: \(4, 2\) does not fit a vocabulary of 5 rows"):
        to_union({"t": torch.zeros(4, 2)}, {"t": torch.arange(5)}, {"t": 5}, OOV_ID)
