"""The rules of ARCHITECTURE.md: who imports whom, sizes, a configuration that holds together."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import cki_rec
from cki_rec import environment
from cki_rec.config import parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "cki_rec").rglob("*.py"))
}
ROOT_NAMES = {"__version__", "project_root", "COMMAND_VARIABLE"}
MAY_IMPORT = {
    "config": set(),
    "environment": set(),
    "progress": set(),
    "merging": set(),
    "evaluation": set(),
    "data": {"config", "progress"},
    "models": {"config", "data.schema", "merging.symmetry"},
    "checkpoints": {"config", "data.schema", "data.provenance", "merging.params"},
    "engine": {"config", "environment", "progress", "data", "models", "merging", "checkpoints"},
    "pipelines": {
        *("config", "environment", "data", "models"),
        *("merging", "checkpoints", "engine", "evaluation"),
    },
    "cli": {"config", "environment", "pipelines", "engine"},
    "__main__": {"cli"},
}
"""Part of cki_rec -> what it may import besides itself and the names of cki_rec itself."""
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path != CONF / "model" / "default.yaml"  # no model: what all of them start from
)
NOT_BOARDS = [choice for choice in CHOICES if not choice[1].startswith("bars_")]
"""Experiments on boards are composed by unit/test_experiments.py."""
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def imports(path: Path) -> set[str]:
    """Return the dotted modules, and names of cki_rec itself, that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join([*package, *([module] if module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
            if module == "cki_rec":
                found.discard("cki_rec")
                found |= {name.removeprefix("cki_rec.") for name in names if name not in MODULES}
    return found


def ours(path: Path) -> set[str]:
    return {n.removeprefix("cki_rec.") for n in imports(path) if n.startswith("cki_rec.")}


def part_of(module: str) -> str:
    return module.removeprefix("cki_rec.").split(".")[0]


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_part_has_a_row():
    assert {part_of(module) for module in MODULES} == {*MAY_IMPORT, "cki_rec"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    if module == "cki_rec":
        assert not ours(MODULES[module])
        return
    part = part_of(module)
    for name in ours(MODULES[module]):
        allowed = {*MAY_IMPORT[part], part}
        assert any(is_within(name, package) for package in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_only_known_names_come_from_the_root(module):
    names = {
        alias.name
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "cki_rec"
        for alias in node.names
        if f"cki_rec.{alias.name}" not in MODULES
    }
    assert names <= ROOT_NAMES


@pytest.mark.parametrize("module", MODULES)
def test_torchrec_and_processes_stay_in_the_engine(module):
    may_shard = part_of(module) == "engine"
    for name in imports(MODULES[module]):
        if is_within(name, "torchrec") or is_within(name, "fbgemm_gpu"):
            assert may_shard or module == "cki_rec.models.embeddings", f"{module} imports {name}"
        if is_within(name, "torch.distributed"):
            assert may_shard, f"{module} imports {name}"
    text = MODULES[module].read_text()
    assert may_shard or "torch.distributed" not in re.sub(r'""".*?"""', "", text, flags=re.S)


@pytest.mark.parametrize("module", ["cki_rec.config", "cki_rec.cli", "cki_rec.environment"])
def test_start_imports_no_torch_at_the_top(module):
    tree = ast.parse(MODULES[module].read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(n, "module", None) or n.names[0].name for n in top}
    assert not {n for n in names if is_within(n, "torch") or is_within(n, "hydra")}


@pytest.mark.parametrize("module", MODULES)
def test_only_evaluate_can_read_labels_of_test_rows(module):
    """``labels`` has NaN there; the column behind it is named in two modules, its file in data."""
    if "data.test_labels" in ours(MODULES[module]):
        assert module == "cki_rec.pipelines.evaluate"
    text = MODULES[module].read_text()
    named = {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
    assert "_label" not in named or module in ("cki_rec.data.dataset", "cki_rec.data.test_labels")
    if part_of(module) != "data":
        assert "_columns" not in named
        assert "label.npy" not in text


def test_imports_have_no_cycle():
    targets = {m: {f"cki_rec.{name}" for name in ours(path)} for m, path in MODULES.items()}
    remaining = {module: names & set(MODULES) for module, names in targets.items()}
    while free := [m for m, targets in remaining.items() if not targets & set(remaining)]:
        for module in free:
            del remaining[module]
    assert not remaining, f"cycle among {sorted(remaining)}"


def test_the_lists_of_imports_are_not_empty():
    assert "config" in ours(MODULES["cki_rec.engine.trainer"])
    assert "torchrec.modules.embedding_modules" in imports(MODULES["cki_rec.models.embeddings"])


SOURCES = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 420


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_conf_instantiates_nothing_but_the_callback():
    found = [
        line.split("#")[0].strip()
        for path in CONF.rglob("*.yaml")
        for line in path.read_text().splitlines()
        if "_target_" in line
    ]
    assert found == ["_target_: cki_rec.cli.SweepProgress"]


@pytest.mark.parametrize(("group", "choice"), NOT_BOARDS)
def test_every_choice_composes_and_parses(compose, group, choice):
    config = parse(compose(f"{group}={choice}"))
    assert config.name == (choice if group == "experiment" else "adhoc")


def test_conf_has_choices():
    assert ("model", "deepfm") in CHOICES
    assert EXPERIMENTS


def sweep_of(name: str) -> list[tuple[str, ...]]:
    """Return the jobs of an experiment as lists of overrides, expanded by Hydra's own parser."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    tree = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    params = tree.hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    values = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [f"{o.key_or_group}={o.get_value_element_as_str()}"]
        for o in overrides
    ]
    return list(itertools.product(*values))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_sweep_expands_and_its_jobs_parse(compose, name):
    jobs = sweep_of(name)
    assert len(set(jobs)) == len(jobs) > 0
    # every value of every axis is met, not every combination: the first job with one value changed
    # (but only the last of the seeds, which are numbers alike)
    axes = [list(dict.fromkeys(values)) for values in zip(*jobs, strict=True)]
    one_changed = {
        tuple(value if i == axis else first for i, first in enumerate(jobs[0]))
        for axis, values in enumerate(axes)
        for value in values
        if not value.startswith("seed=")
    }
    for job in dict.fromkeys([jobs[0], jobs[-1], *sorted(one_changed)]):
        config = parse(compose(f"experiment={name}", *job))
        assert config.name == name


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_values_are_explained(path):
    lines = path.read_text().splitlines()
    is_variant = "defaults:" in lines or lines[0].startswith("# @package")
    if is_variant:  # it changes values that its default explains; a first comment says what it is
        assert next(line for line in lines if not line.startswith("# @package")).startswith("# ")
        return
    for number, line in enumerate(lines, start=1):
        is_value = re.match(r"\s*[\w.]+:\s*[^\s#]", line)
        assert not is_value or " # " in line, f"{path}:{number}: {line}"


def test_labels_equal_file_names():
    for path in (CONF / "merge").glob("*.yaml"):
        label = OmegaConf.load(path).label
        assert label == ("cki" if path.stem == "default" else path.stem)


def test_every_table_row_has_a_file():
    from cki_rec.data.raw.formats import FORMATS
    from cki_rec.merging.registry import METHODS
    from cki_rec.models import MODELS

    def values(group, key):
        trees = [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")]
        found = [tree for tree in trees if key in tree and not OmegaConf.is_missing(tree, key)]
        return {tree[key] for tree in found}  # others are variants of another file

    assert values("merge", "method") == set(METHODS)
    assert values("model", "name") == set(MODELS)
    assert values("data", "format") == set(FORMATS)


def test_gate_kinds_and_partitions_are_those_of_the_code():
    from cki_rec.config import CHOICES as WORDS
    from cki_rec.data.encoding.partition import KINDS as PARTITIONS
    from cki_rec.merging.methods.cki.gate import KINDS as GATES

    assert set(WORDS["merge.gate.kind"]) == set(GATES)
    assert set(WORDS["data.partition.by"]) == set(PARTITIONS)


def test_changelog_names_this_version():
    path = ROOT / "CHANGELOG.md"
    assert path.exists()
    titles = re.findall(r"^## \[?([^\]\s]+)\]?", path.read_text(), flags=re.M)
    assert titles, "CHANGELOG.md has no '## version' title"
    newest = [title for title in titles if title.lower() != "unreleased"]
    assert titles[0].lower() == "unreleased" or titles[0] == cki_rec.__version__
    assert not newest or newest[0] == cki_rec.__version__


@pytest.mark.skipif(tomllib is None, reason="tomllib is in the standard library from Python 3.11")
def test_pins_are_equal_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert f"torch=={environment.TORCH}" in project["dependencies"]
    for accelerator, package in environment.FBGEMM_PACKAGES.items():
        assert f"{package}=={environment.FBGEMM}" in extras[accelerator]
    assert f"torchrec=={environment.TORCHREC}" in extras["cuda"]
    assert not [line for line in extras["cpu"] if line.startswith("torchrec")]


def test_minor_versions_are_equal_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10,<3.14"' in text
    assert (
        "(3, 10) <= sys.version_info[:2] <= (3, 13)"
        in (ROOT / "cki_rec" / "environment.py").read_text()
    )
    assert "(3, 10) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()
