"""The README: every command runs, on a tiny data set; python blocks run; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from cki_rec import project_root
from cki_rec.cli import main

ROOT = project_root()
README = (ROOT / "README.md").read_text()
SMALL = [
    "runtime.threads=1",
    "train.epochs=1",
    "train.batch_size=512",
    "model.hidden=[8]",
    "model.embedding_dim=4",
    "evaluate.bootstrap=100",
    "merge.refinement.steps=20",
    "merge.refinement.map_steps=10",
    "merge.refinement.routed_steps=20",
]


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Return the fenced blocks of a Markdown text: info string and lines."""
    found, info = [], None
    for line in text.splitlines():
        if not line.startswith("```"):
            if info is not None:
                found[-1][1].append(line)
        elif info is None:
            info = line.removeprefix("```").strip()
            found.append((info, []))
        else:
            info = None
    assert info is None, "a fence is open"
    return found


SHELL = [line for info, lines in blocks(README) if info in ("", "bash") for line in lines]
COMMANDS = [line for line in SHELL if line.startswith("cki-rec ")]
TARGETS = [line for line in SHELL if line.startswith("make ")]
PYTHON = ["\n".join(lines) for info, lines in blocks(README) if info == "python"]


def test_fences_are_paired():
    text = "a\n```bash\none\n```\nb\n```python\ntwo\n```\nc\n```\nthree\n```\n"
    assert blocks(text) == [("bash", ["one"]), ("python", ["two"]), ("", ["three"])]


def test_readme_has_commands():
    assert len(COMMANDS) >= 5
    assert TARGETS[:2] == ["make reproduce", "make test"]
    assert PYTHON


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.fixture(scope="module")
def places(raw_zip, tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder in which commands run, with trained models, and options that keep them there."""
    home = tmp_path_factory.mktemp("readme")
    options = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    for day, seed in (("monday", 11), ("tuesday", 12)):
        out = home / f"out-{day}"
        words = [f"seed={seed}", f"data.raw={raw_zip}", *options, *SMALL, f"runtime.out={out}"]
        assert main(["train", *words]) == 0
        (run,) = out.glob("train-*")
        (home / "runs").mkdir(exist_ok=True)
        run.rename(home / "runs" / day)
    return home, options


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, places, raw_zip, monkeypatch, capsys):
    home, options = places
    monkeypatch.chdir(home)
    words = shlex.split(command)[1:]
    raw = f"data.raw={raw_zip}"
    if any(word.startswith("data=synthetic") for word in words):
        raw = f"data.raw={home}"
    else:  # other data sets are not at hand
        words = [w for w in words if not w.startswith("data")]
    small = [s for s in SMALL if s.split("=")[0] not in command]
    if words[0] == "report":
        evaluate = ["evaluate", "suite=shards", "merge=average", words[1]]
        assert main([*evaluate, raw, *options, *small]) == 0
    assert main([*words, raw, *options, *small]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, capsys):
    torch.manual_seed(1)
    base, *models = (nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 1)) for _ in range(3))
    names = {
        "models": models,
        "base": base,
        "counts": [{"0.weight": torch.arange(5) + k} for k in range(2)],
        "module": models[0],
        "batches": [torch.randint(5, (40, 2)) for _ in range(2)],
        "validation_auc": lambda params: float(params["1.bias"]),
    }
    exec(code, names)
    assert names["result"].recipe in capsys.readouterr().out


def test_targets_exist():
    for command in TARGETS:
        words = [*command.replace("...", "x").split(), "-n"]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
