"""Models of two regions, each with users, items and an encoding of its own, become one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from regions import TINY, train_regions
from store import twin

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.data.encoding import tokens
from cki_rec.engine import checkpoint_io
from cki_rec.engine.embeddings import table_of
from cki_rec.pipelines import preflight


@pytest.fixture(scope="module")
def regions(tmp_path_factory):
    """Two trained models, and where they and their data are: out, checkpoints by name."""
    home = tmp_path_factory.mktemp("regions")
    return home, train_regions(home)


def merge_sources(home, sources, *words):
    places = [f"runtime.{key}={home / key}" for key in ("reports", "encoded")]
    named = ",".join(f"{{path: {path}}}" for path in sources)
    rule = [] if any(word.startswith("merge=") for word in words) else ["merge=evidence"]
    return main(["merge", f"merge.sources=[{named}]", *places, *TINY, *rule, *words])


def merge(regions, tmp_path, *words, order=("north", "south")):
    home, found = regions
    sources = [found[name] for name in order]
    out = f"runtime.out={tmp_path / 'out'}"
    assert merge_sources(home, sources, out, "merge.vocabularies=[null,null]", *words) == 0
    (run,) = (tmp_path / "out").glob("merge-*")
    return run


def rows_by_token(folder, home=None):
    """Return the table rows of a model by (parameter, token), and its other parameters."""
    saved = checkpoint.load(folder / "checkpoint")
    places = [folder / "vocabulary", *(home.glob("encoded/*-*") if home else [])]
    rows, rest = {}, {}
    for name, tensor in saved.params.items():
        table = table_of(name)
        if table is None:
            rest[name] = tensor
            continue
        digest = saved.schema.vocabulary_hashes[table]
        place = tokens.find_tokens(places, {table: digest})
        listed = ["", "?", *tokens.read_tokens(place, table, digest)]
        rows |= {(name, t): tensor[i] for i, t in enumerate(listed)}
    return rows, rest


@pytest.mark.parametrize(
    "method", ["evidence", "average", "karcher", "cki_dual_hard", "filter_grafting"]
)
def test_lone_rows_are_their_owners_and_shared_rows_are_merged(regions, tmp_path, method):
    run = merge(regions, tmp_path, f"merge={method}")
    home, found = regions
    merged, _ = rows_by_token(run)
    north, south = (rows_by_token(found[name], home)[0] for name in ("north", "south"))
    assert merged.keys() == north.keys() | south.keys()
    alone = [key for key in merged if (key in north) != (key in south)]
    users = {token for name, token in alone if table_of(name) == "user"}
    assert users == {str(u) for u in [*range(1, 21), *range(41, 61)]}
    for key in alone:
        assert torch.equal(merged[key], north.get(key, south.get(key))), key
    if method == "average":
        for key in north.keys() & south.keys():
            torch.testing.assert_close(merged[key], (north[key] + south[key]) / 2)
    record = json.loads((run / "record.json").read_text())
    facts = record["result"]["vocabularies"]["user"]
    assert facts == {"tokens": 60, "of_each": [40, 40], "of_all": 20}


def test_counts_and_accumulators_move_with_their_rows(regions, tmp_path):
    run = merge(regions, tmp_path)
    merged = checkpoint.load(run / "checkpoint")
    _, found = regions
    north = checkpoint.load(found["north"] / "checkpoint")
    for table, digest in north.schema.vocabulary_hashes.items():
        assert len(merged.counts[table]) == merged.schema.table_sizes[table], digest
    assert merged.counts["user"][:42].ge(north.counts["user"]).all()
    for name, tensor in merged.accumulators.items():
        assert len(tensor) == len(merged.params[name])


def test_the_order_of_sources_changes_ids_only(regions, tmp_path):
    one = merge(regions, tmp_path / "one")
    two = merge(regions, tmp_path / "two", order=("south", "north"))
    (rows, rest), (others, other_rest) = rows_by_token(one), rows_by_token(two)
    assert rows.keys() == others.keys()
    for key, row in rows.items():
        torch.testing.assert_close(row, others[key], rtol=1e-5, atol=1e-7)
    for name, tensor in rest.items():
        torch.testing.assert_close(tensor, other_rest[name], rtol=1e-5, atol=1e-7)


def test_aligned_sources_can_be_joined(regions, tmp_path):
    run = merge(regions, tmp_path, "merge.align.by=weights")
    record = json.loads((run / "record.json").read_text())
    assert record["result"]["alignment"]["agreement"] > 0


@pytest.mark.parametrize("repair", ["none", "project"])
def test_rows_that_stand_in_have_no_say_in_alignment_without_counts(regions, tmp_path, repair):
    """No counts are as good as one lookup of every row that a source has."""
    home, found = regions
    merged, facts = [], []
    for kind in ("ones", "none"):
        sources = []
        for name, path in found.items():
            saved = checkpoint.load(path / "checkpoint")
            ones = {table: torch.ones_like(c) for table, c in saved.counts.items()}
            groups = {"model": saved.params, "accumulator": saved.accumulators}
            groups["counts"] = ones if kind == "ones" else {}
            sources.append(tmp_path / kind / name)
            checkpoint_io.save(sources[-1], groups, saved.model, saved.schema, saved.origin)
        words = [f"runtime.out={tmp_path / kind}", "merge.vocabularies=[null,null]"]
        words += ["merge=average", "merge.align.by=weights", f"merge.repair={repair}"]
        words += (
            ["merge.evidence=none"] if kind == "none" else []
        )  # else sums of squared gradients
        words += [f"data.raw={home / 'north.zip'}", "data.name=north"]
        assert merge_sources(home, sources, *words) == 0
        (run,) = (tmp_path / kind).glob("merge-*")
        facts.append(json.loads((run / "record.json").read_text())["result"]["alignment"])
        merged.append(checkpoint.load(run / "checkpoint").params)
        assert merge_sources(home, sources, *words, "check_only=true") == 0
    assert facts[0] == facts[1]
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


def test_no_source_is_chosen_on_rows_of_one_encoding(regions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "has_anchor", lambda *_: True)
    home, found = regions
    words = [f"runtime.out={tmp_path}", "merge.vocabularies=[null,null]"]
    words += ["merge.repair=project", f"data.raw={home / 'north.zip'}", "data.name=north"]
    assert merge_sources(home, found.values(), *words) == 2
    assert "merge.repair=project chooses a source by validation rows" in capsys.readouterr().err
    assert not list(tmp_path.glob("merge-*/checkpoint"))


def test_a_merged_model_is_merged_again(regions, tmp_path):
    """Its token lists lie beside it, and an empty entry finds them."""
    home, found = regions
    run = merge(regions, tmp_path)
    out, joint = f"runtime.out={tmp_path / 'again'}", "merge.vocabularies=[null,null]"
    assert merge_sources(home, [run, found["south"]], out, joint) == 0
    (again,) = (tmp_path / "again").glob("merge-*")
    sizes = [checkpoint.describe(r / "checkpoint").schema.table_sizes for r in (run, again)]
    assert sizes[0] == sizes[1]


def test_one_vocabulary_joined_with_itself_changes_nothing(regions, tmp_path):
    home, found = regions
    north = found["north"]
    joint, out = "merge.vocabularies=[null,null]", f"runtime.out={tmp_path / 'out'}"
    assert merge_sources(home, [north, twin(north, tmp_path / "twin")], out, joint) == 0
    (run,) = (tmp_path / "out").glob("merge-*")
    one, two = (checkpoint.load(path / "checkpoint") for path in (north, run))
    assert one.schema == two.schema
    for name, tensor in one.params.items():
        assert torch.equal(tensor, two.params[name]), name


def test_a_common_start_has_a_vocabulary_too(regions, tmp_path):
    home, found = regions
    start = f"merge.base={{path: {found['north']}}}"
    words = [
        f"runtime.out={tmp_path / 'out'}",
        "merge=ties",
        start,
        "merge.options.scale=1.0",
    ]
    both = [found["north"], found["south"]]
    assert merge_sources(home, both, *words, "merge.vocabularies=[null,null,null]") == 0
    (run,) = (tmp_path / "out").glob("merge-*")
    merged, _ = rows_by_token(run)
    south, _ = rows_by_token(found["south"], home)
    for key, row in merged.items():
        if table_of(key[0]) == "user" and key[1].isdigit() and int(key[1]) > 40:
            assert torch.equal(row, south[key]), key


def refused(regions, tmp_path, capsys, *words):
    home, found = regions
    capsys.readouterr()
    out = f"runtime.out={tmp_path / 'out'}"
    assert merge_sources(home, [found["north"], found["south"]], out, *words) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert not list((tmp_path / "out").glob("merge-*"))
    return shown


def encoded(regions, name):
    (folder,) = (p.parent for p in (regions[0] / "encoded").glob(f"{name}-*/manifest.json"))
    return folder


def test_what_cannot_be_joined_is_refused_in_one_line(regions, tmp_path, capsys):
    def error(*words):
        return refused(regions, tmp_path, capsys, *words)

    north, south = encoded(regions, "north"), encoded(regions, "south")
    assert "merge.vocabularies=[null,null]" in error()
    assert "1 folders for 2 models" in error("merge.vocabularies=[null]")
    swapped = error(f"merge.vocabularies=[{south},{north}]")
    assert "vocabulary." in swapped
    assert "differs from the tokens that the model was trained with" in swapped
    assert "no such folder" in error(f"merge.vocabularies=[{north},/nowhere]")
    assert "missing, but the model has this table" in error(
        f"merge.vocabularies=[{north},{tmp_path}]"
    )
    bare = [tmp_path / "bare" / name for name in ("north", "south")]
    for path in bare:  # a run of an earlier release has no token lists
        shutil.copytree(regions[1][path.name], path, ignore=lambda *_: ["vocabulary"])
    words = ["merge.vocabularies=[null,null]", f"runtime.encoded={tmp_path}"]
    assert merge_sources(regions[0], bare, f"runtime.out={tmp_path / 'out'}", *words) == 2
    assert "merge.vocabularies[0]: no encoded data set" in capsys.readouterr().err
    both = f"merge.vocabularies=[{north},{south}]"
    assert "merges no parameters" in error(both, "merge.method=output_ensemble")
    assert "joint (merge.method=best_source) merges no parameters; leave it out" in error(
        both, "merge=joint"
    )
    assert "reads rows" in error(both, "merge=cki_gate")
    assert "merge.method=auto searches on validation rows" in error(both, "merge=auto")
    assert "reads rows" in error(both, "merge.recalibrate=true")


def test_a_truncated_token_list_is_refused(regions, tmp_path, capsys):
    south = encoded(regions, "south")
    path = south / "vocabulary.user.txt"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    try:
        shown = refused(
            regions,
            tmp_path,
            capsys,
            f"merge.vocabularies=[{encoded(regions, 'north')},{south}]",
        )
    finally:
        path.write_bytes(content)
    assert f"{path}: damaged" in shown
