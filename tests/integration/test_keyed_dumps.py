"""``cki-rec merge`` and ``inspect`` of dynamicemb dumps."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from keyed import assert_same, draw, merged, read_dump, write_dump
from strangers import Command, command

from cki_rec.checkpoints import partitions
from cki_rec.checkpoints.formats.dynamicemb import ranks_of, tables_of
from cki_rec.cli import main
from cki_rec.config import UserError

__all__ = ["command"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TABLE = "model.ebc/user"
SOURCES = [draw(0, range(-30, 60)), draw(1, range(30, 110)), draw(2, range(0, 120, 5))]


@pytest.fixture
def dumps(tmp_path):
    return [
        write_dump(tmp_path / name, TABLE, rows, world_size)
        for name, rows, world_size in zip("abc", SOURCES, (2, 1, 3), strict=True)
    ]


@pytest.mark.parametrize(
    ("number", "method"),
    [pytest.param(2, "average", marks=pytest.mark.slow), (3, "evidence")],
)
def test_a_merge_equals_that_of_dictionaries(dumps, command, monkeypatch, number, method):
    path = command.model(f"merge={method}", sources=dumps[:number])
    rows = read_dump(path, TABLE)
    assert_same(rows, merged(SOURCES[:number], method))
    assert {f.name.split(".")[2] for f in (path / "model.ebc").iterdir()} == {"world_size_2"}
    assert command.card["evidence"]["kind"] == "scores"
    assert command.card["keys"] == {TABLE: len(rows)}
    several = sum(sum(key in s for s in SOURCES[:number]) > 1 for key in rows)
    assert command.card["shared_keys"] == {TABLE: several}
    assert f"{len(rows)} keys, {several} of them in several sources" in command.shown.out
    assert command.card["sources"][1]["keys"] == {TABLE: 80}
    assert sum(command.card["shares"][TABLE]) == pytest.approx(1)
    files = {f.name: f.read_bytes() for f in (path / "model.ebc").iterdir()}
    monkeypatch.setattr(partitions, "PART_BYTES", 1000)
    monkeypatch.setattr(partitions, "BLOCK_BYTES", 500)
    again = command.model(f"merge={method}", "runtime.force=true", sources=dumps[:number])
    assert {f.name: f.read_bytes() for f in (again / "model.ebc").iterdir()} == files


def test_the_rows_of_least_use_leave(dumps, command):
    path = command.model("merge=evidence", "merge.max_rows=50", sources=dumps)
    assert_same(read_dump(path, TABLE), merged(SOURCES, "evidence", 50))
    assert "keys of least use leave, 50 stay" in command.shown.out


def test_state_of_the_optimizer_comes_from_the_most_trained_row(tmp_path, command):
    paths = [
        write_dump(tmp_path / name, "t", rows, state=True)
        for name, rows in zip("ab", SOURCES, strict=False)
    ]
    (tmp_path / "a" / "t_opt_args.json").write_text('{"opt_type": "adagrad"}')
    path = command.model("merge=evidence", sources=paths)
    state = np.fromfile(path / "t_emb_opt_values.rank_0.world_size_1", np.float32)
    keys = np.fromfile(path / "t_emb_keys.rank_0.world_size_1", np.int64)
    most = {key: use for key, (_, use) in merged(SOURCES[:2]).items()}
    assert state.reshape(-1, 2)[:, 0].tolist() == [most[int(key)] + 0.5 for key in keys]
    assert json.loads((path / "t_opt_args.json").read_text())["opt_type"] == "adagrad"


@pytest.mark.slow
def test_keys_stay_at_the_ranks_of_their_hash(tmp_path, command):
    def hashed(key, world_size):
        return int(ranks_of(np.array([key]), world_size, "hash_roundrobin")[0])

    paths = [
        write_dump(tmp_path / name, "t", rows, 3, rule=hashed)
        for name, rows in zip("ab", SOURCES, strict=False)
    ]
    path = command.model("merge=average", sources=paths)
    total = 0
    for rank in range(3):
        keys = np.fromfile(path / f"t_emb_keys.rank_{rank}.world_size_3", np.int64)
        assert {hashed(int(key), 3) for key in keys} == {rank}
        total += len(keys)
    assert total == len(SOURCES[0] | SOURCES[1])


@pytest.mark.slow
def test_scores_may_be_missing(tmp_path, command, dumps):
    bare = write_dump(tmp_path / "bare", TABLE, SOURCES[1], scores=False)
    sources = [dumps[0], bare]
    path = command.model("merge=average", sources=sources)
    assert command.card["evidence"]["kind"] == "none"
    no_use = [SOURCES[0], {key: (values, 0) for key, (values, _) in SOURCES[1].items()}]
    assert_same(read_dump(path, TABLE), merged(no_use))
    assert "needs counts or scores" in Command(command.out / "x", command.capsys).error(
        "merge=evidence", sources=sources
    )
    other = Command(command.out / "y", command.capsys)
    assert "merge.max_rows" in other.error("merge=average", "merge.max_rows=9", sources=sources)
    assert f"{bare}: {TABLE} has no scores" in other.error(
        "merge=average", "merge.evidence=scores", sources=sources
    )


@pytest.mark.slow
def test_the_smaller_of_two_words_of_scores_is_the_frequency(tmp_path, command):
    time = 1_700_000_000_000_000_000
    for name, rows in zip("ab", SOURCES, strict=False):
        write_dump(tmp_path / name, "t", rows)
        file = tmp_path / name / "t_emb_scores.rank_0.world_size_1"
        uses = np.fromfile(file, np.int64)
        np.stack([uses * 0 + time, uses], 1).tofile(file)
    path = command.model("merge=evidence", sources=[str(tmp_path / "a"), str(tmp_path / "b")])
    values = np.fromfile(path / "t_emb_values.rank_0.world_size_1", np.float32).reshape(-1, 4)
    keys = np.fromfile(path / "t_emb_keys.rank_0.world_size_1", np.int64)
    expected = merged(SOURCES[:2], "evidence")
    for key, row in zip(keys.tolist(), values, strict=True):
        np.testing.assert_allclose(row, expected[key][0], atol=1e-6)


@pytest.mark.slow
def test_empty_tables_and_no_shared_key(tmp_path, command):
    empty = write_dump(tmp_path / "empty", "t", {}, 2)
    some = write_dump(tmp_path / "some", "t", draw(0, range(7)))
    other = write_dump(tmp_path / "other", "t", draw(0, range(7, 9)))
    for sources, number in (([empty, some], 7), ([some, empty], 7), ([some, other], 9)):
        path = command.model("merge=evidence", sources=sources)
        assert len(read_dump(path, "t")) == number
        assert "t: no key is in several sources" in command.shown.out


def test_the_dense_part_of_a_checkpoint_is_merged_too(tmp_path, command):
    for k, name in enumerate("ab"):
        folder = tmp_path / name
        write_dump(folder / "dynamicemb", TABLE, SOURCES[k])
        model = {"mlp.weight": torch.full((2, 3), 1.0 + k), "steps": torch.tensor(3)}
        dcp.save(model, checkpoint_id=folder / "model", no_dist=True)
    path = command.model("merge=average", sources=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert_same(read_dump(path / "dynamicemb", TABLE), merged(SOURCES[:2]))
    state = {"mlp.weight": torch.empty(2, 3), "steps": torch.tensor(0)}
    dcp.load(state, checkpoint_id=path / "model", no_dist=True)
    assert state["mlp.weight"].unique().item() == 1.5
    assert state["steps"].item() == 3
    again = command.model("merge=average", sources=[str(path), str(tmp_path / "b")])
    assert (again / "dynamicemb").is_dir()


def cut(file, by=4):
    file.write_bytes(file.read_bytes()[:-by])


def damage(name):
    """Return a change of the folder ``a/model.ebc`` of two ranks."""

    def change(folder):
        rank = folder / "user_emb_values.rank_1.world_size_2"
        if name == "cut values":
            cut(rank, 16)
        elif name == "cut keys":
            cut(folder / "user_emb_keys.rank_0.world_size_2")
        elif name == "cut scores":
            cut(folder / "user_emb_scores.rank_0.world_size_2", 8)
        elif name == "no values":
            rank.unlink()
        elif name == "no rank":
            for file in folder.glob("*rank_1*"):
                file.unlink()
        elif name == "no scores":
            (folder / "user_emb_scores.rank_1.world_size_2").unlink()
        elif name == "two world sizes":
            write_dump(folder, "user", SOURCES[0])
        elif name == "twice":
            for word in ("keys", "values", "scores"):
                file = folder / f"user_emb_{word}.rank_0.world_size_2"
                size = 16 if word == "values" else 8
                file.write_bytes(file.read_bytes() + file.read_bytes()[:size])
        elif name == "nan":
            values = np.fromfile(rank, np.float32)
            values[5] = np.nan
            values.tofile(rank)
        elif name == "negative":
            file = folder / "user_emb_scores.rank_0.world_size_2"
            (-1 - np.fromfile(file, np.int64)).tofile(file)

    return change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut values", "user_emb_values.rank_1.world_size_2: unreadable checkpoint, cut, "),
        ("cut keys", "no whole number of int64 keys"),
        ("cut scores", "user_emb_scores.rank_0.world_size_2: unreadable checkpoint, cut, "),
        ("no values", "this file of values is missing"),
        ("no rank", "rank_1.world_size_2: unreadable checkpoint, this rank is missing"),
        ("no scores", "other ranks have it"),
        ("two world sizes", "world sizes 1 and 2"),
    ],
)
def test_damaged_files_are_named_before_any_value_is_read(dumps, name, message):
    damage(name)(Path(dumps[0]) / "model.ebc")
    with pytest.raises(UserError, match=message):
        tables_of(dumps[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut values", "unreadable checkpoint, cut, "),
        ("twice", "model.ebc/user has the key -30 twice"),
        ("nan", "NaN or infinite entries in the row of key -27"),
        ("negative", "scores of model.ebc/user are negative"),
    ],
)
def test_nothing_is_written_if_a_row_is_bad(dumps, command, name, message):
    damage(name)(Path(dumps[0]) / "model.ebc")
    assert message in command.error("merge=evidence", sources=dumps[:2])


def test_sources_that_do_not_fit_are_refused(tmp_path, dumps, command):
    narrow = write_dump(tmp_path / "narrow", TABLE, draw(0, range(9), dim=3))
    assert "columns differ, 4 in" in command.error("merge=average", sources=[dumps[0], narrow])
    other = write_dump(tmp_path / "other", "model.ebc/item", SOURCES[0])
    assert f"{other}: table {TABLE} is missing" in command.error(
        "merge=average", sources=[dumps[0], other]
    )
    shutil.copytree(dumps[0], tmp_path / "copy")
    same = command.error("merge=average", sources=[dumps[0], str(tmp_path / "copy")])
    assert "are the same checkpoint" in same
    for word, message in (
        ("merge=auto", "choose a row-wise method"),
        ("merge=aligned_weights", "not possible for tables by raw key"),
        ("merge=task_arithmetic", "task_arithmetic"),
    ):
        assert message in command.error(word, sources=dumps[:2])
    assert command.merge("merge=average", "check_only=true", sources=dumps[:2]) == 0
    assert "170 keys" in command.shown.out


def test_inspect_recognizes_dumps(dumps, capsys):
    assert main(["inspect", *dumps[:2]]) == 0
    shown = capsys.readouterr().out
    assert f"{dumps[0]}: dynamicemb" in shown
    assert "scores" in shown
    assert f"cki-rec merge merge=evidence 'merge.sources=[{dumps[0]},{dumps[1]}]'" in shown


@pytest.mark.slow
def test_a_killed_merge_leaves_no_model(dumps, tmp_path):
    code = (
        "import os, signal\n"
        "from cki_rec.pipelines import keyed_writing\n"
        "from cki_rec.cli import main\n"
        "keyed_writing._Dump.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"main(['merge', 'merge=average', 'merge.sources=[{dumps[0]},{dumps[1]}]',"
        f" 'runtime.out={tmp_path}/out'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    (run,) = (tmp_path / "out").glob("merge-*")
    assert not (run / "model").exists()
    words = ["merge", "merge=average", f"merge.sources=[{dumps[0]},{dumps[1]}]"]
    assert main([*words, f"runtime.out={tmp_path}/out"]) == 0
    assert_same(read_dump(run / "model", TABLE), merged(SOURCES[:2]))
    assert sorted(f.name for f in run.iterdir()) == [
        *("README.md", "merge.json", "model", "record.json"),
    ]
