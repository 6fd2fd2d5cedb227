"""The README's table and picture are those that the committed runs give."""

import csv
import re
import sys

import pytest

from cki_rec import project_root

ROOT = project_root()
sys.path.insert(0, str(ROOT / "experiments"))
import main_results  # noqa: E402


def test_the_table_of_the_readme_is_the_generated_one():
    readme = main_results.README.read_text()
    assert main_results.with_table(readme) == readme


def test_numbers_are_means_of_the_runs():
    """One row, computed from runs.csv alone; a changed README is brought back."""
    with (ROOT / "experiments" / "refinement_movielens_1m" / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["suite"] == "shards"]
    names = ("best_source", "output_ensemble", "auto", "joint")
    aucs = {name: [float(r["auc"]) for r in rows if r["method"] == name] for name in names}
    best, ensemble, merged, joint = (sum(values) / len(values) for values in aucs.values())
    (line,) = (
        line
        for line in main_results.table().splitlines()
        if "refinement_movielens_1m/" in line and "2 user shards" in line
    )
    cells = [cell.strip(" *") for cell in line.strip("|").split("|")][3:]
    wanted = [3, best, ensemble, merged, joint, (merged - best) / (joint - best)]
    assert [float(cell) for cell in cells] == pytest.approx(wanted, abs=0.006)
    assert cells[3] == f"{merged:.4f}"[1:]
    readme = main_results.README.read_text()
    assert main_results.with_table(readme.replace(cells[3], ".9999")) == readme


def test_the_picture_is_the_generated_one():
    """Texts are compared, AUC included: shapes may differ between versions of matplotlib."""
    committed = re.findall(r"<text.*?>(.*?)</text>", main_results.PICTURE.read_text())
    assert committed == re.findall(r"<text.*?>(.*?)</text>", main_results.picture())
    assert ".8162" in committed
