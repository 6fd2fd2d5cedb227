"""Whole pipelines through the command line, on a tiny data set in the real raw format."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store import twin

from cki_rec.cli import main

TINY = [
    "runtime.threads=1",
    "train.epochs=2",
    "train.batch_size=256",
    "model.hidden=[16,8]",
    "model.embedding_dim=8",
    "evaluate.bootstrap=100",
]


@pytest.fixture
def options(raw_zip, tmp_path):
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw_zip}", *places, *TINY]


def records(folder: Path, pipeline: str = "") -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in folder.glob(f"out/{pipeline}*/record.json")]
    return {record["run_id"]: record for record in found}


def modified(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.glob("out/*/record.json")}


@pytest.mark.slow
def test_sweep_reports_every_method_once(options, tmp_path, capsys):
    sweep = ["merge=best_source,output_ensemble,evidence", "finetune=none,one_epoch"]
    sweep += ["train.epochs=1"]
    assert main(["evaluate", "-m", "suite=seeds,shards", "seed=1", *options, *sweep]) == 0
    shown = capsys.readouterr().out
    assert "[12/12" in shown
    assert "skipped: output_ensemble" in shown
    assert main(["report", *options]) == 0
    table = capsys.readouterr().out
    assert "10 evaluated models.\n" in table
    with (tmp_path / "reports" / "adhoc" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert all(row["disjoint"] == str(row["suite"] == "shards") for row in rows)
    by_method = {(r["suite"], r["method"], r["finetuned"], r["seed"]): r for r in rows}
    best = by_method["shards", "best_source", "False", "1"]
    assert best["auc_minus_best_source"] == ""  # itself: undefined, not 0
    for suffix in ("table.md", "report.html"):
        assert (tmp_path / "reports" / "adhoc" / suffix).stat().st_size > 1000
    assert list((tmp_path / "reports" / "adhoc").glob("*.svg"))

    before = modified(tmp_path)
    assert main(["evaluate", "-m", "suite=shards", "seed=1", *options, *sweep]) == 0
    assert modified(tmp_path) == before, "a finished run was repeated"


@pytest.mark.usefixtures("without_store")
def test_same_seed_gives_equal_records(options, tmp_path):
    first = tmp_path / "first"
    arguments = ["evaluate", "suite=shards", "merge=cki_gate", "merge.learn.epochs=1"]
    for out in (first, tmp_path / "second"):
        assert main([*arguments, *options, f"runtime.out={out / 'out'}"]) == 0
    one, two = records(first), records(tmp_path / "second")
    assert one.keys() == two.keys()
    assert len(one) == 4  # two sources, a merge, an evaluation
    for run_id, record in one.items():
        for key in ("config", "data", "result", "fingerprint"):
            assert record[key] == two[run_id][key], (run_id, key)
    for path in first.glob("out/*/checkpoint/tensors/*.distcp"):
        twin = tmp_path / "second" / path.relative_to(first)
        assert path.read_bytes() == twin.read_bytes()


def test_another_seed_gives_another_record(options, tmp_path):
    assert main(["train", "seed=1", *options]) == 0
    assert main(["train", "seed=2", *options]) == 0
    one, two = records(tmp_path, "train").values()
    assert one["result"]["valid_auc"] != two["result"]["valid_auc"]


@pytest.mark.slow
def test_killed_sweep_goes_on_with_equal_results(options, tmp_path, capsys):
    sweep = ["evaluate", "-m", "suite=shards", "seed=1,2", "merge=average", *options]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    places = [f"runtime.out={unbroken / 'out'}", f"runtime.reports={unbroken / 'reports'}"]
    assert main([*sweep, *places]) == 0
    assert main(["report", *options, *places]) == 0

    places = [f"runtime.out={broken / 'out'}", f"runtime.reports={broken / 'reports'}"]
    command = [sys.executable, "-m", "cki_rec", *sweep, *places]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(records(broken)) < 3 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the sweep ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = modified(broken)
    assert 3 <= len(finished) < 8

    assert main([*sweep, *places]) == 0
    assert {k: v for k, v in modified(broken).items() if k in finished} == finished
    assert main(["report", *options, *places]) == 0
    capsys.readouterr()
    one, two = (
        list(csv.DictReader((folder / "reports/adhoc/runs.csv").read_text().splitlines()))
        for folder in (unbroken, broken)
    )
    for row in (*one, *two):
        del row["command"]  # names the folder
    assert one == two
    assert {row["seed"] for row in one} == {"1", "2"}
    assert not list(broken.rglob("*.tmp*"))


def test_external_checkpoints_need_no_data(options, tmp_path, capsys):
    assert main(["train", "seed=1", *options]) == 0
    assert main(["train", "seed=2", *options]) == 0
    runs = sorted(path for path in (tmp_path / "out").glob("train-*"))
    sources = f"merge.sources=[{{path: {runs[0]}}},{{path: {runs[1]}/checkpoint}}]"
    moved = [o for o in options if not o.startswith("data.raw")] + ["data.raw=/nowhere"]
    assert main(["merge", "merge=evidence", sources, *moved]) == 0
    shown = capsys.readouterr().out
    assert "embedding_bags.item.weight" in shown
    assert "model: " in shown


def test_average_of_one_model_with_itself_is_that_model(options, tmp_path):
    from cki_rec.checkpoints import checkpoint

    assert main(["train", *options]) == 0
    (run,) = (tmp_path / "out").glob("train-*")
    other = twin(run, tmp_path / "twin")
    sources = f"merge.sources=[{{path: {run}}},{{path: {other}}}]"
    assert main(["merge", "merge=average", sources, *options]) == 0
    (merged,) = (tmp_path / "out").glob("merge-*")
    one, two = (checkpoint.load(path / "checkpoint").params for path in (run, merged))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


@pytest.mark.parametrize(
    ("train_options", "message"),
    [
        (["model.hidden=[32,8]"], "architecture: model.hidden"),
        (["data.split.seed=5"], "vocabulary user: differs in"),
        (["model.histories=true"], "features: "),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    options, tmp_path, capsys, train_options, message
):
    assert main(["train", *options]) == 0
    (first,) = (tmp_path / "out").glob("train-*")
    assert main(["train", *options, *train_options]) == 0
    (second,) = set((tmp_path / "out").glob("train-*")) - {first}
    sources = f"merge.sources=[{{path: {first}}},{{path: {second}}}]"
    assert main(["merge", "merge=average", sources, *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(second) in shown
    assert shown.count("\n") == 1
    assert not list((tmp_path / "out").glob("merge-*/checkpoint"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "data.raw=/nowhere.zip"], "/nowhere.zip"),
        (["merge", "merge.method=evidenc"], "did you mean 'evidence'"),
        (["merge", "merge.sources=[{path: /nowhere}]"], "/nowhere"),
        (["merge", "merge.sources=[{sed: 1}]"], "sed"),
        (["train", "data.split.fractions=[1.0,0.0,0.0]"], "valid"),
        (["train", "data.part=7", "data.partition.parts=2"], "data.part=7"),
        (["report", "name=never_run"], "never_run"),
        (["finetune"], "finetune.epochs=0"),
        (["finetune", "merge=output_ensemble", "finetune=one_epoch"], "no single model"),
        (["train", "runtime.device=cuda"], "no CUDA device"),
    ],
)
def test_mistakes_are_one_line(options, capsys, arguments, message):
    if "runtime.device=cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    assert main([arguments[0], *options, *arguments[1:]]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("key", ["out", "encoded"])
def test_unwritable_folder_is_one_line(options, tmp_path, capsys, key):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert main(["train", *options, f"runtime.{key}={blocked}/inside"]) == 2
    shown = capsys.readouterr().err
    assert str(blocked) in shown
    assert shown.count("\n") == 1


@pytest.mark.usefixtures("without_store")
def test_full_disk_leaves_nothing_half_written(options, tmp_path, capsys, monkeypatch):
    import errno

    from cki_rec.engine import checkpoint_io

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io.dcp, "save", full)
    assert main(["train", *options]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.tmp*"))
    assert not list((tmp_path / "out").glob("*/record.json"))
    monkeypatch.undo()
    assert main(["train", *options]) == 0


@pytest.mark.slow  # the README's command with joblib runs in any case
def test_joblib_launcher_gives_the_same_records(options, tmp_path):
    sweep = ["evaluate", "-m", "suite=shards", "merge=average,evidence"]
    for name, launcher in (("basic", []), ("joblib", ["hydra/launcher=joblib"])):
        more = ["hydra.launcher.n_jobs=2"] if launcher else []
        out = f"runtime.out={tmp_path / name / 'out'}"
        subprocess.run(
            [sys.executable, "-m", "cki_rec", *sweep, *options, out, *launcher, *more], check=True
        )
    one, two = records(tmp_path / "basic"), records(tmp_path / "joblib")
    assert one.keys() == two.keys()
    assert len(one) == 6
    for run_id, record in one.items():
        assert record["fingerprint"] == two[run_id]["fingerprint"]


def test_sources_of_one_model(options, tmp_path):
    assert main(["evaluate", "merge=average", "merge.sources=[{seed: 1}]", *options]) == 0
    (record,) = records(tmp_path, "evaluate").values()
    assert record["result"]["shares"]["bias"] == [1.0]


@pytest.mark.parametrize("pipeline", ["merge", "finetune", "evaluate"])
def test_unknown_method_stops_before_any_training(options, tmp_path, capsys, pipeline):
    words = ["merge.method=evidenc", "finetune=one_epoch"]
    assert main([pipeline, *options, *words]) == 2
    assert "did you mean 'evidence'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("train-*"))


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [("evaluate", []), ("finetune", ["finetune=one_epoch"])],
)
def test_models_of_another_split_are_refused(options, tmp_path, capsys, pipeline, words):
    """Vocabularies may agree or not: test rows of this split were training rows of theirs."""
    assert main(["train", *options, "data.split.seed=5"]) == 0
    (run,) = (tmp_path / "out").glob("train-*")
    sources = f"suite.sources=[{{path: {run}}},{{path: {twin(run, tmp_path / 'twin')}}}]"
    assert main([pipeline, *options, *words, "merge=average", sources]) == 2
    assert "another data set, encoding or split" in capsys.readouterr().err
    capsys.readouterr()
    same = [*options, "data.split.seed=5"]
    assert main([pipeline, *same, *words, "merge=average", sources]) == 0


def test_checkpoints_are_compared_with_themselves_only(options, tmp_path, capsys):
    assert main(["train", *options]) == 0
    (run,) = (tmp_path / "out").glob("train-*")
    sources = f"merge.sources=[{{path: {run}}}]"
    assert main(["evaluate", *options, "merge=average", sources]) == 2
    assert "suite.sources=[{path: ...},{path: ...}]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["merge.options.splice=hard"], ["merge.sources=[{seed: 1}]"]])
def test_learned_gates_go_with_every_splicing(options, tmp_path, words):
    gate = ["merge=cki_gate", "merge.learn.epochs=1"]
    assert main(["merge", *options, *gate, *words]) == 0
    (record,) = records(tmp_path, "merge").values()
    for shares in record["result"]["shares"].values():
        assert sum(shares) == pytest.approx(1)


def test_released_protocol_splices_the_mlp_and_trains_the_rest(options, tmp_path):
    from cki_rec.checkpoints import checkpoint

    gate = ["merge=cki_released", "merge.learn.epochs=1", "suite=shards"]
    assert main(["merge", *options, *gate]) == 0
    (record,) = records(tmp_path, "merge").values()
    assert {name.split(".")[0] for name in record["result"]["shares"]} == {"mlp"}
    first = checkpoint.load(tmp_path / "out" / record["config"]["sources"][0] / "checkpoint")
    merged = checkpoint.load(tmp_path / "out" / record["run_id"] / "checkpoint")
    for name, tensor in first.params.items():
        is_frozen = name.startswith("mlp.") and tensor.ndim == 1
        assert tensor.equal(merged.params[name]) == is_frozen, name


def test_fine_tuned_models_have_seen_all_rows(options, tmp_path):
    from cki_rec.checkpoints import checkpoint

    words = ["suite=shards", "merge=evidence", "finetune=one_epoch"]
    assert main(["finetune", *options, *words]) == 0
    (tuned,) = (tmp_path / "out").glob("finetune-*")
    sources = [checkpoint.load(p / "checkpoint") for p in (tmp_path / "out").glob("train-*")]
    seen = checkpoint.load(tuned / "checkpoint").counts
    for table, counts in seen.items():
        assert counts.equal(sum(source.counts[table] for source in sources)), table


@pytest.mark.parametrize("external", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suite", ["shards", "seeds", "drift"])
def test_rows_of_disjoint_parts_add_up_and_others_are_not_counted_twice(
    options, tmp_path, suite, external
):
    """That sources are disjoint is in the records beside their checkpoints."""
    import torch

    from cki_rec.checkpoints import checkpoint

    assert main(["merge", *options, f"suite={suite}", "merge=evidence"]) == 0
    (record,) = records(tmp_path, "merge").values()
    sources = [tmp_path / "out" / name for name in record["config"]["sources"]]
    if external:
        named = ",".join(f"{{path: {path}}}" for path in sources)
        other = f"runtime.out={tmp_path / 'other' / 'out'}"
        words = [f"merge.sources=[{named}]", "merge=evidence", other]
        assert main(["merge", *options, *words]) == 0
        (record,) = records(tmp_path / "other", "merge").values()
    home = tmp_path / "other" if external else tmp_path
    merged = checkpoint.load(home / "out" / record["run_id"] / "checkpoint").counts
    seen = [checkpoint.load(path / "checkpoint").counts for path in sources]
    for table, counts in merged.items():
        each = torch.stack([counts_of[table] for counts_of in seen])
        assert counts.equal(each.sum(0) if suite == "shards" else each.amax(0)), table


def test_shards_of_one_partition_are_disjoint():
    from cki_rec.pipelines.sources import are_disjoint

    def part(number, seed=1, data="a"):
        return {
            "hash": data,
            "partition": {"by": "user", "parts": 3, "seed": seed},
            "part": number,
        }

    assert are_disjoint([part(0), part(2), part(1)])
    for other in (part(0), part(1, seed=2), part(1, data="b"), None):
        assert not are_disjoint([part(0), other])
    assert not are_disjoint([None, None])


def test_settings_that_share_a_row_of_the_table_are_named(options, capsys):
    for dropout in (0.0, 0.1):
        words = ["merge=best_source", f"model.dropout={dropout}"]
        assert main(["evaluate", *options, *words]) == 0
    capsys.readouterr()
    assert main(["report", *options]) == 2
    error = capsys.readouterr().err
    assert "do not belong in one table (suite seeds: model.dropout is 0.0 in best_source" in error
    assert "To begin this name anew, delete" in error


def test_best_of_two_equal_parents_is_either(options, tmp_path):
    assert main(["train", *options]) == 0
    (run,) = (tmp_path / "out").glob("train-*")
    same = f"suite.sources=[{{path: {run}}},{{path: {twin(run, tmp_path / 'twin')}}}]"
    assert main(["evaluate", *options, "merge=best_source", same]) == 0
    (record,) = records(tmp_path, "evaluate").values()
    assert record["result"]["inference_cost"] == 1
    assert record["result"]["difference"]["best_source"] is None
    assert record["result"]["suite"] == "own_sources"  # not seeds, whose sources were replaced
    assert record["result"]["sources"][0] == str(run)


def test_a_merge_over_encodings_is_evaluated_on_each_but_on_no_other_split(
    options, tmp_path, capsys
):
    other = "data.history_length=5"  # the same rows and vocabularies, another encoding
    assert main(["train", *options]) == 0
    assert main(["train", *options, other]) == 0
    one, two = sorted((tmp_path / "out").glob("train-*"))
    sources = f"merge.sources=[{{path: {one}}},{{path: {two}}}]"
    assert main(["merge", *options, "merge=average", sources]) == 0
    (merged,) = (tmp_path / "out").glob("merge-*")
    suite = [f"suite.sources=[{{path: {merged}}}]", "merge=average"]
    for encoding in ([], [other]):
        assert main(["evaluate", *options, *encoding, *suite]) == 0
    capsys.readouterr()
    assert main(["evaluate", *options, "data.split.seed=1", *suite]) == 2
    assert "the same raw files were split otherwise" in capsys.readouterr().err
