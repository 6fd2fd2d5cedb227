"""``cki-rec inspect CHECKPOINT...``: parts, differences, methods, and a draft that runs."""

import pytest
import safetensors.torch
import torch
from conftest import SMALL
from strangers import command, home, read, state_of

import cki_rec
from cki_rec.cli import main

__all__ = ["command", "home"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return its output."""
    monkeypatch.chdir(tmp_path)

    def run(*words, code=0):
        assert main(["inspect", *map(str, words)]) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return run


def test_parts_methods_symmetries_and_a_draft_that_runs(home, inspect, tmp_path, capsys):
    net = home / "net.py"
    words = (f"merge.module={net}:Ranker", f"merge.batches={net}:batches")
    shown = inspect(home / "a.pt", home / "b.pt", *words)
    assert "names without the prefix model_state.module." in shown
    table = next(line for line in shown.splitlines() if "user.weight" in line)
    assert table.split()[:5] == ["table", "user.weight", "40", "x", "4"]
    assert "optimizer (step, exp_avg, exp_avg_sq)" in table
    assert "the checkpoints fit together" in shown
    assert "symmetry: permutation of 6 in mlp.0.weight, mlp.0.bias, mlp.2.weight" in shown
    assert "symmetry: rotation of 4 in user.weight, mlp.0.weight" in shown
    draft = tmp_path / "conf" / "merge" / "a.yaml"
    assert "method: evidence" in draft.read_text()
    lines = draft.read_text().splitlines()[5:]
    assert all("#" in line for line in lines if not line.startswith("  - "))
    assert main(["merge", "merge=a", f"runtime.out={tmp_path / 'out'}"]) == 0
    (path,) = (tmp_path / "out").glob("merge-*/model.pt")
    half = state_of(home, "a")["user.weight"][:20]
    assert torch.equal(read(path)["user.weight"][:20], half)
    assert "is kept; runtime.force=true" in inspect(home / "a.pt", home / "b.pt", *words)


@pytest.mark.slow
def test_names_and_transposes_are_drafted(home, inspect, tmp_path):
    state = state_of(home, "b")
    other = {name.replace("user", "user_emb"): tensor for name, tensor in state.items()}
    other["mlp.0.weight"] = other["mlp.0.weight"].t().contiguous()
    torch.save(other, tmp_path / "b.pt")
    shown = inspect(home / "a.safetensors", tmp_path / "b.pt", "merge.table_names=['user.*']")
    assert r"names change by ^user_emb\.weight$ -> user.weight" in shown
    assert main(["merge", "merge=a", f"runtime.out={tmp_path / 'out'}"]) == 0
    (path,) = (tmp_path / "out").glob("merge-*/model.safetensors")
    expected = cki_rec.merge([state_of(home, "a"), state]).params
    assert all(torch.equal(read(path)[name], tensor) for name, tensor in expected.items())


def test_differences_norms_buffers_and_tied_tensors(home, inspect, tmp_path):
    state = state_of(home, "a")
    norm = torch.nn.BatchNorm1d(6).state_dict()
    more = {**state, **{f"norm.{name}": tensor for name, tensor in norm.items()}}
    more["copy.weight"] = more["user.weight"]
    torch.save(more, tmp_path / "more.pt")
    shown = inspect(home / "a.safetensors", tmp_path / "more.pt")
    kinds = {line.split()[1]: line.split()[0] for line in shown.splitlines() if "float32" in line}
    assert kinds["norm.weight"] == kinds["norm.bias"] == "norm"
    assert kinds["norm.running_mean"] == "buffer"
    assert kinds["mlp.0.bias"] == "layer"
    assert "tied: user.weight, copy.weight" in shown
    assert "norm.weight is missing" in shown
    assert "no merge is possible before these are repaired" in shown
    assert not (tmp_path / "conf").exists()
    halves = {name: tensor.half() for name, tensor in state_of(home, "b").items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    assert "merged in float32" in inspect(home / "a.pt", tmp_path / "half.safetensors")
    same = inspect(home / "a.pt", home / "a.pt")
    assert "are the same checkpoint" in same


def test_mistakes_are_one_line(home, inspect, tmp_path):
    (tmp_path / "rows.csv").write_text("a,label\n1,0\n")
    both = inspect(home / "a.pt", tmp_path / "rows.csv", code=2)
    assert "reads checkpoints or data, not both" in both
    assert "no such file" in inspect(tmp_path / "gone.safetensors", code=2)
    assert "no checkpoint here" in inspect(tmp_path, code=2)


@pytest.mark.slow
def test_runs_of_this_project_are_described(raw_zip, inspect, tmp_path):
    options = [f"runtime.{key}={tmp_path / key}" for key in ("out", "encoded")]
    assert main(["train", f"data.raw={raw_zip}", *options, *SMALL]) == 0
    (run,) = (tmp_path / "out").glob("train-*")
    shown = inspect(run)
    table = next(line for line in shown.splitlines() if " table " in line)
    assert "counts, optimizer (accumulator)" in table
