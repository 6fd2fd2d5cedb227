"""Refinement through the command line: teachers, rows, interrupts and refusals."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_resume import check_equal, kill_at, steps_kept, unfinished

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.config import parse
from cki_rec.data.encoding import store
from cki_rec.engine import checkpoint_io
from cki_rec.engine.record import Run
from cki_rec.engine.steps import StepLog
from cki_rec.pipelines import merge, refine, teacher
from cki_rec.pipelines.sources import Source

TINY = (
    *("runtime.threads=1", "train.epochs=3", "train.batch_size=256", "model.hidden=[16,8]"),
    *("model.embedding_dim=8", "evaluate.bootstrap=100", "merge.refinement.batch_size=256"),
    *(
        "merge.refinement.steps=30",
        "merge.refinement.routed_steps=30",
        "merge.refinement.map_steps=10",
    ),
)
SLOWER = "merge.refinement.table_learning_rate=0.005"
"""With it, passes over the few rows gain."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("refine")


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


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(t.equal(b[name]) for name, t in a.items())


def error_of(capsys) -> str:
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    return shown


def source(folder, run_id):
    run = Run(folder / "out" / run_id)
    return Source(run_id, run_id, run.checkpoint)


class TrainingRows:
    """The training rows of a data set, and the logits of models on them."""

    def __init__(self, options):
        self.config = parse_words("merge=evidence", "merge.refine=router", *options)
        self.data = store.prepare(self.config.data, self.config.runtime.encoded)
        self.rows = teacher.UnlabelledRows(self.data, np.asarray(self.data.rows("train")), "test")

    def logits(self, source):
        return teacher._logits(self.config, self.data, source, self.rows)


def parse_words(*words):
    from conftest import compose_tree

    return parse(compose_tree(*words))


def test_the_refined_model_is_nearer_to_the_mean_logit(options, folder):
    words = ["suite=seeds", "merge=average", "merge.refine=mean", SLOWER, *options]
    assert main(["merge", *words]) == 0
    fitted = records(folder, "refine")[-1]
    training, reads = TrainingRows(options), fitted["config"]
    mean_R = np.mean([training.logits(source(folder, run)) for run in reads["sources"]], 0)
    error = {
        name: np.square(training.logits(source(folder, run)) - mean_R).mean()
        for name, run in {"start": reads["start"], "refined": fitted["run_id"]}.items()
    }
    assert error["refined"] < 0.7 * error["start"]
    assert fitted["result"]["valid_auc"] > fitted["result"]["history"][0]["valid_auc"]
    merged = records(folder, "merge")[-1]
    assert merged["result"]["refinement"]["field"] is None
    assert equal(params_of(folder, merged["run_id"]), params_of(folder, fitted["run_id"]))


def test_distillation_is_the_refinement_of_the_best_source(options, folder, capsys):
    words = ["suite=seeds", "merge=distillation", *options]
    assert main(["merge", *words]) == 0
    fitted = records(folder, "refine")[-1]
    auc = {r["run_id"]: r["result"]["valid_auc"] for r in records(folder, "train")}
    sources = fitted["config"]["sources"]
    assert fitted["config"]["start"] == max(sources, key=auc.get)
    if fitted["result"]["best_epoch"] == 0:  # left as it is, and the log is plain about it
        shown = capsys.readouterr().out
        assert "no epoch is better than the initial weights" in shown
        assert "no pass gains on validation rows; not refined" in shown
    assert main(["evaluate", *words]) == 0
    assert records(folder, "evaluate")[-1]["result"]["method"] == "distillation"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("suite=shards", "user"),
        ("suite=seeds", None),
        pytest.param("suite=shards data.partition.by=time", None, marks=pytest.mark.slow),
        pytest.param("suite=shards data.partition.by=random", None, marks=pytest.mark.slow),
    ],
)
def test_auto_takes_the_router_if_sources_saw_different_ids(options, folder, words, field):
    rest = ["merge=evidence", "merge.refine=auto", *options]
    assert main(["merge", *words.split(), *rest]) == 0
    merged = records(folder, "merge")[-1]["result"]["refinement"]
    assert merged["field"] == field
    assert merged["share"] == (0.75 if field else 1.0)
    assert merged["auc"] >= merged["start_auc"]


def test_the_routed_teacher_against_a_loop(options, folder):
    words = ("suite=shards", "merge=evidence", *options)
    assert main(["merge", *words, "merge.refine=router"]) == 0
    fitted = records(folder, "refine")[-1]
    training = TrainingRows(["suite=shards", *options])
    sources = [source(folder, run) for run in fitted["config"]["sources"]]
    start = source(folder, fitted["config"]["start"])
    logits_KR = np.stack([training.logits(each) for each in sources])
    start_R = training.logits(start)
    counts = [checkpoint.load(each.folder).counts["user"] for each in sources]
    users = training.data.column("user")[training.rows.numbers]
    chosen = teacher.choose_teacher(training.config, training.data, sources)
    assert (chosen.field, chosen.share) == ("user", 0.75)
    actual = teacher.teacher_logits(
        training.config, training.data, sources, chosen, training.rows, start
    )
    for row in range(0, len(users), 97):
        seen = [float(count[users[row]]) for count in counts]
        shares = [s / sum(seen) if sum(seen) else 0.5 for s in seen]
        routed = sum(share * logits_KR[k, row] for k, share in enumerate(shares))
        assert actual[row] == pytest.approx(0.75 * routed + 0.25 * start_R[row], abs=1e-5)


def test_a_field_of_several_ids_routes_by_all_of_them(options, folder):
    words = ["suite=shards", "merge=evidence", "merge.refine=router", *options]
    assert main(["merge", *words, "merge.refinement.field=genres"]) == 0
    reads = records(folder, "refine")[-1]["config"]
    training = TrainingRows(["suite=shards", *options])
    sources = [source(folder, run) for run in reads["sources"]]
    numbers = training.rows.numbers[::50]
    shares_KR = teacher._shares(
        training.config, training.data, sources, "genres", training.data, numbers
    )
    counts = [checkpoint.load(each.folder).counts["genres"].double() for each in sources]
    column = training.data.column("genres")
    for place, row in enumerate(numbers):
        ids = column.ids(np.array([row]))[0]
        seen = [float(count[ids.astype(np.int64)].sum()) for count in counts]
        assert shares_KR[:, place] == pytest.approx(np.array(seen) / sum(seen), abs=1e-6)


@pytest.mark.slow
def test_rows_are_those_of_training_or_random_or_of_a_folder(options, folder, tmp_path):
    words = ["merge", "suite=seeds", "merge=evidence", "merge.refine=mean", *options]
    (encoded,) = (p.parent for p in folder.glob("encoded/*/manifest.json"))
    elsewhere = shutil.copytree(encoded, tmp_path / "elsewhere")
    params = {}
    for rows in ("training", "random", str(elsewhere)):
        assert main([*words, f"merge.rows={rows}"]) == 0
        params[rows] = params_of(folder, records(folder, "merge")[-1]["run_id"])
    assert equal(params["training"], params[str(elsewhere)])
    assert not equal(params["training"], params["random"])
    digest = json.loads((encoded / "manifest.json").read_text())["hash"]
    assert records(folder, "refine")[-1]["config"]["rows"] == digest


@pytest.mark.slow
def test_din_is_refined_on_random_histories(options, folder):
    words = ["suite=shards", "merge=average", "model=din", "data.history_length=5"]
    assert main(["merge", *words, "merge.refine=router", "merge.rows=random", *options]) == 0
    history = records(folder, "refine")[-1]["result"]["history"]
    assert history[-1]["train_loss"] < history[1]["train_loss"]


def test_few_steps_of_few_rows(options, folder):
    tiny = [f"merge.refinement.{n}=1" for n in ("steps", "routed_steps", "batch_size")]
    words = ["suite=shards", "merge=average", "merge.refine=mean"]
    assert main(["merge", *words, *options, *tiny]) == 0
    assert records(folder, "refine")[-1]["result"]["history"][-1]["step"] <= 2


@pytest.mark.parametrize("objective", ["teacher", "both"])
def test_fine_tuning_by_a_teacher(options, folder, objective):
    words = ["suite=shards", "merge=evidence", "finetune=one_epoch", *options]
    assert main(["finetune", *words, f"finetune.objective={objective}"]) == 0
    assert main(["finetune", *words]) == 0
    runs = {
        record["config"].get("teacher", {}).get("objective"): record["run_id"]
        for record in records(folder, "finetune")
    }
    assert not equal(params_of(folder, runs[objective]), params_of(folder, runs[None]))


def test_the_same_command_gives_the_same_bits(options, folder, tmp_path):
    words = ["merge", "suite=shards", "merge=average", "merge.refine=router", *options]
    assert main(words) == 0
    first = records(folder, "refine")[-1]
    shutil.rmtree(folder / "out" / first["run_id"])
    assert main([*words, "runtime.force=true"]) == 0
    again = records(folder, "refine")[-1]
    assert first["run_id"] == again["run_id"]
    assert first["fingerprint"] == again["fingerprint"]


# interrupts


@pytest.fixture
def interrupted(raw_zip, folder, tmp_path):
    """Words of a refinement with checkpoints in a folder of this test, and those without."""
    own = f"runtime.out={tmp_path / 'out'}"
    shared = [f"data.raw={raw_zip}", f"runtime.encoded={folder / 'encoded'}", *TINY]
    words = ["suite=seeds", "merge=average", "merge.refine=mean", "model.dropout=0.3", SLOWER]
    words += ["runtime.log_steps=1", "runtime.tensorboard=false", *shared]
    unbroken = [*words, f"runtime.out={tmp_path / 'unbroken'}"]
    return [*words, own, "runtime.checkpoint_steps=4"], unbroken, tmp_path


@pytest.mark.slow
def test_a_killed_refinement_ends_like_an_unbroken_one(interrupted, monkeypatch):
    words, unbroken, folder = interrupted
    merge.ensure(parse_words(*unbroken))
    config = parse_words(*words)
    pipeline = SimpleNamespace(__name__="refine", ensure=merge.ensure)
    path = kill_at(config, 14, pipeline)
    assert steps_kept(path) == [8, 12]
    monkeypatch.delattr(refine, "fit_maps")  # the maps are read, and not fitted again
    merge.ensure(config)
    assert not (path / "mapped").exists()
    (want,) = (Run(p) for p in (folder / "unbroken").glob("refine-*"))
    check_equal(Run(path), want, 12)


@pytest.mark.slow
def test_a_refinement_that_is_asked_to_stop_resumes(interrupted, capsys, monkeypatch):
    words, unbroken, folder = interrupted
    write = StepLog.step

    def ask(log, step, *rest):
        write(log, step, *rest)
        if step == 6 and log._folder.name.startswith("refine"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StepLog, "step", ask)
    assert main(["merge", *words]) == 0
    path = unfinished(folder / "out", "refine")
    assert f"stopped by the system after step 6; the state is saved in {path}" in error_of(capsys)
    assert not list((folder / "out").glob("merge-*/record.json"))[1:]  # the average alone
    monkeypatch.undo()
    assert main(["merge", *words]) == 0
    assert main(["merge", *unbroken]) == 0
    (want,) = (Run(p) for p in (folder / "unbroken").glob("refine-*"))
    check_equal(Run(path), want, 6)


@pytest.mark.slow
def test_a_full_disk_loses_only_the_kept_logits(options, folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["merge", "suite=seeds", "merge=average", "merge.refine=mean", *options, "seed=5"]
    monkeypatch.setattr(teacher, "save_arrays", full)
    assert main(words) == 0
    shown = "".join(capsys.readouterr())
    assert shown.count("logits are not kept: No space left on device") == 2
    first = records(folder, "refine")[-1]
    monkeypatch.undo()
    shutil.rmtree(folder / "out" / first["run_id"])
    for _ in range(2):  # computed again, then read
        assert main(words) == 0
        shutil.rmtree(folder / "out" / first["run_id"])
    assert "not kept" not in "".join(capsys.readouterr())


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge.refine=router"], "merge.refine=router: .*same ids.*use merge.refine=mean"),
        (["suite=shards", "merge.refine=router", "merge.refinement.field=nonsense"],
         "merge.refinement.field=nonsense: .*one of user, item"),
        (["merge=output_ensemble", "merge.refine=mean"], "merge.refine=mean: .*leave it out"),
        (["merge.refine=both"], "merge.refine=both"),
        (["merge.refine=mean", "merge.refinement.share=0"], "merge.refinement.share"),
        (["merge.refine=mean", "merge.refinement.steps=0"], "merge.refinement.steps"),
        (["merge.refine=mean", "merge.refinement.learning_rate=1e30"], "the loss is|not finite"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(options, capsys, words, message):
    assert main(["merge", "suite=seeds", "merge=evidence", *options, *words]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert re.search(message, shown.splitlines()[-1])


@pytest.mark.parametrize("method", ["evidence", "auto"])
@pytest.mark.parametrize("rows", ["nowhere", "train"])
def test_rows_that_are_nowhere_stop_before_any_training(options, tmp_path, capsys, rows, method):
    words = [f"merge={method}", "merge.refine=mean", f"merge.rows={rows}"]
    assert main(["merge", *options, f"runtime.out={tmp_path}", *words]) == 2
    assert f"merge.rows={rows}: no encoded data set; use training or random" in error_of(capsys)
    assert not list(tmp_path.glob("train-*"))


def test_rows_of_another_vocabulary_are_refused(options, folder, capsys):
    words = ["merge", "suite=seeds", "merge=average", "merge.refine=mean", *options]
    other = ["data.split.seed=7", "suite=single"]  # other training rows, so other vocabularies
    before = set(folder.glob("encoded/*/manifest.json"))
    assert main(["prepare", *options, *other]) == 0
    (encoded,) = (p.parent for p in set(folder.glob("encoded/*/manifest.json")) - before)
    capsys.readouterr()
    assert main([*words, f"merge.rows={encoded}"]) == 2
    assert "has another vocabulary than the models" in error_of(capsys)


def test_a_source_with_scores_that_are_not_finite_is_named(options, folder, capsys, tmp_path):
    assert main(["merge", "suite=seeds", "merge=average", *options]) == 0
    paths = [folder / "out" / r["run_id"] / "checkpoint" for r in records(folder, "train")[:2]]
    saved = checkpoint.load(paths[1])
    for name in saved.params:
        if "mlp" in name:
            saved.params[name] *= 1e25  # finite, but its logits are not
    paths[1] = tmp_path / "broken"
    groups = {"model": saved.params, "counts": saved.counts}
    checkpoint_io.save(paths[1], groups, saved.model, saved.schema, saved.origin)
    named = f"merge.sources=[{','.join(f'{{path: {p}}}' for p in paths)}]"
    words = ["merge", "merge=first", named, *options, f"runtime.out={tmp_path / 'out'}"]
    assert main([*words, "merge.refine=mean"]) == 2
    assert f"{paths[1]}: the model gives NaN or infinite logits" in error_of(capsys)
    assert len(list((tmp_path / "out" / "teachers").glob("*"))) == 1  # of the whole source


def test_sources_without_counts(options, folder, capsys, tmp_path):
    """A router and random rows need counts; the mean logit does not."""
    assert main(["merge", "suite=seeds", "merge=average", *options]) == 0
    runs = [r["run_id"] for r in records(folder, "train")][:2]
    paths = []
    for run in runs:
        saved = checkpoint.load(folder / "out" / run / "checkpoint")
        paths.append(tmp_path / run)
        checkpoint_io.save(
            paths[-1], {"model": saved.params}, saved.model, saved.schema, saved.origin
        )
    named = f"merge.sources=[{','.join(f'{{path: {p}}}' for p in paths)}]"
    words = ["merge", "merge=average", named, *options, f"runtime.out={tmp_path / 'out'}"]
    assert main([*words, "merge.refine=router"]) == 2
    assert "merge.refine=router: a source holds no row counts; use merge.refine=mean" in (
        error_of(capsys)
    )
    assert main([*words, "merge.refine=mean", "merge.rows=random"]) == 2
    assert "merge.rows=random: a source holds no row counts" in error_of(capsys)
    assert main([*words, "merge.refine=auto"]) == 0
    (fitted,) = (Path(p) for p in (tmp_path / "out").glob("refine-*"))
    assert json.loads((fitted / "record.json").read_text())["result"]["history"]
