"""Merges of other programs' checkpoints from disk to disk give the model of a merge in memory."""

import hashlib
import json
import os
import shutil

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from strangers import command, home, read, state_of

from cki_rec.checkpoints.formats import safetensors as of_safetensors
from cki_rec.engine.placed_writer import PlacedWriter
from cki_rec.pipelines import foreign_inputs, stream_plan

__all__ = ["command", "home"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TABLES = "merge.table_names=['(user|item)[.]weight']"
EVIDENCE = ("merge=evidence", TABLES)
BUDGET = "merge.memory_gb=1"
OTHERS, SLOW = ("", ".safetensors", "-shards"), pytest.mark.slow


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream_plan, "BLOCK", 8)
    monkeypatch.setattr(stream_plan, "SMALLEST", 1)


@pytest.fixture(scope="module")
def shards(home):
    """The two models as sharded safetensors."""
    for name in "ab":
        state, folder = state_of(home, name), home / f"{name}-shards"
        folder.mkdir()
        files = {n: f"model-0000{1 + n.startswith('mlp')}-of-00002.safetensors" for n in state}
        for file in set(files.values()):
            part = {n: x for n, x in state.items() if files[n] == file}
            safetensors.torch.save_file(part, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return home


def both(command, *words, sources):
    """Return the models of a merge in memory and of one from disk to disk."""
    out, models = command.out, []
    for case, more in (("memory", ()), ("disk", (BUDGET,))):
        command.out = out / case
        models.append(command.model(*words, *more, sources=sources))
    command.out = out
    return models


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name not in ("record.json", "merge.json", "README.md")]
    names = {str(path.relative_to(folder)): path.read_bytes() for path in kept}
    return {name: hashlib.sha256(content).hexdigest() for name, content in names.items()}


@pytest.mark.parametrize("ending", [".pt", *(pytest.param(e, marks=SLOW) for e in OTHERS)])
def test_a_streamed_model_is_that_of_memory(shards, command, ending):
    sources = [str(shards / f"{name}{ending}") for name in "ab"]
    optimizer = ending in (".pt", "")
    how = EVIDENCE if optimizer else ("merge=slerp", TABLES)
    one, many = both(command, *how, sources=sources)
    assert one.name == many.name
    expected, found = read(one), read(many)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert command.card["evidence"]["kind"] == ("optimizer" if optimizer else "none")
    assert command.card["streamed"] == {"block_rows": 8, "memory_gb": 1}
    assert set(command.card["shares"] or {}) == (set(expected) if optimizer else set())
    assert not (command.out / "disk" / "partial").exists()


def test_other_programs_read_the_result(shards, command):
    sources, out = [str(shards / "a.pt"), str(shards / "b")], command.out
    expected = {n: (x + state_of(shards, "b")[n]) / 2 for n, x in state_of(shards, "a").items()}
    for form in (None, "safetensors", "torch", "dcp"):
        command.out = out / str(form)
        words = () if form is None else (f"merge.format={form}",)
        path = command.model("merge=average", TABLES, BUDGET, *words, sources=sources)
        if form in (None, "torch"):  # that of the first source
            content = torch.load(path, weights_only=True, mmap=form is None)["model_state"]
            loaded = {name.removeprefix("module."): x for name, x in content.items()}
        elif form == "safetensors":
            loaded = safetensors.torch.load_file(path)
        else:
            loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            dcp.load(loaded, checkpoint_id=path, no_dist=True)
        for name, tensor in expected.items():
            assert torch.allclose(loaded[name], tensor, atol=1e-6), (form, name)


class Kill(BaseException):
    """The end of a process, without a chance to tidy up."""


@pytest.mark.parametrize(
    "ending", [".safetensors", *(pytest.param(e, marks=SLOW) for e in ("", ".pt"))]
)
def test_a_killed_merge_goes_on_and_gives_the_same_bytes(shards, command, monkeypatch, ending):
    sources, out = [str(shards / f"{name}{ending}") for name in "ab"], command.out
    how = ("merge=average", TABLES, BUDGET)
    command.out = out / "whole"
    expected = digests(command.model(*how, sources=sources).parents[0])
    command.out, put = out / "killed", PlacedWriter._put
    left, kills = [0], 0

    def limited(self, *block):
        left[0] -= 1
        if left[0] == 0:
            raise Kill
        put(self, *block)

    monkeypatch.setattr(PlacedWriter, "_put", limited)
    for blocks in (2, 5, 3):
        left[0] = blocks
        with pytest.raises(Kill):
            command.merge(*how, sources=sources)
        kills += 1
        assert not [p for p in command.out.glob("merge-*/*")]
    (partial,) = (command.out / "partial").glob("merge-*")
    lines = (partial / "journal.jsonl").read_text().splitlines()
    places = {(block["file"], block["start"]) for block in map(json.loads, lines)}
    assert len(places) == len(lines) >= 7  # no block is written twice
    block = json.loads(lines[3])
    (file,) = partial.rglob(block["file"])
    content = bytearray(file.read_bytes())
    content[block["start"]] ^= 1  # a block that did not reach the disk is written again
    file.write_bytes(content)
    (partial / "journal.jsonl").write_text("\n".join(lines) + '\n{"key": "mod')
    left[0] = -1
    path = command.model(*how, sources=sources)
    assert "it goes on after its last block" in command.shown.out
    assert digests(path.parents[0]) == expected
    assert not (command.out / "partial").exists()


@pytest.mark.slow
def test_types_names_and_ties(shards, command, tmp_path):
    one, two = state_of(shards, "a"), state_of(shards, "b")
    one["mlp.0.weight"] = one["mlp.0.weight"].t().contiguous()
    one["again.weight"], two["again.weight"] = one["user.weight"], two["user.weight"]
    torch.save({"net": one}, tmp_path / "a.pt")
    torch.save({n: x.bfloat16() for n, x in two.items() if "again" not in n}, tmp_path / "b.pt")
    halves = {n: x.bfloat16() for n, x in two.items()}
    halves["again.weight"] = halves["user.weight"]
    torch.save(halves, tmp_path / "b.pt")
    first = f"{{path: {tmp_path / 'a.pt'}, transposed: ['mlp.0.weight']}}"
    tables = "merge.table_names=['(user|item|again)[.]weight']"
    for how in (
        ("merge=dare", "merge.options={scale: 0.7}", f"merge.base={first}"),
        ("merge=slerp",),
    ):
        paths = both(command, *how, tables, sources=[first, str(tmp_path / "b.pt")])
        expected, found = read(paths[0]), read(paths[1])
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert torch.equal(found["again.weight"], found["user.weight"])
        assert paths[1].stat().st_size < paths[0].stat().st_size * 1.05  # tied ones once
        shutil.rmtree(command.out)
    path = command.model(
        *("merge=average", "merge.dtype=float16", tables, BUDGET),
        sources=[first, str(tmp_path / "b.pt")],
    )
    assert {x.dtype for x in read(path).values()} == {torch.float16}
    assert command.card["types"] == {
        "sources": ["torch.bfloat16", "torch.float32"],
        "result": ["torch.float16"],
    }


def test_the_plan_is_printed_and_no_value_is_read(shards, command, monkeypatch):
    monkeypatch.setattr(of_safetensors.Safetensors, "rows", None)
    sources = [str(shards / f"{name}.safetensors") for name in "ab"]
    assert command.merge("merge=average", TABLES, BUDGET, "check_only=true", sources=sources) == 0
    assert "streams tables in blocks of 8 rows; they are read 1 times" in command.shown.out
    assert "the budget is 1.00 GB" in command.shown.out
    assert not command.out.exists()


@pytest.mark.slow
def test_mistakes_are_one_line_and_leave_nothing(shards, command, tmp_path, monkeypatch):
    a, b = (str(shards / f"{name}.safetensors") for name in "ab")

    def error(*words, sources=(a, b)):
        shown = command.error("merge=average", TABLES, *words, sources=list(sources))
        assert shown.count("\n") == 1
        assert not [*command.out.glob("partial/*")]
        return shown

    assert "is below the smallest block: 1 process(es)" in error("merge.memory_gb=0.1")
    assert "needs whole models or rows of data" in error("merge=fisher", BUDGET)
    assert "merge.repair=rescale needs whole models" in error("merge.repair=rescale", BUDGET)
    assert "no table has any in all sources" in error("merge=evidence", BUDGET)
    turned = f"{{path: {b}, transposed: ['user.weight']}}"
    assert "rows of tables differ" in error(BUDGET, sources=(a, turned))
    turned = [f"{{path: {p}, transposed: ['user.weight']}}" for p in (a, b)]
    assert "table user.weight is stored transposed" in error(BUDGET, sources=turned)
    broken = state_of(shards, "b")
    broken["user.weight"][[9, 17]] = float("nan")
    safetensors.torch.save_file(broken, tmp_path / "b.safetensors")
    shown = error(BUDGET, sources=(a, str(tmp_path / "b.safetensors")))
    assert "user.weight of" in shown
    assert "rows 9 have NaN" in shown
    large = {n: x * 1e6 for n, x in state_of(shards, "b").items()}
    safetensors.torch.save_file(large, tmp_path / "b.safetensors")
    shown = error(BUDGET, "merge.dtype=float16", sources=(a, str(tmp_path / "b.safetensors")))
    assert "do not fit torch.float16" in shown
    put = PlacedWriter._put

    def touch(self, *block):
        put(self, *block)
        os.utime(a)

    monkeypatch.setattr(PlacedWriter, "_put", touch)
    assert "has changed while it was merged" in error(BUDGET)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "evidence", "cki_dual_soft"])
def test_aligned_sources_without_a_table_in_memory(shards, command, monkeypatch, method):
    """Blocks are as large as they are by default: rounding may decide between equal bases."""
    monkeypatch.setattr(foreign_inputs, "LARGE", 50)
    monkeypatch.setattr(stream_plan, "BLOCK", 1 << 16)
    net = shards / "net.py"
    how = (f"merge={method}", "merge.align.by=weights", f"merge.module={net}:Ranker")
    how += (f"merge.batches={net}:batches", "merge.learn.what=none")
    sources = [str(shards / "a.pt"), str(shards / "b.pt")]
    one, many = both(command, *how, sources=sources)
    assert command.card["alignment"]["agreement"] > command.card["alignment"]["agreement_before"]
    expected, found = read(one), read(many)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
