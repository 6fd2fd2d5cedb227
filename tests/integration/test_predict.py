"""``cki-rec predict``: raw rows of a file score as in the training, and mistakes are one line."""

from __future__ import annotations

import gzip

import numpy as np
import polars as pl
import pytest
from conftest import SMALL
from mixed import train_mixed

from cki_rec import notebook
from cki_rec.cli import main
from cki_rec.engine import evaluator
from cki_rec.pipelines import predict
from cki_rec.pipelines.predict import CPU


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_mixed(tmp_path_factory.mktemp("predict"))


def served(trained, source, output):
    _, words, run, _ = trained
    return main(["predict", f"run={run}", f"input={source}", f"output={output}", *words])


def without_label(folder):
    return pl.read_csv(folder / "rows.csv", infer_schema_length=0).drop("y")


def check(path, expected):
    read = pl.read_parquet if path.suffix == ".parquet" else pl.read_csv
    scores = read(path)
    assert scores.columns == ["row", "score"]
    assert scores["row"].to_list() == list(range(1, len(expected) + 1))
    np.testing.assert_allclose(scores["score"].to_numpy(), expected, rtol=0, atol=1e-5)


def test_raw_rows_score_as_in_the_training(trained, tmp_path, monkeypatch, capsys):
    folder, _, _, expected = trained
    assert served(trained, folder / "rows.csv", tmp_path / "new" / "scores.csv") == 0
    check(tmp_path / "new" / "scores.csv", expected)
    assert "400 rows, mean score 0." in capsys.readouterr().out
    bare = without_label(folder).with_columns(extra=pl.lit('a "quoted", word'))
    bare.select(reversed(bare.columns)).write_csv(tmp_path / "bare.tsv", separator="\t")
    (tmp_path / "bare.csv.gz").write_bytes(gzip.compress((tmp_path / "bare.tsv").read_bytes()))
    assert served(trained, tmp_path / "bare.csv.gz", tmp_path / "scores.parquet") == 0
    check(tmp_path / "scores.parquet", expected)
    typed = pl.read_csv(folder / "rows.csv").with_columns(pl.col("tags").str.split("|"))
    typed.write_parquet(tmp_path / "typed.parquet")
    monkeypatch.setattr("cki_rec.data.raw.served.PARQUET_ROWS", 70)
    assert served(trained, tmp_path / "typed.parquet", tmp_path / "scores.csv") == 0
    check(tmp_path / "scores.csv", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("bare.csv.gz", "bare.tsv", "new", "scores.csv", "scores.parquet", "typed.parquet")
    ]


def test_files_are_read_block_by_block(trained, tmp_path, monkeypatch):
    sizes = []
    score, served_rows = predict.score, predict.served_rows

    def counted(model, rows):
        sizes.append(len(rows))
        return score(model, rows)

    monkeypatch.setattr(predict, "score", counted)
    monkeypatch.setattr(predict, "served_rows", lambda *a, **k: served_rows(*a[:3], 4096, **k))
    assert served(trained, trained[0] / "rows.csv", tmp_path / "scores.csv") == 0
    assert len(sizes) > 3
    check(tmp_path / "scores.csv", trained[3])


def test_unknown_tokens_and_new_users_have_scores(trained, tmp_path, capsys):
    row = "u99,nothing,1800000000,,,t0|unseen|other,i1|gone"
    (tmp_path / "rows.csv").write_text(f"user,item,at,price,age,tags,past\n{row}\n")
    assert served(trained, tmp_path / "rows.csv", tmp_path / "scores.csv") == 0
    assert "out of vocabulary: user 100.0%, item 100.0%" in capsys.readouterr().out
    assert 0 < pl.read_csv(tmp_path / "scores.csv")["score"][0] < 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.replace("price", "prize", 1), "rows.csv, line 1: no column price, which"),
        (lambda t: t.replace("1700", "soon1700", 1), "rows.csv, line 2: column at: found 'soon17"),
        (lambda t: f"{t}u1,i1,1700000000,dear,,,\n", "line 402: column price: found 'dear'"),
        (lambda t: f"{t}u1,i1\n", "rows.csv, line 402: missing field: found 'u1,i1', expected 7"),
        (lambda t: f'{t}u1,"i1\n', "rows.csv, line 402: quotes: found"),
        (lambda t: t.replace("item", "user", 1), "no column item, which the model reads"),
        (lambda t: t.split("\n")[0] + "\n", "rows.csv: no usable row"),
        (lambda t: "", "rows.csv: empty, expected one row per line"),
    ],
)
def test_bad_rows_are_named_and_leave_no_file(trained, tmp_path, capsys, change, part):
    text = without_label(trained[0]).write_csv()
    (tmp_path / "rows.csv").write_text(change(text))
    (tmp_path / "scores.csv").write_text("as before")
    assert served(trained, tmp_path / "rows.csv", tmp_path / "scores.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert "on_bad_row" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "scores.csv"]
    assert (tmp_path / "scores.csv").read_text() == "as before"


@pytest.mark.slow
def test_mistakes_are_one_line(trained, tmp_path, capsys):
    folder, words, run, _ = trained
    rows = folder / "rows.csv"
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no parquet")
    typed = without_label(folder).with_columns(price=pl.Series(["dear"] + [None] * 399))
    typed.write_parquet(tmp_path / "typed.parquet")
    cases = {
        (
            "run=null",
            f"input={rows}",
            "output=s.csv",
        ): "run=null: name a model, e.g. cki-rec p",
        (f"run={run}", "output=s.csv"): "input=null: name a .csv or .parquet file",
        (f"run={run}", f"input={rows}"): "output=null: name a .csv or .parquet file",
        (f"run={run}", f"input={rows}", "output=s.txt"): "output=s.txt: expected a name that ends",
        (f"run={run}", f"input={rows}", f"output={rows}"): "is the input; name another file",
        (f"run={run}", "input=gone.csv", "output=s.csv"): "input=gone.csv: no such file",
        (f"run={run}", f"input={tmp_path}", "output=s.csv"): "a folder, expected a file",
        (f"run={run}", f"input={bad}", "output=s.csv"): "not a readable Parquet file",
        (f"run={run}", f"input={tmp_path}/typed.parquet", "output=s.csv"): "row 1: column price",
        (f"run={run}", f"input={rows}", "output=/proc/s.csv"): "output=/proc/s.csv: cannot be",
    }
    for arguments, part in cases.items():
        assert main(["predict", *arguments, *words]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line, line


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["criteo", "avazu", "movielens"])
def test_files_of_other_formats_score_as_in_the_training(tmp_path, layout):
    """Criteo's rows have no header, with or without a label; Avazu's hour is a time."""
    words = [f"runtime.{name}={tmp_path / name}" for name in ("out", "reports", "encoded")]
    words += [*SMALL, "runtime.device=cpu"]
    data = [f"data=synthetic_{layout}", "data.synthetic.rows=2000", f"data.raw={tmp_path}"]
    assert main(["train", "model.histories=true", *data, *words, "name=mine"]) == 0
    model = notebook.load_model("mine", *words)
    every = np.arange(len(model.dataset))
    logits = evaluator.predict(model.network, model.dataset, model.schema, every, CPU)
    expected = 1 / (1 + np.exp(-logits.astype(np.float64)))
    (raw,) = tmp_path.glob("synthetic-*/")
    files = {"criteo": raw / "train.txt", "avazu": raw / "train.csv"}
    source = files.get(layout, tmp_path / "rows.csv")
    if layout == "movielens":
        rows = notebook.raw_rows(notebook.compose(*data, *words))
        rows.select(c for c in rows.columns if c != "@time").write_csv(source)
    options = ["predict", "run=mine", f"output={tmp_path}/scores.csv", *words]
    assert main([*options, f"input={source}"]) == 0
    check(tmp_path / "scores.csv", expected)
    if layout == "criteo":
        bare = [line.split("\t", 1)[1] for line in source.read_text().splitlines()]
        (tmp_path / "bare.txt").write_text("\n".join(bare) + "\n")
        assert main([*options, f"input={tmp_path}/bare.txt"]) == 0
        check(tmp_path / "scores.csv", expected)
