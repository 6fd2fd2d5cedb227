"""CONTRIBUTING, followed literally in a copy of the checkout: four additions, no other change."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cki_rec import project_root

ROOT = project_root()
STEP = re.compile(r"^([^\n]+:)\n```(\w*)\n(.*?)```", flags=re.S | re.M)
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "encoded", "__pycache__", "*.egg-info", "docs")
TESTS = {
    "merge method": ["tests/contract/test_methods.py", "smoothed or every_method or declarations"],
    "model": ["tests/contract/test_models.py tests/contract/test_symmetries.py", "pooled"],
    "data format": ["tests/contract/test_bad_raw.py", "clicklog"],
    "metric": ["tests/unit/test_metrics.py tests/numerical/test_metrics_reference.py", "brier"],
}
"""Recipe -> the contract tests of its kind."""


def apply(recipe: str, root: Path) -> set[str]:
    """Apply every step of a recipe; return the files that it names."""
    named: set[str] = set()
    path = ""
    for intro, _, code in STEP.findall(recipe):
        quoted = re.findall(r"`([^`]+)`", intro)
        path = next((word for word in quoted if "/" in word), path)
        named.add(path)
        target = root / path
        if "new file" in intro:
            assert not target.exists(), path
            target.write_text(code)
            continue
        text = target.read_text()
        for line in quoted:
            if line.startswith("from "):
                text = text.replace("\nfrom cki_rec", f"\n{line}\nfrom cki_rec", 1)
        table = next((word for word in quoted if word.isupper()), None)
        if table is None:  # a function, before the table that the next step names
            text = text.replace("\n\nMETRICS", f"\n\n{code}\n\nMETRICS", 1)
        else:
            start = re.search(
                rf"^{table}\b[^\n]*= \{{\n(?:    \w+\.name: \w+\n    for \w+ in \(\n)?", text, re.M
            )
            assert start, f"{path} has no table {table}"
            text = text[: start.end()] + code + text[start.end() :]
        target.write_text(text)
    return named


def digests(root: Path) -> dict[str, str]:
    files = [
        path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout in which all recipes are applied."""
    root = tmp_path_factory.mktemp("contributing") / "checkout"
    shutil.copytree(ROOT, root, ignore=LEFT_OUT)
    return root


@pytest.mark.slow
def test_four_additions_change_nothing_but_the_named_places(copy):
    before = digests(copy)
    titles = re.split(r"^## Add a ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)[1:]
    recipes = {text.partition("\n")[0]: re.split(r"^## ", text, flags=re.M)[0] for text in titles}
    assert set(recipes) == set(TESTS)
    named = set().union(*(apply(recipe, copy) for recipe in recipes.values()))
    after = digests(copy)
    assert {path for path in after if after[path] != before.get(path)} == named
    paths = [path for paths, _ in TESTS.values() for path in paths.split()]
    selected = " or ".join([*(words for _, words in TESTS.values()), "table_row", "arrows"])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            *command,
            *paths,
            "tests/test_architecture.py",
            "-k",
            f"{selected} or table_row or arrows",
        ],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 40
