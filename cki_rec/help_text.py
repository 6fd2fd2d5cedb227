"""The texts of ``cki-rec --help`` and ``cki-rec <pipeline> --help``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cki_rec.search_path import CONF, config_groups

PIPELINES = {
    "prepare": "encode a data set and print its summary",
    "train": "train one model",
    "assess": "compare models before a merge: compatibility, distances, seen rows, the barrier",
    "merge": "make one model out of several; trains sources that are missing",
    "finetune": "merge, then train briefly on all rows",
    "evaluate": "all of the above as configured, then metrics and intervals on test rows",
    "export": "write a trained or merged model as one file that serves without this package",
    "predict": "score the raw rows of a csv or Parquet file with a model",
    "runs": "list all runs: name, data, model, metric, size, age; --json prints JSON",
    "clean": "list leftovers, caches and runs that nothing refers to; delete=all deletes them",
    "report": "tables, figures and an HTML page from the records of a name",
    "inspect": "describe your file of rows, or checkpoints of any program, and draft their YAML",
}
EXAMPLES = {
    "prepare": "data=movielens_1m data.raw=ml-1m.zip",
    "train": "model=deepfm seed=2 train.epochs=5",
    "assess": "'merge.sources=[{seed: 1},{seed: 2}]' assess.barrier=5",
    "merge": "merge=evidence 'merge.sources=[{seed: 1},{seed: 2}]'",
    "finetune": "merge=evidence finetune=one_epoch",
    "evaluate": "-m suite=seeds,shards seed=1,2,3 merge=average,evidence",
    "export": "run=train-0123456789abcdef format=onnx",
    "predict": "run=train-0123456789abcdef input=rows.csv output=scores.csv",
    "runs": "--json",
    "clean": "delete=leftovers",
    "report": "name=quickstart",
    "inspect": "my.csv",
}
READS = {
    "inspect": ["data"],
    "prepare": ["data"],
    "train": ["data", "model", "train"],
    "assess": ["data", "model", "train", "suite", "merge", "assess"],
    "merge": ["data", "model", "train", "suite", "merge"],
    "finetune": ["data", "model", "train", "suite", "merge", "finetune"],
    "evaluate": ["data", "model", "train", "suite", "merge", "finetune", "evaluate"],
    "export": [],
    "predict": [],
    "runs": [],
    "clean": [],
    "report": [],
}
"""The groups whose values a pipeline reads."""


def help_text(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the pipelines, the groups with their choices, and examples."""
    lines = ["cki-rec <pipeline> [group=choice] [key=value] [-m]", "", "pipelines"]
    lines += [f"  {name:10} {what}" for name, what in PIPELINES.items()]
    lines += ["", "groups"]
    lines += [f"  {group:10} {', '.join(choices)}" for group, choices in groups.items()]
    lines += ["", "examples"]
    lines += [f"  cki-rec {name} {EXAMPLES[name]}" for name in PIPELINES]
    lines += [
        "",
        "./conf and --config-dir DIR add folders like conf/, with more choices for its groups.",
        "--cfg job prints the composed configuration and runs nothing.",
        "-m sweeps over comma-separated values; hydra/launcher=joblib runs jobs in parallel.",
    ]
    lines += ["cki-rec <pipeline> --help lists its options. Values and their meaning: conf/."]
    lines += ["cki-rec merge --list shows all methods: summary, options, needs, cost, reference."]
    return "\n".join(lines)


def pipeline_help(pipeline: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Return an example and the commented values of the groups that a pipeline reads."""
    lines = [f"cki-rec {pipeline}: {PIPELINES[pipeline]}", ""]
    lines += [f"  cki-rec {pipeline} {EXAMPLES[pipeline]}", ""]
    for group in [*READS[pipeline], "runtime"]:
        choices = groups[group]
        shown = "default" if "default" in choices else config_groups()[group][-1]
        text = (CONF / group / f"{shown}.yaml").read_text()
        lines += [f"{group}={'|'.join(choices)}; {group}.KEY=VALUE with, in {group}={shown}:"]
        lines += [f"    {x}" for x in text.splitlines() if x and x[0] != "#"] + [""]
    return "\n".join(lines).rstrip()
