"""Ids as a server sends them score as in training: outside of a table, or repeated; int8."""

from dataclasses import replace

import pytest
import torch
from networks import make_case, options
from samples import slow_but

from cki_rec.data.schema import OOV_ID
from cki_rec.engine.export import FORMATS, example_inputs
from cki_rec.engine.servable import Servable, draw_batch, inputs_of
from cki_rec.models import MODELS
from cki_rec.pipelines.export import describe_servable


@pytest.fixture(scope="module")
def served():
    """Return a network and the schema that its batches have."""
    network, schema = make_case("fm", "mixed")
    return network.float().eval(), schema


def set_of(schema) -> str:
    return next(f.name for f in schema.lookups if f.kind == "multi")


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_ids_outside_of_a_table_and_repeats_score_as_in_training(served, tmp_path, name):
    """The set a|a|b of a raw row is encoded as a|b, and an unknown id as the one of unseen ids."""
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network, schema = served
    path = tmp_path / f"model.{name}"
    FORMATS[name].write(Servable(network, schema), example_inputs(schema), path)
    scores = FORMATS[name].read(path)
    key = f"ids.{set_of(schema)}"
    good = inputs_of(draw_batch(schema, 8, 6, torch.Generator().manual_seed(1)), schema)
    good["ids"][0] = OOV_ID
    good[key] = torch.zeros(8, 5, dtype=torch.int64)
    good[key][0, :3] = torch.tensor([3, 2, OOV_ID])
    expected = scores(good)
    for outside in (-1, 10**6, 2**40):
        wrong = {name: value.clone() for name, value in good.items()}
        wrong["ids"][0] = outside
        wrong[key][0] = torch.tensor([3, 2, 3, outside, 2])
        torch.testing.assert_close(scores(wrong), expected, rtol=1e-5, atol=1e-6)


def test_description_states_repeats_and_ids_outside_of_tables(served):
    network, schema = served
    name = set_of(schema)
    table = next(f.table for f in schema.lookups if f.name == name)
    hashed = replace(
        schema, vocabulary_hashes={**schema.vocabulary_hashes, table: "crc32 modulo 4"}
    )
    for known, repeats in ((schema, "ignored"), (hashed, "counted")):
        servable = Servable(network, known)
        facts = describe_servable(servable, options("fm"))
        stated = {f["name"]: f["repeats"] for f in facts["fields"] if "repeats" in f}
        assert stated == {name: repeats}
        assert facts["ids_outside_tables"] == "scored as unseen_id"


@pytest.mark.parametrize("name", slow_but(["din"], MODELS))
def test_int8_tables_score_as_their_rounded_floats(name):
    network, schema = make_case(name, "mixed")
    network = network.float().eval()
    exact, small = (Servable(network, schema, is_int8) for is_int8 in (False, True))
    assert len(small.scales) == sum(table.shape[1] > 1 for table in small.tables)
    for place, scale in small.scales.items():
        table, rounded = exact.tables[int(place)], small.tables[int(place)]
        assert rounded.dtype == torch.int8
        assert ((rounded * scale - table).abs() <= 0.501 * scale).all()
        assert not rounded[0].any()
        table.copy_(rounded * scale)
    for longest in (0, 1, 6):
        generator = torch.Generator().manual_seed(longest)
        inputs = inputs_of(draw_batch(schema, 64, longest, generator), schema)
        torch.testing.assert_close(small(inputs), exact(inputs), rtol=1e-5, atol=1e-5)
