"""Which packages fit together, and what `make setup` runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from cki_rec import environment
from cki_rec.environment import (
    FBGEMM,
    TORCH,
    TORCHREC,
    EnvironmentMismatchError,
    check_versions,
    detect_accelerator,
    install,
    installed_version,
)

GOOD = {"torch": TORCH, "torchrec": TORCHREC, "fbgemm-gpu-cpu": FBGEMM}


def check_with(monkeypatch, installed) -> str:
    monkeypatch.setattr(environment, "installed_version", installed.get)
    monkeypatch.setattr(environment, "detect_accelerator", lambda: "cpu")
    with pytest.raises(EnvironmentMismatchError) as caught:
        check_versions()
    message = str(caught.value)
    assert "\n" not in message
    assert "make setup" in message
    assert f"pip install torch=={TORCH} fbgemm-gpu-cpu=={FBGEMM}" in message
    assert f"pip install --no-deps torchrec=={TORCHREC}" in message
    return message


@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu-cpu", "fbgemm-gpu"])
def test_either_fbgemm_fits(monkeypatch, fbgemm):
    installed = {"torch": TORCH, "torchrec": TORCHREC, fbgemm: FBGEMM}
    monkeypatch.setattr(environment, "installed_version", installed.get)
    check_versions()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"torch": None}, f"found torch missing, torchrec {TORCHREC}, fbgemm-gpu-cpu {FBGEMM}."),
        ({"torch": "2.0.0"}, "found torch 2.0.0,"),
        ({"torchrec": None}, "torchrec missing"),
        ({"torchrec": "1.0"}, "torchrec 1.0,"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm missing"),
        ({"fbgemm-gpu-cpu": "1.0"}, "fbgemm-gpu-cpu 1.0"),
        ({"fbgemm-gpu": FBGEMM}, f"fbgemm-gpu-cpu {FBGEMM}, fbgemm-gpu {FBGEMM}"),
        ({"fbgemm-gpu": "1.0", "fbgemm-gpu-cpu": None}, "fbgemm-gpu 1.0"),
    ],
)
def test_mismatch_says_what_was_found_and_what_to_run(monkeypatch, changes, part):
    assert part in check_with(monkeypatch, {**GOOD, **changes})


def test_installed_version_drops_the_local_part(monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.13.0+cpu")
    assert installed_version("torch") == "2.13.0"


def test_installed_version_of_nothing():
    assert installed_version("no-such-package-of-ours") is None


def test_this_environment_fits():
    check_versions()


@pytest.mark.parametrize(
    ("script", "accelerator"),
    [
        (None, "cpu"),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "cuda"),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "cpu"),
        ("echo 'GPU 0: NVIDIA'; exit 9", "cpu"),
        ("echo 'No devices found'", "cpu"),
    ],
)
def test_accelerator_follows_the_driver(monkeypatch, tmp_path, script, accelerator):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    assert detect_accelerator() == accelerator


@pytest.fixture
def commands(monkeypatch):
    """What install() would run: a list of (what, words); nothing is run."""
    found = []

    def run(words, **options):
        if "-c" in words:  # asks for the version of an interpreter
            text = f"{sys.version_info.major} {sys.version_info.minor}\n"
            return subprocess.CompletedProcess(words, 0, stdout=text)
        found.append([str(word) for word in words])
        return subprocess.CompletedProcess(words, 0, stdout="")

    def create(folder, **options):
        found.append(["venv", str(folder), options["clear"]])
        python = Path(folder) / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setattr(environment.venv, "create", create)
    monkeypatch.setattr(environment, "detect_accelerator", lambda: "cuda")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return found


@pytest.mark.parametrize(
    ("accelerator", "other"), [("cpu", "fbgemm-gpu"), ("cuda", "fbgemm-gpu-cpu")]
)
def test_install_runs_pip_in_the_new_environment(commands, tmp_path, capsys, accelerator, other):
    folder = tmp_path / "env"
    install(folder, accelerator)
    create, uninstall, project, torchrec = commands
    assert create == ["venv", str(folder), True]
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    assert uninstall == [*pip, "uninstall", "--quiet", "--yes", other]
    root = Path(environment.__file__).resolve().parents[1]
    quiet = ["install", "--quiet", "--disable-pip-version-check"]
    assert project == [*pip, *quiet, "--editable", f"{root}[train,report,{accelerator},dev]"]
    assert torchrec == [*pip, *quiet, "--no-deps", f"torchrec=={TORCHREC}"]
    assert f"setup: {accelerator} packages (as asked)" in capsys.readouterr().out


def test_install_the_second_time_does_nothing(commands, tmp_path, capsys):
    install(tmp_path, "cpu")
    commands.clear()
    install(tmp_path, "cpu")
    assert commands == []
    assert f"setup: {tmp_path} is up to date (cpu, as asked)" in capsys.readouterr().out


def test_auto_asks_the_driver(commands, tmp_path, capsys):
    install(tmp_path, "auto")
    assert commands[2][-1].endswith("[train,report,cuda,dev]")
    assert "NVIDIA driver found" in capsys.readouterr().out


def test_another_accelerator_installs_into_the_same_environment(commands, tmp_path):
    install(tmp_path, "cpu")
    commands.clear()
    install(tmp_path, "cuda")
    assert [words[0] for words in commands] == [str(tmp_path / "bin" / "python")] * 3
    assert commands[0][-1] == "fbgemm-gpu-cpu"


def test_another_python_makes_the_environment_again(commands, tmp_path, monkeypatch):
    install(tmp_path, "cpu")
    commands.clear()
    monkeypatch.setattr(environment, "_minor", lambda python: (3, 9))
    (tmp_path / "cki-rec-setup").unlink()
    install(tmp_path, "cpu")
    assert commands[0] == ["venv", str(tmp_path), True]


def test_index_of_the_user_is_asked_too(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install(tmp_path, "cpu")
    for words in commands[2:]:
        assert words[words.index("--extra-index-url") + 1] == "https://example.org/cpu"


def test_a_failed_installation_leaves_no_stamp(commands, tmp_path, monkeypatch):
    install(tmp_path, "cpu")
    working = environment.subprocess.run

    def fail(words, **options):
        if "--no-deps" in words:
            raise subprocess.CalledProcessError(1, words)
        return working(words, **options)

    monkeypatch.setattr(environment.subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        install(tmp_path, "cuda")
    assert not (tmp_path / "cki-rec-setup").exists()


def test_minor_of_what_does_not_run(tmp_path):
    assert environment._minor(tmp_path / "nothing") == ()
    assert environment._minor(Path(sys.executable)) == sys.version_info[:2]


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (None, 0, ""),
        (EnvironmentMismatchError("not so"), 2, "setup: not so"),
        (subprocess.CalledProcessError(1, ["pip", "x"]), 1, "setup: failed: pip x"),
    ],
)
def test_main_exit_codes(monkeypatch, capsys, raised, code, text):
    def fake(folder, accelerator):
        assert (folder, accelerator) == (Path("env"), "auto")
        if raised:
            raise raised

    monkeypatch.setattr(environment, "install", fake)
    monkeypatch.setattr(sys, "argv", ["environment.py", "env"])
    assert environment.main() == code
    assert capsys.readouterr().err.strip() == text


def test_unknown_accelerator(commands, tmp_path):
    with pytest.raises(EnvironmentMismatchError, match="accelerator 'tpu': auto, cpu or cuda"):
        install(tmp_path, "tpu")
    assert commands == []


def test_old_python_is_refused(monkeypatch, capsys):
    class Old(tuple):
        __slots__ = ()

    monkeypatch.setattr(sys, "version_info", Old((3, 9, 1)))
    monkeypatch.setattr(environment, "install", lambda *a: pytest.fail("it installed"))
    assert environment.main() == 2
    assert "3.10 to 3.13 needed" in capsys.readouterr().err
