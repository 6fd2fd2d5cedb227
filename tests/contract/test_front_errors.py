"""Errors of the caller of the library: one line that names the tensor or the argument."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from cki_rec.merging.api import merge
from cki_rec.merging.params import MergeError
from cki_rec.merging.symmetry import Slice, Symmetry


def draw(seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"table": (6, 3), "weight": (4, 3), "bias": (4,)}
    return {n: torch.randn(s, generator=noise).to(dtype) for n, s in shapes.items()}


def broken(change):
    model = draw(2)
    change(model)
    return model


def moves(kind="rotation", size=3, axis=1, start=0):
    return [Symmetry(kind, size, (Slice("table", axis, start),))]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(1), torch.ones(3)])
NAN = broken(lambda m: m["weight"].view(-1)[5:6].fill_(math.nan))
INF = broken(lambda m: m["bias"][0:1].fill_(-math.inf))
ODD = broken(lambda m: m.pop("bias"))
ONE, TWO = draw(1), draw(2)
PAIR = [ONE, TWO]
HUGE = {"w": torch.full((2,), 1e6)}
COUNTS = [{"table": torch.ones(6)}] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"models": []}, "no models to merge"),
        ({"models": nn.Linear(2, 2)}, "models is one Linear; pass a list"),
        ({"models": ONE}, "models is one dict; pass a list"),
        ({"models": 3}, "models is one int; pass a list"),
        ({"models": [ONE, 3]}, "source 1 is a int; pass a module or a state dict"),
        ({"models": [ONE, {**TWO, "bias": [1.0]}]}, "bias: source 1 holds a list"),
        ({"models": [ONE, {**TWO, 3: ONE["bias"]}]}, "3 is no name of a tensor"),
        ({"models": [{}, {}]}, "source 0 has no tensors"),
        ({"models": [ONE, ODD]}, "only in source 0: bias"),
        ({"models": [ODD, ONE]}, "only in source 1: bias"),
        (
            {"models": [ONE, {"else": ONE["bias"]}]},
            "only in source 0: table, weight, bias; only in source 1: else",
        ),
        ({"models": [ONE, {**TWO, "bias": torch.ones(5)}]}, r"bias: shapes differ, \(4,\) in"),
        ({"models": [ONE, {**TWO, "bias": torch.ones(4).int()}]}, "bias: .*both must be floating"),
        ({"models": [ONE, {**TWO, "bias": torch.ones(4) + 0j}]}, "bias: .*complex64"),
        ({"models": [ONE, {**TWO, "bias": torch.ones(4).to("meta")}]}, "bias: .*meta device"),
        ({"models": [nn.LazyLinear(2)]}, "weight: source 0 is not initialized"),
        ({"models": [ONE, NAN]}, "weight: source 1 has NaN or infinite entries"),
        ({"models": [INF, ONE]}, "bias: source 0 has NaN or infinite entries"),
        (
            {
                "models": [ONE, broken(lambda m: m["table"][2:3].fill_(math.nan))],
                "method": "evidence",
                "counts": [{"table": torch.ones(6)}, {"table": torch.arange(6) % 2}],
            },
            "table: source 1 has NaN",  # in a row of which it has no share
        ),
        ({"models": [INF, ONE], "method": "slerp"}, "bias: source 0 has NaN or infinite"),
        ({"method": "tiess"}, "no method 'tiess': did you mean 'ties'"),
        ({"method": 3}, "method is a int; pass the name of a method"),
        ({"method": "ties"}, "needs the model that all sources started from"),
        (
            {"method": "ties", "base": ONE, "densty": 1},
            "no option 'densty': did you",
        ),
        ({"counst": COUNTS}, "no option 'counst': did you mean 'counts'"),
        ({"method": "ties", "base": ONE, "density": "a"}, "density=a: must be a number"),
        ({"method": "ties", "base": ONE, "density": 2.0}, "density=2.0: must be in"),
        ({"method": "ties", "base": ODD}, "only in source 0: bias"),
        ({"method": "ties", "base": NAN}, "weight: the base has NaN"),
        ({"method": "evidence"}, "needs row counts of every source"),
        ({"counts": [{}, {}]}, "counts name no table"),
        ({"counts": COUNTS[:1]}, "counts of 1 sources for 2 models"),
        ({"counts": COUNTS[0]}, "counts: pass one dictionary per source"),
        ({"counts": [COUNTS[0], {}]}, "table: source 1 has no counts"),
        ({"counts": [{"tabel": torch.ones(6)}] * 2}, "tabel: has counts but is no parameter"),
        ({"counts": [{"table": torch.ones(5)}] * 2}, r"table: counts \(5,\) of source 0"),
        ({"counts": [{"table": -torch.ones(6)}] * 2}, "table: counts of source 0 must be finite"),
        ({"counts": [{"table": "abc"}] * 2}, "table: counts of source 0 are a str; pass one"),
        ({"counts": [{"table": None}] * 2}, "table: counts of source 0 are a NoneType"),
        ({"counts": [{"table": torch.ones(6) + 0j}] * 2}, "table: counts of source 0 .*complex64"),
        ({"counts": [{"table": torch.ones(6, device="meta")}] * 2}, "table: .*meta device"),
        ({"counts": [{"table": torch.ones(6).to_sparse()}] * 2}, "table: .*sparse_coo"),
        ({"method": "ties", "base": {**ONE, "bias": torch.ones(4).int()}}, "bias: .* in the base"),
        ({"models": [ONE, {**TWO, "bias": NESTED}]}, "bias: source 1 .*nested"),
        ({"models": [HUGE, HUGE], "dtype": torch.float16}, "w: .* do not fit torch.float16"),
        ({"method": ["ties"]}, "method is a list; pass the name"),
        ({"models": nn.Linear(2, 2), "method": nn.Linear(2, 2)}, "models as one list"),
        ({"starts": 0}, "starts=0: must be at least 1"),
        ({"starts": "2"}, "starts='2': must be a whole number"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"progress": 3}, "progress is a int; pass a function"),
        ({"extras": {}}, "extras is a dict; pass cki_rec.Extras"),
        ({"symmetries": 3, "align": "weights"}, "symmetries is a int"),
        ({"symmetries": "auto", "align": "weights"}, "symmetries is a str"),
        (
            {"symmetries": moves(size=7), "align": "weights"},
            "table: .* 7 units does not fit",
        ),
        ({"symmetries": moves(size=0), "align": "weights"}, "symmetry of size 0"),
        ({"symmetries": moves(axis=-1), "align": "weights"}, "table: a symmetry names axis -1"),
        ({"symmetries": moves(start=1), "align": "weights"}, "table: .* 3 units does not fit"),
        (
            {"symmetries": moves(kind="turn"), "align": "weights"},
            "symmetry of kind 'turn'",
        ),
        ({"method": "greedy_soup", "score": lambda _: "1.5"}, "score returned a str"),
        (
            {"method": "greedy_soup", "score": lambda _: torch.tensor(1j)},
            "returned a Tensor",
        ),
        ({"align": "weights"}, "align=weights needs the symmetries"),
        ({"method": "zipit"}, "method zipit needs the symmetries"),
        ({"align": "activations", "symmetries": []}, "activations needs activations"),
        ({"repair": "rescale", "symmetries": []}, "rescale needs activations"),
        ({"align": "weigths"}, "align='weigths': one of none, weights"),
        ({"symmetries": [3], "align": "weights"}, "symmetries holds a int"),
        (
            {"symmetries": [Symmetry("rotation", 3, (Slice("tabel", 1),))], "align": "weights"},
            "tabel: named by a symmetry",
        ),
        (
            {"symmetries": [Symmetry("rotation", 3, (Slice("bias", 1),))], "align": "weights"},
            "bias: a symmetry names axis 1",
        ),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter(())}, "batches is empty"),
        ({"batches": torch.ones(3)}, "batches is one Tensor; pass a list"),
        ({"module": nn.Linear(3, 4)}, "only in the sources: table; only in|only in the sources"),
        ({"module": 3}, "module is a int"),
        ({"score": 3}, "score is a int; pass a function"),
        ({"method": "greedy_soup", "score": lambda _: math.nan}, "score returned NaN"),
        ({"method": "greedy_soup", "score": lambda _: None}, "score returned a NoneType"),
        (
            {"method": "greedy_soup", "score": lambda _: torch.ones(2)},
            r"returned .* it must return one number",
        ),
        ({"method": "auto"}, "needs a score of models"),
        ({"method": "auto", "score": lambda _: 1.0, "effort": "max"}, "effort='max': one of clos"),
        ({"method": "auto", "score": lambda _: 1.0, "refine": "mean"}, "leave out refine"),
        ({"refine": "auto"}, "refine='auto': one of none, mean, router"),
        ({"refine": "mean"}, "refine=mean needs activations"),
        ({"method": "auto", "score": lambda _: 1.0, "align": "weights"}, "leave out align"),
        ({"method": "auto", "score": lambda _: 1.0, "density": 1}, "leave out density"),
        ({"dtype": torch.int8}, "dtype=torch.int8: must be a floating type"),
    ],
)
def test_errors_of_the_caller_are_one_line_with_a_name(words, message, capsys):
    with pytest.raises(ValueError, match=message) as caught:
        merge(**{"models": PAIR, **words})
    assert isinstance(caught.value, MergeError)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_shapes_of_a_module_are_compared():
    with pytest.raises(MergeError, match=r"weight: shapes differ, .* in module"):
        merge([nn.Linear(3, 4), nn.Linear(3, 4)], module=nn.Linear(2, 4))


def test_errors_of_ours_keep_their_traceback():
    def score(_):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        merge(PAIR, "greedy_soup", score=score)
