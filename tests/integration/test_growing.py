"""Trainings that go on from another one, on data with new tokens: day after day."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from days import TINY, cut_days, write_days
from samples import EMBEDDED, make_data
from torch.nn.functional import pad

from cki_rec.checkpoints import checkpoint
from cki_rec.cli import main
from cki_rec.config import Split, parse
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.store import prepare
from cki_rec.data.encoding.vocabulary import read_vocabulary
from cki_rec.data.schema import FIRST_ID, OOV_ID
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.steps import StepLog
from cki_rec.pipelines import names, train

NUM = 5


class Killed(BaseException):
    """Simulates the end of a process; no code catches it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("growing")
    write_days(home, NUM)
    return home


@pytest.fixture(scope="module")
def trained(home, compose):
    """Function (day, *words, out="out") -> the finished run of such a training."""

    def run(day, *words, out="out"):
        places = [f"runtime.{key}={home / key}" for key in ("reports", "encoded")]
        options = [f"data.raw={home / f'day{day}.zip'}", f"runtime.out={home / out}"]
        return train.ensure(names.resolved(parse(compose(*options, *places, *TINY, *words))))

    return run


@pytest.fixture(scope="module")
def first(trained):
    return trained(1)


def lists_of(run, table):
    return read_vocabulary(run.path / "vocabulary" / f"vocabulary.{table}.txt")


@pytest.mark.parametrize("begin", [pytest.param("oov", marks=pytest.mark.slow), "mean"])
def test_known_rows_stay_and_new_rows_begin_as_configured(trained, first, begin):
    words = [f"train.start={{path: {first.path}}}", "train.epochs=0", f"train.new_rows={begin}"]
    one, other = (checkpoint.load(r.checkpoint) for r in (first, trained(2, *words)))
    grown = one.schema.table_sizes["item"]
    assert other.schema.table_sizes["item"] > grown
    for name, tensor in one.params.items():
        table = table_of(name)
        size = len(tensor) if table else None
        assert other.params[name][:size].equal(tensor)
        if table != "item":
            continue
        new, expected = other.params[name][grown:], tensor[OOV_ID]
        if begin == "mean":
            expected = tensor[FIRST_ID:].double().mean(0).float()
        torch.testing.assert_close(new, expected.expand_as(new), rtol=0, atol=1e-7)
        assert not other.accumulators[name][grown:].any()
        assert other.accumulators[name][:grown].equal(one.accumulators[name])
    assert other.counts["item"][:grown].equal(one.counts["item"])
    assert not other.counts["item"][grown:].any()


@pytest.mark.slow
def test_days_named_by_options_and_by_paths_are_one_training(home, trained, first):
    """Tokens keep their ids from day to day, and counts go on."""
    start = f"{{data.raw: {home / 'day1.zip'}}}"
    second = trained(2, f"train.start={start}")
    run = trained(3, f"train.start={{data.raw: {home / 'day2.zip'}, train.start: {start}}}")
    assert run.record["config"]["start"] == second.path.name
    assert second.record["config"]["start"] == first.path.name
    lists = [lists_of(each, "item") for each in (first, second, run)]
    for earlier, later in itertools.pairwise(lists):
        assert later[: len(earlier)] == earlier
        assert len(later) > len(earlier)
    named = trained(2, f"train.start={{path: {first.path}}}", "name=tuesday")
    named = trained(3, f"train.start={{path: {named.path}}}")
    one, other = (checkpoint.load(each.checkpoint) for each in (run, named))
    for group in ("params", "accumulators", "counts"):
        for name, tensor in getattr(one, group).items():
            assert tensor.equal(getattr(other, group)[name]), name
    shares = []
    for day in (first, second, run):
        (path,) = (
            path.parent
            for path in (home / "encoded").glob("*/manifest.json")
            if json.loads(path.read_text())["hash"] == day.record["data"]["hash"]
        )
        shares.append(EncodedDataset(path))
    seen = sum(
        pad(torch.from_numpy(counts), (0, len(one.counts["user"]) - len(counts)))
        for counts in (data.row_counts(data.schema)["user"] for data in shares)
    )
    assert seen.equal(one.counts["user"])


@pytest.mark.slow
def test_the_share_out_of_vocabulary_is_printed_and_frozen_lists_are_warned_of(
    home, trained, first, caplog
):
    with caplog.at_level("INFO", "cki_rec"):
        trained(5, f"train.start={{path: {first.path}}}")
    lines = [r.message for r in caplog.records]
    assert any("tokens that the start lacks: item " in line for line in lines)
    assert any("out of vocabulary" in line for line in lines)
    assert not any("all of them share one embedding" in line for line in lines)
    caplog.clear()
    with caplog.at_level("INFO", "cki_rec"):
        trained(5, f"train.start={{path: {first.path}}}", f"data.vocabularies=[{first.path}]")
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert any("all of them share one embedding" in line for line in warned)


@pytest.mark.slow
def test_a_run_carries_its_token_lists(home, trained, first, tmp_path, capsys):
    """Another machine has the runs alone: no rows, no encoded data sets."""
    second = trained(2)
    sent = [tmp_path / "north", tmp_path / "south"]
    for run, path in zip((first, second), sent, strict=True):
        shutil.copytree(run.path, path)
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    words = ["merge=evidence", f"merge.sources=[{sent[0]},{sent[1]}]", *places, *TINY]
    assert main(["merge", *words, "merge.vocabularies=[null,null]", "name=both"]) == 0
    merged = tmp_path / "out" / "names" / "both"
    tokens = read_vocabulary(merged / "vocabulary" / "vocabulary.item.txt")
    assert set(tokens) == {*lists_of(first, "item"), *lists_of(second, "item")}
    raw = f"data.raw={home / 'day3.zip'}"
    assert main(["train", raw, "train.start=both", "name=third", *places, *TINY]) == 0
    grown = read_vocabulary(tmp_path / "out/names/third/vocabulary/vocabulary.item.txt")
    assert grown[: len(tokens)] == tokens
    same = ["merge=average", "merge.sources=[both,third]", *places, *TINY]
    assert main(["merge", *same]) == 2
    assert "merge.vocabularies" in capsys.readouterr().err


@pytest.mark.slow
def test_a_delta_of_a_day_sends_new_tokens_and_gives_the_model_of_the_day(
    home, trained, first, tmp_path, capsys
):
    second = trained(2, f"train.start={{path: {first.path}}}")
    places = [f"runtime.{key}={tmp_path / key}" for key in ("out", "reports", "encoded")]
    monday, tuesday = tmp_path / "monday", tmp_path / "tuesday"
    shutil.copytree(first.path, monday)
    shutil.copytree(second.path, tuesday)
    base = f"merge.base={monday}"
    assert main(["export", f"run={tuesday}", "format=delta", base, *places]) == 0
    sent = tmp_path / "sent"
    (tuesday / "delta").rename(sent)
    new = read_vocabulary(sent / "new_tokens" / "vocabulary.item.txt")
    assert [*lists_of(first, "item"), *new] == lists_of(second, "item")
    words = ["merge", "merge=average", base, f"merge.deltas=[{sent}]", "name=applied", *places]
    assert main(words) == 0
    applied = tmp_path / "out" / "names" / "applied"
    one, other = checkpoint.load(applied / "checkpoint"), checkpoint.load(second.checkpoint)
    assert one.schema == other.schema
    for group in ("params", "accumulators", "counts"):
        for name, tensor in getattr(other, group).items():
            assert tensor.equal(getattr(one, group)[name]), name
    assert read_vocabulary(applied / "vocabulary" / "vocabulary.item.txt") == lists_of(
        second, "item"
    )
    raw = f"data.raw={home / 'day3.zip'}"
    assert main(["train", raw, "train.start=applied", *places, *TINY]) == 0
    other_day = trained(2)  # from no start: other ids
    assert main(["export", f"run={other_day.path}", "format=delta", base, *places]) == 2
    assert "does not begin with the tokens of merge.base" in capsys.readouterr().err
    evaluated = ["evaluate", base, f"merge.deltas=[{sent}]", raw, *places, *TINY]
    assert main([*evaluated, "merge=average"]) == 2
    assert "only cki-rec merge takes deltas" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])
def test_a_killed_training_with_new_tokens_ends_like_an_unbroken_one(
    trained, first, step, monkeypatch
):
    words = [f"train.start={{path: {first.path}}}", "train.batch_size=64", "train.epochs=2"]
    words += ["runtime.checkpoint_steps=2", "runtime.log_steps=1"]
    want = trained(2, *words, out="unbroken")
    write = StepLog.step

    def end(log, number, *rest):
        write(log, number, *rest)
        if number == step + 1:
            raise Killed

    monkeypatch.setattr(StepLog, "step", end)
    with pytest.raises(Killed):
        trained(2, *words, out=f"killed-{step}")
    monkeypatch.undo()
    run = trained(2, *words, out=f"killed-{step}")
    assert run.record["provenance"]["resumed_at_step"] == step // 2 * 2
    assert run.record["result"] == want.record["result"]
    one, other = (checkpoint.load(each.checkpoint) for each in (run, want))
    for name, tensor in one.params.items():
        assert tensor.equal(other.params[name]), name
    assert not (run.path / "start").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.new_tokens=add"], "data.new_tokens=add: requires the lists that it adds to"),
        (["data.vocabularies=[/nowhere]"], "/nowhere/vocabulary.user.txt: missing"),
        (["train.start={path: /nowhere}"], "/nowhere: no checkpoint here"),
        (["train.new_rows=zero"], "train.new_rows=zero: one of oov, mean"),
        (["train.start={data.raw: DAY1, data.fields: [user]}"], "data.fields: ['user'] against"),
    ],
)
def test_mistakes_are_one_line(home, capsys, words, message):
    places = [f"runtime.{key}={home / key}" for key in ("out", "reports", "encoded")]
    words = [word.replace("DAY1", str(home / "day1.zip")) for word in words]
    assert main(["train", f"data.raw={home / 'day2.zip'}", *places, *TINY, *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_two_processes_grow_tables_as_one_does(home, trained, first, sharding, tmp_path):
    words = [f"train.start={{path: {first.path}}}", "train.new_rows=mean", "model.dropout=0"]
    one = checkpoint.load(trained(2, *words).checkpoint)
    places = [f"runtime.out={tmp_path}", f"runtime.encoded={home / 'encoded'}"]
    options = [f"data.raw={home / 'day2.zip'}", f"runtime.sharding={sharding}", *places]
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "cki_rec", "train", *options, *TINY, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = tmp_path.glob("train-*")
    other = checkpoint.load(run / "checkpoint")
    assert other.schema == one.schema
    for name, tensor in one.params.items():
        torch.testing.assert_close(other.params[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for table, counts in one.counts.items():
        assert counts.equal(other.counts[table])


@pytest.mark.slow
def test_five_days_of_real_ratings_stay_in_the_vocabulary(tmp_path):
    """Of the item lookups of day 5, below 10 % are out of a grown vocabulary, most of a frozen."""
    days = cut_days(EMBEDDED, tmp_path, NUM, lambda _: 10**9)
    split = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)

    def encoded(day, *folders, new_tokens="oov"):
        data = make_data(
            raw=str(days[day]),
            fields=["user", "item", "genres", "year", "hour"],
            split=split,
            vocabularies=list(map(str, folders)),
            new_tokens=new_tokens,
        )
        return prepare(data, tmp_path / "encoded")

    start = latest = encoded(0)
    for day in range(1, NUM):
        latest = encoded(day, latest.folder, new_tokens="add")
    frozen = encoded(NUM - 1, start.folder)
    shares = [each.manifest["unseen_share"]["item"] for each in (latest, frozen)]
    assert shares[0]["train"] == 0
    assert max(shares[0].values()) < 0.1
    assert min(shares[1].values()) > 0.3
