"""Texts of the command line stay as typed; names lead to no other folder."""

import pytest

from cki_rec.cli import main
from cki_rec.config import UserError, parse, texts_as_typed


@pytest.mark.parametrize("text", ["1.10", "2024_01", "1e3", "007", ".5", "1_000", "true", "inf"])
def test_names_that_look_like_numbers_are_kept_as_typed(compose, text):
    words = [f"name={text}", f"merge.label={text}", f"data.raw={text}", f"++suite.name={text}"]
    words.append(f"runtime.out={text}")
    config = parse(compose(*words))
    texts = [config.name, config.merge.label, config.data.raw, config.suite.name]
    assert [*texts, config.runtime.out] == [text] * 5


def test_other_options_are_not_touched(compose):
    words = [
        *("seed=1_0", "train.epochs=3", "model=din", "run=null", "name='1.10'", "-m", "foo"),
        *("merge.options.scale=1.10", "data.raw=[1.10,b]", "merge.sources=[{seed: 1}]", "=1"),
    ]
    assert texts_as_typed(words) == words
    assert parse(compose("run=null")).run is None


def test_a_sweep_keeps_texts_as_typed(tmp_path, monkeypatch):
    seen = []
    run = "cki_rec.pipelines.train.run"
    monkeypatch.setattr(run, lambda config: seen.append((config.name, config.merge.label)))
    words = ["name=1.10", "merge.label=1e3,2024_01,a", f"runtime.out={tmp_path}"]
    assert main(["train", "-m", *words]) == 0
    assert seen == [("1.10", "1e3"), ("1.10", "2024_01"), ("1.10", "a")]
    assert [p.name for p in (tmp_path / "sweeps").iterdir()] == ["1.10"]


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "/abs/olute", "a/b", "x" * 300, "a b"])
def test_a_name_that_is_no_folder_name_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    for pipeline, more in (("evaluate", []), ("evaluate", ["-m", "seed=1,2"]), ("report", [])):
        assert main([pipeline, f"name='{name}'", "runtime.out=out", *more]) == 2
        error = capsys.readouterr().err
        assert f"name={name}: must be 1 to 100 letters" in error
        assert error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/b"])
def test_a_data_set_has_a_folder_name_too(compose, name):
    with pytest.raises(UserError, match=rf"data.name={name}: must be 1 to 100 letters"):
        parse(compose(f"data.name={name}"))


def test_a_number_as_a_name_in_a_file_is_refused(compose):
    tree = compose()
    tree.name = 1.1
    with pytest.raises(UserError, match=r"name=1.1: is read as a number; put it in quotes"):
        parse(tree)
