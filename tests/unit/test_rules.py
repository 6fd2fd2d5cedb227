"""What is merged, what is a control, and that every choice of conf/merge says so."""

from __future__ import annotations

import pytest
import torch
from networks import draw_batch, make_case
from samples import ROOT
from torch.func import functional_call

from cki_rec.config import CHOICES, UserError, parse
from cki_rec.merging.ablations import permute, shuffle
from cki_rec.merging.methods.cki.assessment import RANGES
from cki_rec.merging.methods.cki.weights import DUAL
from cki_rec.merging.registry import METHODS
from cki_rec.pipelines import rules
from cki_rec.pipelines.merging import initial_gates, trunk_parameters

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "merge").glob("*.yaml"))
CONTROLS = ("frozen", "uniform", "random", "permuted", "shuffled")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "default"])
def test_every_preset_parses_and_is_labelled_as_its_file(compose, name):
    options = parse(compose(f"merge={name}")).merge
    assert options.label == name
    assert options.method in METHODS


@pytest.mark.parametrize(
    ("experiment", "data"),
    [
        ("released_protocol", "movielens_1m"),
        ("released_protocol_amazon_beauty", "amazon_beauty"),
    ],
)
def test_the_released_protocol_comes_with_all_its_controls(compose, experiment, data):
    from omegaconf import OmegaConf

    config = parse(compose(f"experiment={experiment}"))
    assert (config.name, config.data.name, config.model.name) == (experiment, data, "din")
    assert config.suite.name == "seeds"
    assert config.train.epochs == config.merge.gate.epochs == 10
    tree = OmegaConf.load(ROOT / "conf" / "experiment" / f"{experiment}.yaml")
    swept = tree.hydra.sweeper.params.merge.split(",")
    assert {f"control_{name}" for name in CONTROLS} < set(swept) <= set(PRESETS)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_train_as_long_and_as_much_as_the_released_protocol(compose, name):
    released = parse(compose("merge=cki_released")).merge
    own = parse(compose(f"merge=ablation_{name}")).merge
    assert (own.gate, own.scope, own.bias) == (released.gate, released.scope, released.bias)


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
def test_scopes_hold_what_they_say(compose, params, scope, inside):
    options = configured(compose, f"merge.scope={scope}", "merge=evidence")
    outside = rules.outside_scope(options, params)
    assert set(params) - set(outside) == {n for n in params if n.startswith(tuple(inside))}


def test_a_scope_of_nothing_is_refused(compose, params):
    options = configured(compose, "merge=cki_released")
    headless = {n: t for n, t in params.items() if not n.startswith("mlp.")}
    with pytest.raises(UserError, match=r"merge\.scope=head: the model has no such layers"):
        rules.outside_scope(options, headless)


def test_gates_act_in_scope_and_the_trunk_is_the_rest(compose, params):
    options = configured(compose, "merge=cki_released")
    gates = initial_gates(options, params, 1)
    gated = {name for name, gate in gates.items() if gate is not None}
    assert gated == {n for n in params if n.startswith("mlp.") and params[n].ndim > 1}
    assert trunk_parameters(options, params) == [n for n in params if not n.startswith("mlp.")]
    low_rank = configured(compose, "merge=cki_gate_low_rank", "merge.gate.rank=2")
    gate = initial_gates(low_rank, params, 1)["mlp.layers.0.weight"]
    assert gate.shape == (2, params["mlp.layers.0.weight"].shape[1], 2)


def test_entropies_are_reported_where_they_decide(compose, params):
    models = [params, shuffle(params, 1)]
    report = rules.entropy_report(configured(compose, "merge=cki_released"), models, 1)
    assert set(report) == {n for n in params if n.startswith("mlp.") and params[n].ndim > 1}
    for row in report.values():
        assert row["difference"] == [0.0, 0.0]
        assert row["noise"][0] > 0
    assert rules.entropy_report(configured(compose, "merge=cki_local"), models, 1) is None
    assert rules.entropy_report(configured(compose, "merge=average"), models, 1) is None
    everywhere = rules.entropy_report(configured(compose, "merge=cki_global"), models, 1)
    assert set(everywhere) == set(params)


def test_words_are_those_of_the_code():
    assert CHOICES["merge.range"] == RANGES
    assert CHOICES["merge.dual"] == DUAL


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["merge.gate.train=trunk"], "what is out of scope trains along"),
        (["merge=average", "merge.gate.train=frozen"], "average has no gate to learn"),
    ],
)
def test_trainings_of_nothing_are_refused(compose, words, match):
    with pytest.raises(UserError, match=match):
        parse(compose(*words))


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
