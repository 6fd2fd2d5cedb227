"""Alignment, repair and the choice among them through the command line."""

from __future__ import annotations

import json

import pytest
import torch
from store import twin

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.engine import checkpoint_io

TINY = [
    *("runtime.threads=1", "train.epochs=2", "train.batch_size=256", "model.hidden=[16,8]"),
    *("model.embedding_dim=8", "evaluate.bootstrap=100", "merge.sample=500"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aligning")


@pytest.fixture(scope="module")
def options(raw_zip, folder):
    """Sources are trained once for all tests of this file."""
    places = [f"runtime.{key}={folder / key}" for key in ("out", "reports", "encoded")]
    steps = [f"merge.refinement.{name}=20" for name in ("steps", "map_steps", "routed_steps")]
    return [f"data.raw={raw_zip}", *places, *TINY, *steps]


def records(folder, pipeline):
    paths = sorted(folder.glob(f"out/{pipeline}-*/record.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize(
    ("by", "model"),
    [
        *((by, model) for by in ("weights", "activations") for model in ("deepfm", "din")),
        *(
            pytest.param(by, model, marks=pytest.mark.slow)
            for by in ("weights", "activations")
            for model in ("dcn", "dcnv2")
        ),
    ],
)
def test_aligned_sources_agree_more(options, folder, by, model):
    histories = ["model.histories=true"] if model == "din" else []
    words = [f"model={model}", *histories, "suite=seeds", f"merge=aligned_{by}"]
    assert main(["evaluate", *words, *options]) == 0
    facts = records(folder, "merge")[-1]["result"]["alignment"]
    assert facts["by"] == by
    assert facts["agreement"] > facts["agreement_before"]
    assert records(folder, "evaluate")[-1]["result"]["test"]["auc"] > 0.5


@pytest.mark.parametrize("repair", ["rescale", "least_squares", "select_units", "project"])
@pytest.mark.parametrize(
    "norm",
    ["model.batch_norm=true", pytest.param("model.activation=dice", marks=pytest.mark.slow)],
)
def test_every_repair_gives_a_model_that_serves(options, folder, repair, norm):
    words = ["suite=seeds", "merge=aligned_activations", f"merge.repair={repair}", norm]
    assert main(["evaluate", *words, *options]) == 0
    merged = records(folder, "merge")[-1]
    params = checkpoint.load(folder / "out" / merged["run_id"] / "checkpoint").params
    assert all(bool(tensor.isfinite().all()) for tensor in params.values())
    assert all(bool((t >= 0).all()) for n, t in params.items() if n.endswith("running_var"))


def method_of(record):
    """Return the method of a merge; None: it is the refinement of another one."""
    return record["config"].get("merge", {}).get("method")


def test_the_best_candidate_is_kept_and_can_be_fine_tuned(options, folder):
    words = ["suite=seeds", "merge=auto", "finetune=one_epoch"]
    assert main(["evaluate", *words, *options]) == 0
    search = next(r for r in records(folder, "merge") if method_of(r) == "auto")
    (chosen,) = search["result"]["chosen"]
    made = [
        record["run_id"] for pipeline in ("merge", "train") for record in records(folder, pipeline)
    ]
    scores = search["result"]["valid_auc"]["all"]
    assert set(scores) <= set(made)
    assert len(scores) == 10  # six recipes, two sources, the best of them refined in two ways
    assert scores[chosen] == search["result"]["valid_auc"]["chosen"] == max(scores.values())
    assert records(folder, "evaluate")[-1]["result"]["finetuned"]


def test_the_same_command_gives_the_same_bits(options, folder):
    words = ["suite=shards", "merge=aligned_activations", "merge.repair=select_units"]
    assert main(["merge", *words, *options]) == 0
    first = records(folder, "merge")[-1]
    assert main(["merge", *words, *options, "runtime.force=true"]) == 0
    again = records(folder, "merge")[-1]
    assert first["fingerprint"] == again["fingerprint"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge=evidence", "merge.method=auto"], "merge.recipes is empty"),
        (["merge.align.by=weight"], "did you mean 'weights'"),
        (["merge.repair=fix"], "merge.repair=fix"),
        (
            ["merge=slerp", "merge.repair=project"],
            "merge.repair=project requires method=average or evidence",
        ),
        (
            ["merge=auto", "merge.recipes=[{method: best_source}]"],
            "recipes[0]",
        ),
        (["merge=auto", "merge.recipes=[{align.bye: weights}]"], "align"),
    ],
)
def test_mistakes_are_one_line(options, words, says, capsys):
    assert main(["merge", "suite=seeds", *words, *options]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in shown


def test_a_sample_that_is_small_against_a_layer_is_noticed(options, capsys):
    words = ["suite=seeds", "merge=average", "merge.repair=least_squares"]
    assert main(["merge", *words, *options, "merge.sample=40"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fits the 41 inputs of mlp.layers.0.weight on 40 rows" in shown
    assert "take 410 or more" in shown
    for size, is_noticed in ((409, True), (410, False)):
        assert main(["merge", *words, *options, f"merge.sample={size}"]) == 0
        assert ("take 410 or more" in capsys.readouterr().out) == is_noticed
    words[2] = "merge.repair=rescale"
    assert main(["merge", *words, *options, "merge.sample=40"]) == 0


def test_the_router_takes_each_row_to_the_parent_that_knows_it(options, folder, capsys):
    found = {}
    for method in ("oracle_router", "best_source"):
        assert main(["evaluate", "suite=shards", f"merge={method}", *options]) == 0
        found[method] = records(folder, "evaluate")[-1]["result"]
    routed, single = (found[name]["test"] for name in ("oracle_router", "best_source"))
    domains = zip(routed["domains"].values(), single["domains"].values(), strict=True)
    assert sum(a["auc"] == b["auc"] for a, b in domains) == 1  # on its own part the best is itself
    assert found["oracle_router"]["inference_cost"] == 2
    capsys.readouterr()
    before = len(records(folder, "evaluate"))
    assert main(["evaluate", "suite=seeds", "merge=oracle_router", *options]) == 0
    assert len(records(folder, "evaluate")) == before  # skipped, as in a sweep over suites
    assert "needs one source for each shard" in "".join(capsys.readouterr())


def test_an_evaluation_is_of_its_method_whatever_its_label(options, folder):
    before = len(records(folder, "evaluate"))
    for method in ("output_ensemble", "probability_ensemble"):
        words = ["suite=seeds", "merge=output_ensemble", f"merge.method={method}"]
        words += ["merge.label=mine"]
        assert main(["evaluate", *words, *options]) == 0
    mean_logit, mean_probability = records(folder, "evaluate")[before:]
    losses = [r["result"]["test"]["log_loss"] for r in (mean_logit, mean_probability)]
    assert losses[0] != losses[1]


def test_external_checkpoints_are_aligned_by_weights_without_data(options, folder, tmp_path):
    run = folder / "out" / records(folder, "train")[0]["run_id"]
    paths = ", ".join(f"{{path: {path}}}" for path in (run, twin(run, tmp_path / "twin")))
    words = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    words += [f"merge.sources=[{paths}]", "merge=aligned_weights", "runtime.threads=1"]
    assert main(["merge", *words, f"data.raw={tmp_path / 'nothing.zip'}"]) == 0
    (record,) = records(tmp_path, "merge")
    assert record["result"]["alignment"]["agreement"] == pytest.approx(1)


def test_accumulators_of_moved_tables_are_means_over_the_row(options, folder):
    words = ["suite=seeds", "merge=aligned_weights", "train.table_optimizer=adagrad"]
    assert main(["merge", *words, *options]) == 0
    run_id = records(folder, "merge")[-1]["run_id"]
    found = checkpoint.load(folder / "out" / run_id / "checkpoint").accumulators
    assert found
    for tensor in found.values():
        assert bool((tensor == tensor[:, :1]).all())
        assert float(tensor.max()) > 0


@pytest.mark.parametrize("model", ["deepfm", "dcn"])
def test_a_recalibrated_model_needs_no_recalibration(options, folder, model):
    words = [f"model={model}", "suite=seeds", "merge=average"]
    assert main(["evaluate", *words, *options]) == 0
    plain = records(folder, "evaluate")[-1]["result"]
    assert main(["evaluate", *words, "merge.recalibrate=true", *options]) == 0
    found = records(folder, "evaluate")[-1]["result"]
    facts = records(folder, "merge")[-1]["result"]["recalibration"]
    for key in ("scale", "shift"):
        assert facts[key] == pytest.approx(plain["recalibration"][key], rel=1e-3)
    assert found["recalibration"]["scale"] == pytest.approx(1, abs=1e-3)
    assert found["recalibration"]["shift"] == pytest.approx(0, abs=1e-3)
    assert found["test"]["auc"] == pytest.approx(plain["test"]["auc"], abs=1e-4)
    expected = plain["test"]["log_loss_recalibrated"]
    assert found["test"]["log_loss"] == pytest.approx(expected, abs=1e-4)


def test_what_is_kept_as_it_is_is_not_recalibrated(options, capsys):
    words = ["merge=best_source", "merge.recalibrate=true"]
    assert main(["merge", *words, *options]) == 2
    error = capsys.readouterr().err
    assert "merge.recalibrate=true" in error
    assert "Traceback" not in error


def test_a_source_above_all_recipes_is_chosen(options, folder, capsys):
    sources = "suite.sources=[{seed: 1},{seed: 2, train.epochs: 0}]"
    recipes = "merge.recipes=[{method: average}]"
    words = ["merge=auto", "merge.effort=closed_form", sources, recipes, *options]
    for _ in range(2):  # made, and found again
        assert main(["merge", *words]) == 0
        shown = "".join(capsys.readouterr())
        assert "no recipe is above the validation AUC" in shown
        assert "of the source seed=1, which is returned unchanged" in shown
        assert "chosen: seed=1" in shown
    result = records(folder, "merge")[-1]["result"]
    best = next(
        record["run_id"]
        for record in records(folder, "train")
        if record["run_id"] in result["chosen"]
    )
    assert result["valid_auc"]["is_source"]
    assert result["valid_auc"]["chosen"] == result["valid_auc"]["best_source"]
    assert main(["evaluate", *words]) == 0
    alone = records(folder, "evaluate")[-1]
    assert alone["config"]["members"] == [best]
    difference = alone["result"]["difference"]["best_source"]["auc"]
    assert difference["estimate"] == 0
    assert main(["evaluate", *words, "finetune=one_epoch"]) == 0


@pytest.mark.slow
def test_candidates_that_a_sample_cannot_fit_are_left_out(options, folder, capsys):
    words = ["merge", "suite=seeds", "merge=auto", *options]
    assert main([*words, "merge.sample=40"]) == 0
    told = "".join(capsys.readouterr())
    assert "merge.recipes[3] is left out: merge.sample" in told
    only = "merge.recipes=[{align.by: activations, repair: select_units}]"
    assert main([*words, "merge.sample=40", only]) == 2
    told = "".join(capsys.readouterr())
    assert "none could be made" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("suite", ["seeds", pytest.param("seeds_5", marks=pytest.mark.slow)])
def test_the_source_that_leads_is_the_best_and_is_recorded(options, folder, suite):
    """DCNv2's cross network and its tables are one source's, and validation rows say whose."""
    words = ["model=dcnv2", f"suite={suite}", "merge=evidence", "merge.repair=project"]
    assert main(["merge", *words, "merge.align.by=weights", *options]) == 0
    (record,) = (
        r
        for r in records(folder, "merge")
        if r["result"]["anchor"] and len(r["config"]["sources"]) == (2 if suite == "seeds" else 5)
    )
    scores, source = record["result"]["anchor"]["valid_auc"], record["result"]["anchor"]["source"]
    assert source == scores.index(max(scores))
    assert len(set(scores)) == len(scores)
    alone = [float(k == source) for k in range(len(scores))]
    crossing = {n: s for n, s in record["result"]["shares"].items() if n.startswith("cross.")}
    assert crossing
    assert all(shares == alone for shares in crossing.values())
    merged = checkpoint.load(folder / "out" / record["run_id"] / "checkpoint").params
    copied = folder / "out" / record["config"]["sources"][source] / "checkpoint"
    own = checkpoint.load(copied).params
    for name in crossing:  # moved into the common frame: coordinates in other places, other signs
        ours, theirs = merged[name].abs().flatten().sort(), own[name].abs().flatten().sort()
        assert torch.equal(ours.values, theirs.values)


def test_a_source_of_another_division_leads_nothing(options, folder, tmp_path, capsys):
    """Who leads is chosen by labels, which a source must not have been trained on."""
    words = ["model=dcnv2", *options]
    before = set(folder.glob("out/train-*"))
    for more in ([], ["data.split.seed=5"], ["seed=2"]):
        assert main(["train", *words, *more]) == 0
    runs = {
        json.loads((run / "record.json").read_text())["config"]["seed"]: run
        for run in set(folder.glob("out/train-*")) - before
    }
    saved = checkpoint.load(runs[2] / "checkpoint")
    other = next(
        checkpoint.describe(run / "checkpoint").origin
        for run in folder.glob("out/train-*")
        if checkpoint.describe(run / "checkpoint").origin.data_hash != saved.origin.data_hash
    )
    groups = {"model": saved.params, "accumulator": saved.accumulators, "counts": saved.counts}
    checkpoint_io.save(tmp_path / "other", groups, saved.model, saved.schema, other)
    named = f"merge.sources=[{{seed: 1}},{{path: {tmp_path / 'other'}}}]"
    ways = ["merge=evidence", named, "merge.align.by=weights"]
    assert main(["merge", *words, *ways, "merge.repair=select_units"]) == 0
    capsys.readouterr()
    for more in ([], ["check_only=true"]):
        assert main(["merge", *words, *ways, "merge.repair=project", *more]) == 2
        shown = capsys.readouterr()
        assert "split otherwise" in shown.err + shown.out


@pytest.mark.slow
def test_final_mlp_has_the_default_too(options, folder):
    assert main(["merge", "model=final_mlp", "model.streams.hidden=[16,8]", *options]) == 0
