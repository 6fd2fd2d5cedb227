"""``cki-rec merge`` of checkpoints that other programs have written."""

import json
import os
from pathlib import Path

import polars as pl
import pytest
import safetensors.torch
import torch
from strangers import NETWORK, command, home, read, state_of

import cki_rec
from cki_rec.cli import main

__all__ = ["command", "home"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ""])
def test_the_result_is_in_the_form_of_the_first_source_and_equals_the_library(
    home, command, ending
):
    sources = [str(home / f"{name}{ending}") for name in "ab"]
    path = command.model("merge=average", sources=sources)
    merged = read(path)
    expected = cki_rec.merge([state_of(home, "a"), state_of(home, "b")]).params
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    if ending == ".pt":
        content = torch.load(path, weights_only=True)
        assert set(content["model_state"]) == {f"module.{name}" for name in expected}
    assert [source["path"] for source in command.card["sources"]] == sources
    assert command.card["shares"]["user.weight"] == [0.5, 0.5]
    assert command.card["command"].startswith("cki-rec merge")
    assert command.card["command"] in command.text
    assert command.card["sources"][0]["digest"][:16] in command.text


@pytest.mark.slow
def test_formats_mix_and_the_result_has_any(home, command):
    mixed = [str(home / "a.pt"), str(home / "b")]
    expected = cki_rec.merge([state_of(home, "a"), state_of(home, "b")]).params
    for form in ("safetensors", "torch", "dcp"):
        path = command.model("merge=average", f"merge.format={form}", sources=mixed)
        assert all(torch.equal(read(path)[name], tensor) for name, tensor in expected.items())
    assert command.merge("merge=average", "merge.format=dcp", sources=mixed) == 0  # finished


def test_alignment_by_activations_from_the_command_line(home, command):
    net = home / "net.py"
    path = command.model(
        *("merge=average", "merge.align.by=activations", "merge.repair=rescale"),
        *(f"merge.module={net}:Ranker", f"merge.batches={net}:batches"),
        sources=[str(home / "a.safetensors"), str(home / "b.safetensors")],
    )
    names: dict = {}
    exec(NETWORK, names)
    expected = cki_rec.merge(
        [state_of(home, "a"), state_of(home, "b")],
        *("average",),
        align="activations",
        repair="rescale",
        module=names["Ranker"](),
        batches=names["batches"](),
        seed=1,
    ).params
    assert all(torch.equal(read(path)[name], tensor) for name, tensor in expected.items())
    assert command.card["tables"] == ["item.weight", "user.weight"] or command.card["tables"] == [
        "user.weight",
        "item.weight",
    ]


@pytest.mark.slow
def test_auto_compares_recipes_on_labels_of_batches_or_of_a_file(home, command, tmp_path):
    net, sources = home / "net.py", [str(home / "a.pt"), str(home / "b.pt")]
    module = f"merge.module={net}:Ranker"
    auto = ("merge=auto", "merge.effort=closed_form", module)
    command.model(*auto, f"merge.batches={net}:labelled", sources=sources)
    first = command.card["scores"]
    assert {"source 0", "source 1"} < set(first)
    names: dict = {}
    exec(NETWORK, names)
    rows = [names["draw"](seed) for seed in range(3)]
    user, item = (torch.cat(columns).numpy() for columns in zip(*rows, strict=True))
    frame = pl.DataFrame({"user": user, "item": item, "label": (user < 20).astype(int)})
    for name in ("rows.csv", "rows.parquet"):
        write = frame.write_csv if name.endswith("csv") else frame.write_parquet
        write(tmp_path / name)
        command.model(*auto, f"merge.data={tmp_path / name}", sources=sources)
        assert command.card["scores"]["source 0"] == pytest.approx(first["source 0"], abs=1e-12)
    assert "## Scores (AUC on 1,200 rows)" in command.text


def test_evidence_of_optimizers_gives_rows_to_the_model_that_trained_them(home, command):
    sources = [str(home / "a.pt"), str(home / "b.pt")]
    assert "no table is known" in command.error("merge=evidence", sources=sources)
    named = ("merge=evidence", "merge.table_names=['(user|item)[.]weight']")
    merged = read(command.model(*named, sources=sources))
    assert command.card["evidence"]["kind"] == "optimizer"
    assert "Evidence of trained rows: optimizer, of user.weight, item.weight" in command.text
    for half, name in ((slice(0, 20), "a"), (slice(20, 40), "b")):
        assert torch.equal(merged["user.weight"][half], state_of(home, name)["user.weight"][half])
    command.model("merge=average", "merge.evidence=none", sources=sources)
    assert command.card["evidence"]["kind"] == "none"
    shown = command.merge(*named, "merge.evidence=counts", sources=sources)
    assert shown == 2
    assert "merge.evidence=counts:" in command.shown.err


@pytest.mark.slow
def test_counts_and_optimizer_state_of_other_files(home, command, tmp_path):
    counts = []
    for k, name in enumerate("ab"):
        rows = torch.zeros(40, dtype=torch.int64)
        rows[20 * k : 20 * k + 20] = 5
        torch.save({"user": rows}, tmp_path / f"counts_{name}.pt")
        counts.append(str(tmp_path / f"counts_{name}.pt"))
    sources = [
        f"{{path: {home / name}.safetensors, counts: {file}}}"
        for name, file in zip("ab", counts, strict=True)
    ]
    merged = read(command.model("merge=evidence", sources=sources))
    assert command.card["evidence"] == {"kind": "counts", "tables": ["user.weight"]}
    for half, name in ((slice(0, 20), "a"), (slice(20, 40), "b")):
        assert torch.equal(merged["user.weight"][half], state_of(home, name)["user.weight"][half])
    sources = [f"{{path: {home / n}.safetensors, optimizer: {home / n}.pt}}" for n in "ab"]
    net = f"merge.module={home / 'net.py'}:Ranker"
    command.model("merge=evidence", net, sources=sources)
    assert command.card["evidence"]["kind"] == "optimizer"


@pytest.mark.parametrize(
    "name", ["user_scores", pytest.param("user_timestamps", marks=pytest.mark.slow)]
)
def test_scores_of_dynamic_tables_are_evidence(home, command, tmp_path, name):
    """Uses (LFU), or the time of the last one; rows that were never seen have 0."""
    values = [torch.tensor([3] * 10 + [0] * 30), torch.tensor([1] * 5 + [0] * 5 + [9] * 30)]
    sources = []
    for source, scores in zip("ab", values, strict=True):
        content = {**state_of(home, source), name: scores}
        torch.save(content, tmp_path / f"{source}.pt")
        sources.append(str(tmp_path / f"{source}.pt"))
    net = f"merge.module={home / 'net.py'}:Ranker"
    merged = read(command.model("merge=evidence", net, sources=sources))
    assert command.card["evidence"] == {"kind": "scores", "tables": ["user.weight"]}
    one, two = (state_of(home, source)["user.weight"] for source in "ab")
    assert torch.equal(merged["user.weight"][5:10], one[5:10])
    assert torch.equal(merged["user.weight"][10:], two[10:])
    torch.testing.assert_close(merged["user.weight"][:5], 0.75 * one[:5] + 0.25 * two[:5])
    assert name not in merged
    assert "merge.evidence=counts:" in _refused(command, "merge.evidence=counts", net, sources)


def _refused(command, *words):
    *options, sources = words
    assert command.merge("merge=evidence", *options, sources=sources) == 2
    return command.shown.err


@pytest.mark.slow
def test_assess_and_the_commands_that_need_data_of_ours(home, command):
    sources = f"merge.sources=[{home / 'a.pt'},{home / 'b.pt'}]"
    out = f"runtime.out={command.out}"
    named = "merge.table_names=['(user|item)[.]weight']"
    assert main(["assess", "merge=average", sources, out, named]) == 0
    shown = command.capsys.readouterr().out
    assert "user.weight" in shown
    (run,) = command.out.glob("assess-*")
    record = json.loads((run / "record.json").read_text())
    assert record["provenance"]["evidence"] == "optimizer"
    assert (run / "assess.csv").is_file()
    net = [f"merge.module={home / 'net.py'}:Ranker", f"merge.batches={home / 'net.py'}:labelled"]
    assert main(["assess", "merge=average", sources, out, *net, "assess.barrier=3"]) == 0
    assert "barrier" in command.capsys.readouterr().out
    commands = {
        "evaluate": ["merge=average", sources],
        "finetune": ["merge=average", "finetune=one_epoch", sources],
        "export": [f"run={home / 'a.pt'}"],
        "predict": [f"run={home / 'a'}", "input=rows.csv", "output=scores.csv"],
    }
    for name, words in commands.items():
        assert main([name, out, *words]) == 2
        error = command.capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{name} needs" in error
    assert main(["assess", "merge=average", sources, out, "assess.barrier=3"]) == 2
    assert "set merge.module and merge.batches" in command.capsys.readouterr().err


@pytest.mark.slow
def test_labelled_rows_give_the_auc_of_sources_and_result(home, command):
    net = home / "net.py"
    how = ("merge=average", f"merge.module={net}:Ranker", f"merge.batches={net}:labelled")
    command.model(*how, sources=[str(home / "a.pt"), str(home / "b.pt")])
    assert set(command.card["scores"]) == {"source 0", "source 1", "average"}
    assert "| average | 0." in command.text


def test_types_differ(home, command, tmp_path):
    halves = {n: x.bfloat16() for n, x in state_of(home, "b").items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    sources = [str(home / "a.safetensors"), str(tmp_path / "half.safetensors")]
    assert read(command.model("merge=average", sources=sources))["user.weight"].dtype == (
        torch.float32
    )
    assert "they are merged in float32" in command.shown.out
    types = {"sources": ["torch.bfloat16", "torch.float32"], "result": ["torch.float32"]}
    assert command.card["types"] == types
    path = command.model("merge=average", "merge.dtype=bfloat16", sources=sources)
    assert read(path)["user.weight"].dtype == torch.bfloat16
    assert "out" in command.text


@pytest.mark.slow
def test_names_of_other_frameworks(home, command, tmp_path):
    other = {f"tower.{n}": x for n, x in state_of(home, "b").items()}
    other["tower.mlp.0.weight"] = other["tower.mlp.0.weight"].t().contiguous()
    torch.save(other, tmp_path / "b.pt")
    a, b = str(home / "a.safetensors"), str(tmp_path / "b.pt")
    assert "names begin with 'tower.'" in command.error("merge=average", sources=[a, b])
    named = f"{{path: {b}, names: ['^tower[.] -> ']}}"
    error = command.error("merge=average", sources=[a, named])
    assert "it is transposed: add {transposed: ['mlp.0.weight']}" in error
    named = f"{{path: {b}, names: ['^tower[.] -> '], transposed: ['mlp.0.weight']}}"
    expected = cki_rec.merge([state_of(home, "a"), state_of(home, "b")]).params
    merged = read(command.model("merge=average", sources=[a, named]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    written = torch.load(
        command.model("merge=average", sources=[named, a]), weights_only=True
    )  # in the form of the first source, transposed matrix and all
    turned = expected["mlp.0.weight"].t()
    assert torch.allclose(written["tower.mlp.0.weight"], turned, atol=1e-6)


def test_bad_sources_are_one_line_and_nothing_is_written(home, command, tmp_path, monkeypatch):
    a, state = str(home / "a.safetensors"), state_of(home, "b")

    def error(change, *words, name="b.pt"):
        torch.save(change, tmp_path / name)
        return command.error("merge=average", *words, sources=[a, str(tmp_path / name)])

    with monkeypatch.context() as patch:  # found before any tensor is read
        patch.setattr("cki_rec.pipelines.foreign.load", None)
        lacking = {n: x for n, x in state.items() if n != "item.weight"}
        assert "b.pt: tensor item.weight is missing" in error(lacking) or "table" in error(lacking)
        net = f"merge.module={home / 'net.py'}:Ranker"
        assert "b.pt: table item.weight is missing" in error(lacking, net)
        grown = {**state, "user.weight": torch.zeros(41, 4)}
        assert "user.weight: rows of tables differ, (40, 4)" in error(grown, net)
        assert "both must be floating" in error({**state, "mlp.0.bias": torch.ones(6).long()})
        (tmp_path / "copy.safetensors").write_bytes(Path(a).read_bytes())
        same = command.error("merge=average", sources=[a, str(tmp_path / "copy.safetensors")])
        assert "sources 1 and 2 are the same checkpoint" in same
    broken = {n: x.clone() for n, x in state.items()}
    broken["user.weight"][[3, 17]] = float("nan")
    assert "user.weight has NaN or infinite entries in row 3, 17;" in error(broken)
    assert "are the same model, tensor by tensor" in error(state_of(home, "a"))
    assert "no such file" in command.error("merge=average", sources=[a, "gone.pt"])
    assert "cannot be mixed" in command.error("merge=average", sources=[a, "{seed: 1}"])
    assert "a/nothing: no checkpoint here" in command.error(
        "merge=average", sources=[a, "a/nothing"]
    )
    assert "odd: no such key" in command.error(
        "merge=average", sources=[a, f"{{path: {home / 'b.pt'}, odd: 1}}"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge=auto"], "merge=auto compares recipes on rows with labels"),
        (["merge=best_source"], "merge=best_source: is for models that cki-rec has trained"),
        (["merge=average", "merge.scope=head"], "merge.scope=head: is for models that cki-rec"),
        (["merge=average", "merge.align.by=weights"], "merge.module gives the network"),
        (["merge=average", "merge.module=NET:Rankr"], "has no function Rankr"),
        (["merge=average", "merge.module=NET:draw"], "merge.module=NET:draw: fails, TypeError"),
        (["merge=average", "merge.module=NET:batches"], "returns a list; it must return"),
        (["merge=average", "merge.batches=NET:batches"], "set merge.module"),
        (["merge=average", "merge.module=NET:Ranker", "merge.data=x.csv"], "x.csv: unreadable"),
        (["merge=average", "merge.table_names=[odd]"], "odd matches no matrix"),
        (["merge=average", "merge.evidence=scores"], "merge.evidence=scores:"),
    ],
)
def test_bad_options(home, command, words, message):
    net = str(home / "net.py")
    sources = [str(home / "a.pt"), str(home / "b.pt")]
    shown = command.error(*(word.replace("NET", net) for word in words), sources=sources)
    assert message.replace("NET", net) in shown
    assert shown.count("\n") == 1


def test_a_merge_that_is_stopped_while_it_writes_leaves_no_model(home, command, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    sources = [str(home / "a.safetensors"), str(home / "b.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr("cki_rec.checkpoints.formats.safetensors.write_file", stopped)
        assert command.merge("merge=average", sources=sources) == 130
    assert not list(command.out.rglob("*.safetensors*"))
    command.model("merge=average", sources=sources)


def test_check_only_reads_no_tensor(home, command, monkeypatch):
    monkeypatch.setattr("cki_rec.pipelines.foreign.load", None)
    sources = [str(home / "a.pt"), str(home / "b.safetensors")]
    assert command.merge("merge=average", "check_only=true", sources=sources) == 0
    assert "the sources fit together" in command.shown.out


@pytest.mark.slow
def test_two_strangers_models_give_the_same_hits_as_from_python(command):
    data = Path(os.environ.get("CKI_REC_DATA", "")) / "ml1m_ncf_checkpoints"
    if not os.environ.get("CKI_REC_DATA") or not data.is_dir():
        pytest.skip("CKI_REC_DATA names no folder with ml1m_ncf_checkpoints")
    import ncf_module

    ncf, file = ncf_module.ncf, Path(ncf_module.__file__)
    assert len(file.read_text().splitlines()) <= 20
    sources = [str(data / "safetensors" / f"{n}.safetensors") for n in ncf.PAIRS["MLP"]]
    path = command.model(
        *("merge=average", "merge.align.by=activations", "merge.repair=project"),
        *(f"merge.module={file}:network", f"merge.batches={file}:rows"),
        sources=sources,
    )
    module = ncf.MLP()

    def hits(params):
        test = ncf.read_test(data)
        with torch.no_grad():
            return ncf.hits_and_gains(torch.func.functional_call(module, params, test))[0]

    expected = cki_rec.merge(
        [ncf.load_file(path) for path in sources],
        *("average",),
        align="activations",
        repair="project",
        module=module,
        batches=ncf_module.rows(),
        seed=1,
    ).params
    assert hits(read(path)) == hits(expected)
    assert hits(read(path)) == pytest.approx(0.63, abs=0.01)


def test_a_moved_source_is_the_same_and_other_counts_are_not(home, command, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((home / "a.safetensors").read_bytes())
    b = str(home / "b.safetensors")
    first = command.model("merge=average", sources=[str(home / "a.safetensors"), b])
    assert command.model("merge=average", sources=[str(moved), b]) == first
    for number in (1, 2):
        torch.save({"user": torch.full((40,), number)}, tmp_path / "counts.pt")
        listed = [f"{{path: {p}, counts: {tmp_path / 'counts.pt'}}}" for p in (moved, b)]
        command.model("merge=average", sources=listed)
    assert len(list(command.out.glob("merge-*"))) == 3


def test_options_for_others_are_refused_where_all_is_of_cki_rec(command):
    for word in ("data=x.csv", "format=dcp", "batches=x:y", "table_names=[a]"):
        error = command.error(f"merge.{word}", sources=["{seed: 1}", "{seed: 2}"])
        assert "is for checkpoints of other programs" in error


def test_a_merged_model_has_a_name_by_which_it_is_a_source_again(home, command):
    a, b = str(home / "a.pt"), str(home / "b.pt")
    assert command.merge("merge=average", "name=monday", sources=[a, b]) == 0, command.shown.err
    options = ["merge=slerp", f"merge.sources=[monday,{b}]", f"runtime.out={command.out}"]
    assert main(["merge", *options]) == 0
