"""Trainings that go on from others, and suite drift: windows of time, each from the last."""

from __future__ import annotations

import itertools
import json
import shlex

import pytest

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.config import UserError, parse, run_id, section, with_delta
from cki_rec.data.encoding import store
from cki_rec.engine import checkpoint_io
from cki_rec.models.layers import MASKS
from cki_rec.pipelines import finetune, train

TINY = [
    *("runtime.threads=1", "train.epochs=2", "train.batch_size=256", "model.hidden=[16,8]"),
    *("model.embedding_dim=8", "evaluate.bootstrap=100"),
]
STILL = ["train.learning_rate=0.0", "train.table_learning_rate=0.0", "train.table_l2=0.0"]
"""A training that changes no parameter."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drift")


@pytest.fixture(scope="module")
def options(raw_zip, folder):
    """Starts are trained once for all tests of this file."""
    places = [f"runtime.{key}={folder / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw_zip}", *places, *TINY]


@pytest.fixture
def trained(options, compose):
    """Function (*words) -> the finished run of such a training."""
    return lambda *words: train.ensure(parse(compose(*options, *words)))


def records(folder, pipeline):
    paths = sorted(folder.glob(f"out/{pipeline}-*/record.json"), key=lambda p: p.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def same(one, other, *groups):
    for group in groups:
        found, want = getattr(one, group), getattr(other, group)
        assert found.keys() == want.keys()
        assert all(tensor.equal(want[name]) for name, tensor in found.items()), group


def test_without_epochs_a_training_is_its_start(trained):
    start = trained("seed=2")
    run = trained("train.epochs=0", "train.start={seed: 2, train.epochs: 2}")
    assert run.path != start.path
    assert run.record["config"]["start"] == start.path.name
    assert run.record["result"]["valid_auc"] == start.record["result"]["valid_auc"]
    one, other = (checkpoint.load(each.checkpoint) for each in (run, start))
    same(one, other, "params", "accumulators", "counts")


def test_first_step_sees_the_start(trained):
    start, fresh = trained("seed=2"), trained("train.epochs=1", *STILL)
    rates = "train.learning_rate: 0.002, train.table_learning_rate: 0.02, train.table_l2: 1.0e-5"
    run = trained("train.epochs=1", f"train.start={{train.epochs: 2, seed: 2, {rates}}}", *STILL)
    assert run.record["config"]["start"] == start.path.name
    same(checkpoint.load(run.checkpoint), checkpoint.load(start.checkpoint), "params")
    assert run.record["result"]["valid_auc"] == start.record["result"]["valid_auc"]
    losses = [each.record["result"]["history"][0]["train_loss"] for each in (run, fresh)]
    assert losses[0] < losses[1]


def test_a_path_names_the_same_start(trained):
    start = trained("seed=2")
    named = trained("train.start={seed: 2}")
    for path in (start.path, start.checkpoint):
        run = trained(f"train.start={{path: {path}}}")
        assert run.record["config"]["start"].startswith("external-")
        assert run.record["result"] == named.record["result"]
        one, other = (checkpoint.load(each.checkpoint) for each in (run, named))
        same(one, other, "params", "accumulators", "counts")


def test_counts_of_a_start_without_any_stay_unknown(trained, folder):
    saved = checkpoint.load(trained("seed=2").checkpoint)
    plain = folder / "plain"
    checkpoint_io.save(plain, {"model": saved.params}, saved.model, saved.schema, saved.origin)
    assert checkpoint.row_counts(plain) == {}
    assert checkpoint.load(trained(f"train.start={{path: {plain}}}").checkpoint).counts == {}


def test_only_a_start_changes_the_identity(options, compose):
    """Run directories of before there were starts are found."""
    config = parse(compose(*options, "data.part=1"))
    dataset = store.prepare(config.data, config.runtime.encoded)
    schedule = section(config.train)
    del schedule["start"]
    reads = {
        "data": {"hash": dataset.hash, "partition": section(config.data.partition), "part": 1},
        "model": section(config.model),
        "train": schedule,
        "seed": config.seed,
        "masks": MASKS,
    }
    assert train.run_of(config, dataset).path.name == run_id("train", reads)
    changed = [{"seed": 2}, {"seed": 3}, {"seed": 3, "train.start": {"seed": 2}}]
    ids = {
        train.run_of(with_delta(config, {"train.start": start}), dataset).path.name
        for start in [None, *changed]
    }
    assert len(ids) == 4


def test_fine_tuning_asks_not_where_parents_started(options, compose):
    words = ["merge=average", "finetune=one_epoch", "train.start={seed: 2}"]
    sources = "merge.sources=[{seed: 2, train.start: null},{seed: 3, train.start: null}]"
    runs = [
        finetune.ensure(parse(compose(*options, *more, sources))) for more in (words, words[:2])
    ]
    assert runs[0].path == runs[1].path
    assert "start" not in runs[0].record["config"]["schedule"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.start={data.prt: 0}"], "train.start, data.prt: "),
        (["train.start=3"], "train.start"),
        (["train.start={path: /nowhere}"], "/nowhere: no checkpoint here"),
        (["train.start={path: 3}"], "must be {path: FOLDER}"),
        (["train.start={path: /nowhere, seed: 3}"], "must be {path: FOLDER}"),
        (["train.start={train.start.seed: 3}"], "a start is named whole"),
        (["train.start={train: {start: {seed: 3}}}"], "a start is named whole"),
        (["train.start={model.hidden: [4]}"], "model.hidden is [4], not [16, 8]; choose"),
        (["train.start={model.histories: true}"], "fields "),
        (["train.start={data.split.seed: 5}"], "another data set, encoding or split"),
        (["train.start={train.table_optimizer: adagrad}"], "train.table_optimizer=rowwise_adag"),
        (["train.start={train.start: {sede: 1}}"], "train.start, sede: "),
    ],
)
def test_mistakes_are_one_line(options, capsys, words, message):
    assert main(["train", *options, *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_another_data_set_is_noticed_by_its_checkpoint(options, trained):
    other = trained("data.split.seed=5")
    with pytest.raises(UserError, match="another data set, encoding or split"):
        trained(f"train.start={{path: {other.path}}}")


@pytest.mark.slow
def test_drift_is_evaluated_end_to_end(options, folder, capsys):
    methods = "best_source,newest_source,output_ensemble,joint,average,evidence,task_arithmetic"
    sweep = ["evaluate", "-m", "suite=drift", f"merge={methods}", "name=drift", *options]
    assert main(sweep) == 0
    evaluated = {r["result"]["method"]: r for r in records(folder, "evaluate")}
    assert set(evaluated) == set(methods.split(","))
    newest = evaluated["newest_source"]
    sources = newest["config"]["sources"]
    assert newest["config"]["members"] == sources[-1:]
    assert newest["result"]["inference_cost"] == 1
    assert list(newest["result"]["test"]["domains"]) == ["time part 3"]

    chain = [json.loads((folder / "out" / p / "record.json").read_text()) for p in sources]
    assert [record["config"].get("start") for record in chain] == [None, *sources[:2]]
    assert [record["config"]["data"]["part"] for record in chain] == [0, 1, 2]
    merged = [r["config"] for r in records(folder, "merge")]
    (task,) = [c for c in merged if c["merge"]["method"] == "task_arithmetic"]
    assert task["merge"]["base"] == sources[0]
    assert main(["report", "name=drift", *options]) == 0
    assert "newest_source" in capsys.readouterr().out


def test_windows_follow_each_other_and_evidence_adds_up(options, compose):
    config = parse(compose(*options, "suite=drift"))
    dataset = store.prepare(config.data, config.runtime.encoded)
    partition, times = config.data.partition, dataset.timestamp
    windows = [dataset.rows("train", partition, part) for part in range(3)]
    windows += [dataset.rows(split) for split in ("valid", "test")]
    for earlier, later in itertools.pairwise(windows):
        assert times[earlier].max() <= times[later].min()

    counts = [dataset.row_counts(dataset.schema, partition, part) for part in range(3)]
    for number, source in enumerate(config.suite.sources):
        run = train.ensure(with_delta(config, source))
        assert run.record["config"]["data"]["valid"] == "all"
        for table, seen in checkpoint.row_counts(run.checkpoint).items():
            if table in ("user", "year"):  # the item table is looked up by histories, too
                want = sum(of_part[table] for of_part in counts[: number + 1])
                assert (seen.numpy() == want).all(), (number, table)


def test_a_check_names_commands_that_make_the_chain(options, tmp_path, capsys, monkeypatch):
    fresh = [*options, f"runtime.out={tmp_path / 'out'}", "train.epochs=1"]
    words = ["merge", "suite=drift", "merge=average", "check_only=true", *fresh]
    monkeypatch.setattr("sys.argv", ["cki-rec", *words])
    assert main(words) == 2
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split("make it: ")[1] for line in lines if "make it: " in line]
    assert len(commands) == 3
    assert main(shlex.split(commands[-1])[1:]) == 0
    assert main(words) == 0
    assert len(list((tmp_path / "out").glob("train-*"))) == 3
