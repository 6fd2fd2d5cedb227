"""Choices in folders of the user, and the flags of Hydra."""

import pytest

from cki_rec import cli, search_path
from cki_rec.config import UserError
from cki_rec.flags import split_flags

MINE = "# Mine.\ndefaults: [default, _self_]\nname: mine\nformat: csv\nraw: mine.csv\n"


@pytest.fixture
def ask(capsys, tmp_path, monkeypatch):
    """Function (*words) -> exit code and all output, in a working folder with ``conf/``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(MINE)

    def run(*words):
        code = cli.main(list(words))
        return code, "".join(capsys.readouterr())

    return run


def test_a_choice_of_the_working_folder_needs_no_option(ask):
    assert ask("prepare", "data=mine")[1].startswith("cki-rec: mine.csv: no such file or folder")
    assert "mine, movielens_100k" in ask("prepare", "data=zzz")[1]
    assert "|mine|" in ask("prepare", "--help")[1]


@pytest.mark.parametrize("words", [["--config-dir", "o w n"], ["hydra.searchpath=['o w n']"]])
def test_other_folders_add_choices_beside_the_working_folder(ask, tmp_path, words):
    (tmp_path / "o w n" / "model").mkdir(parents=True)
    text = "# Mine.\ndefaults: [default, _self_]\nname: deepfm\nhidden: [7]\n"
    (tmp_path / "o w n" / "model" / "seven.yaml").write_text(text)
    code, out = ask("prepare", *words, "model=seven", "data=mine", "--cfg", "job", "-p", "model")
    assert code == 0
    assert "hidden:\n- 7\n" in out


def test_a_choice_that_hydra_would_not_read_is_refused(ask, tmp_path):
    (tmp_path / "conf" / "data" / "criteo.yaml").write_text(MINE)
    code, out = ask("prepare", "data=criteo")
    assert code == 2
    assert "data=criteo: conf/ of cki_rec has this choice too" in out
    assert "rename that file" in out


def test_the_configuration_is_printed_and_nothing_runs(ask, monkeypatch):
    monkeypatch.setattr("cki_rec.pipelines.train.run", lambda config: pytest.fail("it ran"))
    code, out = ask("train", "--cfg=job", "--resolve", "data=mine", "seed=3")
    assert code == 0
    assert "name: mine" in out
    assert "\n    seed: 3\n" in out  # of the partition: ${seed}
    assert "cki-rec: data=mne: did you mean" in ask("train", "--cfg", "job", "data=mne")[1]
    assert ask("train", "--info", "searchpath")[1].count("file://") == 2


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("-cn", "choose a file of its groups"),
        ("--config-path=x", "choose a file of its groups"),
        ("-sc", "there is no completion"),
        ("--confg-dir", "no flag '--confg-dir': did you mean '--config-dir'?"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flag, part):
    with pytest.raises(UserError, match="flag") as caught:
        split_flags([flag, "seed=1"])
    assert part in str(caught.value)


def test_flags_are_split_from_overrides():
    words = ["seed=1", "-c", "job", "-m", "--info", "a=b", "-r"]
    assert split_flags(words) == (["--cfg", "job", "--info"], ["seed=1", "-m", "a=b"])


def test_entries_of_packages_are_searched(monkeypatch, tmp_path):
    (tmp_path / "pack" / "conf" / "data").mkdir(parents=True)
    (tmp_path / "pack" / "conf" / "data" / "mine.yaml").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = search_path.with_folders(["hydra.searchpath=[pkg://pack.conf]"])
    assert "mine" in search_path.config_groups(search_path.folders(options))["data"]
