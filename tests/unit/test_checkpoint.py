"""A model at rest: whole or absent, bit for bit, and every damage named."""

import dataclasses
import errno
import hashlib
import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.functional import binary_cross_entropy_with_logits
from training import load_params, options, plain, state_of, step

from cki_rec.checkpoints import (
    checkpoint,
    digests,
    fill,
    locate,
    open_checkpoint,
    read_tensors,
    reader,
)
from cki_rec.config import Stopped, UserError
from cki_rec.data.provenance import Provenance
from cki_rec.data.schema import Feature
from cki_rec.engine import checkpoint_io
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.optimization import initialized_adam
from cki_rec.pipelines.compatibility import compare, require

CONFIG = options("train.table_learning_rate=0.1")
MODEL = CONFIG.model


@pytest.fixture(autouse=True)
def directly(monkeypatch):
    """Read small tensors as large ones are read: those of other tests are read by torch."""
    monkeypatch.setattr(reader, "SMALL_BYTES", 0)


@pytest.fixture
def trained(sharded, make_batch):
    model = sharded("train.table_learning_rate=0.1")
    adam = initialized_adam(model, CONFIG.train.learning_rate)
    for seed in range(3):
        step(model, make_batch(16, seed=seed), CONFIG.train, adam)
    return model


@pytest.fixture
def tensors(trained, schema):
    counts = {name: torch.arange(size) * 10**10 for name, size in schema.table_sizes.items()}
    return {
        "model": trained.module.state_dict(),
        "accumulator": trained.accumulators(),
        "counts": counts,
    }


@pytest.fixture
def saved(tmp_path, tensors, schema):
    folder = tmp_path / "run" / "checkpoint"
    checkpoint_io.save(folder, tensors, MODEL, schema, Provenance("data hash"))
    return folder


def test_everything_comes_back_bit_for_bit(saved, tensors, schema):
    loaded = checkpoint.load(saved)
    assert (loaded.model, loaded.schema, loaded.origin) == (MODEL, schema, Provenance("data hash"))
    for group, actual in (
        ("model", loaded.params),
        ("accumulator", loaded.accumulators),
        ("counts", loaded.counts),
    ):
        assert set(actual) == set(tensors[group])
        for name, tensor in actual.items():
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == plain(tensors[group][name]).dtype
            assert torch.equal(tensor, plain(tensors[group][name])), name
    assert all(tensor.any() for name, tensor in loaded.accumulators.items())
    assert set(loaded.accumulators) == {name for name in loaded.params if table_of(name)}


def test_small_tensors_are_read_by_torch_and_equal(saved, monkeypatch):
    directly = read_tensors(saved / checkpoint.TENSORS)
    monkeypatch.setattr(reader, "SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "_fill", lambda *_: pytest.fail("it was read directly"))
    by_torch = read_tensors(saved / checkpoint.TENSORS)
    assert by_torch.keys() == directly.keys()
    assert all(tensor.equal(by_torch[name]) for name, tensor in directly.items())


def test_a_new_model_gives_the_same_logits(saved, trained, sharded, make_batch):
    loaded = checkpoint.load(saved)
    other = sharded("train.table_learning_rate=0.1", seed=99)
    batch = make_batch(20, seed=7)
    assert not torch.equal(other.module(batch), trained.module(batch))
    load_params(other, loaded.params, loaded.accumulators)
    for training in (True, False):
        other.module.train(training)
        trained.module.train(training)
        assert torch.equal(other.module(batch), trained.module(batch))


def test_training_goes_on_bit_for_bit(saved, trained, sharded, make_batch):
    loaded = checkpoint.load(saved)
    restored = sharded("train.table_learning_rate=0.1", seed=99)
    load_params(restored, loaded.params, loaded.accumulators)
    batch = make_batch(20, seed=7)
    states = []
    for model in (trained, restored):
        binary_cross_entropy_with_logits(model.module(batch), batch.label).backward()
        states.append(state_of(model))
    for name in trained.tables:
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], loaded.params[name])


def test_plain_tensors_are_written_too(saved, tmp_path, schema):
    loaded = checkpoint.load(saved)
    groups = {"model": loaded.params, "accumulator": loaded.accumulators, "counts": {}}
    checkpoint_io.save(tmp_path / "other", groups, MODEL, schema, Provenance("h"))
    again = checkpoint.load(tmp_path / "other")
    assert again.counts == {}
    assert all(torch.equal(again.params[name], t) for name, t in loaded.params.items())


def test_saving_again_replaces_the_whole_checkpoint(saved, tensors, schema):
    (saved / "leftover").touch()
    tensors["model"]["bias"].data.fill_(3.0)
    checkpoint_io.save(saved, tensors, MODEL, schema, Provenance("other hash"))
    loaded = checkpoint.load(saved)
    assert loaded.params["bias"].item() == 3.0
    assert loaded.origin.data_hash == "other hash"
    assert not (saved / "leftover").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def error_of(folder) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "dcp/.metadata"])
def test_files_of_other_programs_name_the_commands_that_read_them(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    shown = error_of(path.parent if path.parent != tmp_path else path)
    assert "this command reads run folders of cki-rec alone" in shown
    assert "cki-rec merge and cki-rec inspect read such files too" in shown


def test_nothing_there(tmp_path):
    assert "no checkpoint here (checkpoint.json is missing)" in error_of(tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "no checkpoint here" in error_of(tmp_path / "file")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": 2, "model": {}}', '"text"']
)
def test_broken_description(saved, text):
    (saved / "checkpoint.json").write_text(text)
    assert "checkpoint.json: damaged checkpoint" in error_of(saved)


KEYS = ["format", "model", "schema", "data_hash", "position", "files"]


@pytest.mark.parametrize("key", KEYS)
def test_a_description_without_a_key(saved, key):
    path = saved / "checkpoint.json"
    description = json.loads(path.read_text())
    del description[key]
    path.write_text(json.dumps(description))
    assert "checkpoint.json: damaged checkpoint" in error_of(saved)


def test_another_format(saved):
    path = saved / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    assert "checkpoint.json: format 3, this release reads 2" in error_of(saved)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
@pytest.mark.parametrize(
    "harm", [truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
def test_damaged_tensor_files(saved, pattern, harm):
    (path,) = (saved / "tensors").glob(pattern)
    harm(path)
    assert "damaged checkpoint" in error_of(saved)


def test_absent_tensors(saved):
    shutil.rmtree(saved / "tensors")
    assert "damaged checkpoint" in error_of(saved)


def full_disk():
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("wrap", [True, False])
def test_a_failing_save_leaves_the_old_checkpoint_and_nothing_else(
    saved, tensors, schema, monkeypatch, wrap
):
    before = checkpoint.load(saved)

    def fail(state, checkpoint_id, **options):
        checkpoint_id.mkdir(parents=True)
        (checkpoint_id / "half").write_bytes(b"half")
        raise CheckpointException("write", {0: (full_disk(), None)}) if wrap else full_disk()

    monkeypatch.setattr(checkpoint_io.dcp, "save", fail)
    tensors["model"]["bias"].data.fill_(3.0)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint_io.save(saved, tensors, MODEL, schema, Provenance("h"))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    assert torch.equal(checkpoint.load(saved).params["bias"], before.params["bias"])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Stopped("stopped")])
def test_an_interruption_while_reading_is_no_damage(saved, monkeypatch, interruption):
    def interrupt(*arguments, **options):
        raise interruption

    monkeypatch.setattr(FileSystemReader, "read_data", interrupt)
    with pytest.raises(type(interruption)):
        checkpoint.load(saved)


def test_an_unknown_failure_to_write_is_an_ordinary_exception(saved, tensors, schema, monkeypatch):
    def fail(*arguments, **options):
        raise CheckpointException("write", {0: (RuntimeError("odd"), None)})

    monkeypatch.setattr(checkpoint_io.dcp, "save", fail)
    with pytest.raises(OSError, match="odd"):
        checkpoint_io.save(saved, tensors, MODEL, schema, Provenance("h"))


def test_equal_checkpoints_are_compatible(saved):
    loaded = checkpoint.load(saved)
    require(compare([loaded], ["a"]))
    require(compare([loaded, checkpoint.load(saved), loaded], ["a", "b", "c"]))


def with_schema(loaded, **changes):
    return dataclasses.replace(loaded, schema=dataclasses.replace(loaded.schema, **changes))


def another_size(loaded):
    params = {**loaded.params, "mlp.layers.0.weight": torch.zeros(7, 40)}
    return dataclasses.replace(loaded, params=params)


def another_name(loaded):
    return dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, name="dcn"))


def one_field_more(loaded):
    more = (*loaded.schema.features, Feature("year", "year", "categorical"))
    return with_schema(loaded, features=more)


def another_vocabulary(loaded):
    hashes = {**loaded.schema.vocabulary_hashes, "genres": "new"}
    return with_schema(loaded, vocabulary_hashes=hashes)


def one_tensor_more(loaded):
    return dataclasses.replace(loaded, params={**loaded.params, "extra": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (another_size, "tensors: mlp.layers.0.weight: float32 (6, 40), in c float32 (7, 40)"),
        (another_name, "architecture: model.name: deepfm, in c dcn"),
        (one_field_more, "features: c has year (by name, table and kind)"),
        (
            another_vocabulary,
            "vocabulary genres: differs in c; train on one encoded data set",
        ),
        (one_tensor_more, "tensors: extra: float32 (1,), is missing in a"),
    ],
)
def test_differences_are_named(saved, change, part):
    loaded = checkpoint.load(saved)
    with pytest.raises(UserError) as caught:
        require(compare([loaded, loaded, change(loaded)], ["a", "b", "c"]))
    message = str(caught.value)
    assert message.startswith("sources cannot be merged: ")
    assert part in message


def test_a_missing_tensor_is_named(saved):
    loaded = checkpoint.load(saved)
    with pytest.raises(UserError, match=r"extra: float32 \(1,\), is missing in b"):
        require(compare([one_tensor_more(loaded), loaded], ["a", "b"]))


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_reading_runs_no_code(saved, tmp_path):
    """Metadata of torch's format is a pickle; a stranger's may name known types only."""
    metadata = saved / "tensors" / ".metadata"
    metadata.write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    description = json.loads((saved / "checkpoint.json").read_text())
    description["files"][".metadata"] = hashlib.sha256(metadata.read_bytes()).hexdigest()
    (saved / "checkpoint.json").write_text(json.dumps(description))
    assert "may run code" in error_of(saved)
    assert not (tmp_path / "harm").exists()


def test_a_changed_byte_is_noticed(saved):
    (path,) = (saved / "tensors").glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged checkpoint" in error_of(saved)


def test_a_full_disk_is_an_os_error(saved, tensors, schema, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(checkpoint_io.dcp, "save", full)
    with pytest.raises(OSError, match="unexpected pos") as caught:
        checkpoint_io.save(saved, tensors, MODEL, schema, Provenance("data hash"))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(saved)


def test_tensors_of_any_layout_are_filled(saved):
    """Rows that lie in memory as in the file are read straight into it, others by torch."""
    whole = read_tensors(saved / checkpoint.TENSORS)
    turned = {
        name: torch.empty(tensor.shape[::-1], dtype=tensor.dtype).T
        for name, tensor in whole.items()
        if tensor.ndim == 2
    }
    fill(turned, saved / checkpoint.TENSORS)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in turned.items())


def test_an_outline_has_shapes_and_no_numbers(saved):
    outline, loaded = checkpoint.outline(saved), checkpoint.load(saved)
    for actual, expected in (
        (outline.params, loaded.params),
        (outline.accumulators, loaded.accumulators),
        (outline.counts, loaded.counts),
    ):
        assert {n: (t.shape, t.dtype) for n, t in actual.items()} == {
            n: (t.shape, t.dtype) for n, t in expected.items()
        }
        assert all(tensor.is_meta for tensor in actual.values())
    require(compare([outline, loaded], ["a", "b"]))


def test_files_are_hashed_once_per_state(saved, monkeypatch):
    hashed = []
    compute = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: hashed.append(path) or compute(path))
    for _ in range(3):
        checkpoint.describe(saved)
    names = [path.name for path in (saved / "tensors").iterdir()]
    assert sorted(path.name for path in hashed) == sorted(names)
    (path,) = (saved / "tensors").glob("*.distcp")
    path.write_bytes(path.read_bytes())
    checkpoint.describe(saved)
    assert [p.name for p in hashed[len(names) :]] == [path.name]


def test_processes_share_the_check_of_files(saved):
    (path,) = (saved / "tensors").glob("*.distcp")
    place = sorted(p.name for p in path.parent.iterdir()).index(path.name)
    truncate(path)
    checkpoint.describe(saved, (1 - place, 2))
    with pytest.raises(UserError, match="the file has changed"):
        checkpoint.describe(saved, (place, 2))


def test_a_run_directory_is_located(saved):
    assert locate(saved.parent) == locate(saved) == saved
    by_run, by_folder = open_checkpoint(saved.parent), open_checkpoint(saved)
    assert all(torch.equal(by_run.params[n], t) for n, t in by_folder.params.items())
