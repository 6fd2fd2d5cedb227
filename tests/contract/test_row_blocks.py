"""Every method merges a table in blocks of any size as it merges the whole table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_methods import BOTH, draw_inputs, draw_models, skip_unfitting

from cki_rec.merging.methods import METHODS
from cki_rec.merging.mixing import mix
from cki_rec.merging.rows import in_blocks

SUMS = {
    *("slerp", "karcher", "model_stock", "fisher", "cki", "cki_evidence", "cki_evidence_hard"),
    *(f"cki_{part}_{rule}" for part in ("local", "dual", "signed") for rule in ("soft", "hard")),
    *("cki_language_soft", "cki_language_hard", "cki_language_evidence"),
}
"""Cases that add products of floats: the same up to rounding, whatever the blocks."""


def test_every_method_merges_rows_apart():
    assert all(declared.row_wise for declared in METHODS.values())


def draw_rows(kind, num_sources, dtype=torch.float32):
    """Return sources with a table of this kind, their base, and counts of its rows."""
    noise = torch.Generator().manual_seed(num_sources)
    models, base = draw_models(num_sources, dtype=dtype), draw_models(4, dtype=dtype)[3]
    num_rows = {"empty": 0, "one row": 1}.get(kind, 23)
    for params in (*models, base):
        table = torch.randn(num_rows, 4, generator=noise)
        if kind == "constant":
            table = torch.full((num_rows, 4), float(table[0, 0]))
        elif kind == "ties":
            table = table.sign() * table.abs().round()
        params["table"] = table.to(dtype)
    counts = [{"table": torch.randint(0, 9, (num_rows,), generator=noise)} for _ in models]
    return models, base, counts


def merge_apart(declared, models, inputs, options, size):
    """Return the table of a merge in blocks of ``size`` rows, from facts that are summed."""
    rows = in_blocks(models, inputs.base, inputs.fisher, size)
    facts = declared.collect(rows, options) or {}
    parts = []
    for block in rows["table"].read():
        span = slice(block.first, block.first + len(block.models[0]))

        def cut(params, span=span):
            return {name: tensor[span] for name, tensor in params.items() if name == "table"}

        seen = replace(
            inputs,
            counts=[cut(each) for each in inputs.counts],
            fisher=[cut(each) for each in inputs.fisher],
            base=cut(inputs.base),
            gates=None if inputs.gates is None else {"table": inputs.gates["table"]},
            moments={},
            symmetries=(),
            statistics=facts,
            first_rows={"table": block.first},
        )
        result = declared.function(
            [cut(model) for model in models],
            **{name: getattr(seen, name) for name in declared.inputs},
            **options,
        )
        mixed = mix([cut(m) for m in models], result) if declared.returns_weights else result
        parts.append(mixed["table"])
    return torch.cat(parts)


@pytest.mark.parametrize("case", [case for case in BOTH if case != "greedy_soup"])
@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "ties"),
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("constant", "one row", "empty")),
    ],
)
@pytest.mark.parametrize(
    ("num_sources", "dtype"),
    [
        (2, torch.float32),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
        pytest.param(3, torch.float32, marks=pytest.mark.slow),
        pytest.param(2, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(3, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_blocks_of_any_size_give_the_whole(case, kind, num_sources, dtype):
    skip_unfitting(case, num_sources)
    name, options, *more = BOTH[case]
    models, base, counts = draw_rows(kind, num_sources, dtype)
    options = options(num_sources)
    if case == "weighted_average":
        options = {"weights": [1 / num_sources] * num_sources}
    if name in ("ties", "breadcrumbs", "pruning", "dare", "della"):
        options = {**options, "density": 0.4, **({"source": 0} if name == "pruning" else {})}
    fisher = [{n: t.double().square() for n, t in model.items()} for model in models]
    changes = {"counts": counts, "base": base, "fisher": fisher}
    inputs = draw_inputs(models, **changes, **(more[0](num_sources) if more else {}))
    declared = METHODS[name]
    result = declared(models, inputs, **options)
    whole = (mix(models, result) if declared.returns_weights else result)["table"]
    for size in (1, 7, None):
        table = merge_apart(declared, models, inputs, options, size)
        if case in SUMS:
            slack = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(table, whole, rtol=slack, atol=slack)
        else:  # a zero may have another sign
            assert torch.equal(table, whole)
