"""Every command of the README runs: on a tiny data set, small models, the same words."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cki_rec import project_root
from cki_rec.cli import main

ROOT = project_root()
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:bash)?\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("cki-rec ")]
TARGETS = [line for line in LINES if line.startswith("make ")]
SMALL = [
    "runtime.threads=1",
    "train.epochs=1",
    "train.batch_size=512",
    "model.hidden=[8]",
    "model.embedding_dim=4",
    "evaluate.bootstrap=100",
]


def test_readme_has_commands():
    assert len(COMMANDS) >= 10
    assert TARGETS[:2] == ["make reproduce", "make test"]


def test_readme_is_short():
    assert len(README.splitlines()) < 200


def test_commands_run(raw_zip, tmp_path, monkeypatch, capsys):
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        raw = f"data.raw={raw_zip}"
        if "data=synthetic_criteo" in words:
            raw = f"data.raw={tmp_path}"
        else:
            words = [w for w in words if not w.startswith("data")]
        for day, seed in (("monday", 11), ("tuesday", 12)):
            folder = tmp_path / "runs" / day
            if "runs/monday" in command and not folder.exists():
                assert main(["train", f"seed={seed}", f"data.raw={raw_zip}", *places, *SMALL]) == 0
                newest = max(
                    (tmp_path / "out").glob("train-*"), key=lambda p: p.stat().st_mtime_ns
                )
                folder.parent.mkdir(exist_ok=True)
                newest.rename(folder)
        small = [s for s in SMALL if s.split("=")[0] not in command]
        assert main([*words, raw, *places, *small]) == 0, command
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", TARGETS)
def test_targets_exist(command):
    words = [*command.replace("...", "x").split(), "-n"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / Path(link)).exists()
