"""The notebook API: frames of records, figures, and scores of raw rows."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SMALL

from cki_rec import notebook
from cki_rec.config import UserError

MODEL = ("data.fields=[user,item,genres,hour,history]", "model.histories=true")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, raw_zip):
    """Overrides of a finished evaluation, named ``mine``."""
    folder = tmp_path_factory.mktemp("notebook")
    folders = [f"runtime.{name}={folder / name}" for name in ("out", "reports", "encoded")]
    words = (f"data.raw={raw_zip}", *folders, *SMALL, *MODEL, "suite=seeds", "name=mine")
    for merge in ("average", "best_source"):
        notebook.run("evaluate", *words, f"merge={merge}")
    return folder, words


def test_records_and_tables_are_frames(evaluated):
    _, words = evaluated
    runs, summary = notebook.records("mine", *words), notebook.table("mine", *words)
    assert list(runs["method"]) == list(summary["method"]) == ["average", "best_source"]
    assert summary["auc"].tolist() == runs["auc"].tolist()
    assert runs["command"][0].startswith("cki-rec evaluate data.raw=")
    assert {"auc_minus_best_source_low", "parameters"} <= set(summary)
    with pytest.raises(UserError, match="no pipeline 'evalute': did you mean 'evaluate'"):
        notebook.run("evalute")
    with pytest.raises(UserError, match="name=other: no run is recorded"):
        notebook.table("other", *words)


def test_figures_are_matplotlib_figures(evaluated):
    _, words = evaluated
    figure = notebook.metric_figure("mine", "auc", *words)
    assert figure.axes[0].get_xlabel() == "AUC on test rows (higher is better)"
    assert notebook.mixing_figure("mine", None, *words).axes
    with pytest.raises(UserError, match="did you mean 'gauc'"):
        notebook.metric_figure("mine", "gaucc", *words)


def test_scores_of_raw_rows_equal_those_of_the_evaluation(evaluated):
    folder, words = evaluated
    (run,) = (path.parent for path in (folder / "out").glob("merge-*/checkpoint"))
    (stored,) = run.glob("logits-*.npz")
    model = notebook.load_model(run.name, *words)
    runs = notebook.records("mine", *words).set_index("method")["run_id"]
    evaluated_model = notebook.load_model(runs["average"], *words)
    assert (evaluated_model.network.state_dict().keys()) == model.network.state_dict().keys()
    rows = notebook.raw_rows(notebook.compose(*words), "test")
    expected = np.load(stored)["test"]
    scores = notebook.predict(model, rows, logits=True)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    one_by_one = [notebook.predict(model, rows[place])[0] for place in (0, 7)]
    np.testing.assert_allclose(one_by_one, 1 / (1 + np.exp(-expected[[0, 7]])), atol=1e-6)
    assert notebook.predict(model, rows[:0]).shape == (0,)


def test_a_model_without_its_data_set_is_one_line(evaluated, tmp_path):
    folder, words = evaluated
    run = next((folder / "out").glob("train-*"))
    with pytest.raises(
        UserError, match=r"its data set is not encoded in .*runtime.encoded=FOLDER"
    ):
        notebook.load_model(run, *words, f"runtime.encoded={tmp_path}")
    with pytest.raises(UserError, match="no such run"):
        notebook.load_model("train-0", *words)
