"""``cki-rec assess`` through the command line: table, files, record, and refusals in one line."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from regions import TINY as OF_REGIONS
from regions import train_regions

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.engine import checkpoint_io
from cki_rec.merging.assessment import assess

TINY = [
    *("runtime.threads=1", "train.epochs=1", "train.batch_size=256", "model.hidden=[8,4]"),
    "model.embedding_dim=8",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def options(home, raw_zip):
    places = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw_zip}", *places, *TINY]


@pytest.fixture
def run(home, options, capsys):
    """Function (*words) -> exit code, new run directories by pipeline, output, error."""

    def call(*words):
        capsys.readouterr()
        before = set((home / "out").glob("*-*"))
        code = main(["assess", *options, *words])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert shown.err.count("\n") == (code == 2)
        made = sorted(set((home / "out").glob("*-*")) - before)
        return code, [path for path in made if path.name.startswith("assess-")], *shown

    return call


def record_of(path):
    return json.loads((path / "record.json").read_text())


def test_two_seeds_are_compared_once(run, home):
    code, (made,), out, _ = run("suite=seeds", "assess.barrier=3")
    assert code == 0
    assert len(list((home / "out").glob("train-*"))) == 2  # missing sources are trained
    assert not list((home / "out").glob("merge-*"))
    result = record_of(made)["result"]
    assert "mlp.layers.0.weight" in out
    assert result["suggestion"].split()[0] in out
    assert f"assessment: {made}" in out
    with (made / "assess.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in result["rows"]]
    by_name = {row["name"]: row for row in table}
    item = next(row for name, row in by_name.items() if name.endswith("bags.item.weight"))
    assert item["kind"] == "table"
    assert int(item["rows_all"]) > 0
    assert float(item["aligned_cosine"]) > float(item["cosine"])
    assert by_name["mlp.layers.0.weight"]["rows"] == ""
    assert (made / "assess.svg").read_text().count("<svg") == 1
    before = (made / "record.json").stat().st_mtime_ns
    code, again, repeated, _ = run("suite=seeds", "assess.barrier=3")
    assert (code, again) == (0, [])
    assert (made / "record.json").stat().st_mtime_ns == before
    start = out.index("parameter")
    assert repeated == out[start:]
    # it equals the library on the same checkpoints
    paths = sorted((home / "out").glob("train-*"))
    seeds = {record_of(path)["config"]["seed"]: path for path in paths}
    models = [checkpoint.load(seeds[seed] / "checkpoint").params for seed in (1, 1001)]
    rows = {row["name"]: row for row in assess(models).rows}
    for row in result["rows"]:
        assert row["cosine"] == pytest.approx(rows[row["name"]]["cosine"])
        assert row["entropy"] is None or len(row["entropy"]) == 2
    # the ends of the line are the sources
    values = [p["value"] for p in result["barrier"]["points"] if p["basis"] == "raw"]
    scores = [record_of(seeds[seed])["result"]["valid_auc"] for seed in (1, 1001)]
    assert [values[0], values[2]] == pytest.approx(scores, abs=1e-6)
    assert result["barrier"]["measure"] == "score"


def test_without_a_barrier_no_rows_are_read(run, home, tmp_path):
    paths = sorted((home / "out").glob("train-*"))[:2]
    if len(paths) < 2:
        assert run("suite=seeds")[0] == 0
        paths = sorted((home / "out").glob("train-*"))[:2]
    sources = f"merge.sources=[{{path: {paths[0]}}},{{path: {paths[1]}}}]"
    nowhere = ["data.raw=/nowhere", f"runtime.encoded={tmp_path / 'none'}"]
    code, (made,), _, _ = run(sources, *nowhere)
    assert code == 0
    assert not (tmp_path / "none").exists()
    record = record_of(made)
    assert record["result"]["barrier"] is None
    assert record["config"]["data"] is None
    code, (raw,), out, _ = run(sources, *nowhere, "assess.align=none")
    assert code == 0
    assert ">cos" not in out
    assert record_of(raw)["result"]["rows"][0]["aligned_cosine"] is None
    code, _, _, error = run(sources, *nowhere, "assess.barrier=3")
    assert code == 2
    assert "/nowhere" in error


def test_shards_with_a_base_and_activations(run):
    code, (made,), out, _ = run("suite=shards", "merge=ties", "assess.align=activations")
    assert code == 0
    record = record_of(made)
    rows = {row["name"]: row for row in record["result"]["rows"]}
    assert rows["mlp.layers.0.weight"]["task_cosine"] is not None
    assert 0 <= rows["mlp.layers.0.weight"]["conflicts"] <= 1
    user = next(row for name, row in rows.items() if name.endswith("bags.user.weight"))
    assert user["rows_all"] == 0  # disjoint users
    assert min(user["rows_one"]) > 10
    assert "base cos" in out or "cos" in out
    assert record["config"]["base"] is not None
    assert record["data"]["name"] == "movielens_small"


def test_three_models_and_a_model_without_symmetries(run):
    sources = "merge.sources=[{seed: 1},{seed: 2},{seed: 3}]"
    code, (made,), _, _ = run("model=lr", sources, "assess.barrier=3")
    assert code == 0
    result = record_of(made)["result"]
    assert len(result["rows"][0]["hard"]) == 3
    assert {p["line"] for p in result["barrier"]["points"]} == {"0-mean", "1-mean", "2-mean"}
    assert result["rows"][0]["aligned_cosine"] is None


def changed(folder, target, **changes):
    """Write a checkpoint with other fields; return its folder."""
    saved = dataclasses.replace(checkpoint.load(folder / "checkpoint"), **changes)
    groups = {"model": saved.params, "accumulator": saved.accumulators, "counts": saved.counts}
    checkpoint_io.save(target, groups, saved.model, saved.schema, saved.origin)
    return target


def test_refusals_are_one_line(run, home, tmp_path):
    assert run("suite=seeds")[0] == 0
    path = sorted((home / "out").glob("train-*"))[0]
    params = checkpoint.load(path / "checkpoint").params
    broken = params | {"mlp.layers.0.bias": params["mlp.layers.0.bias"] * float("nan")}
    nan = changed(path, tmp_path / "nan", params=broken)
    for words, part in (
        (["merge.sources=[{seed: 1}]"], "assess compares two or more models"),
        (["assess.barrier=2"], "assess.barrier=2: must be 0 (none) or at least 3"),
        (["assess.align=wieghts"], "assess.align=wieghts: did you mean 'weights'?"),
        (["merge.sources=[{merge.tables: first},{seed: 1}]"], "merge.tables does not change"),
        (["merge=ties"], "merge.method=ties needs the model that all sources started from"),
        ([f"merge.sources=[{{path: {path}}},{{path: {nan}}}]"], "mlp.layers.0.bias of"),
        (
            ["merge.sources=[{seed: 1},{model.hidden: [8,6]}]"],
            "sources cannot be merged: architecture: model.hidden",
        ),
        (["merge.sources=[{path: /nowhere},{seed: 1}]"], "/nowhere"),
        (["merge.vocabularies=[null,null]", "assess.barrier=3"], "set assess.barrier=0"),
        (["merge.vocabularies=[null]"], "1 folders for 2 models"),
    ):
        code, made, _, error = run(*words)
        assert (code, made) == (2, []), words
        assert part in error, error


@pytest.mark.slow
def test_models_of_two_regions_are_joined_by_token(tmp_path, capsys):
    found = train_regions(tmp_path)
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    sources = ",".join(f"{{path: {path}}}" for path in found.values())
    words = [f"merge.sources=[{sources}]", *places, *OF_REGIONS]
    assert main(["assess", *words]) == 2
    assert "merge.vocabularies=[null,null]" in capsys.readouterr().err
    assert main(["assess", "merge.vocabularies=[null,null]", *words]) == 0
    (made,) = (tmp_path / "out").glob("assess-*")
    rows = {row["name"]: row for row in record_of(made)["result"]["rows"]}
    user = next(row for name, row in rows.items() if name.endswith("bags.user.weight"))
    assert user["rows"] == 62  # 60 users, padding, unseen
    assert user["rows_all"] == 20
    assert user["rows_one"] == [20, 20]
