"""Pairs of random models, for what makes a merged model compute what its sources compute."""

from __future__ import annotations

import pytest
import torch
from networks import draw_batch, make_case
from samples import slow_but
from torch.func import functional_call
from torch.nn import Linear

from cki_rec.engine.embeddings import table_of
from cki_rec.merging.methods.average import average
from cki_rec.merging.mixing import mix
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.merging.steps import Network

CASES = [
    "final_mlp batch norm",
    "deepfm",
    "dcn",
    "dcnv2",
    "dcnv2 mixture",
    "din",
    "dnn",
    "wide_deep",
    "final_mlp",
]
all_cases = pytest.mark.parametrize("case", CASES)
din_is_slow = pytest.mark.parametrize("case", slow_but([c for c in CASES if c != "din"], CASES))
HALVES = [0.5, 0.5]


class Pair:
    """Two random models of one network, and what shows how they compute."""

    def __init__(self, case, num_sources=2):
        network, self.schema = make_case(case, "mixed")
        self.network = network.eval()
        self.symmetries = network.symmetries()
        self.batches = [draw_batch(self.schema, 256, seed) for seed in range(4)]
        self.observe = ActivationStatistics(self.network, self.batches)
        self.models = []
        for seed in range(num_sources):
            draw = torch.Generator().manual_seed(seed)
            self.models.append(
                {
                    n: 0.3 * torch.randn(t.shape, generator=draw)
                    if not n.endswith("running_var")
                    else torch.rand(t.shape, generator=draw) + 0.5
                    for n, t in network.state_dict().items()
                }
            )
        self.average = mix(self.models, average(self.models))

    @torch.no_grad()
    def logits(self, params):
        return torch.cat([functional_call(self.network, params, (b,)) for b in self.batches])

    def error(self, params):
        """Return the mean squared distance to the mean logit."""
        mean = torch.stack([self.logits(model) for model in self.models]).mean(0)
        return float((self.logits(params) - mean).square().mean())

    def valid(self, name, values):
        """Return what a module saw, without the empty places of histories."""
        if not name.startswith("attention."):
            return values
        history = self.network.pairs[int(name.split(".")[1])].histories[0]
        masks = [self.network.sparse(batch).masks[history] for batch in self.batches]
        return values[torch.cat(masks).flatten()]

    def readers(self):
        return {f"{n}.weight" for n, m in self.network.named_modules() if isinstance(m, Linear)}


def moved_tables(symmetries):
    """Return the tables that symmetries move."""
    names = [part.parameter for symmetry in symmetries for part in symmetry.slices]
    return Network(symmetries, [name for name in names if table_of(name)]).moved_tables()
