"""Plain modules that do not know cki_rec, and random ones, to search symmetries in."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 50


def ids(*shape: int, seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes: int, act: type = nn.ReLU, norm: type | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([norm(b)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


class Residual(nn.Module):
    def __init__(self, width=8, hidden=6):
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 1)
        self.block = nn.Sequential(
            nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, hidden), nn.Tanh(),
            nn.Linear(hidden, width),
        )  # fmt: skip

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.block(x))


class TwoTowers(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, dim), nn.Embedding(ROWS, dim)
        self.left, self.right = mlp(dim, 8, dim), mlp(dim, 8, dim)

    def forward(self, u, i):
        return (self.left(self.user(u)) * self.right(self.item(i))).sum(-1)


class NeuMF(nn.Module):
    """GMF, an MLP, or both (``parts``), as in the NCF paper."""

    def __init__(self, parts=("gmf", "mlp"), dim=6):
        super().__init__()
        self.parts = parts
        if "gmf" in parts:
            self.user_gmf, self.item_gmf = nn.Embedding(ROWS, dim), nn.Embedding(ROWS, dim)
        if "mlp" in parts:
            self.user_mlp, self.item_mlp = nn.Embedding(ROWS, dim), nn.Embedding(ROWS, dim)
            self.mlp = nn.Sequential(nn.Linear(2 * dim, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        self.out = nn.Linear(dim * ("gmf" in parts) + 4 * ("mlp" in parts), 1)

    def forward(self, u, i):
        x = []
        if "gmf" in self.parts:
            x.append(self.user_gmf(u) * self.item_gmf(i))
        if "mlp" in self.parts:
            x.append(self.mlp(torch.cat([self.user_mlp(u), self.item_mlp(i)], -1)))
        return torch.sigmoid(self.out(torch.cat(x, -1)))


class DLRM(nn.Module):
    def __init__(self, fields=3, dim=4):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(ROWS, dim, mode="sum") for _ in range(fields))
        self.bottom = mlp(5, 8, dim)
        self.top = mlp(dim + (fields + 1) * fields // 2, 8, 1)

    def forward(self, dense, sparse, offsets):
        z = self.bottom(dense)
        bags = [bag(sparse[f], offsets[f]) for f, bag in enumerate(self.bags)]
        x = torch.stack([z, *bags], 1)
        rows, columns = torch.tril_indices(x.size(1), x.size(1), -1)
        return self.top(torch.cat([z, torch.bmm(x, x.mT)[:, rows, columns]], 1))


class DIN(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.item, self.user = nn.Embedding(ROWS, dim, padding_idx=0), nn.Embedding(ROWS, dim)
        self.attention, self.mlp = mlp(4 * dim, 6, 1, act=nn.Sigmoid), mlp(3 * dim, 8, 1)

    def forward(self, u, i, history):
        q, k = self.item(i), self.item(history)
        wide = q.unsqueeze(1).expand_as(k)
        a = self.attention(torch.cat([wide, k, wide - k, wide * k], -1))
        a = a.masked_fill((history == 0).unsqueeze(-1), 0.0)
        return self.mlp(torch.cat([self.user(u), q, (a * k).sum(1)], -1))


class Encoder(nn.Module):
    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads = heads
        self.emb, self.norm = nn.Embedding(ROWS, dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.feed, self.out = mlp(dim, 12, dim, act=nn.GELU), nn.Linear(dim, 2)

    def forward(self, x):
        x = self.emb(x)
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return self.out(x + self.feed(self.norm(x)))


class Recurrent(nn.Module):
    def __init__(self, dim=4, hidden=6):
        super().__init__()
        self.emb = nn.Embedding(ROWS, dim)
        self.rnn, self.out = nn.GRU(dim, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.rnn(self.emb(x))[0][:, -1])


class Tied(nn.Module):
    """One table for two inputs and for the output layer."""

    def __init__(self, dim=6):
        super().__init__()
        self.table, self.mlp, self.out = (
            nn.Embedding(ROWS, dim),
            mlp(2 * dim, 8, dim),
            nn.Linear(dim, ROWS),
        )
        self.out.weight = self.table.weight

    def forward(self, a, b):
        return self.out(self.mlp(torch.cat([self.table(a), self.table(b)], 1)))


class OneTable(nn.Module):
    """A factorization machine and an MLP on one table for all fields, with an offset per field."""

    def __init__(self, fields=3, dim=4):
        super().__init__()
        self.table, self.deep = nn.Embedding(ROWS * fields, dim), mlp(fields * dim, 8, 1)
        self.register_buffer("offsets", torch.arange(fields) * ROWS)

    def forward(self, x):
        e = self.table(x + self.offsets)
        fm = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        return fm + self.deep(e.flatten(1))


class Experts(nn.Module):
    """Experts in one parameter, with a softmax gate."""

    def __init__(self, experts=3, hidden=4, biases=False):
        super().__init__()
        self.first = nn.Parameter(floats(experts, 5, hidden))
        self.last = nn.Parameter(floats(experts, hidden, 2, seed=1))
        self.inside = nn.Parameter(floats(experts, hidden, seed=2)) if biases else 0
        self.outside = nn.Parameter(floats(experts, 2, seed=3)) if biases else 0
        self.gate = nn.Linear(5, experts)

    def forward(self, x):
        y = (torch.einsum("bd,edh->beh", x, self.first) + self.inside).relu()
        y = torch.einsum("beh,ehk->bek", y, self.last) + self.outside
        return (self.gate(x).softmax(1).unsqueeze(-1) * y).sum(1)


class Between(nn.Module):
    """An operation between two layers: one that treats units unequally, or is unknown."""

    def __init__(self, operation: Callable[[Tensor], Tensor], width=16):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.operation = nn.Linear(5, 16), mlp(width, 8, 1), operation

    def forward(self, x):
        return self.last(self.operation(F.relu(self.first(x))))


def _write(h: Tensor) -> Tensor:
    y = h.clone()
    y[:, 3] = y[:, 2] * 2
    return y


ODD: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "sort": (lambda h: h.sort(-1)[0], 16),
    "cumsum": (lambda h: h.cumsum(-1), 16),
    "topk": (lambda h: h.topk(4)[0], 4),
    "fft": (lambda h: torch.fft.rfft(h).abs(), 9),
    "roll": (lambda h: h + h.roll(1, -1), 16),
    "flip": (lambda h: h * h.flip(-1), 16),
    "one unit": (lambda h: h * h[:, 3:4], 16),
    "ramp": (lambda h: h * torch.arange(16.0, dtype=h.dtype), 16),
    "half": (lambda h: torch.cat([h[:, :8].tanh(), h[:, 8:]], 1), 16),
    "in place": (lambda h: h.mul_(2).add_(h[:, :1]), 16),
    "written": (lambda h: torch.zeros_like(h).index_copy_(1, torch.arange(15, -1, -1), h), 16),
    "argmax": (lambda h: F.one_hot(h.argmax(-1), 16).to(h), 16),
    "pool": (lambda h: F.max_pool1d(h[:, None], 2)[:, 0], 8),
    "glu": (lambda h: F.glu(h), 8),
    "outer": (lambda h: (h[:, :4, None] * h[:, None, 4:8]).flatten(1), 16),
    "softmax": (lambda h: h.softmax(-1), 16),
    "item": (lambda h: h * float(h[0, 0]), 16),
    "normalize": (lambda h: F.normalize(h), 16),
    "group norm": (lambda h: F.group_norm(h, 4), 16),
    "maxout": (lambda h: h.view(-1, 8, 2).amax(-1), 8),
    "slice": (_write, 16),
    "branch": (lambda h: h.sin() if h[0, 0] > 0.5 else h.cos(), 16),
}
"""Title -> operation on 16 units, and the width of its result."""


class Random(nn.Module):
    """A random small network: a chain of random layers, skips, splits and products."""

    KINDS = (
        "linear linear act norm residual product sort cumsum chunk flat roll dots scale bn pick "
        "softmax attention gate mean"
    ).split()  # fmt: skip

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.table = nn.Embedding(30, draw.choice([4, 6, 8]))
        self.plan: list[tuple[str, str]] = []
        self.layers = nn.ModuleList()
        width = self.table.embedding_dim * 2
        for _ in range(draw.randint(2, 6)):
            kind = draw.choice(self.KINDS)
            act = draw.choice(["relu", "tanh", "gelu", "sin", "abs", "square"])
            needs_four = kind in ("dots", "attention", "mean")
            if (needs_four and width % 4) or (kind == "chunk" and width % 2):
                kind = "act"
            new = draw.choice([4, 6, 8, 12]) if kind == "linear" else width
            layer = {
                "linear": lambda: nn.Linear(width, new, bias=draw.random() < 0.7),  # noqa: B023
                "norm": lambda: nn.LayerNorm(width),  # noqa: B023
                "bn": lambda: nn.BatchNorm1d(width),  # noqa: B023
                "scale": lambda: nn.Embedding(1, width),  # noqa: B023
                **dict.fromkeys(
                    ["residual", "product", "gate", "attention"],
                    lambda: nn.Linear(width, width),  # noqa: B023
                ),
            }.get(kind, nn.Identity)()
            width = {"chunk": width // 2, "dots": 16, "mean": 4}.get(kind, new)
            self.plan.append((kind, act))
            self.layers.append(layer)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x).flatten(1)
        for (kind, name), layer in zip(self.plan, self.layers, strict=True):
            act = getattr(torch, name, None) or getattr(F, name)
            h = self.step(kind, act, layer, h)
        return self.out(h)

    def step(self, kind: str, act: Callable, layer: nn.Module, h: Tensor) -> Tensor:
        parts = h.view(len(h), 4, -1) if kind in ("dots", "attention", "mean") else h
        if kind == "attention":
            keys = layer(h).view(len(h), 4, -1)
            return (torch.softmax(parts @ keys.mT, -1) @ parts).flatten(1)
        return {
            "linear": lambda: layer(h),
            "norm": lambda: layer(h),
            "bn": lambda: layer(h),
            "act": lambda: act(h),
            "residual": lambda: h + act(layer(h)),
            "product": lambda: h * layer(h),
            "sort": lambda: h.sort(-1)[0],
            "cumsum": lambda: h.cumsum(-1),
            "chunk": lambda: torch.mul(*h.chunk(2, -1)),
            "flat": lambda: torch.stack([h, act(h)], 2).sum(2),
            "roll": lambda: h + h.roll(1, -1),
            "dots": lambda: (parts @ parts.mT).flatten(1),
            "scale": lambda: h * layer.weight[0],
            "pick": lambda: h + h[:, :1],
            "softmax": lambda: h.softmax(-1),
            "gate": lambda: h * torch.sigmoid(layer(h)),
            "mean": lambda: parts.mean(-1),
        }[kind]()


def units_of(symmetry) -> list[frozenset]:
    """Return per unit the entries that a symmetry moves: parameter, axis, row or None, place."""
    units: list[set] = [set() for _ in range(symmetry.size)]
    for part in symmetry.slices:
        step = part.step or part.width
        starts = part.starts or [part.start + unit * step for unit in range(symmetry.size)]
        rows = [None]
        if part.within:
            ((_, begin, stop),) = part.within
            rows = list(range(begin, stop))
        for unit, start in enumerate(starts):
            units[unit] |= {
                (part.parameter, part.axis, row, start + offset, part.signed)
                for row in rows
                for offset in range(part.width)
            }
    return [frozenset(unit) for unit in units]


@torch.no_grad()
def independent_error(module, inputs: tuple, symmetries, seed: int) -> float:
    """Return the relative change of the outputs, by code that shares nothing with the search.

    States, inputs and elements are new, and entries are moved one by one.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(module).double().eval()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor.copy_(
                tensor * 1.7 if "running_var" in name else tensor + 0.3 * torch.randn_like(tensor)
            )
    inputs = tuple(
        x.double() + torch.randn(x.shape).double() if x.is_floating_point() else x for x in inputs
    )
    torch.manual_seed(seed)
    before = model(*inputs)
    for symmetry in symmetries:
        element = _element(symmetry.kind, symmetry.size)
        units = units_of(symmetry)
        for name, axis in {entry[:2] for entry in units[0]}:
            for row in {entry[2] for entry in units[0] if entry[:2] == (name, axis)}:
                tensor = tensors[name] if row is None else tensors[name][row : row + 1]
                flat = tensor.movedim(axis, 0)  # a view
                places = [
                    sorted(e[3:] for e in unit if e[:3] == (name, axis, row)) for unit in units
                ]
                for copies in zip(*places, strict=True):
                    index = torch.tensor([place for place, _ in copies])
                    matrix = element if copies[0][1] else element.abs()
                    flat[index] = torch.einsum("i...,ij->j...", flat[index], matrix)
    torch.manual_seed(seed)
    after = model(*inputs)
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-9))


def _element(kind: str, size: int) -> Tensor:
    noise = torch.randn(size, size, dtype=torch.float64)
    signs = (torch.rand(size) < 0.5).double() * 2 - 1
    if kind == "rotation":
        return torch.linalg.qr(noise)[0] * signs
    permutation = torch.eye(size, dtype=torch.float64)[torch.randperm(size)]
    return {"permutation": permutation, "signs": signs.diag()}.get(kind, permutation * signs)
