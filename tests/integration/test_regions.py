"""Three regional csv files become one served model, as docs/how_to/regions.md describes it."""

from __future__ import annotations

import random
from html import unescape

import numpy as np
import polars as pl
import pytest
from test_readme import SMALL, blocks

from cki_rec import notebook, project_root
from cki_rec.cli import main
from cki_rec.data.encoding.frames import raw_rows
from cki_rec.data.test_labels import all_labels
from cki_rec.engine.sweeps import sweep_runs
from cki_rec.evaluation.metrics import auc

PAGE = project_root() / "docs" / "how_to" / "regions.md"
SIZES = {"north": 900, "south": 600, "west": 500}


def write_clicks(path, rows, items, seed):
    """Write clicks that depend on users and products."""
    draw = random.Random(seed)
    lines = ["clicked,user_id,product,price"]
    for _ in range(rows):
        user, item = draw.randrange(30), draw.choice(items)
        chance = 0.2 + 0.3 * (item % 3 == 0) + 0.3 * (user % 2)
        cells = (
            f"{seed % 2}u{user},p{item},{draw.random() * 90:.2f}"  # regions 0 and 2 share users
        )
        lines.append(f"{draw.random() < chance:d},{cells}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folder in which all commands of the page have run, and their last options."""
    home = tmp_path_factory.mktemp("regions")
    for seed, (name, rows) in enumerate({**SIZES, "new": 40}.items()):
        write_clicks(home / f"{name}.csv", rows, range(4 * seed, 24), seed)
    options = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    options += [word for word in SMALL if not word.startswith("train.epochs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for info, lines in blocks(PAGE.read_text()):
            if info == "yaml":
                (home / "conf" / "data").mkdir(parents=True)
                (home / "conf" / "data" / "shop.yaml").write_text("\n".join(lines))
            for line in lines if info == "bash" else ():
                assert main([*line.split()[1:], *options, "train.epochs=2"]) == 0
        yield home, options


def records(home, name):
    """Return the records of an evaluation by method."""
    runs, _ = sweep_runs(home / "out", name)
    return {run.record["result"]["method"]: run.record["result"] for run in runs}


@pytest.mark.slow
def test_every_source_is_measured_on_every_region(served):
    home, options = served
    words = ["data=shop", "data.raw=[north.csv,south.csv,west.csv]", "data.partition.by=file"]
    words += [f"data.vocabularies=[{home}/out/names/shop]", "data.partition.parts=3"]
    config = notebook.compose(*words, *options)
    dataset = notebook.store.prepared(config)
    parts, rows = dataset.parts(config.data.partition), dataset.rows("test")
    assert np.bincount(parts.part).tolist() == list(SIZES.values())
    raw, label = raw_rows(config.data), all_labels(dataset)
    found = records(home, "regions")
    assert list(found) == ["best_source", "output_ensemble", "evidence"]
    measured = {source["name"]: source for source in found["evidence"]["of_sources"]}
    assert list(measured) == found["evidence"]["sources"] == list(SIZES)
    for name in (*SIZES, "shop"):
        model = notebook.load_model(name, *options)
        scores = notebook.predict(model, raw, logits=True)
        for place, region in enumerate(SIZES):
            own = rows[parts.part[rows] == place]
            expected = auc(label[own], scores[own])
            if name == "shop":
                value = found["evidence"]["test"]["domains"][region]["auc"]
            else:
                value = measured[name]["domains"][region]
            assert value == pytest.approx(expected, abs=2e-3), (name, region)  # ties of float32


@pytest.mark.slow
def test_the_report_names_sources_and_regions(served):
    home, _ = served
    table = (home / "reports" / "regions" / "table.md").read_text()
    assert "\n## 3 models: north, south, west\n" in table
    assert "own_sources" not in table.partition("<details>")[0]
    assert "\n| model | all rows | north | south | west |\n" in table
    page = unescape((home / "reports" / "regions" / "report.html").read_text())
    assert "<h2>3 models: north, south, west</h2>" in page
    for row in ("source north", "source south", "source west", "best source"):
        assert f"\n| {row} | " in table
        assert row in page
    together = (home / "reports" / "together" / "table.md").read_text()
    assert "\n## regions\n" in together
    assert "recovered" in together
    assert "\n| source west | " in together


@pytest.mark.slow
def test_new_rows_get_the_scores_of_the_merged_model(served):
    home, options = served
    model = notebook.load_model("shop", *options)
    frame = pl.read_csv(home / "new.csv", infer_schema_length=0)
    scores = pl.read_csv(home / "scores.csv")["score"].to_numpy()
    np.testing.assert_allclose(scores, notebook.predict(model, frame), rtol=0, atol=1e-6)
    (exported,) = (home / "out").glob("merge-*/export")
    assert {"model.pt2", "encoder.py", "vocabulary.user_id.parquet"} <= {
        path.name for path in exported.iterdir()
    }


@pytest.mark.slow
def test_regions_that_overlap_are_routed_and_are_not_disjoint(served):
    home, options = served
    parts = "[{name: ns,values: [north,south]},{name: sw,values: [south,west]}]"
    words = ["data=shop", "data.raw=[north.csv,south.csv,west.csv]", "suite=regions"]
    words += ["data.partition.by=file", f"data.partition.parts={parts}", "train.epochs=1"]
    sweep = [*words, "merge=oracle_router,evidence,joint", "name=overlap"]
    assert main(["evaluate", "-m", *sweep, *options]) == 0
    runs, _ = sweep_runs(home / "out", "overlap")
    assert not any("disjoint" in run.record["config"] for run in runs)
    for run in runs:
        domains = run.record["result"]["test"]["domains"]
        assert set(domains) == {"ns", "sw", "ns & sw"}
        assert sum(d["rows"] for d in domains.values()) == run.record["result"]["test"]["rows"]
    router, names = runs[0].record["result"], ["ns", "sw"]
    alone = {source["name"]: source["domains"] for source in router["of_sources"]}
    for name in names:
        assert router["test"]["domains"][name]["auc"] == pytest.approx(alone[name][name])
    assert router["test"]["domains"]["ns & sw"]["auc"] == pytest.approx(alone["ns"]["ns & sw"])
