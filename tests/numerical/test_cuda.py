"""Results on a GPU are those of the processor."""

from __future__ import annotations

import json

import pytest
import torch
from pairs import Pair

from cki_rec import merge
from cki_rec.cli import main
from cki_rec.merging.methods import METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICE = torch.device("cuda")
TINY = (
    *("model.hidden=[16,8]", "model.embedding_dim=8", "train.epochs=2", "train.batch_size=256"),
    *("evaluate.bootstrap=100", "runtime.threads=1"),
)
TABLES = "sparse.collection.embedding_bags."


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair("deepfm")


def inputs_of(pair: Pair, device: torch.device) -> dict:
    """Return the arguments of a merge of two sources that differ little from their base."""
    base = pair.models[0]
    models = [{n: t + 0.1 * (m[n] - t) for n, t in base.items()} for m in (pair.average, base)]
    counts = [
        {n: torch.arange(len(t)) * (k + 1) for n, t in base.items() if n.startswith(TABLES)}
        for k in range(2)
    ]

    def score(params) -> float:
        return -float(sum(t.double().square().sum() for t in params.values()))

    def moved(params):
        return {n: t.clone().to(device) for n, t in params.items()}

    return {
        "models": [moved(model) for model in models],
        "base": moved(base),
        "counts": [moved(each) for each in counts],
        "score": score,
        "module": pair.network.to(device),
        "batches": [batch.to(device) for batch in pair.batches],
    }


def compared(pair: Pair, *words: str, **options: object) -> None:
    results = []
    for device in (torch.device("cpu"), DEVICE):
        inputs = inputs_of(pair, device)
        results.append(merge(inputs.pop("models"), *words, **inputs, **options).params)
    pair.network.to("cpu")
    for name, tensor in results[1].items():
        assert tensor.device.type == DEVICE.type, name
        torch.testing.assert_close(tensor.cpu(), results[0][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fisher"])
def test_merged_parameters_are_those_of_the_processor(pair, method):
    compared(pair, method)


@pytest.mark.parametrize("repair", ["rescale", "least_squares", "select_units", "project"])
def test_repaired_layers_are_those_of_the_processor(pair, repair):
    compared(pair, "average", align="activations", repair=repair)


@pytest.mark.parametrize("model", ["deepfm", "dcnv2", "din"])
def test_the_chain_scores_as_on_the_processor(raw_zip, tmp_path, model):
    """Sums round otherwise, so AUC may differ in the fourth digit."""
    auc = []
    for device in ("cpu", DEVICE.type):
        folder = tmp_path / device
        places = [f"runtime.{name}={folder / name}" for name in ("out", "reports", "encoded")]
        words = [f"data.raw={raw_zip}", *places, *TINY, f"model={model}", "suite=seeds"]
        words += ["model.histories=true"] if model == "din" else []
        assert main(["evaluate", *words, "merge=auto", f"runtime.device={device}"]) == 0
        (path,) = (folder / "out").glob("evaluate-*/record.json")
        auc.append(json.loads(path.read_text())["result"]["test"]["auc"])
    assert auc[1] == pytest.approx(auc[0], abs=2e-3)
