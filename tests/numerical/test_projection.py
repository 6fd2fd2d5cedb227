"""Tables projected from all sources: fixed points, inner products, copied modules."""

from __future__ import annotations

import pytest
import torch
from pairs import HALVES, Pair, moved_tables

from cki_rec.engine.embeddings import table_of
from cki_rec.merging.alignment import table_products
from cki_rec.merging.extras import Processes
from cki_rec.merging.methods.average import average
from cki_rec.merging.methods.evidence import evidence
from cki_rec.merging.mixing import mix, source_shares
from cki_rec.merging.projection import anchor_weights, project_tables
from cki_rec.merging.repair import fit_layers
from cki_rec.merging.steps import Network, repair_model
from cki_rec.merging.traits import elementwise_parameters


@pytest.mark.parametrize("case", ["deepfm", "dcn", "fm"])
def test_a_projection_of_equal_sources_is_the_source(case):
    pair = Pair(case, 1)
    models = [pair.models[0], dict(pair.models[0])]
    products = table_products(models, moved_tables(pair.symmetries))
    weights = average(models)
    projected = project_tables(
        models[0], models, pair.symmetries, products, weights, pair.readers()
    )
    torch.testing.assert_close(
        pair.logits(projected), pair.logits(models[0]), atol=1e-4, rtol=1e-4
    )


def test_a_projection_keeps_inner_products_better_than_the_average():
    pair = Pair("fm")
    tables = moved_tables(pair.symmetries)
    products = table_products(pair.models, tables)
    projected = project_tables(
        pair.average, pair.models, pair.symmetries, products, average(pair.models), ()
    )

    def gap(params):
        tables_of = [torch.cat([m[t] for t in tables]).double() for m in (*pair.models, params)]
        left, right, merged = (table @ table.T for table in tables_of)
        return float(((left + right) / 2 - merged).square().sum())

    assert gap(projected) < gap(pair.average)
    assert all(projected[n] is pair.average[n] for n in projected if "first_order" in n)


def test_rows_of_one_source_stay_finite():
    pair = Pair("fm")
    tables = [n for n in pair.average if table_of(n)]
    counts = [
        {n: torch.arange(len(pair.average[n])) % 2 * 3 + (k == 0) for n in tables}
        for k in range(2)
    ]
    weights = evidence(pair.models, counts)
    products = table_products(pair.models, moved_tables(pair.symmetries), counts)
    projected = project_tables(
        mix(pair.models, weights), pair.models, pair.symmetries, products, weights, ()
    )
    assert all(bool(tensor.isfinite().all()) for tensor in projected.values())


@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize(
    ("case", "prefix"),
    [
        ("din", "attention."),
        ("dcnv2", "cross."),
        ("dcnv2 mixture", "cross."),
        ("final_mlp", "gates."),
    ],
)
def test_elementwise_modules_are_copied_from_one_source(case, prefix, anchor):
    pair = Pair(case)
    copied = elementwise_parameters(pair.network)
    assert copied == {n for n in pair.average if n.startswith(prefix)}
    tables = moved_tables(pair.symmetries)
    read = [
        name
        for symmetry in pair.symmetries
        if {p.parameter for p in symmetry.slices} & copied
        for name in tables
        if name in {p.parameter for p in symmetry.slices}
    ]
    products = table_products(pair.models, tables)
    counts = [{n: torch.ones(len(pair.average[n])) for n in tables} for _ in pair.models]
    for table in read:
        counts[anchor][table][-1] = 0  # a row that it never saw
    weights = average(pair.models) | evidence(pair.models, counts)
    merged, readers = mix(pair.models, weights), pair.readers() - copied
    projected = project_tables(merged, pair.models, pair.symmetries, products, weights, readers)
    own = anchor_weights(weights, pair.symmetries, readers, copied, anchor)
    assert set(own) >= {*copied, *read}
    projected |= mix([{n: model[n] for n in own} for model in pair.models], own)
    for table in read:
        assert torch.equal(projected[table][:-1], pair.models[anchor][table][:-1])
        assert torch.equal(projected[table][-1], merged[table][-1])
    assert read
    if case != "din":  # there numbers may be rotated
        numbers = "sparse.numbers"
        assert torch.equal(projected[numbers], pair.models[anchor][numbers])
    assert all(torch.equal(projected[n], pair.models[anchor][n]) for n in copied)
    fitted = fit_layers(
        projected, pair.models, HALVES, pair.observe, pair.symmetries, True, copied
    )
    assert all(torch.equal(fitted[n], projected[n]) for n in (*copied, *read))
    assert pair.error(fitted) < pair.error(pair.average)


@pytest.mark.parametrize("case", ["din", "dcnv2"])
@pytest.mark.parametrize("num_sources", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_source_with_the_best_score_is_the_anchor(case, num_sources):
    pair = Pair(case, num_sources)
    tables = [name for name in pair.average if table_of(name)]
    network = Network(pair.symmetries, tables)
    copied = elementwise_parameters(pair.network)
    weights = average(pair.models)
    for best in range(num_sources):
        scores = [0.6 if anchor == best else 0.5 for anchor in range(num_sources)]
        seen = []

        def score(params, scores=scores, seen=seen):
            seen.append(params)
            return scores[len(seen) - 1]

        repaired, mixing, anchor = repair_model(
            *("project", pair.average, pair.models, weights, network, ()),
            *(pair.observe, score, Processes()),
        )
        assert repaired is seen[best]
        assert anchor == {"source": best, "valid_auc": scores}
        for k, params in enumerate(seen):
            assert all(torch.equal(params[name], pair.models[k][name]) for name in copied)
        shares = source_shares(mixing, pair.models)
        alone = [float(k == best) for k in range(num_sources)]
        assert all(shares[name] == alone for name in copied)
        assert any(shares[name] != alone for name in shares)
