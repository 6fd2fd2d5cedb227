"""Numeric fields from raw text to records: initial weights, training, evaluation without users."""

from __future__ import annotations

import json

import numpy as np
import pytest
from training import sharded_model

from cki_rec.cli import main
from cki_rec.data.schema import Feature, FeatureSchema

SMALL = ("model.hidden=[8]", "model.embedding_dim=4", "evaluate.bootstrap=100", "train.epochs=1",
         "train.batch_size=512", "runtime.threads=1", "data.synthetic.rows=3000")  # fmt: skip


def test_vectors_of_numbers_start_like_embeddings():
    numbers = [Feature(f"n{number}", "", "numeric") for number in range(300)]
    schema = FeatureSchema((Feature("c", "c", "categorical"), *numbers), {"c": 5}, {"c": "x"})
    built = sharded_model(schema, "model.init_std=0.01", "model.histories=false")
    state = built.module.state_dict()
    assert state["sparse.numbers"].std().item() == pytest.approx(0.01, rel=0.1)
    assert not state["sparse.numbers_first_order"].any()
    assert state["sparse.numbers_first_order"].shape == (300, 1)


@pytest.mark.slow
def test_evaluation_without_users_resamples_rows_with_a_message(tmp_path, capsys):
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    words = ["data=synthetic_criteo", f"data.raw={tmp_path}", "data.numeric=log1p", *SMALL]
    chosen = ["suite=shards", "merge=evidence", "name=numbers"]
    assert main(["evaluate", *words, *chosen, *places]) == 0
    (record,) = (
        json.loads(p.read_text()) for p in (tmp_path / "out").glob("evaluate-*/record.json")
    )
    assert record["config"]["evaluate"]["resample"] == "row"
    assert record["data"]["synthetic"] is True
    assert record["result"]["test"]["gauc"] is None
    assert np.isfinite(record["result"]["test"]["log_loss"])
    assert main(["report", "name=numbers", *places]) == 0
    assert "Traceback" not in capsys.readouterr().err
