"""Two small networks, and their refinement, as several tests use them."""

from __future__ import annotations

import torch
from torch import nn

import cki_rec


class Net(nn.Module):
    """Two tables, a batch norm with its statistics, a tied output and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(6, 4)
        self.items = nn.EmbeddingBag(5, 4, mode="sum", include_last_offset=True)
        self.mlp = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        self.last, self.tied = nn.Linear(6, 1), nn.Linear(6, 1)
        self.tied.weight = self.last.weight
        self.register_buffer("ids", torch.arange(3))

    def forward(self, user, items, offsets):
        hidden = self.mlp(torch.cat([self.user(user), self.items(items, offsets=offsets)], 1))
        return (self.last(hidden) + self.tied(hidden))[:, 0]


def net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    model.mlp[1].running_mean.normal_()
    model.mlp[1].running_var.uniform_(0.5, 1.5)
    return model


def batch(seed: int, rows: int = 16) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 3, (rows,), generator=noise)
    lengths[-1] = 0
    return {
        "user": torch.randint(6, (rows,), generator=noise),
        "items": torch.randint(5, (int(lengths.sum()),), generator=noise),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
    }


BATCHES = [batch(seed) for seed in range(4)]
SOURCES = [net(1), net(2)]
COUNTS = [
    {"user.weight": torch.tensor([9, 5, 1, 0, 0, 0])},
    {"user.weight": torch.tensor([0, 0, 1, 7, 4, 0])},
]


def refine(models=SOURCES, **words):
    words = {"module": SOURCES[0], "batches": BATCHES, "steps": 8} | words
    return cki_rec.refine(models, **words)
