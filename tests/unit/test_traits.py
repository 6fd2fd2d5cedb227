"""Traits: facts that merging reads from modules, and their defaults."""

from networks import make_case
from torch import nn

from cki_rec.merging.traits import (
    elementwise_parameters,
    logit_scale_of,
    symmetries_of,
    valid_positions_of,
)


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
