"""Names of models, the list of runs, and the cleaning of leftovers, caches and unused runs."""

from __future__ import annotations

import json
import os

import pytest
from conftest import SMALL
from filelock import FileLock

from cki_rec.cli import main
from cki_rec.pipelines import names, run_list


@pytest.fixture
def command(raw_zip, tmp_path, capsys):
    """Function (*words) -> exit code, output, error; all folders lie in ``tmp_path``."""
    places = [f"runtime.{name}={tmp_path / name}" for name in ("out", "reports", "encoded")]
    options = [f"data.raw={raw_zip}", "data.fields=[user,item]", *places, *SMALL]

    def run(*words):
        flags = [word for word in words if word.startswith("--")]
        code = main([*(w for w in words if w not in flags), *options, *flags])
        out, error = capsys.readouterr()
        assert len(error.splitlines()) == (code == 2), error
        return code, out, error

    return run


@pytest.fixture
def days(command):
    """Train monday and tuesday, and merge them as week."""
    for seed, name in enumerate(("monday", "tuesday"), 1):
        assert command("train", f"seed={seed}", f"name={name}")[0] == 0
    merge = ("merge", "merge=average", "merge.sources=[monday,tuesday]", "name=week")
    code, out, error = command(*merge)
    assert code == 0, error
    assert "week is the name of merge-" in out
    return command


def test_names_are_sources_and_models(days, tmp_path):
    out = tmp_path / "out"
    assert sorted(names.names_of(out)) == ["monday", "tuesday", "week"]
    (tmp_path / "rows.csv").write_text("user,item\n1,2\n3,99999\n")
    files = [f"input={tmp_path}/rows.csv", f"output={tmp_path}/scores.csv"]
    assert days("predict", "run=week", *files)[0] == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 3
    monday = names.names_of(out)["monday"]
    by_id = days("merge", "merge=average", f"merge.sources=[{monday},tuesday]")[1]
    assert names.names_of(out)["week"] in by_id  # the same merge
    assert days("train", "seed=3", "train.start=monday", "name=monday")[0] == 0
    assert names.names_of(out)["monday"] != monday
    rows = json.loads(days("runs", "--json")[1])
    assert [row["age_seconds"] for row in rows] == sorted(row["age_seconds"] for row in rows)
    row = next(row for row in rows if row["names"] == ["week"])
    assert {row[key] for key in ("data", "model", "detail")} == {
        *("movielens_small", "deepfm", "average")
    }
    tuesday = next(row for row in rows if row["names"] == ["tuesday"])
    assert (tuesday["detail"], tuesday["split"]) == ("seed 2", "valid")
    assert tuesday["bytes"] > 1000
    table = days("runs")[1].splitlines()
    assert table[0].split() == ["name", "run", "data", "model", "metric", "size", "age"]
    assert len(table) == 1 + len(rows)


def test_clean_lists_first_and_deletes_what_nothing_refers_to(days, tmp_path):
    out = tmp_path / "out"
    assert days("train", "seed=4")[0] == 0  # of no name
    (unnamed,) = {f.name for f in run_list.folders(out)} - set(names.names_of(out).values())
    cache = out / names.names_of(out)["week"] / "logits-0123456789abcdef.npz"
    cache.write_bytes(b"scores")
    unfinished, busy = (out / f"train-{word * 16}" for word in "ab")
    for folder in (unfinished, busy):
        (folder / "resume").mkdir(parents=True)
        (folder / "steps.jsonl").write_text("{}\n")
    encoding = tmp_path / "encoded" / "mine-0123456789ab.tmp-1"
    encoding.mkdir()
    gone = [unfinished, encoding, cache, out / unnamed]
    with FileLock(out / "locks" / f"{busy.name}.lock"):
        listed = days("clean")[1]
        assert all(str(path) in listed and path.exists() for path in gone)
        assert "deleted" not in listed
        assert str(busy) not in listed
        listed = days("clean", "delete=leftovers")[1]
        assert [path.exists() for path in gone] == [False, False, False, True]
        assert days("clean", "delete=all")[0] == 0
    assert not any(path.exists() for path in gone)
    assert busy.exists()
    assert sorted(names.names_of(out)) == ["monday", "tuesday", "week"]
    os.remove(out / "names" / "week")
    assert len(names.names_of(out)) == 2
    assert "merge-" in days("clean", "delete=all")[1]
    left = [f.name for f in run_list.folders(out) if f != busy]
    assert left == sorted(names.names_of(out).values())


@pytest.mark.slow
def test_runs_that_kept_runs_are_made_of_are_kept(command, tmp_path):
    """A report keeps its evaluations, and they keep their merge and its sources."""
    words = ("suite=seeds", "merge=average", "name=mine")
    assert command("evaluate", *words)[0] == 0
    before = run_list.folders(tmp_path / "out")
    out = command("clean", "delete=all")[1]
    assert run_list.folders(tmp_path / "out") == before
    assert "logits-" in out  # only their cached scores are gone
    assert "nothing to clean" in command("clean")[1]
    rows = run_list.listed(tmp_path / "out")
    evaluation = next(row for row in rows if row["run"].startswith("evaluate"))
    assert (evaluation["names"], evaluation["split"]) == (["mine"], "test")


def test_mistakes_are_one_line(command, tmp_path):
    assert "no runs in" in command("runs")[1]
    assert command("runs", "--json")[1] == "[]\n"
    assert command("train", "train.epochs=0", "name=monday")[0] == 0
    for words, part in (
        (("merge", "merge.sources=[mondy,monday]"), "merge.sources: mondy: did you mean 'monday'"),
        (("merge", "merge.sources=[monday,monday]"), "are the same checkpoint (monday, monday)"),
        (("train", "train.start=mondy"), "train.start: mondy: did you mean 'monday'? no such"),
        (("export", "run=mondy"), "run=mondy: did you mean 'monday'? no such folder"),
        (("clean", "delete=al"), "delete=al: did you mean 'all'? one of none, leftovers, all"),
        (("train", "name=a/b"), "name=a/b: must be 1 to 100 letters"),
    ):
        code, _, error = command(*words)
        assert code == 2, words
        assert part in error, error
