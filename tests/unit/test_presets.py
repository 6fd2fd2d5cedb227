"""Presets of conf/merge, scopes and gates, and ablations of sources."""

from __future__ import annotations

import pytest
import torch
from networks import draw_batch, make_case
from samples import ROOT
from torch.func import functional_call

from cki_rec.config import UserError, parse
from cki_rec.merging.methods import METHODS
from cki_rec.merging.perturbation import permute, shuffle
from cki_rec.merging.steps import initial_gates
from cki_rec.pipelines.merge_inputs import fixed_rules, out_of_scope
from cki_rec.pipelines.preflight import check_options, entry_of

RELEASED = ROOT / "experiments" / "released_protocol" / "conf"
SEARCH_PATH = f"hydra.searchpath=[file://{RELEASED}]"
PRESETS = sorted(
    path.stem for conf in (ROOT / "conf", RELEASED) for path in (conf / "merge").glob("*.yaml")
)
ABLATIONS = ("frozen", "uniform", "random", "permuted", "shuffled")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "default"])
def test_every_preset_parses_and_is_labelled_as_its_file(compose, name):
    options = parse(compose(SEARCH_PATH, f"merge={name}")).merge
    assert options.label == name
    entry_of(options)


@pytest.mark.parametrize(
    ("experiment", "data"),
    [
        ("released_protocol", "movielens_1m"),
        ("released_protocol_amazon_beauty", "amazon_beauty"),
    ],
)
def test_the_released_protocol_comes_with_all_its_ablations(compose, experiment, data):
    from omegaconf import OmegaConf

    config = parse(compose(SEARCH_PATH, f"experiment={experiment}"))
    assert (config.name, config.data.name, config.model.name) == (experiment, data, "din")
    assert config.suite.name == "seeds"
    assert config.train.epochs == config.merge.learn.epochs == 10
    tree = OmegaConf.load(RELEASED / "experiment" / f"{experiment}.yaml")
    swept = tree.hydra.sweeper.params.merge.split(",")
    assert {f"ablation_{name}" for name in ABLATIONS} < set(swept) <= set(PRESETS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_as_long_and_as_much_as_the_released_protocol(compose, name):
    released = parse(compose("merge=cki_released")).merge
    own = parse(compose(SEARCH_PATH, f"merge=ablation_{name}")).merge
    assert (own.learn, own.scope, own.biases) == (released.learn, released.scope, released.biases)


@pytest.fixture(scope="module")
def params():
    network, _ = make_case("din", "mixed")
    return {n: t for n, t in network.state_dict().items() if t.is_floating_point()}


def configured(compose, *words):
    return parse(compose(*words)).merge


@pytest.mark.parametrize(
    ("scope", "inside"),
    [
        ("output", ["mlp.layers.2."]),
        ("hidden", ["mlp.layers.0.", "mlp.layers.1.", "mlp.norms.", "mlp.activations."]),
        ("head", ["mlp."]),
        ("all", [""]),
    ],
)
def test_scopes(compose, params, scope, inside):
    options = configured(compose, f"merge.scope={scope}", "merge=evidence")
    outside = out_of_scope(options, params)
    assert set(params) - set(outside) == {n for n in params if n.startswith(tuple(inside))}


def test_a_scope_of_nothing_is_refused(compose, params):
    options = configured(compose, "merge=cki_released")
    headless = {n: t for n, t in params.items() if not n.startswith("mlp.")}
    with pytest.raises(UserError, match=r"merge\.scope=head: the model has no such layers"):
        out_of_scope(options, headless)


def gates_of(options, params):
    fixed = fixed_rules(options, params)
    return initial_gates(METHODS[options.method], params, 1, options.options, fixed)


def test_gates_act_in_scope_and_the_trunk_is_the_rest(compose, params):
    options = configured(compose, "merge=cki_released")
    gated = {name for name, gate in gates_of(options, params).items() if gate is not None}
    assert gated == {n for n in params if n.startswith("mlp.") and params[n].ndim > 1}
    assert out_of_scope(options, params) == [n for n in params if not n.startswith("mlp.")]
    low_rank = configured(compose, "merge=cki_gate_low_rank", "merge.options.rank=2")
    gate = gates_of(low_rank, params)["mlp.layers.0.weight"]
    assert gate.shape == (2, params["mlp.layers.0.weight"].shape[1], 2)


def test_statistics_of_batch_norms_have_no_gate(compose, params):
    gates = gates_of(configured(compose, "merge=cki"), params)
    ungated = {name for name, gate in gates.items() if gate is None}
    assert ungated == {n for n in params if n.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["merge.learn.what=trunk"], "trains the parameters out of scope"),
        (["merge=average", "merge.learn.what=gates"], "average has no gate to learn"),
        (["merge=cki_local", "merge.learn.what=gates"], "cki has no gate to learn"),
    ],
)
def test_trainings_of_nothing_are_refused(compose, words, match):
    with pytest.raises(UserError, match=match):
        check_options(parse(compose(*words)))


@pytest.mark.parametrize("title", ["din", "deepfm", "dcnv2", "final_mlp"])
def test_permuted_sources_compute_the_same_with_other_numbers(title):
    network, schema = make_case(title, "mixed")
    network = network.eval()
    params = {n: t.clone() for n, t in network.state_dict().items()}
    moved = permute(params, network.symmetries(), 1)
    batch = draw_batch(schema, 12)
    with torch.no_grad():
        before, after = (functional_call(network, p, (batch,)) for p in (params, moved))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for name, tensor in params.items():  # so nothing changes for the global term
        assert torch.equal(moved[name].flatten().sort()[0], tensor.flatten().sort()[0]), name
    assert not torch.equal(moved["mlp.layers.1.weight"], params["mlp.layers.1.weight"])
    again = permute(params, network.symmetries(), 1)
    assert all(torch.equal(moved[n], again[n]) for n in moved)


def test_shuffled_sources_keep_their_distribution_and_nothing_else():
    network, _ = make_case("din", "mixed")
    params = dict(network.state_dict())
    table = "sparse.collection.embedding_bags.user.weight"
    params[table] = torch.nn.functional.pad(params[table], (0, 4))
    shuffled = shuffle(params, 1)
    for name, tensor in params.items():
        assert torch.equal(shuffled[name].flatten().sort()[0], tensor.flatten().sort()[0]), name
    assert torch.equal(shuffled[table].sort(0)[0], params[table].sort(0)[0])  # zeros stay unused
    assert not torch.equal(shuffled[table], params[table])
    assert torch.equal(shuffle(params, 1)[table], shuffled[table])
    assert not torch.equal(shuffle(params, 2)[table], shuffled[table])
