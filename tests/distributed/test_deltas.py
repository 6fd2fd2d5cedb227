"""Deltas: changed rows of a base, and merges of them that equal merges of whole models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from merging_cases import SCHEMA, SIZES, merged, of, run_command
from training import options

from cki_rec.checkpoints import checkpoint, content_digest, deltas, describe
from cki_rec.checkpoints.formats import safetensors
from cki_rec.checkpoints.rows import RowReader
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import checkpoint_io
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.methods import METHODS
from cki_rec.models import build_model
from cki_rec.pipelines import continuous
from cki_rec.pipelines import deltas as rows_of_deltas

ITEM = "sparse.collection.embedding_bags.item.weight"
CHANGED = {"a": {"item": [3, 4, 7, 100], "user": [0, 36]}, "b": {"item": [4, 5, 99], "hour": [1]}}
"""Rows that each source changes; row 4 of the items is changed by both."""
APART = [3, 5, 7, 99, 100]
QUICK = {"evidence": ("merge=evidence",)}
CASES = {
    **QUICK,
    "average": ("merge=average",),
    "moving_average": ("merge=moving_average",),
    "sequential": ("merge=sequential",),
    "weighted": ("merge=weighted_average", "merge.options={weights: [0.3, 0.7]}"),
    "tables": ("merge=average", "merge.tables=evidence", "merge.scope=head"),
}


def grown(sizes):
    return FeatureSchema(SCHEMA.features, sizes, SCHEMA.vocabulary_hashes)


def write_source(folder, name, changed):
    """Write a model that differs from ``base`` in some rows, their counts, and all else."""
    config = options("model.histories=false")
    network = build_model(SCHEMA, config.model, torch.device("meta"))
    draw = torch.Generator().manual_seed(0)
    params = {n: torch.randn(t.shape, generator=draw) for n, t in network.state_dict().items()}
    tables = [n for n in params if table_of(n)]
    sums = {n: torch.rand(len(params[n]), 1, generator=draw) for n in tables}
    counts = {t: torch.randint(1, 5, (n,), generator=draw) for t, n in SIZES.items()}
    if name != "base":
        draw = torch.Generator().manual_seed(ord(name))
        for tensors in (params, sums):
            for key, tensor in tensors.items():
                rows = changed.get(table_of(key), []) if table_of(key) else slice(None)
                tensor[rows] += torch.rand(tensor[rows].shape, generator=draw)
        for table, rows in changed.items():
            counts[table][rows] += 3
    tensors = {"model": params, "accumulator": sums, "counts": counts}
    checkpoint_io.save(folder / name, tensors, config.model, SCHEMA, Provenance("hash"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of a base, two models that were trained on from it, and their deltas."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("base", "a", "b"):
        write_source(folder, name, CHANGED.get(name, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_of_deltas, "BLOCK", 16)
        for name in "ab":
            words = [f"run={folder / name}", "format=delta", f"merge.base={folder / 'base'}"]
            assert run_command(folder, "out", "export", *words) == (0, "")
    return folder


def of_deltas(sources, *more, names="ab"):
    listed = ",".join(str(sources / name) for name in names)
    return (f"merge.base={sources / 'base'}", f"merge.deltas=[{listed}]", *more)


def test_a_delta_holds_the_changed_rows_and_all_else(sources):
    base = checkpoint.load(sources / "base")
    for name, changed in CHANGED.items():
        delta, whole = deltas.open_delta(sources / name), checkpoint.load(sources / name)
        assert delta.base == content_digest(sources / "base")
        for table in SIZES:
            rows, values = delta.table(table)
            assert rows.tolist() == changed.get(table, [])
            for key, tensor in values.items():
                group, _, param = key.partition(".")
                kept = {"model": whole.params, "accumulator": whole.accumulators}
                expected = whole.counts[table] if key == "counts" else kept[group][param]
                assert tensor.equal(expected[rows])
        for param, tensor in delta.dense().items():
            assert tensor.equal(whole.params[param])
            assert not tensor.equal(base.params[param])


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_a_merge_of_deltas_is_that_of_whole_models(sources, tmp_path, monkeypatch, case):
    for module in (continuous, rows_of_deltas):
        monkeypatch.setattr(module, "BLOCK", 2)
    whole = of(*(str(sources / name) for name in "ab")), f"merge.base={sources / 'base'}"
    assert run_command(tmp_path, "whole", "merge", *whole, *CASES[case]) == (0, "")
    assert run_command(tmp_path, "rows", "merge", *of_deltas(sources, *CASES[case])) == (0, "")
    one = checkpoint.load(merged(tmp_path, "whole") / "checkpoint")
    run = merged(tmp_path, "rows")
    other = checkpoint.load(run / "checkpoint")
    for group in ("params", "accumulators", "counts"):
        assert getattr(one, group).keys() == getattr(other, group).keys()
        for name, tensor in getattr(one, group).items():
            assert tensor.equal(getattr(other, group)[name]), name
    base, delta = checkpoint.load(sources / "base"), deltas.open_delta(run)
    rows, values = delta.table("item")
    assert rows.tolist() == [3, 4, 5, 7, 99, 100]
    assert values[f"model.{ITEM}"].equal(one.params[ITEM][rows])
    rest = torch.tensor([row for row in range(SIZES["item"]) if row not in rows.tolist()])
    assert one.params[ITEM][rest].equal(base.params[ITEM][rest])


def test_a_moving_average_keeps_nine_tenths_of_the_base(sources, tmp_path):
    words = of_deltas(sources, "merge=moving_average", "merge.write=delta", names="a")
    assert run_command(tmp_path, "rows", "merge", *words) == (0, "")
    run = merged(tmp_path, "rows")
    assert not (run / "checkpoint").exists()
    base, new = (checkpoint.load(sources / name).params for name in ("base", "a"))
    rows, values = deltas.open_delta(run).table("item")
    expected = 0.9 * base[ITEM][rows].double() + 0.1 * new[ITEM][rows].double()
    torch.testing.assert_close(values[f"model.{ITEM}"].double(), expected, rtol=1e-6, atol=1e-6)
    assert run_command(tmp_path, "rows", "merge", *words) == (0, "")  # finished: not again
    assert len(list((tmp_path / "rows").glob("merge-*"))) == 1


def test_only_changed_rows_are_read_and_written(sources, tmp_path, monkeypatch):
    """Of the base: 3 tensors per row, and rows that lie on the same page with them."""
    read = []
    whole = RowReader.read

    def note(reader, key, first=0, stop=None):
        if table_of(key) == "item" or key == "counts.item":
            read.append((stop or SIZES["item"]) - first)
        return whole(reader, key, first, stop)

    monkeypatch.setattr(RowReader, "read", note)
    monkeypatch.setattr("cki_rec.checkpoints.rows.NEAR", 1)
    words = of_deltas(sources, "merge=average", "merge.write=delta")
    assert run_command(tmp_path, "rows", "merge", *words) == (0, "")
    changed, tensors = len([3, 4, 5, 7, 99, 100]), 5  # two tables with accumulators, and counts
    assert sum(read) == changed * tensors


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_equals_whole_models_or_is_refused_in_one_line(sources, tmp_path, method):
    entry = METHODS[method]
    given = {"scale": 0.4, "weights": [0.4, 0.6], "source": 1}
    chosen = {n: given[n] for n, x in entry.options.items() if x is None and n in given}
    values = ", ".join(f"{name}: {value}" for name, value in chosen.items())
    words = ("merge=average", f"merge.method={method}", f"merge.options={{{values}}}")
    code, message = run_command(tmp_path, "rows", "merge", *of_deltas(sources, *words))
    if code:
        assert "merge.deltas merges changed rows alone" in message
        assert message.count("\n") == 1
        return
    whole = of(*(str(sources / name) for name in "ab")), f"merge.base={sources / 'base'}"
    assert run_command(tmp_path, "whole", "merge", *whole, *words) == (0, "")
    one, other = (
        checkpoint.load(merged(tmp_path, case) / "checkpoint") for case in ("whole", "rows")
    )
    for name, tensor in one.params.items():
        assert tensor.equal(other.params[name]), name


def damaged(sources, folder, change):
    """Return a copy of delta ``a`` with changed tensors of the item table; digests fit."""
    shutil.copytree(sources / "a" / "delta", folder)
    path = folder / deltas.file_name("item")
    stored = safetensors.Safetensors(path)
    tensors = {name: stored.rows(name) for name in stored.entries}
    stored.close()
    change(tensors)
    safetensors.write_file(tensors, path)
    content = json.loads((folder / "delta.json").read_text())
    content["files"][path.name] = deltas.file_digest(path)
    (folder / "delta.json").write_text(json.dumps(content))
    return folder


def set_rows(*rows):
    return lambda tensors: tensors["rows"].copy_(torch.tensor(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_rows(3, 4, 7, 101), "row 101 is outside of the table of 101 rows"),
        (set_rows(-1, 4, 7, 100), "row -1 is outside of the table"),
        (set_rows(3, 4, 4, 100), "row 4 is there twice"),
        (set_rows(4, 3, 7, 100), "'rows' is not ascending"),
        (lambda t: t[f"model.{ITEM}"][2].fill_(torch.nan), "NaN or infinite entries in row 7;"),
        (lambda t: t.update(counts=t["counts"][:2]), "counts has 2 rows, 'rows' 4"),
        (lambda t: t.pop("rows"), "no int64 tensor 'rows'"),
    ],
)
def test_bad_deltas_are_refused_in_one_line(sources, tmp_path, change, message):
    bad = damaged(sources, tmp_path / "bad", change)
    words = (f"merge.base={sources / 'base'}", f"merge.deltas=[{bad}]", "merge=average")
    code, shown = run_command(tmp_path, "out", "merge", *words)
    assert code == 2
    assert message in shown
    assert shown.count("\n") == 1
    assert not list((tmp_path / "out").glob("merge-*"))


def test_files_that_are_cut_or_of_another_base_are_refused(sources, tmp_path):
    def error(*words, base="base"):
        base = f"merge.base={sources / base}"
        code, shown = run_command(tmp_path, "out", "merge", base, "merge=average", *words)
        assert code == 2
        assert shown.count("\n") == 1
        assert not list((tmp_path / "out").glob("merge-*"))
        return shown

    a, b = sources / "a", sources / "b"
    assert "is a delta of another base (digest " in error(f"merge.deltas=[{a}]", base="b")
    assert "is there twice" in error(f"merge.deltas=[{a},{a}]")
    assert "no delta here (delta.json is missing)" in error(f"merge.deltas=[{tmp_path}]")
    both = error(f"merge.deltas=[{a},{b}]", f"merge.sources=[{a},{b}]")
    assert "merge.deltas and merge.sources are both set" in both
    assert "needs whole tables" in error(f"merge.deltas=[{a},{b}]", "merge.method=ties")
    assert "merge.align.by=weights needs whole" in error(
        f"merge.deltas=[{a},{b}]", "merge.align.by=weights"
    )
    cut = tmp_path / "cut"
    shutil.copytree(a / "delta", cut)
    path = cut / deltas.file_name("item")
    path.write_bytes(path.read_bytes()[:-9])
    assert "the file is cut or has changed; copy it again" in error(f"merge.deltas=[{cut}]")
    path.unlink()
    assert "the file is gone" in error(f"merge.deltas=[{cut}]")
    (cut / "delta.json").write_text("{")
    assert "damaged delta" in error(f"merge.deltas=[{cut}]")


def test_single_rows_are_read_from_their_places(sources):
    whole = checkpoint.load(sources / "a").params[ITEM]
    with RowReader(sources / "a", "a") as reader:
        for rows in ([], [0], [100], [0, 1, 2, 50, 99, 100], list(range(101))):
            numbers = torch.tensor(rows, dtype=torch.int64)
            assert reader.read_rows(f"model.{ITEM}", numbers).equal(whole[numbers])
    assert describe(sources / "a").schema == SCHEMA
