"""Mistakes in calls of ``cki_rec.refine`` are one line that names the fix."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from refined import BATCHES, COUNTS, SOURCES, Net, refine
from torch import nn

from cki_rec.merging.params import MergeError


def nan_teacher(_, outputs_KB):
    return outputs_KB.mean(0) * math.nan


class NoGradient(Net):
    @torch.no_grad()
    def forward(self, *args, **named):
        return super().forward(*args, **named)


class Scalar(Net):
    def forward(self, *args, **named):
        return super().forward(*args, **named).sum()


EMPTY = {"user": torch.tensor([], dtype=torch.long), "items": torch.tensor([], dtype=torch.long),
         "offsets": torch.tensor([0])}  # fmt: skip
ROUTER = {"teacher": "router", "counts": COUNTS}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"stages": "all"}, "stages='all': pass"),
        ({"stages": ()}, "stages=.*: pass"),
        ({"stages": ("all", "maps")}, "stages=.*: pass"),
        ({"stages": ("all", "all")}, "stages=.*: pass"),
        ({"stages": ("tables",)}, "stages=.*: pass"),
        ({"stages": ("maps",), "start": SOURCES[0]}, "maps.* begins as a source"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": 1e30}, "the loss is .* lower learning_rate"),
        ({"share": 0.0, "start": SOURCES[0]}, "share=0.0"),
        ({"share": 1.5, "start": SOURCES[0]}, "share=1.5"),
        ({"share": 0.5}, "share=0.5: .* pass a merged model"),
        ({"share": 0.5, "start": 1}, "share=0.5: .* pass a merged model"),
        ({"start": 2}, "start=2: there are sources 0 to 1"),
        ({"start": -1}, "start=-1"),
        ({"start": {"x": torch.ones(2)}}, "start"),
        ({"start": {n: t * math.nan for n, t in SOURCES[0].state_dict().items()}}, "start.*NaN"),
        ({"teacher": "rooter"}, "teacher='rooter': .*mean.*router.*function"),
        ({"teacher": "router"}, "needs row counts.*use 'mean'"),
        ({"route": "user.weight"}, "route=user.weight.*teacher='router'"),
        (ROUTER | {"route": "users"}, "route=users: no counts of this table.*user.weight"),
        (ROUTER | {"counts": COUNTS[:1] * 2}, "equally often; use 'mean'"),
        (ROUTER | {"counts": COUNTS[:1]}, "counts of 1 sources for 2 models"),
        (ROUTER | {"counts": [{"mlp.0.weight": torch.arange(6) * k} for k in (0, 1)],
                   "route": "mlp.0.weight"}, "route=mlp.0.weight: no nn.Embedding"),
        ({"teacher": nan_teacher}, "NaN or infinite outputs on batch 0"),
        ({"teacher": lambda *_: torch.ones(3)}, r"returned \(3,\); the outputs are \(16,\)"),
        ({"teacher": lambda *_: 0.5}, "teacher returned .*float"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter(BATCHES[:2])}, "batches ended after 2"),
        ({"batches": BATCHES[0]}, "batches is one dict"),
        ({"batches": [EMPTY]}, "batch 0 has no rows"),
        ({"score": 0.5}, "score is a float"),
        ({"score": lambda _: math.nan}, "score returned NaN"),
        ({"module": Scalar()}, r"the module returns \(\)"),
        ({"module": NoGradient()}, "gradient"),
        ({"module": nn.Linear(1, 1)}, "module"),
        ({"module": "net"}, "module is a str"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, message):
    with pytest.raises(MergeError, match=message) as caught:
        refine(**words)
    assert "\n" not in str(caught.value)


class Unused(Net):
    """The user is known by half of its rows, or not at all."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, user, items, offsets):
        self.user(torch.arange(self.rows) % 6) if self.rows else None
        return (self.items(items, offsets=offsets) @ self.items.weight.T)[:, 0]


@pytest.mark.parametrize(
    ("rows", "message"), [(0, "look nothing up in it"), (20, "lookups of 20 rows for 16 outputs")]
)
def test_a_router_without_the_ids_of_rows_is_refused(rows, message):
    with pytest.raises(MergeError, match=f"route=user.weight: .*{message}"):
        refine(module=Unused(rows), **ROUTER)


def test_nan_of_a_source_is_named():
    broken = copy.deepcopy(SOURCES[1])
    broken.last.bias.data[0] = math.nan
    with pytest.raises(MergeError, match=r"last.bias: source 1 has NaN"):
        refine([SOURCES[0], broken])
