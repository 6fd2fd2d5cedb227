"""Frames reduced from those of all sources: fixed points, what is kept, what comes whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cki_rec.pipelines.matching import coordinatewise, moved_tables
from pairs import HALVES, Pair

from cki_rec.engine.embeddings import table_of
from cki_rec.merging.alignment import table_products
from cki_rec.merging.methods.average import average
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix, source_shares
from cki_rec.merging.projection import anchor_weights, project_tables
from cki_rec.merging.repair import fit_layers
from cki_rec.pipelines import matching


@pytest.mark.parametrize("case", ["deepfm", "dcn", "fm"])
def test_reduced_frames_of_equal_sources_are_theirs(case):
    pair = Pair(case, 1)
    models = [pair.models[0], dict(pair.models[0])]
    products = table_products(models, moved_tables(pair.symmetries))
    weights = average(models)
    reduced = project_tables(models[0], models, pair.symmetries, products, weights, pair.readers())
    torch.testing.assert_close(pair.logits(reduced), pair.logits(models[0]), atol=1e-4, rtol=1e-4)


def test_reduced_frames_keep_inner_products_better_than_the_average():
    pair = Pair("fm")
    tables = moved_tables(pair.symmetries)
    products = table_products(pair.models, tables)
    reduced = project_tables(
        pair.average, pair.models, pair.symmetries, products, average(pair.models), ()
    )

    def gap(params):
        tables_of = [torch.cat([m[t] for t in tables]).double() for m in (*pair.models, params)]
        left, right, merged = (table @ table.T for table in tables_of)
        return float(((left + right) / 2 - merged).square().sum())

    assert gap(reduced) < gap(pair.average)
    assert all(reduced[n] is pair.average[n] for n in reduced if "first_order" in n)


def test_rows_of_one_owner_keep_their_length():
    pair = Pair("fm")
    tables = [n for n in pair.average if table_of(n)]
    counts = [
        {n: torch.arange(len(pair.average[n])) % 2 * 3 + (k == 0) for n in tables}
        for k in range(2)
    ]
    weights = evidence(pair.models, counts)
    products = table_products(pair.models, moved_tables(pair.symmetries), counts)
    reduced = project_tables(
        mix(pair.models, weights), pair.models, pair.symmetries, products, weights, ()
    )
    assert all(bool(tensor.isfinite().all()) for tensor in reduced.values())


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(
    ("case", "prefix"),
    [
        ("din", "attention."),
        ("dcnv2", "cross."),
        ("dcnv2 mixture", "cross."),
        ("final_mlp", "gates."),
    ],
)
def test_what_multiplies_coordinates_comes_whole_from_one_source(case, prefix, lead):
    pair = Pair(case)
    whole = coordinatewise(pair.network)
    assert whole == {n for n in pair.average if n.startswith(prefix)}
    tables = moved_tables(pair.symmetries)
    read = [
        name
        for symmetry in pair.symmetries
        if {p.parameter for p in symmetry.slices} & whole
        for name in tables
        if name in {p.parameter for p in symmetry.slices}
    ]
    products = table_products(pair.models, tables)
    counts = [{n: torch.ones(len(pair.average[n])) for n in tables} for _ in pair.models]
    for table in read:
        counts[lead][table][-1] = 0  # a row that it never saw
    weights = average(pair.models) | evidence(pair.models, counts)
    merged, readers = mix(pair.models, weights), pair.readers() - whole
    reduced = project_tables(merged, pair.models, pair.symmetries, products, weights, readers)
    own = anchor_weights(weights, pair.symmetries, readers, whole, lead)
    assert set(own) >= {*whole, *read}
    reduced |= mix([{n: model[n] for n in own} for model in pair.models], own)
    for table in read:
        assert torch.equal(reduced[table][:-1], pair.models[lead][table][:-1])
        assert torch.equal(reduced[table][-1], merged[table][-1])
    assert read
    if case != "din":  # there numbers may be rotated
        numbers = "sparse.numbers"
        assert torch.equal(reduced[numbers], pair.models[lead][numbers])
    assert all(torch.equal(reduced[n], pair.models[lead][n]) for n in whole)
    fitted = fit_layers(reduced, pair.models, HALVES, pair.observe, pair.symmetries, True, whole)
    assert all(torch.equal(fitted[n], reduced[n]) for n in (*whole, *read))
    assert pair.error(fitted) < pair.error(pair.average)


@pytest.mark.parametrize("case", ["din", "dcnv2"])
@pytest.mark.parametrize("num_sources", [2, 3])
def test_the_source_with_the_best_score_leads(case, num_sources, monkeypatch):
    pair = Pair(case, num_sources)
    monkeypatch.setattr(matching, "symmetries_of", lambda _: pair.symmetries)
    whole = coordinatewise(pair.network)
    weights = average(pair.models)
    for best in range(num_sources):
        scores = [0.6 if lead == best else 0.5 for lead in range(num_sources)]
        seen = []

        def score(params, scores=scores, seen=seen):
            seen.append(params)
            return scores[len(seen) - 1]

        found, own, lead = matching.repaired(
            *(SimpleNamespace(repair="reduce"), pair.average, pair.models, weights, ()),
            *(None, pair.observe, score),
        )
        assert found is seen[best]
        assert lead == {"source": best, "valid_auc": scores}
        for k, params in enumerate(seen):
            assert all(torch.equal(params[name], pair.models[k][name]) for name in whole)
        shares = source_shares(own, pair.models)
        alone = [float(k == best) for k in range(num_sources)]
        assert all(shares[name] == alone for name in whole)
        assert any(shares[name] != alone for name in shares)
