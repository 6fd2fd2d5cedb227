"""The documentation: links lead somewhere, generated pages are complete, every code block runs."""

from __future__ import annotations

import importlib.util
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from test_readme import ROOT, SMALL, blocks, places  # noqa: F401

from cki_rec.cli import main
from cki_rec.help_text import PIPELINES
from cki_rec.merging.methods import METHODS
from cki_rec.pipelines.references import REFERENCES

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
RUN = [page for page in PAGES if page.parent.name in ("tutorial", "how_to")]
MODULE = re.compile(r"# (\S+\.py)$")
FILE_NAME = re.compile(r"# (\S+\.yaml)$")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav_of(hooks) -> set[str]:
    return set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))


def test_the_site_shows_every_page(hooks):
    generated = {"reference/commands.md", "reference/options.md", "reference/methods.md"}
    listed = nav_of(hooks) | {"decisions/" + page.name for page in DOCS.glob("decisions/0*.md")}
    assert listed == {str(p.relative_to(DOCS)) for p in PAGES} | generated | set(hooks.COPIES)


def test_links_of_pages_lead_somewhere(hooks):
    made = nav_of(hooks)
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            target = (page.parent / link).resolve()
            assert target.exists() or str(target.relative_to(DOCS)) in made, (page, link)


def test_generated_pages_name_every_method_command_and_option(hooks):
    methods, commands, options = hooks.methods(), hooks.commands(), hooks.options()
    for name in [*METHODS, *REFERENCES]:
        assert f"\n## {name}\n" in methods
    for name in PIPELINES:
        assert f"\n## {name}\n" in commands
    for option in ("merge.refinement.steps", "train.batch_size", "data.split.by", "seed"):
        assert f"| `{option}` | " in options
    for option in ("model.sequence.length", "model.bottom.hidden", "evaluate.ranking.negatives"):
        assert f"| `{option}` | " in options  # of sections that are null in the default
    rows = [line for line in options.splitlines() if line.startswith("| `")]
    assert not [row for row in rows if len(re.findall(r"(?<!\\)\|", row)) != 4]


def test_formulas_of_docstrings_become_tex(hooks):
    methods = hooks.methods()
    assert r"\[ W = \frac{\sin((1-t)\Omega)}" in methods
    assert ":math:" not in methods
    assert ".. math::" not in methods


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]' (make docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference/methods/index.html").exists()


def write_clicks(path, items, seed):
    """Write a csv file of random clicks: the files that pages name."""
    draw = random.Random(seed)
    lines = ["clicked,user_id,product,price"]
    for _ in range(1000):
        user, item = draw.randrange(60), draw.choice(items)
        lines.append(f"{draw.random() < 0.4:d},{seed}u{user},p{item},{draw.random() * 90:.2f}")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, raw_zip, places, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Blocks run in their order, in a folder with trained models; others only show."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(places[0] / "runs")
    days = enumerate(("wednesday", "monday", "tuesday"), start=3)
    for seed, name in (*enumerate(("my", "north", "south", "west", "new")), *days):
        write_clicks(tmp_path / f"{name}.csv", range(5 * seed, 40), seed)
    (tmp_path / "clicks").mkdir()
    clicks = pl.read_csv(tmp_path / "my.csv").with_row_index("at")
    clicks.write_parquet(tmp_path / "clicks" / "monday.parquet")
    options = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    names: dict[str, object] = {}
    for info, lines in blocks(page.read_text()):
        text = "\n".join(lines)
        if info == "python":
            torch.manual_seed(0)
            exec(text, names)
            if named := MODULE.match(lines[0]):
                Path(named[1]).write_text(text)
        elif info == "yaml" and (named := FILE_NAME.match(lines[0])):
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(text)
        elif info == "bash":
            for words in (shlex.split(line) for line in lines if line.startswith("cki-rec ")):
                small = [s for s in SMALL if s.split("=")[0] not in "\n".join(words)]
                raw = [] if any(w.startswith("data") for w in words) else [f"data.raw={raw_zip}"]
                assert main([*words[1:], *raw, *options, *small]) == 0, capsys.readouterr().err
