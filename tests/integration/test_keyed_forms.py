"""``cki-rec merge`` of managed collision modules, and of tables with vocabulary files."""

import json

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from keyed import assert_same, draw, merged, read_dump, write_dump
from strangers import command
from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from cki_rec.checkpoints.formats.vocabulary_files import read
from cki_rec.cli import main
from cki_rec.config import UserError

__all__ = ["command"]  # a fixture
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SOURCES = [draw(0, range(0, 18)), draw(1, range(10, 24))]
PREFIX = "ebc._managed_collision_collection._managed_collision_modules.t"
WEIGHT = "ebc._embedding_module.embedding_bags.t.weight"
FALLBACK = (1.0, 3.0)


def module(size):
    return MCHManagedCollisionModule(size, torch.device("cpu"), LFU_EvictionPolicy(), 1)


def zch(rows, size, fallback, seed=0, shift=0):
    """Return the state of a collection with a ZCH module that TorchRec itself can load."""
    held = module(size)
    keys = np.array(sorted(rows))
    places = torch.from_numpy(np.random.default_rng(seed).permutation(size - 1))
    held._mch_remapped_ids_mapping[:-1] = places
    held._mch_sorted_raw_ids[: len(keys)] = torch.from_numpy(keys + shift)
    held._mch_counts[: len(keys)] = torch.tensor([rows[int(key)][1] for key in keys])
    held._mch_counts[-1] = torch.iinfo(torch.int64).max
    weight = torch.full((size, 4), 0.25)
    weight[places[: len(keys)]] = torch.tensor(np.stack([rows[int(key)][0] for key in keys]))
    weight[-1] = fallback
    state = {f"{PREFIX}.{name}": tensor for name, tensor in held.state_dict().items()}
    return {**state, WEIGHT: weight, "mlp.weight": torch.full((2, 2), float(fallback))}


def looked_up(state, size, keys):
    """Return the rows that TorchRec looks up."""
    held = module(size)
    held.load_state_dict(
        {n.removeprefix(f"{PREFIX}."): x for n, x in state.items() if n.startswith(PREFIX)}
    )
    keys = torch.tensor(keys)
    found = held.remap({"t": JaggedTensor(keys, lengths=torch.ones(len(keys), dtype=torch.int64))})
    return state[WEIGHT][found["t"].values()]


@pytest.mark.parametrize("form", ["safetensors", pytest.param("dcp", marks=pytest.mark.slow)])
def test_torchrec_looks_up_the_merged_rows(tmp_path, command, form):
    sizes = 30, 16
    paths = []
    for k, (rows, size) in enumerate(zip(SOURCES, sizes, strict=True)):
        state, path = zch(rows, size, FALLBACK[k], seed=k), tmp_path / f"{k}.safetensors"
        paths.append(str(path if form == "safetensors" else tmp_path / f"{k}"))
        if form == "safetensors":
            safetensors.torch.save_file(state, path)
        else:
            dcp.save({"model": state}, checkpoint_id=tmp_path / f"{k}", no_dist=True)
    path = command.model("merge=evidence", sources=paths)
    if form == "safetensors":
        state = safetensors.torch.load_file(path / "model.safetensors")
    else:
        state = {f"model.{n}": torch.empty_like(x) for n, x in zch(SOURCES[0], 30, 0).items()}
        dcp.load(state, checkpoint_id=path / "model", no_dist=True)
        state = {n.removeprefix("model."): x for n, x in state.items()}
    expected = merged(SOURCES, "evidence")
    rows = looked_up(state, 30, [*expected, 1000])
    values = np.stack([values for values, _ in expected.values()])
    np.testing.assert_allclose(rows[:-1].numpy(), values, atol=1e-6)
    assert rows[-1].tolist() == [2.0] * 4  # of ids without a slot
    assert state["mlp.weight"].unique().item() == 2.0
    counts = dict(
        zip(
            state[f"{PREFIX}._mch_sorted_raw_ids"].tolist(),
            state[f"{PREFIX}._mch_counts"].tolist(),
            strict=True,
        )
    )
    assert [counts[key] for key in expected] == [use for _, use in expected.values()]
    assert (state[WEIGHT][len(expected) : -1] == 0.25).all()
    assert command.card["evidence"]["kind"] == "counts"


def test_the_table_keeps_its_size_and_the_rows_of_least_use_leave(tmp_path, command):
    for k, rows in enumerate(SOURCES):
        safetensors.torch.save_file(zch(rows, 20, 1.0, k), tmp_path / f"{k}.safetensors")
    paths = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    state = safetensors.torch.load_file(
        command.model("merge=average", sources=paths) / "model.safetensors"
    )
    expected = merged(SOURCES, max_rows=19)
    rows = looked_up(state, 20, list(expected))
    values = np.stack([values for values, _ in expected.values()])
    np.testing.assert_allclose(rows.numpy(), values, atol=1e-6)
    assert command.card["keys"] == {WEIGHT: 19}


def test_other_forms_become_dumps(tmp_path, command):
    several = zch(SOURCES[0], 30, 1.0)
    several[f"{PREFIX}._output_segments_tensor"][:3] = torch.tensor([0, 15, 30])
    torch.save({"state_dict": several}, tmp_path / "several.pt")
    identities = torch.full((20, 1), -1)
    identities[3:17, 0] = torch.tensor(list(SOURCES[1]))
    weight = torch.zeros(20, 4)
    weight[3:17] = torch.tensor(np.stack([v for v, _ in SOURCES[1].values()]))
    hashed = {f"{PREFIX}._hash_zch_identities": identities, WEIGHT: weight}
    torch.save({**hashed, "mlp.weight": torch.ones(2, 2)}, tmp_path / "hashed.pt")
    sources = [str(tmp_path / "several.pt"), str(tmp_path / "hashed.pt")]
    assert "divided into 2 parts" in command.error("merge=average", sources=sources)
    assert "placed by a kernel" in command.error("merge=average", sources=sources[::-1])
    path = command.model("merge=average", "merge.format=dynamicemb", sources=sources)
    rows = read_dump(path / "dynamicemb", "ebc._embedding_module.embedding_bags/t")
    expected = merged([SOURCES[0], {k: (v, 0) for k, (v, _) in SOURCES[1].items()}])
    assert_same(rows, expected)
    dump = write_dump(tmp_path / "dump", "t", SOURCES[1])
    again = command.model("merge=average", sources=[dump, str(tmp_path / "hashed.pt")])
    assert len(read_dump(again, "t")) == len(SOURCES[1])


@pytest.mark.slow
def test_damaged_modules_are_named(tmp_path, command):
    good = zch(SOURCES[0], 30, 1.0)
    safetensors.torch.save_file(zch(SOURCES[1], 30, 2.0), tmp_path / "b.safetensors")
    for change, message in (
        ({f"{PREFIX}._mch_remapped_ids_mapping": torch.full((30,), 31)}, "outside of the table"),
        ({f"{PREFIX}._mch_remapped_ids_mapping": torch.zeros(30).long()}, "two ids in one row"),
        ({f"{PREFIX}._mch_remapped_ids_mapping": torch.arange(29)}, "30 ids, 29 places"),
        ({f"{PREFIX}._mch_remapped_ids_mapping": None}, "_mch_remapped_ids_mapping is missing"),
        ({WEIGHT: None}, "has no table named t"),
    ):
        state = {n: x for n, x in {**good, **change}.items() if x is not None}
        safetensors.torch.save_file(state, tmp_path / "a.safetensors")
        sources = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
        assert message in command.error("merge=average", sources=sources)


def write_vocabulary(file, keys, counts=None, first=None):
    columns = {"key": keys}
    if first is not None:
        columns["row"] = range(first, first + len(keys))
    if counts is not None:
        columns["count"] = counts
    frame = pl.DataFrame(columns)
    if file.suffix == ".csv":
        frame.sample(fraction=1.0, shuffle=first is not None, seed=0).write_csv(file)
    elif file.suffix == ".parquet":
        frame.write_parquet(file)
    elif file.suffix == ".json":
        rows = {str(key): first + n for n, key in enumerate(keys)} if first is not None else keys
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(f"{key}\n" for key in keys))
    return file


@pytest.mark.parametrize(
    ("ending", "first", "is_text"),
    [
        (".txt", None, True),
        pytest.param(".csv", 2, False, marks=pytest.mark.slow),
        (".json", 2, True),
        pytest.param(".json", None, False, marks=pytest.mark.slow),
        (".parquet", None, False),
        pytest.param(".parquet", 1, True, marks=pytest.mark.slow),
    ],
)
def test_vocabularies_are_joined_and_written_again(tmp_path, command, ending, first, is_text):
    sources, has_counts = [], ending in (".csv", ".parquet")
    reserved = first or 0
    for k, rows in enumerate(SOURCES):
        keys = [f"ü,{key}" if is_text else key for key in rows]
        counts = [use for _, use in rows.values()] if has_counts else None
        file = write_vocabulary(tmp_path / f"{k}{ending}", keys, counts, first)
        values = torch.tensor(np.stack([v for v, _ in rows.values()]))
        before = torch.full((reserved, 4), float(k))
        state = {"user.weight": torch.cat([before, values]).bfloat16(), "b": torch.ones(2)}
        safetensors.torch.save_file(state, tmp_path / f"{k}.safetensors")
        sources.append(f"{{path: {tmp_path / f'{k}.safetensors'}, keys: {file}}}")
    method = "evidence" if has_counts else "average"
    path = command.model(f"merge={method}", sources=sources)
    state = safetensors.torch.load_file(path / "model.safetensors")
    vocabulary = read(path / "vocabularies" / f"0{ending}")
    held = vocabulary.frame.collect()
    keys = [int(str(key).removeprefix("ü,")) for key in held["keys"].to_list()]
    assert vocabulary.reserved == reserved
    assert state["user.weight"].dtype == torch.bfloat16
    assert (state["user.weight"][:reserved] == 0.5).all()
    expected = merged(SOURCES, method)
    assert sorted(keys) == list(expected)
    for key, row in zip(keys, state["user.weight"][reserved:], strict=True):
        np.testing.assert_allclose(row.float().numpy(), expected[key][0], atol=2e-2)
    if has_counts:
        assert held["counts"].to_list() == [expected[key][1] for key in keys]


def test_counts_in_the_checkpoint_are_merged_with_the_table(tmp_path, command):
    sources = []
    for k, rows in enumerate(SOURCES):
        file = write_vocabulary(tmp_path / f"{k}.txt", list(rows))
        state = {
            "user.weight": torch.tensor(np.stack([v for v, _ in rows.values()])),
            "user_counts": torch.tensor([use for _, use in rows.values()]),
        }
        torch.save(state, tmp_path / f"{k}.pt")
        sources.append(f"{{path: {tmp_path / f'{k}.pt'}, keys: {{user.weight: {file}}}}}")
    path = command.model("merge=evidence", "merge.max_rows=9", sources=sources)
    state = torch.load(path / "model.pt", weights_only=True)
    keys = (path / "vocabularies" / "0.txt").read_text().split()
    expected = merged(SOURCES, "evidence", 9)
    held = zip(state["user.weight"].numpy(), state["user_counts"].tolist(), strict=True)
    assert_same({int(key): row for key, row in zip(keys, held, strict=True)}, expected)
    assert main(["inspect", f"merge.sources=[{','.join(sources)}]"]) == 0
    shown = command.capsys.readouterr().out
    assert "vocabulary 0.txt" in shown
    assert f"keys: {{user.weight: {tmp_path / '0.txt'}}}}}" in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "key,row\n1,0\n2,1\n3,3\n", "there is 3 in place of 2"),
        ("a.csv", "key,row\n1,0\n2,1\n3,x\n", "column row must hold whole numbers"),
        ("a.csv", "key,count\n1,0\n2,1\n3,-1\n", "column count must hold numbers from 0 on"),
        ("a.csv", "key,row\n1,0\n,1\n3,2\n", "the key in row 1 is empty"),
        ("a.json", "3", "must be a list of keys"),
        ("a.json", "[1.5, 2.5, 3.5]", "keys are Float64"),
        ("a.parquet", "no", "unreadable vocabulary"),
        ("a.vocab", "1\n", "a vocabulary is .txt, .csv, .json, .parquet"),
        ("gone.txt", None, "no such file"),
    ],
)
def test_unreadable_vocabularies_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_vocabularies_that_do_not_fit_are_refused(tmp_path, command):
    sources = []
    for k in range(2):
        path = tmp_path / f"{k}.safetensors"
        safetensors.torch.save_file({"user.weight": torch.rand(3, 4) + k}, path)
        keys = write_vocabulary(tmp_path / f"{k}.txt", [1, 2, 3])
        sources.append(f"{{path: {path}, keys: {keys}}}")
    for content, message in (
        ("1\n2\n", "2 keys for 3 rows of user.weight"),
        ("1\n2\n1\n", "has the key 1 twice"),
    ):
        (tmp_path / "0.txt").write_text(content)
        assert message in command.error("merge=average", sources=sources)


def test_keys_of_numbers_and_texts(tmp_path):
    for content, keys in (("1\n-2\n", [1, -2]), ("01\n2\n", ["01", "2"]), ("a\n1\n", ["a", "1"])):
        (tmp_path / "a.txt").write_text(content)
        assert read(tmp_path / "a.txt").frame.collect()["keys"].to_list() == keys
        (tmp_path / "a.csv").write_text(f"token\n{content}")
        assert read(tmp_path / "a.csv").frame.collect()["keys"].to_list() == keys
    (tmp_path / "a.parquet").unlink(missing_ok=True)
    pl.DataFrame({"key": pl.Series([1 << 63], dtype=pl.UInt64)}).write_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="fit 64 signed bits"):
        read(tmp_path / "a.parquet")


def test_a_vocabulary_alone_belongs_to_the_table_and_not_to_a_layer(tmp_path, command):
    sources = []
    for k, keys in enumerate(([5, 9], [9, 1, 7])):
        path, file = tmp_path / f"{k}.safetensors", tmp_path / f"{k}.txt"
        table = torch.full((len(keys), 4), float(2 * k))
        safetensors.torch.save_file(
            {"item_emb.weight": table, "mlp.weight": torch.ones(3, 4)}, path
        )
        file.write_text("".join(f"{key}\n" for key in keys))
        sources.append(f"{{path: {path}, keys: {file}}}")
    held = safetensors.torch.load_file(
        command.model("merge=average", sources=sources) / "model.safetensors"
    )
    assert sorted(held["item_emb.weight"][:, 0].tolist()) == [0, 1, 2, 2]
