"""The command line: exit codes, one-line messages, what starts without heavy imports."""

import errno
import json
import logging
import os
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from samples import ROOT

from cki_rec import JOB_VARIABLE, __version__, cli, help_text
from cki_rec.config import RankLost, Stopped, UserError
from cki_rec.environment import EnvironmentMismatchError
from cki_rec.search_path import config_groups


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("CKI_REC_COMMAND", "cki-rec evaluate")
    monkeypatch.setenv(cli.SWEEP_VARIABLE, "0 0")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    ours = logging.getLogger("cki_rec")
    monkeypatch.setattr(ours, "handlers", [])  # each test has a standard output of its own
    monkeypatch.setattr(ours, "propagate", True)
    level = ours.level
    yield
    ours.setLevel(level)


@pytest.fixture
def command(capsys):
    """Function (*words) -> exit code, standard output, standard error."""

    def run(*words):
        code = cli.main(list(words))
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        if code == 2:
            *before, last = error.splitlines()
            assert last.startswith("cki-rec: ")
            # Hydra itself names the job of a sweep that failed
            assert all(line.startswith("Error executing job with overrides") for line in before)
            assert not before or "-m" in words or "--multirun" in words
        return code, out, error

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_pipelines_groups_and_examples(command, words):
    code, out, error = command(*words)
    assert (code, error) == (0, "")
    for pipeline, what in cli.PIPELINES.items():
        assert f"  {pipeline:10} {what}" in out
        assert f"cki-rec {pipeline} {help_text.EXAMPLES[pipeline]}" in out
    assert "cki_dual_soft" in out
    assert "movielens_1m" in out


@pytest.mark.parametrize("pipeline", sorted(cli.PIPELINES))
def test_help_of_a_pipeline_lists_what_it_reads(command, pipeline):
    code, out, _ = command(pipeline, "--help")
    assert code == 0
    assert help_text.EXAMPLES[pipeline] in out
    assert [group for group in config_groups() if f"\n{group}=" in out] == sorted(
        [*help_text.READS[pipeline], "runtime"]
    )


def test_help_of_train_shows_values_with_their_meaning(command):
    code, out, _ = command("train", "seed=1", "-h")
    assert code == 0
    assert "patience: 2                # epochs in a row that are not better" in out
    assert "train=bars|default; train.KEY=VALUE" in out


PROTOCOL = ROOT / "experiments" / "released_protocol" / "conf"


@pytest.mark.parametrize("words", [["--help"], ["merge", "--help"]])
def test_help_lists_the_choices_of_more_folders(command, words):
    assert "cki_language_v1" not in command(*words)[1]
    for option in (["--config-dir", str(PROTOCOL)], [f"hydra.searchpath=[file://{PROTOCOL}]"]):
        code, out, _ = command(*words, *option)
        assert code == 0
        assert "cki_language_v1" in out


def test_a_folder_of_choices_may_bring_a_method(command, tmp_path, monkeypatch):
    (tmp_path / "merge").mkdir()
    text = "defaults: [default, _self_]\nlabel: mine\n"
    (tmp_path / "merge" / "mine.yaml").write_text(f"{text}method: mine\n")
    monkeypatch.setattr("cki_rec.pipelines.merge.run", lambda config: None)
    assert command("merge", "--config-dir", str(tmp_path), "merge=mine")[0] == 0
    assert "no such folder" in command("merge", "--config-dir", f"{tmp_path}/no")[2]
    assert "no such folder" in command("merge", "--config-dir")[2]


@pytest.mark.parametrize("name", ["released_protocol", "released_protocol_amazon_beauty"])
def test_make_reproduces_an_experiment_beside_its_results(name):
    done = subprocess.run(
        ["make", "-n", f"reproduce-{name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if "evaluate -m" in line)
    assert f"--config-dir {PROTOCOL.relative_to(ROOT)} experiment={name}" in line
    plain = ["make", "-n", "reproduce-quickstart"]
    done = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--config-dir" not in done.stdout


@pytest.mark.parametrize("pipeline", ["merge", "finetune", "evaluate"])
def test_check_only_trains_nothing(command, pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr("cki_rec.pipelines.check_only.report", seen.append)
    assert command(pipeline, "check_only=true")[0] == 0
    assert [config.check_only for config in seen] == [True]


def test_version(command):
    assert command("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "no pipeline 'trian': did you mean 'train'? one of prepare, train"),
        (["xyz"], "no pipeline 'xyz': one of prepare"),
        (["integrate"], "no pipeline 'integrate': did you mean 'merge'? one of prepare"),
        (["train", "train.epoch=3"], "no option 'train.epoch': did you mean 'train.epochs'?"),
        (["train", "sed=3"], "no option 'sed': did you mean 'seed'?"),
        (["train", "qqqqqq=3"], "no option 'qqqqqq': see cki-rec --help"),
        (
            ["train", "model=depfm"],
            "did you mean 'deepfm'? one of dcn, dcnv2, deepfm",
        ),
        (["train", "merge=zzz"], "merge=zzz: one of aligned_activations"),
        (["evaluate", "experiment=quickstrat"], "did you mean 'quickstart'?"),
        (["train", "data=shop"], "(cki-rec inspect FILE drafts one)"),
        (["train", "check_only=true"], "train has no check; merge, finetune, evaluate have it"),
        (["train", "data=csv", "data.raw=no.csv"], "no.csv: no such file or folder; set data.raw"),
        (["train", "foo"], "'foo': options are written key=value"),
        (["train", "seed"], "'seed': options are written key=value"),
        (["train", "train.epochs=many"], "train.epochs=many: must be a whole number"),
        (["train", "seed=one"], "seed"),
        (["train", "+train.momentum=1"], "train.momentum"),
        (["train", "model.dropout=2"], "model.dropout=2"),
        (
            ["train", "merge=cki", "merge.options.splyce=soft"],
            "did you mean 'splice'? cki takes a, bins",
        ),
        (["train", "seed=[1"], ""),
        (["train", "-m", "sed=1,2"], "no option 'sed': did you mean 'seed'?"),
        (["train", "-m", "merge=average,ties", "sed=1"], "no option 'sed': did you mean 'seed'?"),
        (["train", "-m", "model=deepfm,depfm"], "model=depfm: did you mean 'deepfm'?"),
        (["train", "-m", "merge=averge,evidence"], "did you mean 'average'?"),
        (["train", "-m", "foo", "seed=1,2"], "'foo': options are written key=value"),
        (
            ["train", "--multirun", "train.epochs=many,some"],
            "train.epochs=many: must be a whole number",
        ),
        (["train", "data.raw=/nowhere.zip"], "/nowhere.zip"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, monkeypatch, words, part):
    folders = [f"runtime.{name}={tmp_path}/{name}" for name in ("out", "reports", "encoded")]
    options = folders if words[0] in cli.PIPELINES else []
    monkeypatch.setattr("cki_rec.pipelines.evaluate.run", lambda c: pytest.fail("it ran"))
    code, out, error = command(*words, *options)
    assert code == 2
    assert part in error
    assert out.strip() == "" or out.startswith("[1/")


def test_sweep_runs_every_job_and_counts_them(command, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cki_rec.pipelines.evaluate.run", lambda c: seen.append((c.seed, c.name)))
    code, _, error = command(
        "evaluate", "-m", "seed=1,2,3", "model.dropout=0,0.1", "name=n", f"runtime.out={tmp_path}"
    )
    assert (code, error) == (0, "")
    assert seen == [(seed, "n") for seed in (1, 2, 3) for _ in range(2)]
    assert os.environ[cli.SWEEP_VARIABLE].split()[0] == "6"
    (line,) = (tmp_path / "sweeps" / "n" / "members.jsonl").read_text().splitlines()
    assert json.loads(line)["jobs"] == 6
    assert JOB_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["seed=range(1,3)"], [(1, [200, 80]), (2, [200, 80])]),
        (["seed=choice(4,6)"], [(4, [200, 80]), (6, [200, 80])]),
        (
            ["seed=1,2", "model.hidden=[8],[16,4]"],
            [(s, h) for s in (1, 2) for h in ([8], [16, 4])],
        ),
    ],
)
def test_sweeps_over_ranges_and_lists(command, tmp_path, monkeypatch, words, seen):
    found = []
    run = "cki_rec.pipelines.train.run"
    monkeypatch.setattr(run, lambda config: found.append((config.seed, config.model.hidden)))
    assert command("train", "-m", *words, f"runtime.out={tmp_path}")[0] == 0
    assert found == seen


def test_a_sweep_of_training_begins_no_list_of_evaluations(command, tmp_path, monkeypatch):
    monkeypatch.setattr("cki_rec.pipelines.train.run", lambda config: None)
    assert command("train", "-m", "seed=1,2", "name=n", f"runtime.out={tmp_path}")[0] == 0
    assert not (tmp_path / "sweeps" / "n" / "members.jsonl").exists()


@pytest.mark.parametrize(
    ("raised", "code", "part"),
    [
        (UserError("the reason"), 2, "cki-rec: the reason"),
        (EnvironmentMismatchError("install it"), 2, "cki-rec: install it"),
        (RankLost("another is gone"), 1, "cki-rec: another is gone"),
        (Stopped("stopped after step 3"), 0, "cki-rec: stopped after step 3"),
        (KeyboardInterrupt(), 130, "interrupted; finished runs are kept"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "cannot write /x: No space"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "cannot write: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/y"), 2, "/y: Permission denied"),
    ],
)
def test_errors_of_a_run(command, monkeypatch, raised, code, part):
    def run(config):
        raise raised

    monkeypatch.setattr("cki_rec.pipelines.train.run", run)
    found, _, error = command("train")
    assert found == code
    assert part in error


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def run(config):
        raise OSError(errno.EBADF, "ours")

    monkeypatch.setattr("cki_rec.pipelines.train.run", run)
    with pytest.raises(OSError, match="ours"):
        cli.main(["train"])


def test_versions_are_checked_before_anything_runs(command, monkeypatch):
    monkeypatch.setattr("cki_rec.environment.installed_version", lambda name: None)
    monkeypatch.setattr("cki_rec.pipelines.train.run", lambda c: pytest.fail("it ran"))
    code, _, error = command("train")
    assert code == 2
    assert "make setup" in error


def test_command_line_is_kept_for_the_record(command, monkeypatch):
    monkeypatch.setattr("cki_rec.pipelines.train.run", lambda c: None)
    command("train", "merge.sources=[{seed: 1}]")
    assert os.environ["CKI_REC_COMMAND"] == "cki-rec train 'merge.sources=[{seed: 1}]'"


@pytest.mark.parametrize(
    ("number", "total", "ago", "text"),
    [
        (0, 12, 0, "[1/12]"),
        (3, 12, 45, "[4/12, 4.0 a minute, 2 min 15 s left]"),
        (2, 3, 20, "[3/3, 6.0 a minute, 10 s left]"),
        (4, 0, 0, "[5/0]"),
    ],
)
def test_sweep_position(monkeypatch, number, total, ago, text):
    monkeypatch.setattr(cli.time, "time", lambda: 1000.0 + ago)
    monkeypatch.setenv(cli.SWEEP_VARIABLE, f"{total} 1000.0")
    assert cli.sweep_position(number) == text


@pytest.mark.parametrize(
    ("params", "task", "jobs"),
    [
        ({}, ["seed=1"], 1),
        ({}, ["seed=1,2,3", "merge=average,evidence"], 6),
        ({"seed": "1,2", "suite": "seeds,shards"}, [], 4),
        ({"seed": "1,2", "suite": "seeds,shards"}, ["seed=5", "model=deepfm"], 2),
        ({"seed": "range(1,5)"}, ["model.dropout=choice(0,0.1,0.2)"], 12),
    ],
)
def test_sweep_progress_counts_jobs(tmp_path, params, task, jobs, monkeypatch):
    for variable in (cli.SWEEP_VARIABLE, JOB_VARIABLE):  # set by the callback, removed at the end
        monkeypatch.setenv(variable, "")
    config = OmegaConf.create(
        {
            "name": "n",
            "runtime": {"out": str(tmp_path)},
            "hydra": {"sweeper": {"params": params}, "overrides": {"task": task}},
        }
    )
    assert cli.num_jobs(config) == jobs
    callback = cli.SweepProgress()
    callback.on_multirun_start(config)
    total, start = os.environ[cli.SWEEP_VARIABLE].split()
    assert int(total) == jobs
    assert abs(time.time() - float(start)) < 60
    assert callback.on_job_end(config, result=1) is None
    with pytest.raises(AttributeError):
        _ = callback.surprise


def test_a_search_has_as_many_jobs_as_trials():
    config = OmegaConf.create({"hydra": {"sweeper": {"n_trials": 7, "params": {"seed": "1,2"}}}})
    assert cli.num_jobs(config) == 7


HEAVY = ["torch", "torchrec", "polars", "sklearn", "numpy", "pandas"]


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import cki_rec.cli", ["torch", "hydra", "omegaconf", "numpy", "polars", "torchrec"]),
        ("import cki_rec.cli as c; c.main(['--help'])", ["torch", "hydra", "omegaconf"]),
        ("import cki_rec.cli as c; c.main(['train', '--help'])", ["torch", "hydra", "omegaconf"]),
        ("import cki_rec.config", ["torch", "hydra", "numpy"]),
        *(
            (f"import cki_rec.cli as c; c.main({words!r}); print()", HEAVY)
            for words in (
                ["train", "train.epochs=many"],
                ["train", "train.epoch=3"],
                ["train", "-m", "seed=1", "train.epochs=many"],
                ["merge", "merge.method=tiess"],
                ["evaluate", "data.part=5"],
            )
        ),
    ],
)
def test_start_imports_nothing_heavy(code, absent):
    text = f"{code}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "cki_rec", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cki-rec: no pipeline 'trian': did you mean 'train'?")
