"""Compare our records with deepctr-torch's results; every number comes from them.

Run in our environment: ``python experiments/peers/table.py EXPORTED RUNS RESULTS.jsonl TABLE.md``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cki_rec.engine.record import Run
from cki_rec.engine.sweeps import sweep_runs
from cki_rec.files import write_atomically

METRICS = {"auc": ("AUC", 1), "log_loss": ("LogLoss", -1)}
"""Metric -> its name, and 1 where higher is better."""
Scores = dict[str, dict[int, dict[str, float]]]
"""Model -> seed -> metric -> value."""


def theirs(lines: list[dict[str, Any]], facts: dict[str, Any]) -> Scores:
    """Return the results of deepctr-torch on these rows, with these options."""
    scores: Scores = {}
    for line in lines:
        is_same = line["data_hash"] == facts["data_hash"] and line["seed"] in facts["seeds"]
        if is_same and line["options"] == facts["models"].get(line["model"]):
            found = {metric: line[f"test_{metric}"] for metric in METRICS}
            scores.setdefault(line["model"], {})[line["seed"]] = found
    return scores


def ours(runs: list[Run], facts: dict[str, Any]) -> Scores:
    """Return the test metrics of our evaluations of models trained on these rows, so."""
    scores: Scores = {}
    for run in runs:
        record = run.record
        assert record is not None
        trained = Run(run.path.parent / record["config"]["parents"][0]).record
        assert trained is not None, "an evaluation whose model is gone"
        sections = {**trained["config"]["model"], **trained["config"]["train"]}
        options, seed = facts["models"].get(sections["name"]), record["result"]["seed"]
        is_same = record["data"]["hash"] == facts["data_hash"] and seed in facts["seeds"]
        if is_same and options and all(sections.get(k, v) == v for k, v in options.items()):
            test = record["result"]["test"]
            scores.setdefault(sections["name"], {})[seed] = {m: test[m] for m in METRICS}
    return scores


def row(model: str, metric: str, peer: list[float], own: list[float]) -> list[str]:
    """Return the cells of a model and metric; what too few runs leave undefined is blank."""
    name, sign = METRICS[metric]
    cells = [model, name]
    for values in (peer, own):
        spread = f" ± {stdev(values):.5f}" if len(values) > 1 else ""
        cells += [str(len(values)), f"{mean(values):.5f}{spread}" if values else ""]
    if len(peer) < 2 or not own:
        return [*cells, "", ""]
    difference = mean(own) - mean(peer)
    verdict = "yes" if sign * difference >= -stdev(peer) else "no"
    return [*cells, f"{difference:+.5f}", verdict]


def table(facts: dict[str, Any], peer: Scores, own: Scores) -> list[str]:
    """Return the Markdown lines of one data set."""
    heads = ["model", "metric", "their seeds", "deepctr-torch", "our seeds", "cki_rec, dense"]
    lines = [f"## {facts['data']}", "", f"Data hash {facts['data_hash']}.", ""]
    lines += [_line([*heads, "difference", "within 1 sd or better"]), _line(["---"] * 8)]
    for model in facts["models"]:
        for metric in METRICS:
            values = [
                [scores[metric] for scores in side.get(model, {}).values()] for side in (peer, own)
            ]
            lines.append(_line(row(model, metric, *values)))
    return [*lines, ""]


def main(exported: Path, out: Path, results: Path, target: Path) -> None:
    """Write the table of every exported experiment."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    versions = sorted({json.dumps(line["versions"]) for line in lines})
    text = ["# Parity with deepctr-torch", "", "Written by `make bench-peers`, see README.md.", ""]
    for path in sorted(exported.glob("*.json")):
        facts = json.loads(path.read_text())
        runs, _ = sweep_runs(out, path.stem)
        text += table(facts, theirs(lines, facts), ours(runs, facts))
    text += [
        "Mean ± sample standard deviation over seeds, on the same test rows. Difference: ours "
        "minus theirs. Last column: whether our mean AUC is not below theirs minus one of their "
        "standard deviations, and our mean LogLoss not above theirs plus one. A blank cell was "
        "not measured.",
        "",
    ]
    for found in versions:
        text.append("Versions: " + ", ".join(f"{k} {v}" for k, v in json.loads(found).items()))
    write_atomically(target, ("\n".join(text) + "\n").encode())
    print("\n".join(text))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
