"""Sources of a merge that are named wrongly: twice, by foreign options, or as the base."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from store import twin

from cki_rec.checkpoints import load, outline
from cki_rec.cli import CONF
from cki_rec.config import UserError, preset_method, with_delta
from cki_rec.engine import checkpoint_io
from cki_rec.engine.record import Run
from cki_rec.merging.methods import METHODS
from cki_rec.pipelines import assess, check_only, evaluate, history, merge, train
from cki_rec.pipelines.compatibility import compare
from cki_rec.pipelines.references import REFERENCES

TINY = ("train.epochs=1", "merge=average")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def config(run_config, folder):
    return run_config(folder, *TINY)


@pytest.fixture(scope="module")
def run(config):
    """The run directory of ``seed=1``."""
    return train.ensure(config).path


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("a source was trained"))


def named(config, *deltas, **changes):
    return replace(config, merge=replace(config.merge, sources=[*deltas], **changes))


def error_of(action, config) -> str:
    with pytest.raises(UserError) as caught:
        action(config)
    return str(caught.value)


@pytest.mark.usefixtures("no_training")
def test_a_training_that_is_there_shows_its_date_and_validation_metrics(config, run, caplog):
    with caplog.at_level("INFO"):
        train.run(config)
    there, metrics, model = caplog.messages
    assert re.fullmatch(
        r"already trained on [\d-]+ [\d:]+; runtime.force=true trains again", there
    )
    assert re.fullmatch(r"validation: AUC 0\.\d{4}, LogLoss 0\.\d{4}", metrics)
    assert model == f"model: {run / 'checkpoint'}"


@pytest.mark.usefixtures("no_training")
def test_an_auc_below_one_half_is_a_warning(run, tmp_path, caplog):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "record.json"
    path.write_text(re.sub(r'"valid_auc": [\d.]+', '"valid_auc": 0.31', path.read_text()))
    history.log_done(Run(copy), 0)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "validation AUC 0.3100 is below 0.5" in warning
    assert "data.labels" in warning


@pytest.mark.parametrize("how", ["path", "link", "checkpoint", "copy", "delta and path"])
@pytest.mark.usefixtures("no_training")
def test_the_same_checkpoint_twice_is_refused(config, run, tmp_path, how):
    first, other = {"path": str(run)}, tmp_path / "other"
    if how == "link":
        other.symlink_to(run)
    elif how == "copy":
        shutil.copytree(run / "checkpoint", other)
    elif how == "delta and path":
        first, other = {"seed": 1}, run
    else:
        other = run / "checkpoint" if how == "checkpoint" else run
    between = {"path": str(twin(run, tmp_path / "twin"))}
    twice = named(config, first, between, {"path": str(other)})
    actions = (merge.ensure, check_only.report, assess.ensure)
    for action in actions if how == "path" else actions[:1]:
        assert "sources 1 and 3 are the same checkpoint" in error_of(action, twice)


@pytest.mark.usefixtures("no_training")
def test_the_same_delta_twice_is_refused_before_training(config):
    deltas = [{"seed": 71}, {"seed": 72}, {"seed": 71, "train.epochs": 1}]
    line = "sources: sources 1 and 3 are the same checkpoint"
    assert f"merge.{line}" in error_of(merge.ensure, named(config, *deltas))
    suite = replace(named(config, {"seed": 73}), suite=replace(config.suite, sources=deltas))
    assert f"suite.{line}" in error_of(evaluate.ensure, suite)


@pytest.mark.parametrize("key", ["merge.method", "suite", "runtime.out", "name"])
@pytest.mark.usefixtures("no_training")
def test_foreign_options_in_a_source_are_refused(config, key):
    line = f"{key} does not change the training of a source; name a source by data, model"
    foreign = {key: "x"}
    wrong = named(config, {"seed": 1}, {"seed": 2, **foreign})
    assert f"merge.sources[1]: {line}" in error_of(merge.ensure, wrong)
    suite = replace(config, suite=replace(config.suite, sources=[{"seed": 1}, foreign]))
    assert f"suite.sources[1]: {line}" in error_of(evaluate.ensure, suite)
    assert f"merge.base: {line}" in error_of(
        merge.ensure, named(config, {"seed": 1}, base=foreign)
    )
    begun = named(config, {"seed": 1}, {"seed": 2, "train.start": foreign})
    assert f"merge.sources[1], train.start: {line}" in error_of(merge.ensure, begun)
    alone = with_delta(config, {"train.start": foreign})
    assert f"train.start: {line}" in error_of(train.ensure, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.hidden": [16, 4]}, "architecture: model.hidden"),
        ({"model": {"embedding_dim": 4}}, "architecture: model.embedding_dim"),
        ({"model.histories": True}, "features: "),
        ({"train.table_optimizer": "adagrad"}, "accumulators: "),
        ({"data.split.seed": 5}, "vocabulary user: differs in"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_sources_that_cannot_fit_are_refused_before_training(config, change, message):
    assert message in error_of(merge.ensure, named(config, {"seed": 81}, {"seed": 82, **change}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"train.embeddings": "dense"}, {"train.table_optimizer": "adagrad"}],
)
def test_the_outline_of_a_training_is_that_of_its_result(config, changes):
    untrained = with_delta(config, {"train.epochs": 0, "model.batch_norm": True, **changes})
    planned, is_trained = train.outline_of(untrained)
    assert not is_trained
    trained = outline(train.ensure(untrained).checkpoint)
    assert {f.state for f in compare([trained, planned], ["a", "b"])} == {"ok"}
    assert train.outline_of(untrained)[1]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_sources_of_two_float_types_are_merged_in_float32(config, run, tmp_path, dtype):
    saved = load(run / "checkpoint")
    params = {name: tensor.bfloat16() for name, tensor in saved.params.items()}
    groups = {"model": params, "accumulator": saved.accumulators, "counts": saved.counts}
    checkpoint_io.save(tmp_path / "half", groups, saved.model, saved.schema, saved.origin)
    pair = {"path": str(run)}, {"path": str(tmp_path / "half")}
    done = merge.ensure(named(config, *pair, dtype=dtype))
    assert done.record["result"]["types"] == [dtype or "float32"]
    for name, merged in load(done.checkpoint).params.items():
        mean = (saved.params[name] + params[name].float()) / 2
        assert torch.equal(merged, mean.to(merged.dtype))
        assert str(merged.dtype) == f"torch.{dtype or 'float32'}"


def test_a_base_that_is_one_of_the_sources_is_warned_of(config, run, tmp_path, caplog):
    other = {"path": str(twin(run, tmp_path / "twin"))}
    source, warning = {"path": str(run)}, "merge.base is the same checkpoint as source 2"
    arithmetic = {"method": "task_arithmetic", "options": {"scale": 1.0}}
    wrong = named(config, other, source, base=source, **arithmetic)
    caplog.set_level("INFO")
    for action in (merge.ensure, check_only.report):
        caplog.clear()
        action(wrong)
        assert warning in caplog.text
    caplog.clear()
    merge.ensure(named(config, other, source, base={"train.epochs": 0}, **arithmetic))
    assert warning not in caplog.text


def test_a_check_of_sources_with_a_base_ends_with_its_report(config, run, tmp_path, caplog):
    """As of ``suite=shards merge=ties check_only=true``."""
    caplog.set_level("INFO")
    sources = [{"path": str(twin(run, tmp_path / "twin"))}, {"path": str(run)}]
    base = {"path": str(train.ensure(with_delta(config, {"train.epochs": 0})).path)}
    options = {"density": 0.2, "scale": 1.0}
    check_only.report(named(config, *sources, base=base, method="ties", options=options))
    assert caplog.messages[-1] == "it would run"


@pytest.mark.parametrize("rows", [("training", 3, 9), ("validation", 9, 3)])
def test_fewer_rows_than_processes_are_refused_before_training(monkeypatch, rows):
    split, *sizes = rows
    monkeypatch.setattr(train.distributed, "world_size", lambda: 4)
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it was trained"))
    numbers = [range(size) for size in sizes]
    with pytest.raises(UserError, match=f"3 {split} rows for 4 processes; start fewer"):
        train.run_training(*[None] * 7, numbers, {}, None, "title", None)


def test_a_finished_training_without_its_checkpoint_is_made_again(config, run, caplog):
    shutil.rmtree(run / "checkpoint")
    assert train.ensure(config).checkpoint.is_dir()
    assert "is missing; train-" in caplog.text
    outline(run / "checkpoint")


def test_the_label_of_another_method_is_refused(config, monkeypatch):
    monkeypatch.setattr(evaluate, "ensure", lambda *_, **__: pytest.fail("it was evaluated"))
    for method, label in (
        *(("slerp", "output_ensemble"), ("average", "best_source"), ("average", "auto")),
        *(("slerp", "cki_dual_hard"), ("slerp", "joint"), ("best_source", "joint")),
    ):
        changed = replace(config, merge=replace(config.merge, method=method, label=label))
        error = error_of(evaluate.run, changed)
        assert f"merge.label={label} is the name of another merge than this one" in error


@pytest.mark.parametrize("path", sorted((CONF / "merge").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_has_its_name_as_label_and_a_known_method(path):
    assert re.search(r"^label: (\w+)", path.read_text(), re.M)[1] == path.stem
    assert preset_method(path.stem) in {"auto", *METHODS, *REFERENCES}


def test_the_label_of_a_baseline_does_not_make_it_one(config, run, tmp_path):
    """The ensemble of one of two sources is compared with that of both."""
    words = [{"path": str(run)}, {"path": str(twin(run, tmp_path / "twin"))}]
    suite = replace(config.suite, sources=words)
    for sources, is_baseline in ((words, True), (words[:1], False)):
        options = replace(
            config.merge, method="output_ensemble", label="output_ensemble", sources=sources
        )
        done = evaluate.ensure(replace(config, suite=suite, merge=options))
        difference = done.record["result"]["difference"]
        assert (difference["output_ensemble"] is None) == is_baseline
