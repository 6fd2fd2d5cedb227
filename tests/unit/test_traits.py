"""Traits: facts that merging reads from modules, and their defaults."""

import dataclasses

import pytest
from networks import make_case
from torch import nn
from training import options

from cki_rec.config import section
from cki_rec.merging.traits import (
    elementwise_parameters,
    logit_scale_of,
    symmetries_of,
    valid_positions_of,
)
from cki_rec.models import MODELS
from cki_rec.models.comparison import decides, reads


def test_a_module_without_declarations_has_defaults():
    network = nn.Linear(2, 1)
    assert symmetries_of(network) == []
    assert logit_scale_of(network) is None
    assert elementwise_parameters(network) == set()
    assert valid_positions_of(network) is None


def test_a_network_declares_its_traits():
    network, _ = make_case("dcnv2", "mixed")
    assert symmetries_of(network) == network.symmetries()
    assert logit_scale_of(network) == network.logit_scale()
    names = elementwise_parameters(network)
    assert names == {n for n in network.state_dict() if n.startswith("cross.")} != set()


def test_attention_declares_its_valid_positions():
    network, _ = make_case("din", "mixed")
    names = [name for name, module in network.named_modules() if valid_positions_of(module)]
    assert names == [f"attention.{number}" for number in range(len(network.pairs))]


@pytest.mark.parametrize(
    ("option", "readers"),
    [
        ("embedding_dim", set(MODELS)),
        ("hidden", set(MODELS) - {"lr", "fm"}),
        ("cross.layers", {"dcn", "dcnv2"}),
        ("attention.length", {"din"}),
        ("streams.heads", {"final_mlp"}),
        ("sequence.length", {"sasrec", "gru4rec"}),
        ("sequence.dropout", set()),
        ("bottom.hidden", {"dlrm"}),
        ("attention.dropout", set()),
        ("histories", set()),
    ],
)
def test_options_matter_to_the_models_that_read_them(option, readers):
    config = options()
    models = {name: dataclasses.replace(config.model, name=name) for name in MODELS}
    assert {name for name, model in models.items() if decides(option, model)} == readers


def test_every_section_is_read_by_a_model():
    config = options()
    sections = {name for name, value in section(config.model).items() if isinstance(value, dict)}
    models = [dataclasses.replace(config.model, name=name) for name in MODELS]
    assert sections
    assert sections <= {name for model in models for name in reads(model)}
