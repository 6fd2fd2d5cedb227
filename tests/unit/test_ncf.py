"""The experiment on checkpoints of strangers: its parts, and one merge where the data lies."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import cki_rec

SCRIPT = Path(__file__).parents[2] / "experiments" / "ncf" / "run.py"


@pytest.fixture(scope="module")
def ncf():
    spec = importlib.util.spec_from_file_location("ncf_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data():
    folder = Path(os.environ.get("CKI_REC_DATA", "")) / "ml1m_ncf_checkpoints"
    if not os.environ.get("CKI_REC_DATA") or not folder.is_dir():
        pytest.skip("CKI_REC_DATA names no folder with ml1m_ncf_checkpoints")
    return folder


def test_hits_and_gains_of_known_ranks(ncf):
    scores = torch.zeros(3, 100)
    scores[0, 0] = 1  # first
    scores[1, 1:12] = 1  # behind eleven
    scores[1, 0] = 0.5
    hits, gains = ncf.hits_and_gains(scores)  # the third: ties count against it
    assert hits == pytest.approx(1 / 3)
    assert gains == pytest.approx(1 / 3)


def test_samples_are_rated_pairs_and_random_ones(ncf):
    rated = torch.stack([torch.arange(6000), torch.arange(6000) % 3000], 1)
    drawn = ncf.samples(rated, 1)
    assert set(map(tuple, drawn["rated"].tolist())) <= set(map(tuple, rated.tolist()))
    assert drawn["rated and random"].max() > 3000
    assert ncf.samples(rated, 1)["rated"].equal(drawn["rated"])
    assert not ncf.samples(rated, 2)["rated"].equal(drawn["rated"])


def test_without_data_the_script_stops_with_one_line(ncf, monkeypatch, capsys):
    monkeypatch.setenv("CKI_REC_DATA", "/nowhere")
    assert ncf.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_sources_score_as_published_and_alignment_brings_them_together(ncf, data):
    test = ncf.read_test(data)
    names = ncf.PAIRS["MLP"]
    sources = [ncf.load_file(data / "safetensors" / f"{name}.safetensors") for name in names]
    module = ncf.MLP()

    def hits(params):
        module.load_state_dict(params)
        with torch.no_grad():
            return ncf.hits_and_gains(module(*test))[0]

    assert [hits(source) for source in sources] == pytest.approx([0.6704, 0.6727], abs=1e-4)
    batches = [(test[0][:100, 0], test[1][:100, 0])]
    aligned = cki_rec.merge(sources, module=module, batches=batches, align="weights")
    assert hits(cki_rec.merge(sources).params) < 0.1
    assert hits(aligned.params) > 0.4


@pytest.mark.slow
def test_rated_pairs_are_those_of_the_published_ids_without_test_rows(ncf, data):
    test = ncf.read_test(data)
    every = ncf.read_ratings(data.parent / "ml-1m.zip")
    assert len(ncf.without(every, test)) == len(every) - ncf.USERS
