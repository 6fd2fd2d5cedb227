"""The report in a headless Chromium: no error, no sideways scroll on a phone, folds, sorting."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_tables import experiment

from cki_rec.evaluation.html import report_page
from cki_rec.evaluation.plots import metric_plot
from cki_rec.evaluation.tables import runs_frame, summary_frame

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WATCH = """<script>
window.errors = [];
addEventListener("error", (event) => errors.push(event.message));
console.error = (...words) => errors.push(words.join(" "));
</script>"""
PROBE = """<pre id="result"></pre><script>
onload = () => {
  const frame = frames[0], page = frame.document, root = page.documentElement;
  const table = page.querySelector("table"), fold = page.querySelector("details");
  const column = (number) => [...table.tBodies[0].rows].map((row) => row.cells[number].innerText);
  const click = (number) => table.tHead.querySelectorAll("button")[number].click();
  const sorted = (number) => (click(number), column(number));
  const inside = fold.querySelector("table"), before = inside.checkVisibility();
  const result = {
    width: root.clientWidth, content: root.scrollWidth,
    inTable: table.scrollWidth > table.parentElement.clientWidth,
    folded: before, opened: (fold.querySelector("summary").click(), inside.checkVisibility()),
    methods: [sorted(0), sorted(0)], auc: [sorted(3), sorted(3)],
    difference: sorted(5), direction: table.tHead.rows[0].cells[5].ariaSort,
    errors: frame.errors,
  };
  document.getElementById("result").textContent = JSON.stringify(result);
};
</script>"""
"""Runs beside the page, which is in a frame that is as wide as a phone."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on PATH"),
]


def opened(page, folder, width):
    """Return the findings of PROBE on a page, and all that the browser logged."""
    text = html.escape(page.replace("<head>", f"<head>{WATCH}", 1))
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{text}"></iframe>'
    path = folder / "probe.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}{PROBE}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"]
    run = subprocess.run(
        [BROWSER, *options, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    found = re.search(r'<pre id="result">(.+?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr
    return json.loads(html.unescape(found[1])), run.stderr


@pytest.mark.parametrize("width", [400, 1280])
def test_report_works_in_a_browser(tmp_path, width):
    records, replicates = experiment()
    runs = runs_frame(records)
    summary = summary_frame(runs, replicates)
    drawing = metric_plot(summary, runs, "auc", "best_source")
    page = report_page("Quick", summary, runs, {"AUC": drawing}, answer={"AUC": drawing})
    found, log = opened(page, tmp_path, width)
    assert found["errors"] == []
    assert "CONSOLE" not in log
    assert found["content"] <= found["width"] <= width
    assert found["inTable"] == (width == 400)  # a wide table scrolls in its box
    assert (found["folded"], found["opened"]) == (False, True)
    up, down = found["methods"]
    assert up == sorted(up, key=str.lower) == down[::-1]
    assert len(set(up)) == 5
    aucs = [[float(cell.split()[0]) for cell in cells] for cells in found["auc"]]
    assert aucs[0] == sorted(aucs[0], reverse=True) == aucs[1][::-1]
    values = [float(cell.split()[0]) for cell in found["difference"] if cell]
    assert values == sorted(values, reverse=True)
    assert found["difference"][len(values) :] == [""] * (5 - len(values))  # blank: at the end
    assert values
    assert len(values) < 5
    assert found["direction"] == "descending"
