"""``merge check_only=true``: differences are named before any work, and nothing is done."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import write_raw_zip
from store import twin

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.engine import checkpoint_io

TINY = [
    *("runtime.threads=1", "train.epochs=1", "train.batch_size=256", "model.hidden=[8,4]"),
    "model.embedding_dim=8",
]
OTHERS = {
    "one": ["seed=1"],
    "two": ["seed=2"],
    "wide": ["model.hidden=[8,6]"],
    "tanh": ["model.activation=tanh"],
    "dropout": ["model.dropout=0.3"],
    "dcn": ["model=dcn"],
    "split": ["data.split.seed=5"],
    "histories": ["model.histories=true"],
    "adagrad": ["train.table_optimizer=adagrad"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base(home):
    raw = write_raw_zip(home / "ml-latest-small.zip")
    places = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    return [f"data.raw={raw}", *places, *TINY]


@pytest.fixture(scope="module")
def trained(home, base):
    """Function (key of OTHERS) -> run directory, trained once."""
    found = {}

    def train(key):
        if key not in found:
            before = set((home / "out").glob("train-*"))
            assert main(["train", *base, *OTHERS[key]]) == 0
            (found[key],) = set((home / "out").glob("train-*")) - before
        return found[key]

    return train


@pytest.fixture
def check(home, base, capsys):
    """Function (sources, *words) -> exit code, lines of the report, error."""

    def run(sources, *words):
        capsys.readouterr()
        before = sorted(home.rglob("*"))
        named = ",".join(f"{{path: {path}}}" for path in sources)
        given = [f"merge.sources=[{named}]"] if sources else []
        code = main(["merge", "check_only=true", *base, *given, *words])
        shown = capsys.readouterr()
        assert sorted(home.rglob("*")) == before, "a check made something"
        assert shown.err.count("\n") == (code == 2)
        return code, shown.out, shown.err

    return run


def changed(folder, target, **changes):
    """Write a checkpoint with other fields; return its folder."""
    saved = dataclasses.replace(checkpoint.load(folder / "checkpoint"), **changes)
    groups = {"model": saved.params, "accumulator": saved.accumulators, "counts": saved.counts}
    checkpoint_io.save(target, groups, saved.model, saved.schema, saved.origin)
    return target


def params_of(folder):
    return checkpoint.load(folder / "checkpoint").params


def lines(out, name):
    return [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(f"  {name}")]


def test_a_compatible_pair_would_run(trained, check):
    code, out, error = check([trained("one"), trained("two")], "merge=evidence")
    assert (code, error) == (0, "")
    assert out.rstrip().endswith("it would run")
    assert "impossible" not in out
    assert "differs" not in out
    for name in (
        *("checkpoint", "architecture", "features", "vocabulary user", "tensors", "finite"),
        *("row counts", "accumulators", "alignment", "symmetries", "agreement", "needs", "memory"),
    ):
        assert lines(out, name), name
    assert "rotation of 8" in out
    assert "permutation of" in out
    assert "one a row" in out
    cosine = float(lines(out, "agreement")[0].split("cosine ")[1].split()[0])
    assert -1 <= cosine < 1


def test_a_model_agrees_with_itself(trained, check, tmp_path):
    other = twin(trained("one"), tmp_path / "twin")
    code, out, _ = check([trained("one"), other], "merge=average")
    assert code == 0
    assert "mean cosine 1.000" in out


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("wide", "tensors", "float32 (4, 8), in"),
        ("tanh", "architecture", "model.activation: relu, in"),
        ("dcn", "architecture", "model.name: deepfm, in"),
        ("histories", "features", "has history"),
        ("adagrad", "accumulators", "one a value in"),
        (
            "split",
            "vocabulary",
            "or join tables by token: merge.vocabularies=[null,null]",
        ),
    ],
)
def test_what_does_not_fit_is_named(trained, check, key, name, message):
    code, out, error = check([trained("one"), trained(key)], "merge=average")
    assert code == 2
    assert any("impossible" in line and message in line for line in lines(out, name))
    assert "merge.method=average would not run" in error


def test_what_only_trained_otherwise_is_no_obstacle(trained, check):
    code, out, _ = check([trained("one"), trained("dropout")], "merge=average")
    assert code == 0
    assert any("differs" in x and "model.dropout" in x for x in lines(out, "architecture"))


def test_other_vocabularies_can_be_joined(trained, check):
    joint = "merge.vocabularies=[null,null]"
    code, out, _ = check([trained("one"), trained("split")], "merge=evidence", joint)
    assert code == 0
    assert any("; joined to" in line for line in lines(out, "vocabulary"))


def test_tensors_of_another_dtype_or_without_value_are_named(trained, check, tmp_path):
    one, params = trained("one"), params_of(trained("two"))
    whole = {**params, "bias": params["bias"].long()}
    code, out, _ = check(
        [one, changed(trained("two"), tmp_path / "a", params=whole)], "merge=average"
    )
    assert code == 2
    assert any("bias: float32 (1,), in" in line for line in lines(out, "tensors"))
    harmed = {**params, "bias": torch.tensor([torch.nan])}
    bad = changed(trained("two"), tmp_path / "b", params=harmed)
    code, out, error = check([one, bad], "merge=average")
    assert code == 2
    assert "bias of" in error
    assert "1 of 1 entries are NaN or infinite" in error
    assert not lines(out, "agreement")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sources_of_several_float_types_are_checked_in_float32(trained, check, tmp_path, dtype):
    other = {name: tensor.to(dtype) for name, tensor in params_of(trained("two")).items()}
    pair = [trained("one"), changed(trained("two"), tmp_path / "other", params=other)]
    for sources in (pair, pair[::-1]):
        code, out, _ = check(sources, "merge=average")
        assert code == 0
        assert any("merged in float32 or wider" in line for line in lines(out, "tensors"))
        assert any("keep the scores" in line for line in lines(out, "symmetries"))
        assert lines(out, "agreement")


def test_missing_sources_are_named_with_the_command_that_makes_them(
    trained, check, base, home, monkeypatch
):
    trained("one")
    code, out, error = check([], "merge=average", "suite.sources=[{seed: 1},{seed: 77}]")
    assert code == 2
    assert "seed=77: not trained yet; make it: cki-rec train" in error
    assert "seed=77" in error
    assert "merge" not in error.split("cki-rec train")[1]
    assert any("ok" in line for line in lines(out, "checkpoint"))
    code, _, error = check([trained("one"), "/nowhere"], "merge=average")
    assert code == 2
    assert "/nowhere: no checkpoint here" in error


def test_unmet_needs_are_named(trained, check, tmp_path):
    one, two = trained("one"), trained("two")
    uncounted = changed(two, tmp_path / "uncounted", counts={})
    code, out, _ = check([one, uncounted], "merge=evidence")
    assert code == 0
    assert any("optimizer (merge.evidence=auto)" in line for line in lines(out, "evidence"))
    code, _, error = check([one, uncounted], "merge=evidence", "merge.evidence=counts")
    assert code == 2
    assert "merge.sources[1] holds no row counts" in error
    without = changed(two, tmp_path / "counts", counts={}, accumulators={})
    code, out, _ = check([one, without], "merge=average")
    assert code == 0
    assert any("differs" in line for line in lines(out, "row counts"))
    code, _, error = check([one, without], "merge=evidence")
    assert code == 2
    assert "row counts: none in" in error
    code, out, error = check([one, two], "merge.method=ties")
    assert code == 2
    assert "needs the model that all sources started from" in error
    assert lines(out, "agreement")
    code, out, _ = check([one, two], "merge=greedy_soup")
    assert code == 0
    code, _, error = check([one, two], "merge=greedy_soup", "data.split.seed=5")
    assert code == 2
    assert "rows of the data set" in error


def test_every_candidate_of_best_of_is_checked(trained, check):
    trained("one")
    words = ["merge.method=auto", "merge.recipes=[{method: average},{method: ties}]"]
    code, out, error = check([trained("one"), trained("two")], *words)
    assert code == 2
    assert "merge.recipes[1]: merge.method=ties" in error
    words[1] = "merge.recipes=[{method: average},{align.by: weights}]"
    code, out, _ = check([trained("one"), trained("two")], *words)
    assert code == 0
    assert out.count("merge ") >= 2


def test_recipes_that_a_sample_cannot_fit_are_left_out(trained, check):
    """``merge=auto`` leaves them out too, with the same reason."""
    pair = [trained("one"), trained("two")]
    words = ["merge.method=auto", "merge.sample=8"]
    fitted = "{align.by: activations, repair: select_units}"
    code, out, _ = check(pair, *words, f"merge.recipes=[{{method: average}},{fitted}]")
    assert code == 0
    assert "impossible" in lines(out, "sample")[0]
    assert out.count("auto leaves it out") == 1
    code, out, error = check(pair, *words, f"merge.recipes=[{fitted}]")
    assert code == 2
    assert "leaves out every recipe" in error
    alone = ["merge=evidence", "merge.align.by=activations", "merge.repair=select_units"]
    code, _, error = check(pair, *alone, "merge.sample=8")
    assert code == 2
    assert "sample: merge.sample" in error


def test_all_recipes_are_reported_before_the_first_problem_ends_the_check(trained, check):
    pair = [trained("one"), trained("two")]
    recipes = "merge.recipes=[{tables: evidence, sample: 500},{method: average}]"
    without_rows = ["merge.method=auto", recipes, "data.split.seed=5"]
    code, out, error = check(pair, *without_rows)
    assert code == 2
    assert sum(line.startswith("merge ") for line in out.splitlines()) == 2
    assert "more, above" in error


@pytest.mark.parametrize("key", ["merge.method", "suite.name", "finetune.epochs"])
def test_a_source_is_named_by_options_of_its_training(base, capsys, key):
    source = f"merge.sources=[{{seed: 1}},{{{key}: slerp}}]"
    assert main(["merge", *base, source, "merge=average"]) == 2
    assert f"merge.sources[1]: {key} does not change the training" in capsys.readouterr().err


def test_all_sources_must_fit_rows_whose_labels_are_read(trained, check, tmp_path):
    """Rows whose labels nobody reads may be training rows of any source."""
    origin = checkpoint.describe(trained("split") / "checkpoint").origin
    sources = [trained("one"), changed(trained("two"), tmp_path / "two", origin=origin)]
    ways = ["merge=evidence", "merge.align.by=activations", "merge.sample=500"]
    for words in (ways, [*ways, "merge.repair=project"]):  # nothing comes whole in DeepFM
        code, out, _ = check(sources, *words)
        assert code == 0
        assert "rows of the data set" in lines(out, "needs")[0]
    code, out, error = check(sources, *ways, "merge.recalibrate=true")
    assert code == 2
    assert "split otherwise" in lines(out, "needs")[0]
    assert "would not run" in error
    assert check(reversed(sources), *ways)[0] == 2


def test_a_check_is_no_part_of_a_run(trained, base, home):
    """The run made after a check is the one that is found without."""
    sources = ",".join(f"{{path: {trained(key)}}}" for key in ("one", "two"))
    words = ["merge", *base, f"merge.sources=[{sources}]", "merge=average"]
    assert main(words) == 0
    (run,) = (home / "out").glob("merge-*")
    written = (run / "record.json").stat().st_mtime_ns
    assert main([*words, "check_only=true"]) == 0
    assert main(words) == 0
    assert (run / "record.json").stat().st_mtime_ns == written


def test_integration_itself_refuses_what_is_cheap_to_see(trained, base, capsys, tmp_path):
    params = params_of(trained("two"))
    whole = {**params, "bias": params["bias"].long()}
    others = {
        trained("tanh"): "model.activation: relu, in",
        changed(trained("two"), tmp_path / "a", params=whole): "bias: float32 (1,), in",
    }
    for other, message in others.items():
        sources = f"merge.sources=[{{path: {trained('one')}}},{{path: {other}}}]"
        capsys.readouterr()
        assert main(["merge", *base, sources, "merge=average"]) == 2
        assert message in capsys.readouterr().err
