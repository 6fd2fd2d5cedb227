"""Figures and the page: standalone, escaped, the same bytes each time."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import pytest
from test_tables import experiment, record

from cki_rec.evaluation.html import THEME, report_page
from cki_rec.evaluation.plots import metric_plot, mixing_plot, tensor_names
from cki_rec.evaluation.tables import runs_frame, summary_frame

TEXT = "{http://www.w3.org/2000/svg}text"
VOID = {"meta", "br", "wbr", "hr", "img"}


class Page(HTMLParser):
    """Checks that tags close in order; collects text, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def frames():
    records, replicates = experiment()
    runs = runs_frame(records)
    return summary_frame(runs, replicates), runs


def mixed(method, seed, shares, **changes):
    return record(method, seed, shares=shares, **changes)


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(TEXT)]


def test_metric_plot_names_methods_suites_and_stages(frames):
    shown = texts(metric_plot(*frames, "auc"))
    for name in ("seeds", "shards", "best source", "output ensemble", "direct", "fine-tuned"):
        assert name in shown
    assert shown.count("cki") == 2  # one per suite
    assert any("higher is better" in text for text in shown)
    assert any("lower is better" in text for text in texts(metric_plot(*frames, "log_loss")))


def test_metric_plot_of_one_repetition_and_undefined_values():
    runs = runs_frame([record(), record("lost", auc=None)])
    assert "lost" in texts(metric_plot(summary_frame(runs, {}), runs, "auc"))


def test_methods_of_a_figure_are_sorted_and_one_far_below_is_cut_off():
    aucs = {"best_source": 0.7, "low": 0.69, "high": 0.72, "awful": 0.4}
    records = [record(method, auc=auc) for method, auc in aucs.items()]
    runs = runs_frame(records)
    svg = metric_plot(summary_frame(runs, {}), runs, "auc", "best_source")
    shown = texts(svg)
    names = [name for name in shown if name in aucs or name == "best source"]
    assert names[:4] == ["high", "best source", "low", "awful"]
    assert {".7200", ".7000", ".4000"} <= set(
        shown
    )  # values of the metric, beside the differences
    ticks = [float(text.replace("\N{MINUS SIGN}", "-")) for text in shown if text[-3:].isdigit()]
    assert min(ticks) > -0.2  # awful, at -.3, is an arrow at the edge
    higher = {**aucs, "low": 0.71, "awful": 0.701, "high": 0.73, "middle": 0.729}
    runs = runs_frame([record(method, auc=auc) for method, auc in higher.items()])
    svg = metric_plot(summary_frame(runs, {}), runs, "auc", "best_source")
    assert "0.00" in {text[:4] for text in texts(svg)}  # the baseline is never cut off
    losses = texts(metric_plot(summary_frame(runs, {}), runs, "log_loss"))
    assert losses.index("high") < losses.index("awful")


def test_figures_of_a_page_follow_its_colors(frames):
    svg = metric_plot(*frames, "auc", "best_source")
    page = report_page("Quick", *frames, {}, answer={"AUC": svg})
    drawing = page.partition("<svg")[2].partition("</svg>")[0]
    assert not [color for color in THEME if color in drawing]
    assert "fill: var(--ink)" in drawing
    assert "var(" not in svg  # the file stands alone
    assert "difference to the best source" in page


def test_a_figure_without_a_best_source_shows_auc_itself():
    runs = runs_frame([record("joint", difference=None)])
    summary = summary_frame(runs, {})
    svg = metric_plot(summary, runs, "auc")
    page = report_page("Quick", summary, runs, {}, answer={"AUC": svg})
    assert "intervals over repetitions" in page
    assert "difference to the best source" not in page


def test_figures_have_the_same_bytes_under_any_user_settings(frames):
    first = metric_plot(*frames, "auc")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "x", "axes.grid": True}):
        assert metric_plot(*frames, "auc") == first
    assert "<dc:date>" not in first
    styles = [node.get("style") for node in ElementTree.fromstring(first).iter(TEXT)]
    assert all(re.search(r"\bsans-serif\b", style) and "'" not in style for style in styles)


def test_mixing_plot_shows_one_repetition_of_direct_models():
    table, layer = "model.embedding_bags.user.weight", "model.mlp.0.weight"
    records = [
        mixed("later", 2, {table: [1.0, 0.0]}),
        mixed("average", 1, {layer: [0.5, 0.5], table: [0.27, 0.73]}),
        mixed("cki", 1, {layer: [0.1, 0.9]}),
        mixed("tuned", 1, {table: [0.5, 0.5]}, finetuned=True),
        record("best_source", 1),
    ]
    shown = texts(mixing_plot(records))
    assert [shown.count(text) for text in ("average", "cki", "later", "tuned")] == [1, 1, 0, 0]
    assert shown.index("table user") < shown.index("mlp 0")
    assert {"27", "73", "90", "source 1", "source 2", "shards, repetition 1"} <= set(shown)
    assert "10" not in shown  # too narrow for its percentage
    assert "later" in texts(mixing_plot(records, seed=2))
    assert mixing_plot([record()]) == ""


def test_tensor_names_stay_different():
    names = tensor_names(
        ["a.mlp.0.bias", "model.head.weight", "head", "ebc.embedding_bags.u.weight"]
    )
    assert list(names.values()) == ["table u", "a mlp 0 bias", "model.head.weight", "head"]


def test_page_is_standalone_and_well_formed(frames):
    summary, runs = frames
    figures = {"AUC per method": metric_plot(summary, runs, "auc")}
    build = {"provenance": {"commit": "c0ffee"}, "suites": {"seeds": "Same rows."}}
    page = report_page("Quick", summary, runs, figures, ["One note."], **build)
    assert page == report_page("Quick", summary, runs, figures, ["One note."], **build)
    parsed = Page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert not {"link", "iframe", "img"} & set(tags)
    assert [attrs for tag, attrs in parsed.tags if tag == "script"] == [{}]  # it has no source
    assert ("html", {"lang": "en"}) in parsed.tags
    assert any(attrs.get("name") == "viewport" for _, attrs in parsed.tags)
    assert "a" not in tags
    assert tags.count("table") == tags.count("caption") == 6  # three per suite
    assert tags.index("details") > tags.index("table") > tags.index("section")
    assert tags.count("table") - tags[: tags.index("details")].count("table") == 4
    assert [a["aria-label"] for t, a in parsed.tags if t == "svg"] == ["AUC per method"]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    text = " ".join(parsed.text)
    for part in ("One note.", "Same rows.", "c0ffee", "cki-rec evaluate", "bootstrap"):
        assert part in text
    assert "nan" not in re.split(r"\W+", text.lower())


def test_page_escapes_every_text():
    bad = '<b onclick="x">&'
    one = record(bad, suite=bad)
    one["data"] |= {"name": bad, "hash": bad}
    one["provenance"] |= {"command": bad, "hardware": bad}
    one["run_id"] = bad
    runs = runs_frame([one])
    summary = summary_frame(runs, {})
    figures = {bad: metric_plot(summary, runs, "auc")}
    page = report_page(bad, summary, runs, figures, [bad], {bad: bad}, {bad: bad}, {bad: bad})
    parsed = Page(page)
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert "".join(parsed.text).count(bad) > 12


def test_page_shows_intervals_and_marks_apart(frames):
    page = report_page("Quick", *frames, {})
    assert "<figure>" not in page
    assert re.search(
        r'<td>\+\.0500 <span class="better">\(\+\+\)</span> '
        r'<span class="range">\[\+\.\d{4}, \+\.\d{4}\]</span></td>',
        page,
    )
    assert '<th scope="col">DeLong p vs best source</th>' in page
    assert "DeLong p vs output ensemble" not in page  # no run has it
