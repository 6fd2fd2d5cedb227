"""Teachers and maps of tables, against slow references.

Shape legend: K sources, B rows of a batch, V rows of a table, D columns.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cki_rec.merging.table_maps import TableMaps
from cki_rec.merging.teachers import (
    Lookups,
    mean_teacher,
    routed,
    router_shares,
    routing_table,
    separation,
)

COUNTS_KV = torch.tensor([[3, 0, 5, 0, 1, 0], [1, 4, 0, 0, 1, 7]])


def reference(counts_KV, ids_of_rows: list[list[int]]) -> torch.Tensor:
    """Return the shares ``(K, B)``, one row and one id after the other."""
    columns = []
    for ids in ids_of_rows:
        seen_K = [sum(float(counts[i]) for i in ids) for counts in counts_KV]
        total = sum(seen_K)
        columns.append([s / total if total else 1 / len(seen_K) for s in seen_K])
    return torch.tensor(columns, dtype=torch.float64).T


def bags(include_last: bool):
    values = torch.tensor([0, 2, 2, 5, 4, 3])
    offsets = torch.tensor([0, 0, 3, 3, 5])  # rows: none, 0 2 2, none, 5 4, 3
    last = torch.tensor([6]) if include_last else torch.tensor([], dtype=torch.long)
    return (values, torch.cat([offsets, last])), [[], [0, 2, 2], [], [5, 4], [3]]


def recorded(owner, run, num_rows: int, counts_KV=COUNTS_KV) -> torch.Tensor:
    lookups = Lookups(nn.ModuleDict({"a": owner}), "a.weight", {"a.weight"})
    with lookups.recorded():
        run(owner)
    run(owner)  # outside of the block: not recorded
    return lookups.shares(counts_KV, num_rows)


@pytest.mark.parametrize(
    ("owner", "inputs", "rows"),
    [
        (nn.Embedding(6, 2), (torch.tensor([5, 0, 3]),), [[5], [0], [3]]),
        (nn.Embedding(6, 2), (torch.tensor([[0, 1], [2, 2], [3, 3]]),), [[0, 1], [2, 2], [3, 3]]),
        (nn.Embedding(6, 2), (torch.tensor([[[0, 1]], [[2, 4]]]),), [[0, 1], [2, 4]]),
        (nn.EmbeddingBag(6, 2), (torch.tensor([[0, 1], [5, 5]]),), [[0, 1], [5, 5]]),
        (nn.EmbeddingBag(6, 2), *bags(include_last=False)),
        (nn.EmbeddingBag(6, 2, include_last_offset=True), *bags(include_last=True)),
        (nn.EmbeddingBag(6, 2), (torch.tensor([], dtype=torch.long), torch.tensor([0, 0])),
         [[], []]),
    ],
)  # fmt: skip
def test_shares_of_recorded_lookups(owner, inputs, rows):
    expected = reference(COUNTS_KV, rows)
    torch.testing.assert_close(recorded(owner, lambda a: a(*inputs), len(rows)), expected)
    names = dict(zip(("input", "offsets"), inputs, strict=False))
    torch.testing.assert_close(recorded(owner, lambda a: a(**names), len(rows)), expected)
    if len(inputs) > 1:
        mixed = recorded(owner, lambda a: a(inputs[0], offsets=inputs[1]), len(rows))
        torch.testing.assert_close(mixed, expected)


def test_several_lookups_of_a_row_add_up():
    def run(table):
        table(torch.tensor([0, 1]))
        table(torch.tensor([[2, 3], [5, 5]]))

    expected = reference(COUNTS_KV, [[0, 2, 3], [1, 5, 5]])
    torch.testing.assert_close(recorded(nn.Embedding(6, 2), run, 2), expected)


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_shares_sum_to_one_for_counts_below_one(scale):
    """Sums of weights are evidence too."""
    ids = torch.arange(6)
    shares = router_shares(COUNTS_KV * scale, ids, ids, 6)
    torch.testing.assert_close(shares, reference(COUNTS_KV, [[i] for i in range(6)]))
    torch.testing.assert_close(shares.sum(0), torch.ones(6, dtype=torch.float64))


def test_routed_outputs_of_any_shape():
    shares_KB = torch.tensor([[0.25, 1.0], [0.75, 0.0]], dtype=torch.float64)
    outputs = torch.randn(2, 2, 3, 4)
    result = routed(outputs, shares_KB)
    assert result.dtype == outputs.dtype
    torch.testing.assert_close(result[0], 0.25 * outputs[0, 0] + 0.75 * outputs[1, 0])
    torch.testing.assert_close(result[1], outputs[0, 1])
    torch.testing.assert_close(mean_teacher(None, outputs), (outputs[0] + outputs[1]) / 2)


def test_separation_is_0_for_equal_shares_and_1_for_disjoint_ids():
    count = torch.tensor([5, 0, 2, 9])
    assert separation([{"a": count}, {"a": 3 * count}])["a"] == pytest.approx(0, abs=1e-12)
    for sizes in ((1, 1), (1, 7)):
        apart = [{"a": sizes[0] * torch.tensor([2, 3, 0, 0])},
                 {"a": sizes[1] * torch.tensor([0, 0, 4, 1])}]  # fmt: skip
        assert separation(apart)["a"] == pytest.approx(1)
    three = [{"a": 2 * torch.eye(3)[k]} for k in range(3)]
    assert separation(three)["a"] == pytest.approx(1)
    once = [{"a": torch.eye(3)[k]} for k in range(3)]  # nobody knows: no id was seen twice
    assert separation(once)["a"] == 0


def test_sources_that_share_some_ids_are_routed_by_the_others():
    shared, alone = torch.full((30,), 20), torch.zeros(70, dtype=torch.long)
    alone[:35] = 20
    counts = [{"a": torch.cat([shared, alone])}, {"a": torch.cat([shared, alone.flip(0)])}]
    assert 0.2 < separation(counts)["a"] < 0.8
    assert routing_table(counts) == "a"


@pytest.mark.parametrize("seen", [2, 5, 40])
@pytest.mark.parametrize("prior", [[0.5, 0.5], [0.8, 0.1, 0.1]])
def test_separation_of_rows_dealt_at_random_is_0(seen, prior):
    """Rare ids differ between sources by chance alone; they do not route."""
    noise = torch.Generator().manual_seed(1)
    rows = torch.multinomial(torch.tensor(prior), 3000 * seen, True, generator=noise)
    counts = [{"a": (rows == k).view(3000, seen).sum(1)} for k in range(len(prior))]
    assert separation(counts)["a"] < 0.03
    assert routing_table(counts) is None


def test_separation_against_a_loop():
    total_V, total_K = COUNTS_KV.sum(0).double(), COUNTS_KV.sum(1).double()
    prior_K = total_K / total_K.sum()
    distance = 0.0
    for row in range(6):
        if total_V[row]:
            shares_K = COUNTS_KV[:, row] / total_V[row]
            distance += float(total_V[row] * (shares_K - prior_K).abs().sum() / 2)
    chance = 0.0
    for n in total_V.int().tolist():
        for p in prior_K.tolist():
            for x in range(n + 1):
                chance += math.comb(n, x) * p**x * (1 - p) ** (n - x) * abs(x - n * p) / 2
    largest = float(total_V.sum() * (prior_K * (1 - prior_K)).sum())
    expected = (distance - chance) / (largest - chance)
    assert separation([{"a": c} for c in COUNTS_KV])["a"] == pytest.approx(expected)


def test_the_routing_table_has_the_largest_separation():
    near = torch.tensor([10, 10, 10])
    counts = [
        {"near": near, "far": torch.tensor([9, 0]), "mid": torch.tensor([8, 2]), "none": near * 0},
        {"near": near, "far": torch.tensor([0, 9]), "mid": torch.tensor([2, 8]), "none": near * 0},
    ]
    assert separation(counts).keys() == {"near", "far", "mid"}
    assert routing_table(counts) == "far"
    assert routing_table([{"near": source["near"]} for source in counts]) is None
    assert routing_table([]) is None
    assert routing_table([{"near": near}, {"near": near * 0}]) is None  # one source saw no rows


class Tables(nn.Module):
    """Lookups of all kinds; the maximum is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(9, 3, padding_idx=0)
        self.mean = nn.EmbeddingBag(9, 2, mode="mean")
        self.sum = nn.EmbeddingBag(9, 2, mode="sum", padding_idx=1)
        self.most = nn.EmbeddingBag(9, 2, mode="max")
        self.short = nn.Embedding(9, 2, max_norm=0.5)
        self.kept = nn.Embedding(9, 2)

    def forward(self, ids):
        weights = torch.linspace(0, 1, ids.numel()).view(ids.shape)
        parts = [self.one(ids).sum(1), self.mean(ids), self.most(ids), self.short(ids).sum(1)]
        parts.append(self.sum(ids, per_sample_weights=weights))
        return torch.cat([*parts, self.kept(ids[:, 0])], 1)


@torch.no_grad()
def test_maps_begin_as_one_source_and_give_mapped_rows(monkeypatch):
    monkeypatch.setattr("cki_rec.merging.table_maps.BLOCK", 4)
    models = [Tables() for _ in range(3)]
    states = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    maps = TableMaps(models[0], states, 1, kept={"kept.weight"})
    assert maps.maps.keys() == {"one.weight", "mean.weight", "sum.weight"}
    for name, table in maps.tables().items():
        assert table.equal(states[1][name])
    ids = torch.randint(9, (5, 4))
    rest = {n: t for n, t in states[1].items() if n not in maps.maps}
    with maps.applied():
        began = torch.func.functional_call(models[0], rest, ids)
    assert began.equal(models[1](ids))
    for table_map in maps.maps.values():
        table_map.normal_()
    for name, table in maps.tables().items():
        slow = torch.stack([torch.cat([s[name][v] for s in states]) @ maps.maps[name]
                            for v in range(9)])  # fmt: skip
        torch.testing.assert_close(table, slow)
    with maps.applied():
        looked_up = torch.func.functional_call(models[0], rest, ids)
    mapped = torch.func.functional_call(models[0], {**rest, **maps.tables()}, ids)
    torch.testing.assert_close(looked_up, mapped)
    assert models[0](ids).shape == mapped.shape  # without maps again
    assert not any(part._forward_hooks for part in models[0].modules())
