"""``cki-rec inspect``: the columns of a file, and a draft that the training reads."""

from __future__ import annotations

import gzip
import itertools
import zipfile

import polars as pl
import pytest

from cki_rec import cli
from cki_rec.data.raw.guesses import describe, labels_of

HEADER = ("id", "clicked", "user_id", "product", "at", "price", "tags", "shop", "region name")


def rows(num=90):
    for n in range(num):
        at = f"2024-03-{1 + n % 28:02} 0{n % 10}:00:50"
        price = "NULL" if n % 9 == 0 else f"{n * 1.5:.2f}"
        label = "true" if n % 3 else "false"
        tags = "|".join("abc"[: n % 4])
        yield (f"row{n}", label, f"u{n % 7}", f"i{n % 11}", at, price, tags, "shop", f"r{n % 3}")


def text(separator):
    return "".join(f"{separator.join(line)}\n" for line in itertools.chain([HEADER], rows()))


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Function (*words) -> exit code, standard output, standard error, in a working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(["inspect", *words])
        return code, *capsys.readouterr()

    return run


FILES = {
    "my clicks.csv": lambda path: path.write_text(text(",")),
    "my.tsv.gz": lambda path: path.write_bytes(gzip.compress(text("\t").encode())),
    "my.zip": lambda path: zipfile.ZipFile(path, "w").writestr("a.csv", text(";")),
    "my.parquet": lambda path: (
        pl.DataFrame(list(rows()), schema=list(HEADER), orient="row")
        .with_columns(pl.col("tags").str.split("|"), pl.col("at").str.to_datetime())
        .with_columns(pl.col("price").replace("NULL", None).cast(pl.Float64))
        .write_parquet(path)
    ),
}


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=pytest.mark.slow) if "zip" in file else file for file in FILES],
)
def test_the_draft_of_a_file_is_encoded_as_it_is(inspect, tmp_path, file, capsys):
    FILES[file](tmp_path / file)
    code, out, error = inspect(file)
    assert (code, error) == (0, "")
    name = "my_clicks" if " " in file else "my"
    assert f"next: cki-rec train data={name}" in out
    assert "90 rows" in out
    draft = (tmp_path / "conf" / "data" / f"{name}.yaml").read_text()
    body = draft.split("_self_\n\n")[1].splitlines()
    assert all(" # " in line or line.endswith((":", "  # inputs of the model")) for line in body)
    for line in (
        *("label: clicked", 'labels: {"true": 1, "false": 0}', "user: user_id", "item: product"),
        *("time: at", "time_form: iso", "  # - id ", "  # - shop ", '  - "region name"'),
        *("  - {name: price, kind: numeric", "  - hour ", "  by: time", "  by: user"),
        '  - {name: tags, kind: multi, separator: "|"}',
    ):
        assert f"\n{line}" in draft
    assert cli.main(["prepare", f"data={name}"]) == 0
    assert "90 rows, 7 fields" in capsys.readouterr().out


def test_a_draft_is_never_overwritten_without_saying_so(inspect, tmp_path):
    FILES["my clicks.csv"](tmp_path / "my clicks.csv")
    target = tmp_path / "conf" / "data" / "my_clicks.yaml"
    target.parent.mkdir(parents=True)
    target.write_text("mine\n")
    code, out, _ = inspect("my clicks.csv")
    assert code == 0
    assert target.read_text() == "mine\n"
    assert "exists and is kept; runtime.force=true replaces it. The draft:" in out
    assert "label: clicked" in out
    assert "replaced conf" in inspect("my clicks.csv", "runtime.force=true")[1]


def test_a_name_of_a_choice_of_ours_is_not_taken(inspect, tmp_path):
    FILES["my clicks.csv"](tmp_path / "criteo.csv")
    assert "next: cki-rec train data=criteo_own" in inspect("criteo.csv")[1]


@pytest.mark.parametrize(
    ("content", "words", "part"),
    [
        (None, [], "inspect needs a file: cki-rec inspect my.csv"),
        (None, ["a.csv", "b.csv"], "inspect reads one file, not 2"),
        (None, ["gone.csv"], "gone.csv: no such file"),
        (b"a,b\n", ["my.csv"], "my.csv: no row below the header"),
        (b"a,h\xe9\n1,2\n", ["my.csv"], "not UTF-8; name its encoding"),
        (b"PAR1....", ["my.csv"], "my.csv: damaged"),
    ],
)
def test_a_file_that_is_not_read_is_one_line(inspect, tmp_path, content, words, part):
    if content is not None:
        (tmp_path / "my.csv").write_bytes(content)
    code, out, error = inspect(*words)
    assert (code, out) == (2, "")
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "conf").exists()


def test_without_a_label_the_draft_leaves_it_open(inspect, tmp_path):
    (tmp_path / "my.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    assert "no column has two values that could be the label" in inspect("my.csv")[1]
    assert "\nlabel: ???" in (tmp_path / "conf" / "data" / "my.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "values", "kind", "form"),
    [
        ("at", ["1700000000", "1700000050"], "time", "seconds"),
        ("at", ["1700000000123", "1700000050456"], "time", "milliseconds"),
        ("hour", ["14102100", "14102123", "14102200"], "time", "yymmddhh"),
        ("day", ["2024-03-01", "2024-03-02"], "time", "iso"),
        ("count", ["1700000000", "1700000050"], "number", "plain"),
        ("price", ["1,234.50", "$5"], "number", "thousands"),
        ("price", ["1.234,50", "5"], "number", "decimal_comma"),
        ("price", ["-", "3", "4.5"], "number", "plain"),
        ("user", ["a", "b", "c"], "text", ""),
    ],
)
def test_kinds_of_columns(name, values, kind, form):
    column = describe(pl.Series(name, values))
    assert (column.kind, column.form) == (kind, form)
    assert column.missing == (["-"] if "-" in values else [])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["0", "1"], {"0": 0, "1": 1}),
        (["1.0", "0.0"], {"1.0": 1, "0.0": 0}),
        (["No", "Yes"], {"Yes": 1, "No": 0}),
        (["-1", "1"], {"1": 1, "-1": 0}),
        (["3", "5"], None),
    ],
)
def test_pairs_of_labels(values, labels):
    assert labels_of(values) == labels
