"""experiments/zoo: the steps and the table without foreign packages, and one stock model."""

import importlib.util
import re
import sys

import pytest
import torch
from torch import nn

import cki_rec
from cki_rec import project_root

ZOO = project_root() / "experiments" / "zoo"


@pytest.fixture(scope="module")
def run():
    """The script; its neighbors are imported by plain names, as when it runs."""
    names = ("entries", "table")
    before, path = {name: sys.modules.pop(name, None) for name in names}, list(sys.path)
    spec = importlib.util.spec_from_file_location("zoo_run", ZOO / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name, old in before.items():
        sys.modules.pop(name)
        if old is not None:
            sys.modules[name] = old


def two_layers():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)


def entry(run, build, name="MLP"):
    return run.Entry(name, "torch", "tabular", build)


def test_an_entry_is_found_moved_and_brought_back(run):
    line = run.measure(entry(run, two_layers))
    assert "failed" not in line, line
    assert line["groups"] == [["permutation", 5, 1]]
    assert line["axes"] == 6
    assert line["fixed"] == ["0.weight axis 1", "2.weight axis 0", "2.bias axis 0"]
    assert line["error"] < 1e-12
    assert line["copy_change"] < 1e-5
    assert line["distance_before"] > 0.1 > 1e-6 > line["distance"]
    assert line["average_change_before"] > 1e-3 > 1e-5 > line["average_change"]
    assert line["agreement"] == pytest.approx(1)
    assert line["finite"] is True


def test_tied_tensors_are_moved_once(run):
    def build():
        table, out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        out.weight = table.weight
        return nn.Sequential(table, out), torch.arange(5)

    line = run.measure(entry(run, build))
    assert line["groups"] == [["rotation", 4, 1]]
    assert line["copy_change"] < 1e-5
    assert line["distance"] < 1e-5


def test_a_failure_is_a_result(run):
    def broken():
        raise RuntimeError("no such model\nmore")

    line = run.measure(entry(run, broken, "broken"))
    assert line["failed"] == "build: RuntimeError: no such model"
    text = run.table([line])
    assert "| broken | torch | tabular | failed: build: RuntimeError: no such model |  |" in text

    def fails():
        return nn.Linear(3, 2), torch.randn(4, 5)

    assert run.measure(entry(run, fails))["failed"].startswith("find_symmetries: MergeError: ")


def test_two_equal_models_prove_nothing(run):
    module, inputs = two_layers()
    line = run.measure(entry(run, lambda: (module, inputs)))
    assert line["failed"] == "merge two models: AssertionError: two models with equal weights"


def test_table(run):
    line = {
        "name": "Net",
        "package": "stranger",
        "kind": "recommender",
        "version": "1.2",
        "versions": {"python": "3", "torch": "2"},
        "seconds": 1.26,
        "runs": 30,
        "groups": [["rotation", 8, 2], ["signed_permutation", 4, 1]],
        "frozen": [", ".join(f"p{i} axis 0" for i in range(8)) + ": operation sort has no rule"],
        "axes": 9,
        "fixed": ["out axis 0"],
        "error": 2.4e-15,
        "distance_before": 1.41,
        "distance": 1.2e-8,
        "agreement_before": 0.05,
        "agreement": 1.0,
        "average_change_before": 0.31,
        "average_change": 0.0,
        "finite": True,
    }
    text = run.table([line])
    cells = (
        "Net | stranger | recommender | rotation 8 x 2, signed permutation 4 x 1 | 1 | 1.3 | 30 | "
        "2e-15 | 1.4 -> 1.2e-08 | 0.050 -> 1.000 | 0.3 -> 0 | finite"
    )
    assert f"| {cells} |" in text
    assert "Groups move 8 of 9 axes. Fixed: `out axis 0`." in text
    assert "- `p0 axis 0`, " in text
    assert "`p5 axis 0` and 2 more: operation sort has no rule" in text
    assert "Packages: stranger 1.2." in text
    assert "Versions: python 3, torch 2." in text


def test_results_are_replaced_by_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ENTRIES", (entry(run, two_layers, "a"), entry(run, two_layers, "b")))
    measured = []

    def fake(chosen):
        measured.append(chosen.name)
        versions = {"python": "3"}
        return {
            "name": chosen.name,
            "package": "p",
            "kind": "k",
            "version": "1",
            "versions": versions,
            "failed": "x",
        }

    monkeypatch.setattr(run, "measure", fake)
    results, target = tmp_path / "results.jsonl", tmp_path / "table.md"
    threads = torch.get_num_threads()
    try:
        run.main(results, target, ["b"])
        run.main(results, target, [])
        run.main(results, target, ["a"])
    finally:
        torch.set_num_threads(threads)
    assert measured == ["b", "a", "b", "a"]
    assert [line.split('"')[3] for line in results.read_text().splitlines()] == ["a", "b"]
    assert target.read_text().count("| p | k |") == 2
    with pytest.raises(SystemExit, match="no entry 'c': a, b"):
        run.main(results, target, ["c"])


def test_a_stock_model_of_torchrec(run):
    """One entry of the zoo whose package is ours as well."""
    torch.manual_seed(0)
    module, inputs = next(e for e in run.ENTRIES if e.name == "SimpleDeepFMNN").build()
    symmetries = cki_rec.find_symmetries(module, inputs)
    assert [(s.kind, s.size) for s in symmetries] == [
        *[("permutation", 8)] * 3,
        ("permutation", 16),
        ("permutation", 8),
        ("permutation", 6),
    ]
    assert max(cki_rec.verify(module, symmetries, inputs, seed=1)) < 1e-12


def test_zoo_holds_enough_strangers(run):
    assert len({e.name for e in run.ENTRIES}) == len(run.ENTRIES) >= 10
    assert len({e.package for e in run.ENTRIES}) >= 5
    assert sum(e.kind == "recommender" for e in run.ENTRIES) >= 6


def test_the_committed_table_follows_from_the_committed_results(run):
    lines = [run.json.loads(x) for x in (ZOO / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [e.name for e in run.ENTRIES]
    assert (ZOO / "table.md").read_text() == run.table(lines)


def test_packages_of_others_are_pinned_and_stay_apart(run):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ZOO / "requirements.txt").read_text(), re.M))
    names = {name.lower().replace("_", "-") for name in pins}
    assert {e.package for e in run.ENTRIES} - {"torchrec"} <= names
    assert not {"torch", "torchrec", "numpy", "scipy"} & names  # ours serve
    assert "recbole" not in (project_root() / "pyproject.toml").read_text()
    assert ".venv-zoo/" in (project_root() / ".gitignore").read_text().splitlines()
