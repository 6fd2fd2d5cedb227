"""The report pipeline on records made by hand: files, and records of version 0.1.0."""

import json
import re

import numpy as np
from test_tables import experiment, record

from cki_rec.cli import main
from cki_rec.engine.record import RECORD, Run
from cki_rec.engine.sweeps import add_to_sweep
from cki_rec.evaluation.display import main_frame
from cki_rec.evaluation.tables import runs_frame, summary_frame
from cki_rec.pipelines.evaluate import REPLICATES


def write_run(out, one, name, baseline):
    folder = out / one["run_id"]
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps(one))
    np.savez(folder / REPLICATES, **{f"{baseline}/auc": np.linspace(0.04, 0.06, 400)})
    add_to_sweep(out, name, Run(folder))


def test_report_reads_records_of_version_0_1_0(tmp_path, capsys):
    tables = []
    for name, label, baseline in (
        ("old", "aligned_evidence", "best_parent"),
        ("new", "auto", "best_source"),
    ):
        one = record("auto", shares={"mlp.0.weight": [0.5, 0.5]})
        one["result"]["method"] = label
        one["result"]["difference"] = {baseline: one["result"]["difference"]["best_source"]}
        one["run_id"] = "evaluate-1"
        write_run(tmp_path / name, one, name, baseline)
        places = [f"runtime.out={tmp_path / name}", f"runtime.reports={tmp_path}"]
        assert main(["report", f"name={name}", *places]) == 0
        tables.append((tmp_path / name / "runs.csv").read_bytes())
        table = (tmp_path / name / "table.md").read_text()
        assert "+.0500 [+.0410, +.0590] (++)" in table
    assert tables[0] == tables[1]
    assert "auto" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "new").iterdir() if path.is_file()}
    figures = {"auc_on_test_rows.svg", "logloss_on_test_rows.svg"}
    figures |= {"auc_against_the_best_source_suite_shards.svg"}
    assert names == figures | {
        *("mixing_weights_suite_shards.svg", "report.html", "runs.csv", "table.md")
    }


def test_a_name_without_runs_is_an_error_with_the_command(tmp_path, capsys):
    assert main(["report", "name=nothing", f"runtime.out={tmp_path}"]) == 2
    assert "start with cki-rec evaluate" in capsys.readouterr().err


def test_runs_that_do_not_belong_together_are_refused_with_their_releases(tmp_path, capsys):
    for seed, (release, confidence) in enumerate((("0.1.0", 0.95), ("0.2.0", 0.9))):
        one = record("auto", shares={"mlp.0.weight": [0.5, 0.5]})
        one["run_id"] = f"evaluate-{seed}"
        one["result"]["seed"] = seed
        one["config"]["evaluate"] = {**one["config"]["evaluate"], "confidence": confidence}
        one["provenance"]["versions"] = {"cki-rec": release}
        write_run(tmp_path, one, "mixed", "best_source")
    assert main(["report", "name=mixed", f"runtime.out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "made by releases 0.1.0 and 0.2.0" in error
    assert "Traceback" not in error


def test_names_with_tags_and_brackets_are_shown_as_typed(tmp_path, capsys):
    """They are escaped in table.md and the page, and the terminal reads no markup in them."""
    labels = ["slerp [t=0.5]", "slerp [/half]", "<script>alert(1)</script>", ":smile: *x*"]
    suite = "<b>a/b</b> [red]"
    for seed, label in enumerate(labels):
        one = record(label, suite=suite)
        one["run_id"] = f"evaluate-{seed}"
        write_run(tmp_path / "out", one, "odd", "best_source")
    places = [f"runtime.out={tmp_path / 'out'}", f"runtime.reports={tmp_path}"]
    assert main(["report", "name=odd", *places]) == 0
    printed = capsys.readouterr().out
    assert f"suite {suite}" in printed
    for label in ("slerp [t=0.5]", "slerp [/half]", ":smile: *x*"):
        assert label in printed
    table = (tmp_path / "odd" / "table.md").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in table
    assert r"slerp \[t=0.5\]" in table
    assert r":smile: \*x\*" in table
    assert r"## &lt;b&gt;a/b&lt;/b&gt; \[red\]" in table
    page = (tmp_path / "odd" / "report.html").read_text()
    for text in (table, page):
        assert not {"<script>alert", "<b>"} & set(re.findall(r"<script>alert|<b>", text))
    assert (tmp_path / "odd" / "auc_against_the_best_source_suite_b_a_b_b_red.svg").exists()


def test_the_terminal_shows_the_verdict_the_path_and_eight_columns(tmp_path, capsys):
    """With every column and long names, no line is longer than 100 characters."""
    records, replicates = experiment()
    records = [one for one in records if one["result"]["seed"] == 1]
    for one in records:
        for baseline in ("best_source", "output_ensemble"):
            if one["result"]["difference"]:
                best = one["result"]["difference"]["best_source"]
                one["result"]["difference"][baseline] = best
        if one["result"]["method"] == "cki":
            one["result"]["method"] = "a_method_with_a_long_name_of_its_own"
        write_run(tmp_path / "out", one, "wide", "best_source")
    places = [f"runtime.out={tmp_path / 'out'}", f"runtime.reports={tmp_path}"]
    assert main(["report", "name=wide", *places]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.startswith("seeds: a_method_with_a_long_name_of_its_own beats the best source")
    assert printed.index("shards: a_method_with") < printed.index("suite seeds")
    assert f"report: {tmp_path / 'wide' / 'report.html'}" in printed
    shown = main_frame(summary_frame(runs_frame(records), replicates))
    assert list(shown.columns) == [
        *("suite", "method", "seeds", "cost", "AUC", "LogLoss recal."),
        *("AUC vs best source", "AUC vs output ensemble", "recovered"),
    ]


def test_damaged_runs_are_left_out_of_a_report(tmp_path, capsys):
    """One line names the file of each; the others are reported."""
    for seed in (1, 2, 3, 4):
        one = record("auto", seed=seed, shares={"mlp.0.weight": [0.5, 0.5]})
        one["run_id"] = f"evaluate-{seed}"
        write_run(tmp_path, one, "n", "best_source")
    places = ["name=n", f"runtime.out={tmp_path}", f"runtime.reports={tmp_path}"]
    cut = tmp_path / "evaluate-2" / REPLICATES
    cut.write_bytes(cut.read_bytes()[:100])
    (tmp_path / "evaluate-3" / REPLICATES).unlink()
    (tmp_path / "evaluate-4" / RECORD).write_text("")
    assert main(["report", *places]) == 0
    shown = capsys.readouterr().out
    for seed in (2, 3):
        file = tmp_path / f"evaluate-{seed}" / REPLICATES
        assert f"{file} is missing or damaged; the run is left out" in shown
    assert "1 evaluated models. Incomplete: 2 damaged runs are left out." in shown
    assert "2 damaged runs" in (tmp_path / "n" / "table.md").read_text()
