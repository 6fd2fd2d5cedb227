"""AUC by region and headings of suites, from records."""

from __future__ import annotations

import copy

import pytest
from test_tables import record

from cki_rec.evaluation.html import report_page
from cki_rec.evaluation.markdown import markdown_table
from cki_rec.evaluation.regions import region_tables, titles
from cki_rec.evaluation.tables import runs_frame, summary_frame

NAMES = ["south", "north"]


def regional(method, seed, shift=0.0, **changes):
    made = copy.deepcopy(record(method, seed))
    domains = {"all & both": 0.5, "north": 0.6 + shift, "south": 0.7 + shift}
    made["result"]["test"]["domains"] = {
        name: {"rows": 10, "auc": auc, "log_loss": 0.5} for name, auc in domains.items()
    }
    made["result"]["of_sources"] = [
        {"name": name, "auc": 0.65 + shift, "domains": {**domains, name: 0.8}} for name in NAMES
    ]
    made["result"] |= changes
    return made


def tables(records):
    runs = runs_frame(records)
    return region_tables(records, summary_frame(runs, {})), runs


def test_sources_come_first_and_regions_follow_their_order():
    records = [regional("evidence", seed, shift) for seed, shift in ((1, 0.0), (2, 0.02))]
    (table,) = tables(records)[0].values()
    assert list(table.columns) == ["model", "all rows", "south", "north", "all & both"]
    assert table["model"].to_list() == ["source south", "source north", "evidence"]
    assert table["south"].to_list() == [".8000", ".7100", ".7100"]  # means over seeds
    assert table["north"].to_list() == [".6100", ".8000", ".6100"]


def test_undefined_values_are_blank_and_suites_without_regions_have_no_table():
    lost = regional("evidence", 1)
    lost["result"]["of_sources"][0]["domains"]["north"] = None
    (table,) = tables([lost])[0].values()
    assert table["north"].to_list()[:2] == ["", ".8000"]
    assert tables([record()])[0] == {}


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["north", "runs/b/checkpoint"], "2 models: north, b"),
        (["a" * 40, "b" * 40], "2 models of your own"),
    ],
)
def test_checkpoints_of_the_user_give_the_heading(names, title):
    own = regional("evidence", 1, suite="own_sources", sources=names)
    assert titles([own, record()], "own_sources") == {"own_sources": title, "shards": "shards"}
    found, runs = tables([own])
    summary = summary_frame(runs, {})
    page = report_page("t", summary, runs, {}, titles={"own_sources": title}, regions=found)
    assert f"<h2>{title}</h2>" in page
    assert "AUC of every model on the test rows of each region" in page
    text = markdown_table(summary, runs, titles={"own_sources": title}, regions=found)
    assert f"\n## {title}\n" in text
    assert "\n| source south | .6500 | .8000 | .6000 | .5000 |\n" in text
