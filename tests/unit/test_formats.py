"""Checkpoints of other programs: read by rows, written back, and every damage named."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cki_rec.checkpoints.formats import WRITERS, is_own, layout, open_stored
from cki_rec.checkpoints.formats.layout import Naming
from cki_rec.config import UserError
from cki_rec.merging.result import MergeResult

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(30, 4)
        self.mlp = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, user, item):
        return self.mlp(torch.cat([self.user(user), self.item(item)], 1)).squeeze(1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Ranker()
    adam = torch.optim.Adam(model.parameters())
    model(torch.arange(9), torch.arange(9)).sum().backward()
    adam.step()
    return model, adam


def sharded(state, folder):
    folder.mkdir()
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weight_map = {name: files[name.startswith("mlp")] for name in state}
    for file in files:
        part = {n: x for n, x in state.items() if weight_map[n] == file}
        safetensors.torch.save_file(part, folder / file)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def make(kind, trained, folder):
    """Write the trained model as another program would; return its path."""
    model, adam = trained
    state, path = model.state_dict(), folder / kind
    if kind == "plain.pt":
        torch.save(state, path)
    elif kind == "nested.ckpt":
        wrapped = {f"module._orig_mod.{n}": x for n, x in state.items()}
        content = {"epoch": 3, "model_state": wrapped, "optimizer": adam.state_dict()}
        torch.save(content, path)
    elif kind == "old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "one.safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "shards":
        sharded(state, path)
    elif kind == "dcp":
        content = {"model": state, "optim": adam.state_dict()}
        dcp.save(content, checkpoint_id=path, no_dist=True)
    elif kind == "easyrec":
        dcp.save(state, checkpoint_id=path / "model", no_dist=True)
        dcp.save(adam.state_dict(), checkpoint_id=path / "optimizer", no_dist=True)
    return path


KINDS = ["plain.pt", "nested.ckpt", "old.pth", "one.safetensors", "shards", "dcp", "easyrec"]
WITH_OPTIMIZER = ("nested.ckpt", "dcp", "easyrec")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_by_rows_and_written_back(kind, trained, tmp_path):
    state = trained[0].state_dict()
    path = make(kind, trained, tmp_path)
    assert not is_own(path)
    stored = open_stored(path)
    parts = layout(stored)
    assert set(parts.names) == set(state)
    assert {n: e.shape for n, e in parts.entries.items()} == {
        n: tuple(x.shape) for n, x in state.items()
    }
    for name, full in parts.names.items():
        tensor = stored.rows(full)
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    full = parts.names["user.weight"]
    assert torch.equal(stored.rows(full, 3, 7), state["user.weight"][3:7])
    assert torch.equal(stored.rows(full, 48, 99), state["user.weight"][48:])

    params = {full: stored.rows(full) * 2 for full in parts.names.values()}
    out = stored.written(params, tmp_path / "out")
    again = open_stored(out)
    assert (again.form, layout(again).names) == (stored.form, parts.names)
    assert all(torch.equal(again.rows(name), tensor) for name, tensor in params.items())
    assert again.digest() != stored.digest()
    leftovers = [p for p in (tmp_path / "out").rglob("*") if "part" in p.name or "tmp" in p.name]
    assert not leftovers


@pytest.mark.parametrize("kind", WITH_OPTIMIZER)
def test_optimizer_state_is_found_by_parameter(kind, trained, tmp_path):
    model, adam = trained
    parts = layout(open_stored(make(kind, trained, tmp_path)))
    assert not parts.notes
    for name, parameter in model.named_parameters():
        holder, key = parts.state[name]["exp_avg_sq"]
        assert torch.equal(holder.rows(key), adam.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("form", WRITERS)
def test_other_programs_read_the_written_files(form, trained, tmp_path):
    state = trained[0].state_dict()
    out = WRITERS[form](state, tmp_path)
    if form == "safetensors":
        loaded = safetensors.torch.load_file(out)
    elif form == "torch":
        loaded = torch.load(out, weights_only=True)
    else:
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        dcp.load(loaded, checkpoint_id=out, no_dist=True)
    Ranker().load_state_dict(loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_safetensors_of_every_type(dtype, tmp_path):
    state = {"a": torch.arange(6).reshape(3, 2).to(dtype), "b": torch.zeros(0, 3, dtype=dtype)}
    state |= {"scalar": torch.tensor(1).to(dtype), "turned": state["a"].t()}
    state["single"] = torch.as_strided(state["a"], (1,), (9,))  # counts as contiguous
    out = WRITERS["safetensors"](state, tmp_path)
    for loaded in (safetensors.torch.load_file(out), open_stored(out)):
        for name, tensor in state.items():
            value = loaded[name] if isinstance(loaded, dict) else loaded.rows(name)
            assert torch.equal(value, tensor)


def test_tensors_of_a_gpu_are_read_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save({"weight": torch.arange(4.0)}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="CUDA device"):
        torch.load(tmp_path / "a.pt", weights_only=True)
    assert open_stored(tmp_path / "a.pt").rows("weight").tolist() == [0, 1, 2, 3]


def test_symlinks_and_moved_folders_are_the_same_checkpoint(trained, tmp_path):
    for kind in ("one.safetensors", "shards", "dcp"):
        path = make(kind, trained, tmp_path)
        digest = open_stored(path).digest()
        (tmp_path / f"link-{kind}").symlink_to(path)
        assert open_stored(tmp_path / f"link-{kind}").digest() == digest
        moved = tmp_path / "elsewhere" / kind
        moved.parent.mkdir(exist_ok=True)
        shutil.copytree(path, moved) if path.is_dir() else shutil.copy(path, moved)
        assert open_stored(moved).digest() == digest


def test_names_change_by_expressions_and_follow_the_network(trained, tmp_path):
    state = {f"tower.{n}": x for n, x in trained[0].state_dict().items()}
    state["tower.mlp.0.weight"] = state["tower.mlp.0.weight"].t().contiguous()
    torch.save(state, tmp_path / "a.pt")
    stored, known = open_stored(tmp_path / "a.pt"), tuple(trained[0].state_dict())
    assert "tower.user.weight" in layout(stored).names
    assert set(layout(stored, Naming(known=known)).names) == set(known)  # a common prefix
    naming = Naming((("^tower[.]", ""),), (r"mlp\.0\.weight",))
    parts = layout(stored, naming)
    assert set(parts.names) == set(known)
    assert parts.entries["mlp.0.weight"].shape == (6, 8)


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_stored(path)
    return str(caught.value)


class Payload:
    def __reduce__(self):
        return exec, ("",)


def test_a_pickle_that_runs_code_is_refused_and_not_executed(trained, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    monkeypatch.setattr(Payload, "__reduce__", lambda self: (exec, (code,)))
    torch.save({"state_dict": trained[0].state_dict(), "extra": Payload()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("a.pt", "b.pt"):
        message = error_of(tmp_path / name)
        assert str(tmp_path / name) in message
    assert "a pickle of other types" in error_of(tmp_path / "a.pt")
    assert "exec" in error_of(tmp_path / "a.pt")
    folder = make("dcp", trained, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    assert "names builtins.exec, which may run code" in error_of(folder)
    assert not marker.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert marker.exists()  # the payload works


def test_a_pickled_module_is_refused_with_the_lines_that_help(trained, tmp_path, monkeypatch):
    torch.save(trained[0], tmp_path / "whole.pt")
    message = error_of(tmp_path / "whole.pt")
    assert "a whole pickled module" in message
    first, second = (line.strip() for line in message.splitlines()[1:])
    monkeypatch.chdir(tmp_path)
    exec(f"{first}\n{second}", {"torch": torch})
    assert set(layout(open_stored(tmp_path / "whole_state.pt")).names) == set(
        trained[0].state_dict()
    )


def cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_cut_files(trained, tmp_path):
    for kind in ("plain.pt", "nested.ckpt", "old.pth", "one.safetensors"):
        assert "cut" in error_of(cut(make(kind, trained, tmp_path))), kind
    folder = make("dcp", trained, tmp_path)
    shard = cut(next(folder.glob("*.distcp")))
    assert f"{shard}: unreadable checkpoint, cut" in error_of(folder)
    shard.unlink()
    assert f"{shard}: unreadable checkpoint, this shard is missing" in error_of(folder)
    (tmp_path / "empty.safetensors").touch()
    assert "cut in its header" in error_of(tmp_path / "empty.safetensors")
    (tmp_path / "empty.pt").touch()
    assert "empty.pt" in error_of(tmp_path / "empty.pt")


def test_shards_that_do_not_belong_together(trained, tmp_path):
    folder = make("shards", trained, tmp_path)
    first = folder / "model-00001-of-00002.safetensors"
    content = first.read_bytes()
    safetensors.torch.save_file({"other": torch.ones(2)}, first)
    assert "shards are of several models" in error_of(folder)
    first.unlink()
    assert "this shard of model.safetensors.index.json is missing" in error_of(folder)
    first.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    assert "no index of shards" in error_of(folder)
    index.unlink()
    assert "the index of its shards is missing" in error_of(folder)


def test_one_cut_shard_of_several(trained, tmp_path):
    folder = make("shards", trained, tmp_path)
    second = cut(folder / "model-00002-of-00002.safetensors")
    assert f"{second}: unreadable checkpoint, no file of safetensors, or cut" in error_of(folder)
    folder = make("easyrec", trained, tmp_path)
    (folder / "optimizer" / ".metadata").unlink()
    assert f"{folder / 'optimizer'}: its index is missing (.metadata)" in error_of(folder)
    cut(folder / "model" / ".metadata")
    assert "unreadable checkpoint" in error_of(folder)


def test_tied_tensors_are_known_by_their_places(trained, tmp_path):
    state = trained[0].state_dict()
    state["again"], state["part"] = state["user.weight"], state["user.weight"][1:]
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        stored = open_stored(tmp_path / name)
        assert stored.tied == {"again": "user.weight"}
        assert torch.equal(stored.rows("part", 2, 5), state["part"][2:5])
    turned = {"turned": state["user.weight"].t(), "step": state["user.weight"][::2, 1:3]}
    torch.save(turned, tmp_path / "b.pt")
    stored = open_stored(tmp_path / "b.pt")
    for name, tensor in turned.items():
        assert torch.equal(stored.rows(name), tensor)
        assert torch.equal(stored.rows(name, 1, 3), tensor[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_values_are_filled_by_rows(kind, trained, tmp_path):
    stored = open_stored(make(kind, trained, tmp_path))
    names = layout(stored).names.values()
    entries = {name: stored.entries[name] for name in names}
    blank = stored.blank(entries, tmp_path / "out", {})
    for _ in range(2):
        for name in names:
            place, tensor = blank.places[name], stored.rows(name)
            with place.file.open("r+b") as file:
                file.seek(place.start)
                file.write(tensor.numpy().tobytes())
        blank = stored.blank(entries, tmp_path / "out", {})  # files that are there stay
    again = open_stored(blank.path)
    assert again.form == stored.form
    assert all(torch.equal(again.rows(name), stored.rows(name)) for name in names)


def test_mixed_shards_of_dcp(trained, tmp_path):
    folder = make("dcp", trained, tmp_path)
    other = Ranker()
    other.user, other.item = nn.Embedding(80, 4), nn.Embedding(99, 8)
    dcp.save({"model": other.state_dict()}, checkpoint_id=tmp_path / "two", no_dist=True)
    (shard,) = (tmp_path / "two").glob("*.distcp")
    shutil.copy(shard, folder / shard.name)
    assert "unreadable checkpoint" in error_of(folder)
    (folder / ".metadata").unlink()
    assert "its index is missing (.metadata)" in error_of(folder)


def test_paths_without_one_checkpoint(trained, tmp_path):
    assert "no checkpoint here" in error_of(tmp_path / "absent")
    assert "no such file" in error_of(tmp_path / "absent.pt")
    for name in ("a.pt", "b.pt"):
        torch.save(trained[0].state_dict(), tmp_path / name)
    assert "holds several checkpoints (a.pt, b.pt)" in error_of(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in error_of(tmp_path / "list.pt")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.onnx").touch()
    assert "holds an ONNX file, which has no state dict" in error_of(tmp_path / "x")


def test_an_interrupted_write_leaves_nothing(trained, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    state = trained[0].state_dict()
    monkeypatch.setattr(torch, "save", broken)
    monkeypatch.setattr(dcp, "save", broken)
    monkeypatch.setattr(Path, "open", broken)
    for form, write in WRITERS.items():
        with pytest.raises(KeyboardInterrupt):
            write(state, tmp_path / form)
        assert not list((tmp_path / form).iterdir())


def test_a_header_nested_too_deeply_is_named_in_one_line(tmp_path):
    file, text = tmp_path / "deep.safetensors", b"[" * 100_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match=r"deep\.safetensors: unreadable checkpoint, its header"):
        open_stored(file)


def test_a_report_without_tensors_in_memory_counts_no_others():
    report = MergeResult({}, {"user.weight": [0.5, 0.5]}, recipe="average").report()
    assert "not merged" not in report
