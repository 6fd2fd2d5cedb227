"""Undo what a user's module registers, since tests of one process share the tables."""

from __future__ import annotations

import pytest

from cki_rec import plugins
from cki_rec.evaluation import metrics
from cki_rec.merging.methods import METHODS

LISTS = (metrics.SHOWN, metrics.COMPARED, metrics.REPEATED)
TABLES = (METHODS, metrics.METRICS, plugins._digests, plugins._classes)


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """The working folder of a user, whose code is forgotten afterwards."""
    tables, lists = [dict(table) for table in TABLES], [list(entries) for entries in LISTS]
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for table, before in zip(TABLES, tables, strict=True):
        table.clear()
        table.update(before)
    for entries, before in zip(LISTS, lists, strict=True):
        entries[:] = before
