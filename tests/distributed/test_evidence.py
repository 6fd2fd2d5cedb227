"""``merge.evidence`` selects the measure by which rows of our checkpoints weigh."""

import json

import pytest
import torch
from merging_cases import merge_sources, merged, of, write

from cki_rec.checkpoints import checkpoint
from cki_rec.engine.embeddings import table_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate("ab"):
        write(folder, name, seed)
    return folder


@pytest.mark.parametrize("more", [(), ("merge.memory_gb=2",)])
@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("auto", "counts")), "optimizer"]
)
def test_rows_weigh_by_the_measure_that_is_chosen(sources, tmp_path, kind, more):
    named = of(*(str(sources / name) for name in "ab"))
    how = (named, "merge=evidence", f"merge.evidence={kind}", *more)
    assert merge_sources(tmp_path, "out", *how) == (0, "")
    run, word = merged(tmp_path, "out"), "counts" if kind == "auto" else kind
    record = json.loads((run / "record.json").read_text())
    assert record["provenance"]["evidence"] == word
    assert record["config"]["merge"].get("evidence", "auto") == kind
    one, two = (checkpoint.load(sources / name) for name in "ab")
    found = checkpoint.load(run / "checkpoint")
    for name in [name for name in found.params if table_of(name)]:
        if word == "counts":
            table = table_of(name)
            measures = [one.counts[table].double(), two.counts[table].double()]
        else:
            measures = [
                one.accumulators[name].double()[:, 0],
                two.accumulators[name].double()[:, 0],
            ]
        total = sum(measures)
        share = torch.where(total > 0, measures[0] / total.clamp(min=1e-30), 0.5)[:, None].float()
        expected = share * one.params[name] + (1 - share) * two.params[name]
        torch.testing.assert_close(found.params[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("merge.memory_gb=2",), ("check_only=true",)])
def test_measures_that_are_not_there(sources, tmp_path, more):
    named = of(*(str(sources / name) for name in "ab"))
    for kind, message in (
        ("none", "merge.evidence=none"),
        ("scores", "checkpoints of cki-rec hold no scores"),
    ):
        how = (named, "merge=evidence", f"merge.evidence={kind}", *more)
        code, said = merge_sources(tmp_path, "out", *how)
        if more == ("check_only=true",) and kind == "none":
            assert "would not run: evidence" in said
        else:
            assert (code, said.count("\n")) == (2, 1)
            assert message in said
    assert merge_sources(tmp_path, "out", named, "merge=average", "merge.evidence=none")[0] == 0
    record = json.loads((merged(tmp_path, "out") / "record.json").read_text())
    assert record["provenance"]["evidence"] == "none"
