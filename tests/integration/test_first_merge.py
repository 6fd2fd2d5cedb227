"""docs/first_merge.ipynb: its code runs, and its committed outputs are those of its code."""

from __future__ import annotations

import json

import pytest
from notebooks import executed

from cki_rec import project_root

PATH = project_root() / "docs" / "first_merge.ipynb"


def test_the_committed_notebook_is_executed():
    cells = json.loads(PATH.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = PATH.read_text()
    assert text.count('"image/png"') == 2
    assert str(project_root()) not in text
    assert '"output_type": "error"' not in text


@pytest.mark.slow
def test_the_notebook_runs_and_gives_its_numbers(tmp_path, monkeypatch, without_store):
    monkeypatch.chdir(tmp_path)
    notebook, names = json.loads(PATH.read_text()), {"__name__": "__main__"}
    executed(notebook, names)
    table = names["table"].set_index("method")["auc"]
    (stored,) = (
        "".join(output["data"]["text/html"])
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "evidence" in "".join(output.get("data", {}).get("text/html", []))
    )
    for method, auc in table.items():  # up to the rounding of another processor
        row = stored[stored.index(f"<td>{method}</td>") :]
        assert float(row.split("<td>")[2].split("</td>")[0]) == pytest.approx(auc, abs=0.01)
    assert table["evidence"] > table["best_source"]
