"""An export serves without cki_rec: raw rows to scores in a fresh process, int8 with its error."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from mixed import train_mixed

from cki_rec import notebook
from cki_rec.cli import main
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding.encoder import Encoder, as_frame

SCRIPT = """
import json, sys, torch
from encoder import Encoder
encoder = Encoder.load(".")
model = torch.export.load("model.pt2").module()
def scores(rows):
    inputs = {name: torch.tensor(v) for name, v in encoder.inputs(rows).items()}
    return model(inputs)["probability"].tolist()
rows = json.load(open("rows.json"))
print(json.dumps({
    "all": scores(rows), "single": [scores([row])[0] for row in rows[:3]],
    "examples": scores(json.load(open("examples.json"))["rows"]),
    "loaded": [m for m in sys.modules if m.split(".")[0] in ("cki_rec", "torchrec", "fbgemm_gpu")],
    "outside": [abs(a - b) for a, b in zip(*(
        model({**{n: torch.tensor(v) for n, v in encoder.inputs(rows[:2]).items()},
               "ids": torch.full((2, 5), id)})["probability"].tolist() for id in (1, 10**9)))],
}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_mixed(tmp_path_factory.mktemp("serving"))


def exported(trained, *options):
    folder, words, run, _ = trained
    assert main(["export", f"run={run}", *options, *words]) == 0
    return folder / "out" / run / "export"


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """Folder of an export, elsewhere."""
    home = tmp_path_factory.mktemp("plain") / "elsewhere"
    return shutil.copytree(exported(trained), home)


def raw_rows(folder):
    return pl.read_csv(folder / "rows.csv", infer_schema_length=0).drop("y")


@pytest.mark.slow
def test_raw_rows_score_as_in_the_training_without_our_code(trained, plain):
    (folder, _, _, expected), home = trained, plain
    rows = raw_rows(folder).to_dicts()
    for row in rows:
        row |= {"tags": row["tags"] and row["tags"].split("|"), "at": int(row["at"])}
    (home / "rows.json").write_text(json.dumps(rows))
    paths = f"import sys; sys.path[:0] = {[p for p in sys.path if 'site-packages' in p]}; "
    command = [sys.executable, "-I", "-c", f"{paths}sys.path.insert(0, '.'){SCRIPT}"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    np.testing.assert_allclose(result["all"], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result["single"], expected[:3], rtol=0, atol=1e-5)
    examples = json.loads((home / "examples.json").read_text())
    assert len(examples["rows"]) == 10
    np.testing.assert_allclose(result["examples"], examples["scores"], rtol=0, atol=1e-5)
    assert result["loaded"] == []
    assert max(result["outside"]) < 1e-6
    card = (home / "README.md").read_text()
    assert "Encoder.load" in card
    assert "int8" not in card
    listed = json.loads((home / "model.pt2.json").read_text())["files"]
    assert {"encoder.py", "encoder.json", "vocabulary.user.parquet", "README.md"} <= set(listed)


def test_examples_encode_to_rows_of_the_data_set(trained, plain):
    _, words, run, _ = trained
    home, model = plain, notebook.load_model(run, *words)
    encoder = Encoder.load(home)
    rows = json.loads((home / "examples.json").read_text())["rows"]
    encoded, dataset = encoder.encode(rows), model.dataset
    train = dataset.rows("train")
    for place, row in enumerate(train[np.linspace(0, len(train) - 1, 8).astype(int)]):
        for feature in model.schema.features:
            column, value = dataset.column(feature.name), encoded[feature.name][place]
            if isinstance(column, Ragged):
                assert value.to_list() == column.ids(np.array([row]))[0].tolist()
            elif feature.kind == "numeric":
                assert abs(value - column[row]) < 1e-5
            else:
                assert value == column[row], feature.name
    assert encoded["user"].to_list()[8:] == [1, 1]
    assert encoded["tags"].to_list()[8:] == [[], [1]]


@pytest.mark.slow
def test_int8_tables_are_small_and_state_their_error(trained, capsys):
    home = exported(trained, "int8=true")
    out = capsys.readouterr().out
    assert "int8 tables: largest error of a score on the ten examples: " in out
    assert "examples.json with ten rows and their scores" in out
    about = json.loads((home / "model.pt2.json").read_text())
    errors = about["int8"]["largest_error"]
    assert next(iter(errors)) == "the ten examples"
    assert list(errors)[1].endswith(" validation rows")
    assert 0 < max(errors.values()) < 2e-2
    assert about["largest_difference"] <= 1e-5  # of the file from its own network
    for rows, error in errors.items():
        assert f"error of a score on {rows} is {error:.1e}" in (home / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="pip install onnx onnxscript onnxruntime",
)
@pytest.mark.parametrize("int8", [False, True])
def test_the_program_of_the_card_runs_with_onnx(trained, int8):
    home = exported(trained, "format=onnx", f"int8={str(int8).lower()}")
    code = (home / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = (
        np.fromstring(part.strip("[] \n").replace(",", " "), sep=" ")
        for part in done.stdout.strip().split("] [")
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if int8 else 1e-5)


@pytest.mark.slow
def test_an_export_without_its_data_set_has_no_encoder(trained, tmp_path, capsys):
    folder, words, run, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder / "out" / run, copy, ignore=shutil.ignore_patterns("export"))
    assert main(["export", f"run={copy}", *words, f"runtime.encoded={tmp_path}"]) == 0
    assert "no encoder of raw rows: " in capsys.readouterr().out
    assert {p.name for p in (copy / "export").iterdir()} == {"model.pt2", "model.pt2.json"}


def test_rows_of_servers_may_be_partly_empty_and_mistakes_are_named(plain):
    encoder = Encoder.load(plain)
    row = {"user": "u1", "item": "i1", "at": 1_700_000_000, "price": 3, "age": None}
    row |= {"tags": ["t1", "t1", "zzz"], "past": ""}
    encoded = encoder.encode([row, {**row, "price": 2.5, "tags": None}])
    assert encoded["tags"].list.len().to_list() == [2, 0]
    assert encoder.encode([{**row, "@history": "i1|i2"}])["history"].list.len()[0] == 2
    with pytest.raises(ValueError, match=r"no column item, at; the rows have user"):
        encoder.encode([{k: v for k, v in row.items() if k not in ("item", "at")}])
    with pytest.raises(ValueError, match="column tags: lists and texts"):
        encoder.encode([row, {**row, "tags": "t1"}])
    with pytest.raises(ValueError, match="row 2: column price: found 'dear', expected a finite"):
        encoder.encode([row, {**row, "price": "dear"}])
    assert as_frame([{"a": True}, {"a": None}])["a"].to_list() == ["true", None]
    assert encoder.inputs([row])["ids.past"] == [[0]]
