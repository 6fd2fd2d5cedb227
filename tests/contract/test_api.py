"""What the merge of the library refuses, without the command line."""

from __future__ import annotations

import re

import pytest
import torch

from cki_rec.merging.api import merge
from cki_rec.merging.extras import Extras
from cki_rec.merging.params import MergeError


def draw(seed):
    noise = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(3, 2, generator=noise), "bias": torch.randn(3, generator=noise)}


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("average", {"align": "weight"}, "align='weight': one of none, weights, activations"),
        ("average", {"align": "weights"}, "align=weights needs the symmetries of the network"),
        ("average", {"repair": "mend"}, "repair='mend': one of none, rescale"),
        ("slerp", {"repair": "rescale"}, "slerp does not average layers"),
        (
            *("average", {"extras": Extras(fixed={"bias": "last"})}),
            "fixed['bias']='last': one of first, evidence",
        ),
        (
            *("average", {"extras": Extras(fixed={"gain": "first"})}),
            "fixed names gain, which no model has",
        ),
    ],
)
def test_steps_are_checked_by_the_library_too(method, words, message):
    with pytest.raises(MergeError, match=re.escape(message)):
        merge([draw(1), draw(2)], method, **words)


def test_one_model_needs_its_base_too():
    with pytest.raises(MergeError, match="needs the model that all sources started from"):
        merge([draw(1)], "task_arithmetic")
