"""Text becomes typed options once; every mistake is one line that names the option."""

import json
import subprocess
import sys
from dataclasses import is_dataclass
from typing import Literal, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from cki_rec.config import (
    Config,
    UserError,
    choices,
    first_comment,
    nearest,
    parse,
    register_resolvers,
    run_id,
    section,
    with_delta,
)


@pytest.fixture(scope="module")
def tree(compose):
    return OmegaConf.to_container(compose(), resolve=True)


def changed(tree, **values):
    copy = OmegaConf.create(json.loads(json.dumps(tree)))
    for key, value in values.items():
        OmegaConf.update(copy, key, value, force_add=True)
    return copy


def error_of(action, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_values_arrive_typed(compose):
    config = parse(compose("model.hidden=[7,5]", "data.part=1", "train.table_l2=1e-4", "seed=9"))
    assert config.model.hidden == [7, 5]
    assert (config.data.part, config.train.table_l2, config.seed) == (1, 1e-4, 9)
    assert config.data.partition.seed == 9
    assert config.merge.sources == [{"seed": 9}, {"seed": 1009}]


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("train.epoch", 3, "train.epoch: no such option; did you mean 'epochs'?"),
        ("surprise", 1, "surprise"),
        ("data.split.bye", 1, "data.split.bye"),
        ("train.epochs", "many", "train.epochs=many: must be a whole number"),
        ("train.learning_rate", "fast", "train.learning_rate=fast: must be a number"),
        ("model.hidden", "wide", "model.hidden=wide: must be a list"),
        ("model.hidden", [8, "x"], "model.hidden[1]=x: must be a whole number"),
        ("runtime.force", "perhaps", "runtime.force=perhaps: must be true or false"),
        ("seed", None, "seed=None: must be a whole number"),
    ],
)
def test_unknown_keys_and_wrong_types(tree, key, value, part):
    assert part in error_of(parse, changed(tree, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("merge.biases", "frist", "merge.biases=frist: did you mean 'first'? one of merge, first"),
        ("data.split.by", "tim", "data.split.by=tim: did you mean 'time'?"),
        ("runtime.device", "tpu", "one of auto, cpu, cuda"),
        ("model.embedding_dim", 0, "model.embedding_dim=0: must be at least 1"),
        ("model.activation", "gelu", "model.activation=gelu: did you mean 'relu'?"),
        ("train.embeddings", "sparse", "train.embeddings=sparse: one of fused, dense"),
        ("train.table_optimizer", "adam", "did you mean 'adagrad'? one of rowwise_adagrad, ad"),
        ("train.precision", "fp16", "one of fp32, bf16"),
        ("train.gradient_clip", 0.0, "train.gradient_clip=0.0: must be above 0"),
        ("train.gradient_clip", float("inf"), "train.gradient_clip=inf: must be finite"),
        ("train.ema", 1.0, "train.ema=1.0: must be below 1"),
        ("train.min_learning_rate", -0.1, "must be at least 0"),
        ("train.monitor", {"auc": 0.0, "log_loss": 0.0, "gauc": 0.0}, "one must not be 0"),
        ("train.monitor", {"auc": float("nan"), "log_loss": 0.0, "gauc": 0.0}, "must be finite"),
        ("runtime.sharding", "rowwise", "did you mean 'row_wise'?"),
        ("runtime.resume", "always", "one of auto, never"),
        ("runtime.keep", 0, "runtime.keep=0: must be at least 1"),
        ("model.dropout", 1.0, "model.dropout=1.0: must be below 1"),
        ("model.dropout", -0.1, "must be at least 0"),
        ("evaluate.confidence", 1.0, "evaluate.confidence=1.0: must be below 1"),
        ("evaluate.confidence", 0.0, "must be above 0"),
        ("data.part", 2, "data.part=2: data.partition has parts 0 to 1"),
        ("data.part", -1, "data.part=-1: data.partition has parts 0 to 1"),
        ("merge.sources", [], "merge.sources=[]: must not be empty"),
    ],
)
def test_impossible_values(tree, key, value, part):
    assert part in error_of(parse, changed(tree, **{key: value}))


def test_every_word_is_checked(tree):
    def words(kind, prefix=""):
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                yield from words(hint, f"{prefix}{name}.")
            elif get_origin(hint) is Literal:
                yield f"{prefix}{name}", choices(kind, name)

    options = dict(words(Config))
    assert len(options) > 20
    for key, allowed in options.items():
        message = error_of(parse, changed(tree, **{key: "nonsense"}))
        assert message.startswith(f"{key}=nonsense: "), message
        assert ", ".join(allowed) in message


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_rates_are_finite(tree, value):
    message = error_of(parse, changed(tree, **{"train.learning_rate": value}))
    assert message.endswith(": must be finite")


@pytest.mark.parametrize(
    ("key", "smallest"),
    [
        *(("seed", 0), ("train.epochs", 0), ("train.batch_size", 1), ("train.table_l2", 0)),
        *(("data.min_count", 1), ("data.history_length", 1), ("data.negatives", 1)),
        *(("data.buckets", 2), ("evaluate.bootstrap", 100), ("model.streams.heads", 1)),
        *(("merge.sample", 1), ("merge.align.starts", 1), ("merge.learn.epochs", 1)),
        *(("runtime.keep", 1), ("runtime.chunk_mb", 1), ("finetune.epochs", 0)),
    ],
)
def test_lower_bounds(tree, key, smallest):
    message = error_of(parse, changed(tree, **{key: smallest - 1}))
    assert message == f"{key}={smallest - 1}: must be at least {smallest}"
    parse(changed(tree, **{key: smallest}))


def test_part_without_partition(tree):
    tree = changed(tree, **{"data.part": 0, "data.partition.by": "none"})
    assert "data.part=0 needs data.partition.by=user" in error_of(parse, tree)


def test_nearest():
    assert nearest("sofd", ["soft", "hard"]) == "did you mean 'soft'? "
    assert nearest("xyz", ["soft", "hard"]) == ""


def test_delta_replaces_dotted_keys_and_leaves_the_original(tree):
    config = parse(OmegaConf.create(tree))
    before = section(config)
    other = with_delta(config, {"seed": 7, "data.part": 1, "model.hidden": [4]})
    assert (other.seed, other.data.part, other.model.hidden) == (7, 1, [4])
    assert section(config) == before
    undone = with_delta(other, {"seed": 1, "data.part": None, "model.hidden": [200, 80]})
    assert section(undone) == before


def test_delta_merges_sections(tree):
    config = parse(OmegaConf.create(tree))
    other = with_delta(config, {"data": {"split": {"seed": 99}}, "train": {"epochs": 9}})
    assert (other.data.split.seed, other.train.epochs) == (99, 9)
    assert other.data.split.by == config.data.split.by
    assert other.train.batch_size == config.train.batch_size


def test_delta_replaces_a_start_whole(tree):
    config = parse(changed(tree, **{"train.start": {"path": "a"}}))
    chain = {"data.part": 1, "train.start": {"data.part": 0}}
    assert with_delta(config, {"train.start": chain}).train.start == chain
    assert with_delta(config, {"train.start": None}).train.start is None
    assert with_delta(config, {"train.epochs": 3}).train.start == {"path": "a"}
    with pytest.raises(UserError, match=r"^train\.start, train\.epoch: "):
        with_delta(config, {"train.epoch": 0}, "train.start")


@pytest.mark.parametrize(
    ("delta", "part"),
    [
        ({"model.hiden": [4]}, "merge.sources, model.hiden: "),
        ({"sede": 4}, "merge.sources, sede: "),
        ({"seed": "four"}, "merge.sources, seed=four: must be a whole number"),
        ({"data.part": 5}, "data.part=5"),
        ({"runtime.device": "tpu"}, "runtime.device=tpu"),
    ],
)
def test_wrong_delta(tree, delta, part):
    assert part in error_of(with_delta, parse(OmegaConf.create(tree)), delta)


def test_run_id_depends_on_content_alone():
    reads = {"model": {"hidden": [2, 3], "name": "a"}, "seed": 1}
    turned = {"seed": 1, "model": {"name": "a", "hidden": [2, 3]}}
    first = run_id("train", reads)
    assert first.startswith("train-")
    assert len(first) == len("train-") + 16
    assert run_id("train", turned) == first
    assert run_id("finetune", reads).split("-")[1] == first.split("-")[1]
    different = [
        {**reads, "seed": 2},
        {**reads, "model": {"hidden": [3, 2], "name": "a"}},
        {**reads, "model": {"hidden": [2, 3], "name": "b"}},
        {**reads, "more": None},
        {"seed": 1},
    ]
    ids = [run_id("train", other) for other in different]
    assert len({first, *ids}) == 1 + len(different)


def test_run_id_is_equal_in_another_process():
    code = "from cki_rec.config import run_id; print(run_id('train', {'b': [1.5, None], 'a': 2}))"
    ids = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert ids == {run_id("train", {"a": 2, "b": [1.5, None]})}


def test_runtime_never_enters_a_run_id(run_config, tmp_path):
    from cki_rec.pipelines import train

    first = run_config(tmp_path / "a", "train.epochs=1", "data.fields=[user,item]")
    second = run_config(
        tmp_path / "b",
        "train.epochs=1",
        "data.fields=[user,item]",
        "runtime.threads=2",
        "name=other",
    )
    runs = [train.ensure(config) for config in (first, second)]
    assert runs[0].path.name == runs[1].path.name
    assert runs[0].path.parent != runs[1].path.parent
    assert runs[0].record["fingerprint"] == runs[1].record["fingerprint"]
    third = train.ensure(with_delta(first, {"train.table_l2": 1e-6}))
    assert third.path.name != runs[0].path.name


def test_version_enters_a_run_id(monkeypatch):
    before = run_id("train", {"seed": 1})
    monkeypatch.setattr("cki_rec.config.parsing.__version__", "99")
    assert run_id("train", {"seed": 1}) != before


def test_resolvers():
    from cki_rec import project_root

    register_resolvers()
    register_resolvers()
    tree = OmegaConf.create({"n": 3, "sum": "${add:${n},1000}", "path": "${project:data/x.zip}"})
    assert tree.sum == 1003
    assert tree.path == str(project_root() / "data" / "x.zip")


def test_first_comment():
    assert first_comment("merge", "average") == "Plain average of all parameters."
    assert first_comment("suite", "seeds").startswith("Independent seeds")
    assert first_comment("suite", "not_there") == ""
    assert first_comment("merge", "ablation_frozen").startswith("Ablation of cki_released: ")
