"""The benches of experiments/bench: a table, turns, ratios, and facts about the machine."""

from __future__ import annotations

import json
import sys

import pytest
from samples import ROOT

BENCH = ROOT / "experiments" / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import rounds
        import run

        yield run, rounds
    finally:
        sys.path.remove(str(BENCH))


def test_the_table_is_well_formed(bench):
    run, _ = bench
    for name, benchmark in run.BENCHMARKS.items():
        assert callable(benchmark.measure), name
        assert benchmark.measure.__doc__.startswith("Return "), name
        assert benchmark.side in ("above", "below"), name
        assert benchmark.target > 0, name


def test_opponents_take_turns_over_three_rounds(bench):
    _, rounds = bench
    calls = []

    def work(name, seconds):
        return lambda: calls.append(name) or seconds.pop(0)

    ours, theirs = rounds.take_turns(work("a", [1.0, 2.0, 4.0]), work("b", [2.0, 6.0, 4.0]))
    assert calls == ["a", "b"] * 3
    figure = rounds.ratio("how", theirs, ours)
    assert (figure.value, figure.spread) == (2.0, (1.0, 3.0))
    assert figure.rounds == [[2.0, 6.0, 4.0], [1.0, 2.0, 4.0]]
    with pytest.raises(ValueError, match="at least 3 rounds"):
        rounds.take_turns(lambda: 1.0, rounds=2)


def test_one_bench_runs_and_names_the_machine(bench, tmp_path, monkeypatch, capsys):
    run, _ = bench
    monkeypatch.setattr(run, "RESULT", tmp_path / "bench.json")
    assert run.main(["import_seconds"]) == 0
    (entry,) = json.loads((tmp_path / "bench.json").read_text())
    assert entry["name"] == "import_seconds"
    assert entry["value"] > 0
    machine = entry["machine"]
    assert machine["torch_capability"] in machine["hardware"]
    assert machine["versions"]["torch"]
    assert run.main(["import_second"]) == 2
    assert "did you mean 'import_seconds'" in capsys.readouterr().err
