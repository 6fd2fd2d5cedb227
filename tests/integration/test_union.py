"""Models of two regions are merged, measured and trained on, on rows with the tokens of both."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
from regions import SAID, TINY, call, logits_of, opened, record_of, train_regions, write_region
from samples import make_data

from cki_rec import notebook
from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.encoder import Encoder, as_frame
from cki_rec.data.encoding.frames import raw_rows as rows_of
from cki_rec.data.schema import OOV_ID
from cki_rec.data.test_labels import all_labels
from cki_rec.engine import evaluator
from cki_rec.evaluation.metrics import auc, log_loss


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """Where everything is, the models of two regions by name, and their data sets."""
    home = tmp_path_factory.mktemp("union")
    found = train_regions(home)
    lists = [opened(home / "encoded", name).folder for name in found]
    return home, found, f"data.vocabularies=[{','.join(map(str, lists))}]"


@pytest.mark.parametrize("region", ["north", "south"])
def test_figures_on_rows_of_each_region_follow_from_scores(regions, tmp_path, region):
    home, found, union = regions
    words = [union, SAID, "merge=average"]
    assert call(regions, tmp_path, "evaluate", *words, region=region) == 0
    record, dataset = (
        record_of(tmp_path, "evaluate"),
        opened(home / "encoded", f"both_{region}"),
    )
    label = all_labels(dataset)[dataset.rows("test")]
    own = logits_of(tmp_path, record["config"]["members"][0], dataset)["test"].astype(np.float64)
    result = record["result"]
    assert result["test"]["auc"] == pytest.approx(auc(label, own), abs=1e-12)
    assert result["test"]["log_loss"] == pytest.approx(log_loss(label, own), abs=1e-12)
    assert result["inference_cost"] == 1
    assert record["config"]["evaluate"]["disjoint_files"] is True
    scores = [logits_of(tmp_path, identity, dataset) for identity in record["config"]["sources"]]
    mean = np.stack([score["test"] for score in scores]).mean(0, dtype=np.float64)
    difference = result["difference"]["output_ensemble"]["auc"]["estimate"]
    assert difference == pytest.approx(auc(label, own) - auc(label, mean), abs=1e-12)
    place = list(found).index(region)
    assert call_alone(regions, tmp_path / "alone", region) == 0
    alone = record_of(tmp_path / "alone", "evaluate")
    plain = opened(home / "encoded", region)
    assert plain.source_rows == dataset.source_rows
    own_encoding = logits_of(tmp_path / "alone", alone["config"]["sources"][0], plain)
    for split, logits in own_encoding.items():
        np.testing.assert_allclose(scores[place][split], logits, rtol=0, atol=1e-6)


def test_token_lists_may_lie_anywhere(regions, tmp_path):
    """They are read where ``data.vocabularies`` says, not only beside the encoded rows."""
    elsewhere = f"runtime.encoded={tmp_path / 'encoded'}"
    words = [regions[2], SAID, "merge=evidence", elsewhere]
    assert call(regions, tmp_path, "evaluate", *words) == 0
    (made,) = (tmp_path / "encoded").glob("*-[0-9a-f]*")
    assert made.name.startswith("both_north")


def call_alone(regions, out, region):
    """Evaluate the model of a region on its own data set."""
    home, found, _ = regions
    one = f"suite.sources=[{{path: {found[region]}}}]"
    places = [f"runtime.{key}={out / key}" for key in ("out", "reports")]
    words = [f"data.raw={home / region}.zip", f"data.name={region}", "evaluate.bootstrap=100"]
    words += [f"runtime.encoded={home / 'encoded'}", *places, *TINY, "merge=best_source"]
    return main(["evaluate", one, *words])


@pytest.mark.parametrize("method", ["output_ensemble", "best_source", "ties", "cki_gate"])
def test_other_methods_run_on_the_union(regions, tmp_path, method):
    words = [regions[2], SAID, f"merge={method}"]
    if method == "ties":
        start = f"merge.base={{path: {regions[1]['north']}}}"
        words += [start, "merge.vocabularies=[null,null,null]"]
    assert call(regions, tmp_path, "evaluate", *words) == 0
    assert record_of(tmp_path, "evaluate")["result"]["test"]["auc"] > 0.5


@pytest.mark.slow
def test_the_best_way_is_chosen_on_rows_of_the_union(regions, tmp_path):
    ways = "merge.recipes=[{align.by: activations},{repair: project},{recalibrate: true}]"
    words = [regions[2], SAID, "merge=auto", ways, "merge.sample=600"]
    assert call(regions, tmp_path, "merge", *words, "check_only=true") == 0
    assert call(regions, tmp_path, "evaluate", *words) == 0
    assert record_of(tmp_path, "evaluate")["result"]["inference_cost"] == 1


@pytest.mark.parametrize("rows", ["training", "random"])
def test_a_merged_model_is_refined_on_rows_of_the_union(regions, tmp_path, rows):
    """Sources are moved to the joined vocabularies, and so are their counts, which route."""
    words = [regions[2], SAID, "merge=evidence", "merge.refine=router", f"merge.rows={rows}"]
    words += ["merge.refinement.routed_steps=8", "merge.refinement.batch_size=256"]
    assert call(regions, tmp_path, "evaluate", *words) == 0
    fitted = record_of(tmp_path, "refine")
    assert fitted["provenance"]["teacher"]["field"] in ("user", "item")
    history = fitted["result"]["history"]
    assert history[-1]["epoch"] >= 1
    assert history[1]["train_loss"] < 10


def test_a_merged_model_is_trained_on(regions, tmp_path, capsys):
    _, found, union = regions
    words = [union, "merge=evidence", "finetune=one_epoch"]
    assert call(regions, tmp_path, "finetune", *words) == 0
    (run,) = (tmp_path / "out").glob("finetune-*")
    tuned = checkpoint.describe(run / "checkpoint")
    seen = [checkpoint.describe(f / "checkpoint").origin.rows[0] for f in found.values()]
    assert tuned.origin.rows == tuple(seen)
    assert tuned.origin.data_hash == "several"
    (merged,) = (tmp_path / "out").glob("merge-*")
    hashes = checkpoint.describe(merged / "checkpoint").schema.vocabulary_hashes
    assert tuned.schema.vocabulary_hashes == hashes
    assert call(regions, tmp_path, "evaluate", *words) == 2
    assert SAID in capsys.readouterr().err
    assert call(regions, tmp_path, "evaluate", *words, SAID) == 0


def test_tokens_of_new_rows_join_when_a_model_is_trained_on(regions, tmp_path):
    """The model of one region goes on to the other, whose users it does not know."""
    _, found, union = regions
    words = [union, "merge=best_source", "finetune=one_epoch", "merge.vocabularies=[]"]
    words += ["finetune.table_learning_rate=0", "finetune.learning_rate=0"]
    alone = {"region": "south", "models": [found["north"]]}
    assert call(regions, tmp_path, "finetune", *words, **alone) == 0
    (run,) = (tmp_path / "out").glob("finetune-*")
    assert not (run / "start").exists()
    tuned, own = (checkpoint.load(path / "checkpoint") for path in (run, found["north"]))
    for name, tensor in own.params.items():
        assert tensor.equal(tuned.params[name][: len(tensor)]), name
        for row in tuned.params[name][len(tensor) :]:
            assert row.equal(tensor[OOV_ID])


def test_a_merged_run_gives_the_same_data_set_as_its_sources(regions, tmp_path):
    home, _, union = regions
    assert call(regions, tmp_path, "merge", "merge=evidence") == 0
    (merged,) = (tmp_path / "out").glob("merge-*")
    for lists in (union, f"data.vocabularies=[{merged}]"):
        assert call(regions, tmp_path, "prepare", lists, name="same") == 0
    dataset = opened(home / "encoded", "same_north")
    own = checkpoint.describe(merged / "checkpoint").schema
    assert dataset.schema.vocabulary_hashes == own.vocabulary_hashes
    for table, digest in own.vocabulary_hashes.items():
        assert tokens.hash_of(dataset.vocabulary(table)) == digest


def test_the_same_rows_encoded_twice_need_no_word(regions, tmp_path):
    """Other minimum counts: the sources differ in vocabularies, and in no row."""
    home, found, _ = regions
    more = ["data.min_count=9", f"runtime.out={home / 'out'}", "runtime.threads=1"]
    assert call(regions, tmp_path, "train", *more, name="rare") == 0
    new = set((home / "out").glob("train-*")) - set(found.values())
    models = [found["north"], *new]
    lists = [opened(home / "encoded", name).folder for name in ("north", "rare_north")]
    union = f"data.vocabularies=[{lists[0]},{lists[1]}]"
    words = [union, "merge=average"]
    assert call(regions, tmp_path, "evaluate", *words, models=models, name="two") == 0
    assert "disjoint_files" not in record_of(tmp_path, "evaluate")["config"]["evaluate"]


def refused(regions, tmp_path, capsys, *words, **others):
    capsys.readouterr()
    assert call(regions, tmp_path, "evaluate", "merge=evidence", *words, **others) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert not list((tmp_path / "out").glob("evaluate-*"))
    return shown


def test_what_may_leak_or_does_not_fit_is_refused_in_one_line(regions, tmp_path, capsys):
    def error(*words, **others):
        return refused(regions, tmp_path, capsys, *words, **others)

    home, found, union = regions
    assert SAID in error(union, "finetune=one_epoch")
    one = f"suite.sources=[{{path: {found['north']}}}]"
    named = ",".join(f"{{path: {path}}}" for path in found.values())
    ways = [one, f"merge.sources=[{named}]"]
    assert SAID in error(union, *ways, "finetune=one_epoch")
    assert not (tmp_path / "out").exists()  # said before anything is merged
    leak = error(union, SAID, "data.split.seed=1")
    assert "same raw files were split otherwise" in leak
    assert "same raw files were split otherwise" in error(union, SAID, "data.split.by=time")
    north = opened(home / "encoded", "north").folder
    lacking = error(f"data.vocabularies=[{north}]", SAID)
    assert "does not list" in lacking
    assert "data.vocabularies=[FOLDER,...]" in lacking
    assert "does not list" in error(SAID, name="north_alone")
    assert "missing, but a field has the table" in error("data.vocabularies=[/nowhere]", SAID)
    assert "reads rows" in error(SAID, "merge.recalibrate=true")
    own = error(f"data.vocabularies=[{north}]", SAID, "merge.recalibrate=true")
    assert "has other tokens" in own


def test_rows_that_a_merge_looked_at_are_rows_it_has_seen(regions, tmp_path, capsys):
    home, found, _ = regions
    write_region(home / "west.zip", home / "whole.zip", range(10, 50))
    lists = [opened(home / "encoded", name).folder for name in found]
    union = f"data.vocabularies=[{lists[0]},{lists[1]}]"
    words = [union, "merge=average", "merge.recalibrate=true"]
    assert call(regions, tmp_path, "merge", *words, region="west") == 0
    (run,) = (tmp_path / "out").glob("merge-*")
    seen = checkpoint.describe(run / "checkpoint").origin.rows
    assert opened(home / "encoded", "both_west").source_rows in seen
    again = [union, SAID, "merge.vocabularies=[]", "data.split.seed=1"]
    shown = refused(regions, tmp_path, capsys, *again, region="west", models=[run])
    assert "split otherwise" in shown


def test_a_start_is_among_what_a_merge_has_seen(regions, tmp_path):
    home, _, union = regions
    other = train_regions(tmp_path, "data.split.seed=1")["north"]
    words = [union, "merge=task_arithmetic", "merge.options.scale=0.5"]
    lists = [opened(home / "encoded", "north").folder, opened(home / "encoded", "south").folder]
    start = f"merge.base={{path: {other}}}"
    home_of_start = opened(tmp_path / "encoded", "north").folder
    named = f"merge.vocabularies=[{lists[0]},{lists[1]},{home_of_start}]"
    assert call(regions, tmp_path / "m", "merge", *words, start, named) == 0
    (run,) = (tmp_path / "m" / "out").glob("merge-*")
    seen = checkpoint.describe(run / "checkpoint").origin.rows
    assert opened(tmp_path / "encoded", "north").source_rows in seen
    assert len(seen) == 3


def test_raw_rows_of_every_region_score_as_on_the_union(regions, tmp_path):
    """A model of joined vocabularies serves raw rows of a frame and of a file."""
    home, found, union = regions
    both = tmp_path / "rows"
    assert call(regions, tmp_path, "merge", "merge=evidence", "name=shop") == 0
    places = [f"runtime.out={tmp_path / 'out'}", f"runtime.encoded={home / 'encoded'}"]
    model = notebook.load_model("shop", *places)
    assert model.schema.table_sizes["user"] == 62
    for region in found:
        assert call(regions, tmp_path, "prepare", union, region=region, name="served") == 0
        dataset = opened(home / "encoded", f"served_{region}")
        every = np.arange(len(dataset))
        device = torch.device("cpu")
        logits = evaluator.predict(model.network, dataset, model.schema, every, device)
        raw = rows_of(make_data("movielens_small", raw=str(home / f"{region}.zip")))
        scores = notebook.predict(model, raw, logits=True)
        np.testing.assert_allclose(scores, logits, rtol=0, atol=1e-5)
    raw = raw.drop("@time") if "timestamp" in raw.columns else raw
    both.mkdir()
    raw.drop([n for n in raw.columns if n.startswith("@")]).write_csv(both / "rows.csv")
    output = f"output={both / 'scores.csv'}"
    words = ["predict", "run=shop", f"input={both / 'rows.csv'}", output, *places]
    assert main(words) == 0
    served = pl.read_csv(both / "scores.csv")["score"].to_numpy()
    np.testing.assert_allclose(served, 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_export_of_joined_vocabularies_encodes_as_the_model(regions, tmp_path):
    home, _, _ = regions
    assert call(regions, tmp_path, "merge", "merge=evidence", "name=shop") == 0
    places = [f"runtime.out={tmp_path / 'out'}", f"runtime.encoded={home / 'encoded'}"]
    model = notebook.load_model("shop", *places)
    assert main(["export", "run=shop", *places]) == 0
    (exported,) = (tmp_path / "out").glob("merge-*/export")
    examples = json.loads((exported / "examples.json").read_text())
    rows = as_frame(examples["rows"])
    assert Encoder.load(exported).encode(rows).equals(model.encoder.encode(rows))
    scores = notebook.predict(model, rows)
    np.testing.assert_allclose(scores, examples["scores"], rtol=0, atol=1e-6)


def test_a_model_whose_data_sets_are_elsewhere_is_named(regions, tmp_path, capsys):
    assert call(regions, tmp_path, "merge", "merge=average", "name=shop") == 0
    place = f"runtime.out={tmp_path / 'out'}"
    words = ["predict", "run=shop", "input=a.csv", "output=b.csv", place]
    assert main([*words, f"runtime.encoded={tmp_path}"]) == 2
    assert "shop: 2 of its data sets are not encoded in" in capsys.readouterr().err
