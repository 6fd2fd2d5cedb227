"""Exported files: scores of every row of MODELS, contents, mistakes of users."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from samples import slow_but

from cki_rec.checkpoints import load
from cki_rec.cli import main
from cki_rec.config import Config, UserError, choices, parse
from cki_rec.data.encoding import store
from cki_rec.data.loader import Loader
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import Feature, FeatureSchema
from cki_rec.engine import checkpoint_io, export
from cki_rec.engine.export import FORMATS, example_inputs
from cki_rec.engine.servable import Servable, draw_batch, inputs_of
from cki_rec.files import file_digest
from cki_rec.models import MODELS, build_model, model_schema
from cki_rec.pipelines import export as pipeline
from cki_rec.pipelines import train
from cki_rec.pipelines.predictions import predictions
from cki_rec.pipelines.sources import Source

MIXED = FeatureSchema(
    features=(
        Feature("price", "", "numeric"),
        Feature("user", "user", "categorical"),
        Feature("item", "item", "categorical"),
        Feature("genres", "genres", "multi"),
        Feature("history", "item", "history"),
        Feature("hour", "hour", "categorical"),
        Feature("age", "", "numeric"),
    ),
    table_sizes={"user": 12, "item": 15, "genres": 6, "hour": 5},
    vocabulary_hashes={name: f"hash of {name}" for name in ("user", "item", "genres", "hour")},
)
SMALL = (
    *("histories=true", "hidden=[8]", "streams.hidden=[8]", "streams.gate_hidden=[4]"),
    *("attention.length=3", "attention.hidden=[4]", "cross.layers=2"),
)
has_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in FORMATS["onnx"].packages),
    reason="pip install onnx onnxscript onnxruntime",
)


@pytest.fixture(scope="module")
def options(compose):
    """Function (name, **changes) -> the model section of the real conf/, made small."""

    @cache
    def composed(name):
        return parse(compose(f"model={name}", *(f"model.{word}" for word in SMALL))).model

    def make(name="deepfm", embedding_dim=6, **changes):
        return dataclasses.replace(composed(name), embedding_dim=embedding_dim, **changes)

    return make


def build(model, schema=MIXED, seed=0):
    """Return a network in eval mode, every weight and statistic of it drawn."""
    network = build_model(schema, model, torch.device("cpu")).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=draw)
                value.copy_(drawn.abs() + 0.5 if "var" in name else 0.3 * drawn)
    return network


def batches(schema=MIXED, longest=7):
    draw = torch.Generator().manual_seed(1)
    return [draw_batch(schema, *size, draw) for size in ((64, longest), (2, 1), (1, 3), (4, 0))]


@torch.no_grad()
def assert_equal_scores(network, schema, scores):
    for batch in batches(schema):
        actual = scores(inputs_of(batch, schema))
        torch.testing.assert_close(actual, network(batch), rtol=1e-5, atol=1e-5)


def round_trip(network, schema, name, folder):
    path = folder / f"model.{name}"
    FORMATS[name].write(Servable(network, schema), example_inputs(schema), path)
    return FORMATS[name].read(path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("embedding_dim", [4, 6])
def test_servable_equals_the_network(options, name, embedding_dim):
    network = build(options(name, embedding_dim))
    servable = Servable(network, MIXED)
    assert_equal_scores(network, MIXED, lambda inputs: servable(inputs)["logit"])
    actual = servable(example_inputs(MIXED))
    assert list(actual) == ["logit", "probability"]
    assert actual["probability"].equal(actual["logit"].sigmoid())


@pytest.mark.parametrize("name", slow_but(["deepfm", "dcn", "din", "final_mlp"], MODELS))
def test_pt2_equals_the_network(options, tmp_path, caplog, name):
    network = build(options(name))
    assert_equal_scores(network, MIXED, round_trip(network, MIXED, "pt2", tmp_path))
    assert "archive" not in caplog.text


@has_onnx
@pytest.mark.parametrize("name", slow_but(["deepfm"], MODELS))
def test_onnx_equals_the_network(options, tmp_path, name):
    network = build(options(name))
    assert_equal_scores(network, MIXED, round_trip(network, MIXED, "onnx", tmp_path))


@pytest.mark.parametrize("kinds", [["categorical"], ["numeric"], ["multi", "history"]])
def test_schemas_of_few_kinds(options, kinds):
    schema = dataclasses.replace(
        MIXED, features=tuple(f for f in MIXED.features if f.kind in kinds)
    )
    network = build(options(), schema)
    servable = Servable(network, schema)
    assert_equal_scores(network, schema, lambda inputs: servable(inputs)["logit"])


@pytest.mark.parametrize("name", MODELS)
def test_models_without_histories(options, name):
    model = options(name, histories=False)
    try:
        network = build(model)
    except UserError:
        return  # it is a model of histories
    schema = model_schema(MIXED, model)
    servable = Servable(network, schema)
    assert "ids.history" not in example_inputs(schema)
    assert_equal_scores(network, schema, lambda inputs: servable(inputs)["logit"])


@pytest.mark.parametrize("name", MODELS)
def test_padding_lies_anywhere(options, name):
    servable = Servable(build(options(name)), MIXED)
    inputs = inputs_of(batches()[0], MIXED)
    expected = servable(inputs)
    for field in ("ids.genres", "ids.history"):
        ids = inputs[field]
        left, spread = torch.zeros_like(ids), torch.zeros(len(ids), 2 * ids.shape[1]).long()
        spread[:, 1::2] = ids
        for row, of_row in zip(left, ids, strict=True):
            real = of_row[of_row != 0]
            row[len(row) - len(real) :] = real
        for moved in (left, spread):
            actual = servable({**inputs, field: moved})
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_network_stays_as_it_is_and_nothing_is_held_twice(options, name):
    network = build(options(name))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    servable = Servable(network, MIXED)
    network(batches()[0]).sum().backward()  # it trains on, with its lookups
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())
    own = {value.data_ptr() for value in network.state_dict().values()}
    assert not own & {value.data_ptr() for value in servable.state_dict().values()}
    assert not any(parameter.requires_grad for parameter in servable.parameters())
    assert not [key for key in servable.state_dict() if "sparse" in key]
    for table in servable.tables:
        assert table.shape[1] in (6, 1)
        assert not table[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=has_onnx)])
def test_names_of_fields_do_not_clash(options, tmp_path, name):
    renamed = {"user": "ids", "item": "tables.0", "genres": "numbers", "history": "cat"}
    schema = dataclasses.replace(
        MIXED,
        features=tuple(
            dataclasses.replace(f, name=renamed.get(f.name, f.name)) for f in MIXED.features
        ),
    )
    assert list(example_inputs(schema)) == ["ids", "ids.numbers", "ids.cat", "numbers"]
    network = build(options(), schema)
    assert_equal_scores(network, schema, round_trip(network, schema, name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=has_onnx)])
def test_files_are_read_without_our_code(options, tmp_path, name):
    network = build(options("din"))
    round_trip(network, MIXED, name, tmp_path)
    inputs = inputs_of(batches()[0], MIXED)
    torch.save(inputs, tmp_path / "inputs")
    load = {
        "pt2": "actual = torch.export.load('model.pt2').module()(inputs)['logit']",
        "onnx": "actual = torch.tensor(__import__('onnxruntime').InferenceSession('model.onnx')"
        ".run(None, {k: v.numpy() for k, v in inputs.items()})[0])",
    }
    code = (
        f"import torch, sys; inputs = torch.load('inputs'); {load[name]};"
        "torch.save(actual, 'actual'); print('cki_rec' in sys.modules, 'torchrec' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
    expected = network(batches()[0]).detach()
    torch.testing.assert_close(torch.load(tmp_path / "actual"), expected, rtol=1e-5, atol=1e-5)


@has_onnx
@pytest.mark.slow
def test_large_weights_lie_beside_an_onnx_file(options, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_ONNX", 0)
    network = build(options())
    assert_equal_scores(network, MIXED, round_trip(network, MIXED, "onnx", tmp_path))
    assert (tmp_path / "model.onnx.data").exists()


def test_the_description_names_attended_histories(options):
    for name, of_history in (("din", {"attends_to_latest": 3}), ("deepfm", {})):
        model = options(name)
        (history,) = [
            field
            for field in pipeline.describe_servable(Servable(build(model), MIXED), model)["fields"]
            if field["name"] == "history"
        ]
        kind = {"name": "history", "table": "item", "kind": "history", "input": "ids.history"}
        assert history == {**kind, **of_history}


def test_formats_are_those_of_the_configuration():
    assert choices(Config, "format") == (*FORMATS, "delta")


@pytest.fixture
def trained(options, tmp_path):
    """Return a run directory as a training leaves it."""
    folder, model = tmp_path / "out" / "train-1", options()
    tensors = {"model": build(model).state_dict(), "accumulator": {}, "counts": {}}
    checkpoint_io.save(folder / "checkpoint", tensors, model, MIXED, Provenance("data hash"))
    record = {"run_id": "train-1", "config": {}, "data": {}, "result": {}, "provenance": {}}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    """Function (*words) -> exit code, standard output, standard error of ``cki-rec export``."""

    def run(*words):
        places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "encoded")]
        code = main(["export", *words, *places, "runtime.threads=1"])
        out, error = capsys.readouterr()
        assert len(error.splitlines()) == (code == 2), error
        return code, out, error

    return run


@pytest.fixture
def quick(monkeypatch):
    """Let ``format=pt2`` keep the network in memory, to test the code around it."""
    kept = {}

    def write(servable, example, path):
        path.write_bytes(b"a file")
        kept["servable"] = servable

    def read(path):
        assert path.read_bytes() == b"a file"
        return lambda inputs: kept["servable"](inputs)["logit"]

    monkeypatch.setitem(FORMATS, "pt2", export.Format(write, read))


def files(folder):
    return sorted(path.name for path in (folder / "export").glob("*"))


def test_a_run_is_named_by_id_by_folder_or_by_checkpoint(command, trained, quick, tmp_path):
    (tmp_path / "encoded" / "mine-1").mkdir(parents=True)
    (tmp_path / "encoded" / "mine-1" / "manifest.json").write_text('{"hash": "data hash"}')
    code, out, _ = command("run=train-1")
    assert code == 0
    assert f"model: {trained}/export/model.pt2\n" in out
    assert "largest difference from the model's own scores: " in out
    assert files(trained) == ["model.pt2", "model.pt2.json"]
    about = json.loads((trained / "export" / "model.pt2.json").read_text())
    assert about["files"] == {"model.pt2": file_digest(trained / "export" / "model.pt2")}
    assert about["source"] == {
        "run_id": "train-1",
        "checkpoint_sha256": file_digest(trained / "checkpoint" / "checkpoint.json"),
        "data_hash": "data hash",
        "data_set": "mine-1",
    }
    assert about["largest_difference"] <= 1e-5
    shapes = {entry["name"]: (entry["shape"], entry["fields"]) for entry in about["inputs"]}
    assert shapes == {
        "ids": (["rows", 3], ["user", "item", "hour"]),
        "ids.genres": (["rows", "length_of_ids.genres"], ["genres"]),
        "ids.history": (["rows", "length_of_ids.history"], ["history"]),
        "numbers": (["rows", 2], ["price", "age"]),
    }
    assert about["tables"]["user"] == {"rows": 12, "vocabulary_hash": "hash of user"}
    assert (about["padding_id"], about["unseen_id"], about["first_id"]) == (0, 1, 2)
    for name in (trained, trained / "checkpoint"):
        before = (trained / "export" / "model.pt2").stat().st_ino
        assert command(f"run={name}")[0] == 0  # replaces the file
        assert (trained / "export" / "model.pt2").stat().st_ino != before
    elsewhere = tmp_path / "mine"
    (trained / "checkpoint").rename(elsewhere)
    assert command(f"run={elsewhere}")[0] == 0
    assert files(elsewhere) == ["model.pt2", "model.pt2.json"]


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_scores_that_differ_leave_the_previous_file(command, trained, quick, monkeypatch, wrong):
    assert command("run=train-1")[0] == 0
    before = (trained / "export" / "model.pt2").stat().st_ino
    read = FORMATS["pt2"].read
    other = dataclasses.replace(
        FORMATS["pt2"], read=lambda path: lambda inputs: read(path)(inputs) + wrong
    )
    monkeypatch.setitem(FORMATS, "pt2", other)
    code, _, error = command("run=train-1")
    assert (code, "exported scores differ from the model's own by" in error) == (2, True)
    assert files(trained) == ["model.pt2", "model.pt2.json"]
    assert (trained / "export" / "model.pt2").stat().st_ino == before


def test_a_full_disk_is_one_line_and_leaves_nothing(command, trained, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    forgiving = export._Forgiving
    monkeypatch.setattr(export, "_Forgiving", lambda file: forgiving(Full()))
    code, _, error = command("run=train-1")
    assert code == 2
    assert error.startswith(f"cki-rec: cannot write {trained}/export/model.pt2: No space left")
    assert files(trained) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "run=null: name a model, e.g. cki-rec export run=train-1"),
        (["run=trian-1"], "run=trian-1: did you mean 'train-1'? no such folder"),
        (["run=/nowhere"], "run=/nowhere: no such folder, and no such run in"),
        (["run=train-1", "format=onxx"], "format=onxx: did you mean 'onnx'? one of pt2, onnx"),
    ],
)
def test_mistakes_are_one_line(command, trained, words, part):
    code, _, error = command(*words)
    assert code == 2
    assert part in error
    assert files(trained) == []


def test_models_that_are_not_there_or_not_whole(command, trained, tmp_path):
    record, description = trained / "record.json", trained / "checkpoint" / "checkpoint.json"
    (tmp_path / "out" / "empty").mkdir()
    assert "run=empty: no run and no checkpoint in" in command("run=empty")[2]
    text = record.read_text()
    record.unlink()
    assert "run=train-1: unfinished, record.json is missing" in command("run=train-1")[2]
    record.write_text(text)
    tensors = next((trained / "checkpoint" / "tensors").glob("*.distcp"))
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    assert "damaged checkpoint, the file has changed" in command("run=train-1")[2]
    tensors.write_bytes(content)
    about = json.loads(description.read_text())
    about["model"]["hidden"] = [8, 8]
    description.write_text(json.dumps(about))
    assert "its tensors do not fit its network" in command("run=train-1")[2]
    search = {**json.loads(text), "run_id": "merge-1", "result": {"chosen": ["train-1"]}}
    (tmp_path / "out" / "merge-1").mkdir()
    (tmp_path / "out" / "merge-1" / "record.json").write_text(json.dumps(search))
    code, _, error = command("run=merge-1")
    assert (code, "made no model; its result is another run: run=train-1" in error) == (2, True)
    assert files(trained) == []


def test_missing_packages_are_named(command, trained, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = command("run=train-1", "format=onnx")
    assert (code, error.endswith("pip install onnx onnxscript onnxruntime\n")) == (2, True)


def test_of_several_processes_the_first_exports(command, trained, quick, monkeypatch):
    for rank, count in (("1", 0), ("0", 2)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert (command("run=train-1")[0], len(files(trained))) == (0, count)


def test_rows_of_the_data_set_score_as_in_the_evaluation(run_config, tmp_path):
    words = ["model=din", "train.epochs=1", "model.embedding_dim=6", "model.attention.length=3"]
    config = run_config(tmp_path, *words)
    done = train.ensure(config)
    pipeline.run(dataclasses.replace(config, run=done.path.name, format="pt2"))
    dataset = store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
    own = predictions(config, dataset, Source("model", done.path.name, done.checkpoint))["test"]
    schema = load(done.checkpoint).schema
    scores = FORMATS["pt2"].read(done.path / "export" / "model.pt2")
    batches = Loader(dataset, schema, dataset.rows("test"), 99)
    exported = torch.cat([scores(inputs_of(batch, schema)) for batch in batches])
    torch.testing.assert_close(exported, torch.from_numpy(own), rtol=1e-5, atol=1e-6)
