"""Baselines through the command line: starts, scores, options, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from store import twin

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.data.dataset import EncodedDataset
from cki_rec.engine import checkpoint_io
from cki_rec.merging.methods import METHODS
from cki_rec.pipelines.method_list import method_table

TINY = [
    *("runtime.threads=1", "train.epochs=2", "train.batch_size=256", "model.hidden=[16,8]"),
    *("model.embedding_dim=8", "evaluate.bootstrap=100"),
]
FROM_START = ["task_arithmetic", "ties", "dare", "della", "breadcrumbs", "model_stock"]
ANYWHERE = ["weighted_average", "greedy_soup", "pruning", "slerp", "karcher"]
FROM_ROWS = ["fisher", "regmean", "ot_fusion", "zipit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def options(raw_zip, folder):
    """Sources are trained once for all tests of this file."""
    places = [f"runtime.{key}={folder / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw_zip}", *places, *TINY]


def records(folder, pipeline):
    paths = sorted(folder.glob(f"out/{pipeline}-*/record.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def params_of(folder, run_id):
    return checkpoint.load(folder / "out" / run_id / "checkpoint").params


def is_plain(config):
    """Return whether a training is that of ``seed=1`` alone."""
    return (config["seed"], config["data"]["part"], config["train"]["epochs"]) == (1, None, 2)


def one_line(capsys):
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize("method", [*FROM_START, *ANYWHERE, *FROM_ROWS])
def test_every_baseline_is_evaluated(options, folder, method):
    suite = "shards" if method in FROM_START else "seeds"
    assert main(["evaluate", f"suite={suite}", f"merge={method}", *options]) == 0
    evaluated, merged = records(folder, "evaluate")[-1], records(folder, "merge")[-1]
    result = evaluated["result"]
    assert result["method"] == method
    assert result["test"]["auc"] > 0.5
    assert (result["shares"] is None) == (not METHODS[method].returns_weights)
    assert (merged["config"]["merge"]["base"] is not None) == (method in FROM_START)


@pytest.mark.parametrize("method", FROM_ROWS)
def test_equal_sources_give_themselves_back(options, folder, method):
    """Through the pipeline: whatever rows say of one model twice, it stays that model."""
    assert main(["train", "seed=1", *options]) == 0
    (run,) = {r["run_id"] for r in records(folder, "train") if is_plain(r["config"])}
    other = twin(folder / "out" / run, folder / "twin")
    words = [f"merge.sources=[{{seed: 1}},{{path: {other}}}]", f"merge={method}", *options]
    words += ["merge.options.temperature=0.0001"] * (method == "ot_fusion")
    assert main(["merge", *words]) == 0
    merged = records(folder, "merge")[-1]
    source = params_of(folder, merged["config"]["sources"][0])
    for name, tensor in params_of(folder, merged["run_id"]).items():
        assert torch.allclose(tensor, source[name], rtol=1e-5, atol=1e-6), name


def test_fisher_is_of_the_rows_that_a_source_was_trained_on(options, folder):
    """A row of the users' table that one source alone was trained on is that source's."""
    words = ["merge.options.floor=0.0", "merge.sample=1000000", *options]
    assert main(["merge", "suite=shards", "merge=fisher", *words]) == 0
    merged = records(folder, "merge")[-1]
    found = params_of(folder, merged["run_id"])
    sources = [
        checkpoint.load(folder / "out" / run / "checkpoint") for run in merged["config"]["sources"]
    ]
    (name,) = [n for n in found if n.endswith(".user.weight")]
    seen = torch.stack([source.counts["user"] > 0 for source in sources])
    for k, source in enumerate(sources):
        alone = seen[k] & (seen.sum(0) == 1)
        assert alone.any()
        assert torch.equal(found[name][alone], source.params[name][alone])


@pytest.mark.parametrize("method", ["fisher", "zipit"])
def test_rows_give_the_same_result_twice(options, folder, method):
    words = ["merge", f"merge={method}", *options, "runtime.force=true"]
    assert main(words) == 0
    first = params_of(folder, records(folder, "merge")[-1]["run_id"])
    assert main(words) == 0
    again = params_of(folder, records(folder, "merge")[-1]["run_id"])
    for name, tensor in first.items():
        assert tensor.equal(again[name]), name


def test_probability_ensemble_is_the_mean_of_probabilities(options, folder):
    assert main(["evaluate", "merge=probability_ensemble", *options]) == 0
    evaluated = records(folder, "evaluate")[-1]["result"]
    assert evaluated["inference_cost"] == 2
    assert evaluated["shares"] is None
    kept = records(folder, "merge")[-1]["config"]["sources"]
    probability = np.mean([1 / (1 + np.exp(-valid_logits(folder, run))) for run in kept], 0)
    label = labels_of(folder, options)
    expected = -np.mean(np.where(label > 0, np.log(probability), np.log1p(-probability)))
    assert evaluated["valid"]["log_loss"] == pytest.approx(expected, abs=1e-6)


def valid_logits(folder, run):
    (path,) = (folder / "out" / run).glob("logits-*.npz")
    with np.load(path) as arrays:
        return arrays["valid"].astype(np.float64)


def labels_of(folder, options):
    (dataset,) = [p for p in (folder / "encoded").iterdir() if (p / "manifest.json").exists()]
    found = EncodedDataset(dataset)
    return found.labels(found.rows("valid"))


def test_chosen_scale_is_no_worse_than_any_given_one(options, folder):
    found = {}
    for scale in ("null", "0.5", "1.0", "1.5"):
        words = ["suite=shards", "merge=task_arithmetic", f"merge.options.scale={scale}"]
        assert main(["evaluate", *words, *options]) == 0
        found[scale] = records(folder, "evaluate")[-1]["result"]["valid"]["auc"]
    assert found["null"] >= max(found.values()) - 1e-6


def test_score_is_the_validation_auc_of_evaluation(options, folder, run_config):
    from cki_rec.config import with_delta
    from cki_rec.data.encoding import store
    from cki_rec.pipelines import history, train
    from cki_rec.pipelines.predictions import scorer

    config = with_delta(run_config(folder), {"seed": 1})
    done = train.ensure(config)
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    saved = checkpoint.load(done.checkpoint)
    score = scorer(config, dataset, saved)
    zeros = {name: tensor * 0 for name, tensor in saved.params.items()}
    assert score(zeros) == pytest.approx(0.5)
    assert score(saved.params) == pytest.approx(history.valid_auc(done), abs=1e-6)


def test_tables_by_evidence_whatever_makes_the_rest(options, folder):
    words = ["suite=shards", *options]
    assert main(["merge", "merge=evidence", *words]) == 0
    evidence = params_of(folder, records(folder, "merge")[-1]["run_id"])
    assert main(["merge", "merge=karcher", "merge.tables=evidence", *words]) == 0
    merged = params_of(folder, records(folder, "merge")[-1]["run_id"])
    assert main(["merge", "merge=karcher", "merge.biases=first", *words]) == 0
    based = records(folder, "merge")[-1]
    first = params_of(folder, based["config"]["sources"][0])
    based = params_of(folder, based["run_id"])
    for name, tensor in merged.items():
        if tensor.numel() == 1:  # the mean in both, rounded otherwise
            torch.testing.assert_close(tensor, evidence[name], msg=name)
        else:
            assert tensor.equal(evidence[name]) == ("embedding_bags" in name), name
        assert based[name].equal(first[name]) == (tensor.ndim == 1), name


def test_no_epochs_keep_the_initial_weights(options, folder, capsys):
    assert (
        main(["train", "train.epochs=0", "seed=7", *[o for o in options if "epochs" not in o]])
        == 0
    )
    assert "initial weights" in capsys.readouterr().out
    record = records(folder, "train")[-1]
    assert record["result"]["epochs"] == record["result"]["best_epoch"] == 0
    assert 0.3 < record["result"]["valid_auc"] < 0.7
    saved = checkpoint.load(folder / "out" / record["run_id"] / "checkpoint")
    assert all(not counts.any() for counts in saved.counts.values())
    assert all(not state.any() for state in saved.accumulators.values())


def test_rows_that_no_parent_saw_are_those_of_the_start(options, folder):
    """The untrained model is where both sources of suite shards began."""
    assert main(["merge", "suite=shards", "merge=model_stock", *options]) == 0
    reads = [r["config"] for r in records(folder, "merge")]
    reads = next(r for r in reads if r["merge"]["method"] == "model_stock")
    start = params_of(folder, reads["merge"]["base"])
    for source in reads["sources"]:
        saved = checkpoint.load(folder / "out" / source / "checkpoint")
        for table, counts in saved.counts.items():
            name = f"sparse.collection.embedding_bags.{table}.weight"
            unseen = counts == 0
            assert saved.params[name][unseen].equal(start[name][unseen]), name
            assert not saved.params[name].equal(start[name])


def test_scale_0_of_external_checkpoints_is_the_start(options, folder):
    assert main(["merge", "suite=shards", "merge=model_stock", *options]) == 0
    reads = [r["config"] for r in records(folder, "merge")]
    reads = next(r for r in reads if r["merge"]["method"] == "model_stock")
    named = [f"{{path: {folder / 'out' / run}}}" for run in reads["sources"]]
    start = reads["merge"]["base"]
    words = [
        *("merge=task_arithmetic", "merge.options.scale=0.0", "data.raw=/nowhere"),
        *(f"merge.sources=[{','.join(named)}]", f"runtime.out={folder / 'out'}"),
        *(f"merge.base={{path: {folder / 'out' / start}}}", "runtime.threads=1"),
    ]
    assert main(["merge", *words]) == 0
    merged = params_of(folder, records(folder, "merge")[-1]["run_id"])
    for name, tensor in params_of(folder, start).items():
        assert tensor.equal(merged[name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge=ties"], "merge.method=ties needs the model that all sources started"),
        (["merge=ties", "suite=shards", "merge.options.density=2"], "density=2: must be"),
        (["merge=ties", "merge.options.density=much"], "density=much: must be a number"),
        (["merge=ties", "+merge.options.densty=1"], "no option 'densty': did you mean"),
        (["merge=average", "+merge.options.weights=[1]"], "average takes none"),
        (["merge=weighted_average", "merge.options.weights=[1,1]"], "of sum 1"),
        (
            ["merge=slerp", "merge.sources=[{seed: 1},{seed: 2},{seed: 3}]"],
            "takes 2 models, not 3",
        ),
        (
            ["merge=model_stock", "merge.base={model.embedding_dim: 4, train.epochs: 0}"],
            "sources cannot be merged: architecture: model.embedding_dim",
        ),
        (["merge=model_stock", "merge.base={path: /nowhere}"], "/nowhere"),
        (["merge=model_stock", "merge.base={train.epoch: 0}"], "train.epoch"),
    ],
)
def test_mistakes_are_one_line(options, folder, capsys, words, message):
    assert main(["merge", *options, *words]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("words", [["merge=ties"], ["merge=dare", "+merge.options.p=1"]])
def test_wrong_options_stop_before_any_training(options, tmp_path, capsys, words):
    assert main(["evaluate", *options, f"runtime.out={tmp_path}", *words]) == 2
    assert "merge." in one_line(capsys)
    assert not list(tmp_path.glob("train-*"))


def test_nan_of_a_source_is_named(options, folder, capsys):
    saved = checkpoint.load(folder / "out" / records(folder, "train")[-1]["run_id"] / "checkpoint")
    saved.params["bias"][0] = float("nan")
    broken = folder / "broken"
    checkpoint_io.save(broken, {"model": saved.params}, saved.model, saved.schema, saved.origin)
    sources = f"merge.sources=[{{path: {broken}}},{{seed: 1}}]"
    for method in ("karcher", "average", "greedy_soup", "pruning", "first", "auto"):
        assert main(["merge", *options, f"merge={method}", sources]) == 2
        assert f"bias of {broken}: 1 of 1 entries are NaN or infinite" in one_line(capsys)
    assert main(["merge", *options, "merge=best_source", sources]) == 2
    assert f"{broken}: the model gives NaN or infinite logits" in one_line(capsys)
    assert not list(folder.glob("out/logits/*/*")), "logits of a broken model are not stored"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge=auto", "merge.recipes=[{foo: 1}]"],
            "merge.recipes[0], merge.foo: no such option",
        ),
        (
            ["merge=average", "merge.vocabularies=[5,null]"],
            "merge.vocabularies[0]=5: no such folder",
        ),
        (["merge=average", "merge.vocabularies=[null]"], "1 folders for 2 models"),
        (
            ["merge=average", "merge.vocabularies=[x,null]"],
            "merge.vocabularies[0]=x: no such folder",
        ),
        (["suite=shards", "merge=ties", "merge.base={foo: 1}"], "merge.base, foo: no such option"),
    ],
)
def test_the_wrong_option_is_named(options, capsys, words, message):
    assert main(["merge", *options, *words]) == 2
    assert message in one_line(capsys)


def test_list_shows_every_method_with_its_options(capsys):
    assert main(["merge", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, method in METHODS.items():
        assert any(line.split()[:1] == [name] for line in shown.splitlines()), name
        for option in method.options:
            assert f"{option}=" in shown
    wide = method_table(180)
    for word in ("summary", "models", "needs", "cost", "reference", "base model", "density=0.2"):
        assert word in wide


def test_list_shows_the_steps_and_that_refine_trains():
    lines = method_table(180).splitlines()
    assert {"align", "repair", "refine"} <= {line.split()[0] for line in lines if line.strip()}
    text = " ".join(" ".join(lines).split())
    assert "FIT all parameters" in text
    assert "merge.refine=none|mean|router|auto" in text
    assert "merge.align.by=none|weights|activations" in text


@pytest.mark.parametrize("width", [120, 180])
def test_list_fits_its_width(width):
    lines = method_table(width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "Options: merge.options.NAME=VALUE" in text


def test_an_interrupted_merge_is_one_line_and_leaves_nothing(options, folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    words = ["merge", "suite=seeds", "merge=slerp", "merge.align.by=weights", *options]
    with monkeypatch.context() as patched:
        patched.setattr("cki_rec.pipelines.merge.merge_counts", interrupt)
        assert main(words) == 130
    assert "interrupted; finished runs are kept" in one_line(capsys)
    assert not list(folder.rglob("*.tmp*"))
    assert main(words) == 0
