"""The rules of ARCHITECTURE.md: who imports whom, names, sizes, a consistent configuration."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from functools import cache

import pytest
from omegaconf import OmegaConf
from samples import ROOT, slow_but

import cki_rec
from cki_rec import environment
from cki_rec.config import parse

CONF = ROOT / "conf"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "cki_rec").rglob("*.py"))
}
ROOT_NAMES = {"__version__", "project_root", "COMMAND_VARIABLE", "JOB_VARIABLE"}
MAY_IMPORT = {
    "config": set(),
    "environment": set(),
    "progress": set(),
    "files": set(),
    "merging": set(),
    "evaluation": set(),
    "data": {"config", "progress", "files"},
    "plugins": {"config"},
    "models": {"config", "data.schema", "merging.symmetry", "plugins"},
    "checkpoints": {"config", "files", "data.schema", "data.provenance", "merging.params"},
    "engine": {
        *("config", "environment", "progress", "files", "data", "models", "merging"),
        "checkpoints",
    },
    "pipelines": {
        *("config", "environment", "files", "data", "models", "merging", "checkpoints"),
        *("engine", "evaluation", "plugins", "progress", "search_path", "sweep_jobs"),
    },
    "search_path": set(),
    "flags": {"config", "search_path"},
    "overrides": {"config"},
    "sweep_jobs": set(),
    "help_text": {"search_path"},
    "processes": {"config", "engine"},
    "cli": {
        *("config", "environment", "flags", "help_text", "overrides", "search_path"),
        *("sweep_jobs", "pipelines", "engine", "plugins", "processes"),
    },
    "__main__": {"cli", "processes"},
    "notebook": {
        *("checkpoints", "cli", "config", "data", "engine", "evaluation", "help_text"),
        *("pipelines", "plugins", "search_path"),
    },
}
"""Part of cki_rec -> parts that it may import, besides itself and the names of cki_rec itself."""
LAYOUT = {
    *("merging/api.py", "merging/registry.py", "merging/params.py", "merging/mixing.py"),
    *("merging/symmetry.py", "merging/alignment.py", "merging/projection.py", "merging/repair.py"),
    *("merging/assessment.py", "merging/barrier.py", "pipelines/assess.py"),
    *("merging/vocabulary.py", "merging/statistics.py", "merging/methods/cki/method.py"),
    *("models/embeddings.py", "data/schema.py", "data/dataset.py", "data/loader.py"),
    *("data/provenance.py", "data/test_labels.py", "data/raw/delimited.py"),
    *("data/encoding/store.py", "checkpoints/checkpoint.py", "engine/trainer.py"),
    *("evaluation/metrics.py", "evaluation/report.html.j2", "pipelines/merge.py"),
    *("pipelines/sources.py", "pipelines/preflight.py", "pipelines/predictions.py"),
}
CHOICES = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path != CONF / "model" / "default.yaml"  # no model: options from which all models start
)
NOT_BOARDS = [choice for choice in CHOICES if not choice[1].startswith("bars_")]
"""Choices without the experiments on boards, which unit/test_experiments.py composes."""
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str) -> set[str]:
    """Return the dotted modules, and names of cki_rec itself, that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            source = node.module or ""
            imported = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else source for name in imported}
            if source == "cki_rec":
                names.discard("cki_rec")
                names |= {n.removeprefix("cki_rec.") for n in imported if n not in MODULES}
    return names


def ours(module: str) -> set[str]:
    return {n.removeprefix("cki_rec.") for n in imports(module) if n.startswith("cki_rec.")}


def part_of(module: str) -> str:
    return module.removeprefix("cki_rec.").split(".")[0]


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_layout_exists():
    assert not [path for path in sorted(LAYOUT) if not (ROOT / "cki_rec" / path).is_file()]


def test_every_part_has_a_row():
    assert {part_of(module) for module in MODULES} == {*MAY_IMPORT, "cki_rec"}


def test_imports_follow_the_arrows():
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if module != "cki_rec"
        for name in ours(module)
        for part in [part_of(module)]
        if not any(is_within(name, package) for package in (*MAY_IMPORT[part], part))
    ]
    assert not wrong


def test_the_root_imports_the_core_for_type_checkers_only():
    assert {part_of(f"cki_rec.{name}") for name in ours("cki_rec")} == {"merging"}
    body = tree_of("cki_rec").body
    plain = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", "") for node in plain} <= {
        *("__future__", "importlib", "pathlib", "typing"),
    }


def test_the_core_needs_torch_numpy_and_scipy_only():
    """``contract/test_front.py`` runs the library where nothing else can be imported."""
    allowed = {"cki_rec", "torch", "numpy", "scipy", *sys.stdlib_module_names}
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if part_of(module) == "merging"
        for name in imports(module)
        if name.split(".")[0] not in allowed
    ]
    assert wrong == ["cki_rec.merging.assessment imports pandas"]  # inside Assessment.frame()


def test_only_known_names_come_from_the_root():
    wrong = [
        f"{module}: {alias.name}"
        for module, tree in zip(MODULES, map(tree_of, MODULES), strict=True)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "cki_rec"
        for alias in node.names
        if f"cki_rec.{alias.name}" not in MODULES and alias.name not in ROOT_NAMES
    ]
    assert not wrong


def test_torchrec_and_processes_stay_in_the_engine():
    wrong = []
    for module in MODULES:
        if part_of(module) == "engine":
            continue
        for name in imports(module):
            is_lookup = is_within(name, "torchrec") or is_within(name, "fbgemm_gpu")
            is_process = is_within(name, "torch.distributed")
            is_format = is_within(name, "torch.distributed.checkpoint")
            if (
                (is_lookup and module != "cki_rec.models.embeddings")
                or (is_process and not is_format)
                or (is_format and part_of(module) != "checkpoints")
            ):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_the_start_imports_no_torch_at_the_top():
    wrong = [
        f"{module} imports {name}"
        for module in ("cki_rec.config", "cki_rec.cli", "cki_rec.environment")
        for node in tree_of(module).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
        if is_within(name, "torch") or is_within(name, "hydra")
    ]
    assert not wrong


def test_only_evaluate_can_read_labels_of_test_rows():
    """``labels`` has NaN there; two modules name the column behind it, only data its file."""
    wrong = []
    for module, path in MODULES.items():
        if "data.test_labels" in ours(module) and module != "cki_rec.pipelines.evaluate":
            wrong.append(f"{module} imports test_labels")
        names = {n.attr for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute)}
        if "_label" in names and module not in (
            "cki_rec.data.dataset",
            "cki_rec.data.test_labels",
        ):
            wrong.append(f"{module} names _label")
        if part_of(module) != "data" and ("_columns" in names or "label.npy" in path.read_text()):
            wrong.append(f"{module} names the column of labels")
    assert not wrong


def strings_compared(tree: ast.AST) -> set[str]:
    """Return the strings that code branches on: compared, matched, or keys of a dictionary."""
    nodes = [node for node in ast.walk(tree)]
    parts = [p for n in nodes if isinstance(n, ast.Compare) for p in (n.left, *n.comparators)]
    parts += [p.value for p in nodes if isinstance(p, ast.MatchValue)]
    parts += [key for n in nodes if isinstance(n, ast.Dict) for key in n.keys if key is not None]
    parts += [e for p in parts if isinstance(p, ast.Tuple | ast.List | ast.Set) for e in p.elts]
    return {p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)}


ALLOWED_WORDS = {
    ("cki_rec.config.parsing", "evidence"),  # merge.evidence, the measure of trained rows
    *((f"cki_rec.data.encoding.{name}", "random") for name in ("partition", "split")),
    ("cki_rec.engine.embeddings", "lr"),  # torch's name of the learning rate
    ("cki_rec.engine.resume", "average"),  # the moving average of weights
    ("cki_rec.merging.api", "fisher"),  # an input of methods
    ("cki_rec.merging.registry", "fisher"),
    ("cki_rec.pipelines.method_list", "fisher"),
    ("cki_rec.merging.steps", "evidence"),  # rules of merge.tables and merge.biases
    ("cki_rec.merging.steps", "first"),
    ("cki_rec.pipelines.merge_inputs", "evidence"),
    ("cki_rec.pipelines.preflight", "evidence"),
    ("cki_rec.pipelines.foreign", "evidence"),  # the measure of trained rows in a merge card
    ("cki_rec.pipelines.teacher", "random"),  # rows of a refinement
    ("cki_rec.pipelines.merge_inputs", "first"),
}
"""Module and word that is also the name of a method or model, and stands for something else."""


def test_no_module_branches_on_the_name_of_a_method_or_model():
    from cki_rec.merging.methods import METHODS
    from cki_rec.models import MODELS

    wrong = []
    for module in MODULES:
        words = strings_compared(tree_of(module))
        if not is_within(module, "cki_rec.merging.methods"):
            wrong += [(module, word) for word in words & set(METHODS)]
        if not is_within(module, "cki_rec.models"):
            wrong += [(module, word) for word in words & set(MODELS)]
    assert not set(wrong) - ALLOWED_WORDS
    assert strings_compared(ast.parse("x == 'a'; {'b': 1}; y in ('c',); z['d']")) == set("abc")


def test_imports_have_no_cycle():
    remaining = {m: {f"cki_rec.{name}" for name in ours(m)} & set(MODULES) for m in MODULES}
    while free := [m for m, targets in remaining.items() if not targets & set(remaining)]:
        for module in free:
            del remaining[module]
    assert not remaining, f"cycle among {sorted(remaining)}"


def test_the_lists_of_imports_are_not_empty():
    assert "config" in ours("cki_rec.engine.trainer")
    assert "torchrec.modules.embedding_modules" in imports("cki_rec.models.embeddings")


def test_files_are_short():
    paths = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    sizes = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}
    assert not {path: size for path, size in sizes.items() if size > 420}


def test_conf_instantiates_nothing_but_the_callback():
    targets = [
        line.split("#")[0].strip()
        for path in CONF.rglob("*.yaml")
        for line in path.read_text().splitlines()
        if "_target_" in line
    ]
    assert targets == ["_target_: cki_rec.cli.SweepProgress"]


def test_every_choice_composes_and_parses(compose):
    """One choice of every group at a time; ``test_every_sweep_expands`` composes the sweeps."""
    groups: dict[str, list[str]] = {}
    for group, choice in NOT_BOARDS:
        if group != "experiment":
            groups.setdefault(group, []).append(f"{group}={choice}")
    for choices in itertools.zip_longest(*groups.values()):
        chosen = [choice for choice in choices if choice is not None]
        assert parse(compose(*chosen)).name == "adhoc", chosen


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


@pytest.mark.parametrize("name", slow_but(["quickstart", "paper_methods"], EXPERIMENTS))
def test_every_sweep_expands_and_its_jobs_parse(compose, name):
    jobs = sweep_of(name)
    assert len(set(jobs)) == len(jobs) > 0
    # every value of every axis is met, not every combination: job n has the n-th of each axis
    axes = [list(dict.fromkeys(values)) for values in zip(*jobs, strict=True)]
    lengths = [len(values) for values in axes if not values[0].startswith("seed=")]
    for number in range(max(lengths, default=1)):
        job = [values[min(number, len(values) - 1)] for values in axes]
        config = parse(compose(f"experiment={name}", *job))
        assert config.name == name


def test_values_are_explained():
    wrong = []
    for path in sorted(CONF.glob("*/*.yaml")):
        lines = path.read_text().splitlines()
        if "defaults:" in lines or lines[0].startswith("# @package"):  # its default explains them
            title = next(line for line in lines if not line.startswith("# @package"))
            wrong += [] if title.startswith("# ") else [f"{path}: no comment"]
            continue
        wrong += [
            f"{path}:{number}: {line}"
            for number, line in enumerate(lines, start=1)
            if re.match(r"\s*[\w.]+:\s*[^\s#]", line) and " # " not in line
        ]
    assert not wrong


def test_labels_equal_file_names():
    for path in (CONF / "merge").glob("*.yaml"):
        assert OmegaConf.load(path).label == path.stem


def test_every_table_row_has_a_file():
    from cki_rec.data.raw.formats import FORMATS
    from cki_rec.merging.methods import METHODS
    from cki_rec.merging.search import AUTO
    from cki_rec.models import MODELS
    from cki_rec.pipelines.references import REFERENCES

    def values(group, key):
        trees = [OmegaConf.load(path) for path in (CONF / group).glob("*.yaml")]
        declared = [tree for tree in trees if key in tree and not OmegaConf.is_missing(tree, key)]
        return {tree[key] for tree in declared}  # others are variants of another file

    assert values("merge", "method") == {*METHODS, *REFERENCES, AUTO}
    assert values("model", "name") == set(MODELS)
    assert values("data", "format") == set(FORMATS)


def test_words_of_options_are_those_of_the_code():
    from typing import get_args

    from cki_rec.config import Synthetic, choices
    from cki_rec.data.raw.click_model import LAYOUTS
    from cki_rec.merging.methods.cki.gate import KINDS
    from cki_rec.merging.methods.cki.method import Gate

    assert set(get_args(Gate)) == set(KINDS)
    assert set(choices(Synthetic, "layout")) == set(LAYOUTS)


def test_changelog_names_this_version():
    path = ROOT / "CHANGELOG.md"
    assert path.exists()
    titles = re.findall(r"^## \[?([^\]\s]+)\]?", path.read_text(), flags=re.M)
    assert titles, "CHANGELOG.md has no '## version' title"
    newest = [title for title in titles if title.lower() != "unreleased"]
    assert titles[0].lower() == "unreleased" or titles[0] == cki_rec.__version__
    assert not newest or newest[0] == cki_rec.__version__


def test_pins_are_equal_everywhere():
    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [r.split(">")[0] for r in project["dependencies"]] == ["torch", "numpy", "scipy"]
    assert f"torch=={environment.TORCH}" in extras["train"]
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
