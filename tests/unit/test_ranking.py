"""Ranks among candidates equal a plain reference; drawn candidates keep their promises."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import build, make_schema

from cki_rec.config import Ranking, UserError
from cki_rec.data.candidates import CandidateRows, candidate_blocks, draw_candidates, item_fields
from cki_rec.data.columns import Ragged
from cki_rec.engine.evaluator import predict
from cki_rec.evaluation.bootstrap import resampling_weights
from cki_rec.evaluation.metrics import METRICS, RANKING
from cki_rec.evaluation.ranking import (
    Cases,
    bootstrap_over_users,
    gains,
    hits,
    mean_over_users,
)

CUTOFFS = (1, 2, 3, 5, 10)


def reference(logit_CN, cutoff):
    """Return HR and NDCG per case: the mean over all orders of equal items."""
    values = []
    for row in logit_CN.astype(np.float64):
        hit, gain, orders = 0.0, 0.0, list(itertools.permutations(range(len(row))))
        for order in orders:
            rank = 1 + sorted(order, key=lambda place: -row[place]).index(0)
            hit += rank <= cutoff
            gain += 1 / math.log2(1 + rank) if rank <= cutoff else 0.0
        values.append((hit / len(orders), gain / len(orders)))
    return np.array(values).T


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_values_are_means_over_the_orders_of_ties(cutoff):
    logit = np.random.default_rng(0).integers(0, 3, (30, 5)).astype(np.float32)
    hit, gain = reference(logit, cutoff)
    np.testing.assert_allclose(hits(cutoff)(logit), hit, rtol=1e-12)
    np.testing.assert_allclose(gains(cutoff)(logit), gain, rtol=1e-12)


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_values_without_ties_are_those_of_the_rank(cutoff):
    logit = np.random.default_rng(1).normal(size=(200, 101))
    rank = np.array([np.sort(row)[::-1].tolist().index(row[0]) + 1 for row in logit])
    np.testing.assert_array_equal(hits(cutoff)(logit), rank <= cutoff)
    expected = np.where(rank <= cutoff, 1 / np.log2(1 + rank), 0)
    np.testing.assert_allclose(gains(cutoff)(logit), expected, rtol=1e-12)


def test_ends():
    best, worst, equal = np.eye(1, 101), -np.eye(1, 101), np.zeros((1, 101))
    for metric in RANKING:
        values = [float(metric.of_cases(logit)[0]) for logit in (best, worst, equal)]
        assert values[:2] == [1, 0]
        assert 0 < values[2] < 0.2
    assert hits(10)(equal)[0] == pytest.approx(10 / 101)
    assert hits(5)(np.zeros((2, 4))).tolist() == [1, 1]  # fewer candidates than the cutoff
    assert hits(10)(np.zeros((0, 101))).shape == (0,)


@pytest.mark.parametrize("metric", RANKING, ids=[metric.name for metric in RANKING])
class TestEveryMetricOfCandidates:
    """The edges of ``test_metrics.TestEveryMetric``, for lists of candidates."""

    @pytest.mark.parametrize("logit", [np.zeros(3), np.zeros((3, 1))])
    def test_other_shapes_are_refused(self, metric, logit):
        with pytest.raises(ValueError, match="must be a matrix"):
            metric.of_cases(logit)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 1])
    def test_logits_that_are_not_finite_are_refused(self, metric, bad, place):
        logit = np.zeros((3, 2))
        logit[2, place] = bad
        with pytest.raises(ValueError, match="a logit of case 2 is not finite"):
            metric.of_cases(logit)

    def test_order_of_cases_and_of_items_does_not_matter(self, metric):
        rng = np.random.default_rng(0)
        logit, order = np.round(rng.normal(size=(50, 30)), 1), rng.permutation(50)
        value, user = metric.of_cases(logit), rng.integers(0, 9, 50)
        columns = np.r_[0, 1 + rng.permutation(29)]
        np.testing.assert_array_equal(metric.of_cases(logit[order][:, columns]), value[order])
        mean = mean_over_users(value, Cases(np.arange(50), user))
        other = mean_over_users(value[order], Cases(np.arange(50), user[order]))
        assert other == pytest.approx(mean, rel=1e-12)

    def test_its_row_is_consistent(self, metric):
        assert METRICS[metric.name] is metric
        assert metric.better == "higher"
        assert metric.bootstrap is None
        assert metric.over_repetitions or not metric.compared


def test_means_are_over_users():
    cases = Cases(np.arange(4), np.array([7, 7, 7, 2]))
    assert mean_over_users(np.array([1.0, 0.0, 0.5, 0.0]), cases) == pytest.approx(0.25)
    assert mean_over_users(np.empty(0), Cases(np.empty(0, int), np.empty(0, int))) is None


@pytest.mark.parametrize("by", ["user", "row"])
def test_replicates_are_means_over_drawn_units(by):
    rng = np.random.default_rng(0)
    user_B = rng.integers(0, 12, 80)
    rows = np.sort(rng.choice(80, 30, replace=False))
    cases, value = Cases(rows, user_B[rows]), rng.random(30)
    resamples = resampling_weights(user_B if by == "user" else np.arange(80), 20, rng)
    own = {user: (cases.user == user).sum() for user in range(12)}
    for replicate, weights in zip(
        bootstrap_over_users(value, cases, resamples), resamples.weights, strict=True
    ):
        times = weights[resamples.unit[rows]] / np.array([own[user] for user in cases.user])
        assert replicate == pytest.approx(np.average(value, weights=times), rel=1e-12)


def test_metrics_of_candidates_are_undefined_on_rows():
    assert [m.name for m in RANKING] == [f"{n}_{k}" for n in ("hr", "ndcg") for k in (5, 10, 20)]
    assert all(METRICS[m.name]([1, 0], [0.0, 1.0]) is None for m in RANKING)


class Dataset:
    """Rows of 8 users and 12 items; brand and tags follow from the item, age from the user."""

    def __init__(self, num=400, seed=0):
        rng = np.random.default_rng(seed)
        self.folder = Path("data-1")
        self.group = rng.integers(0, 8, num).astype(np.int32)
        self.item_index = rng.integers(0, 12, num).astype(np.int32)
        self.item_index[:12] = np.arange(12)
        self.group[:8] = np.arange(8)
        self.split = rng.choice(3, num, p=[0.6, 0.2, 0.2]).astype(np.uint8)
        self.label = (rng.random(num) < 0.15).astype(np.uint8)
        self.schema = make_schema(
            ("item", "item", "categorical"),
            ("user", "user", "categorical"),
            ("brand", "brand", "categorical"),
            ("hour", "hour", "categorical"),
            ("tags", "tags", "multi"),
            ("liked", "item", "history"),
            ("price", "", "numeric"),
            ("age", "", "numeric"),
        )
        self.schema.table_sizes.update(dict.fromkeys(self.schema.table_sizes, 30))
        self.id_columns = ["item", "user", "brand", "hour"]
        self.ids = np.stack(
            [self.item_index + 2, self.group + 2, self.item_index % 3, rng.integers(0, 24, num)], 1
        ).astype(np.int32)
        price, age = rng.random(12)[self.item_index], rng.random(8)[self.group]
        price[self.item_index == 4] = np.nan
        self.numbers = np.stack([price, age], 1).astype(np.float32)
        sizes = self.item_index % 4
        ends = np.cumsum(sizes)
        tags = Ragged(np.repeat(self.item_index, sizes).astype(np.int32), ends - sizes, sizes)
        self.ragged = {"tags": tags, "liked": Ragged(tags.values, tags.starts[::-1], sizes[::-1])}

    def __len__(self):
        return len(self.label)

    def rows(self, split):
        return np.flatnonzero(self.split == ("train", "valid", "test").index(split))

    def column(self, name):
        if name in self.ragged:
            return self.ragged[name]
        if name in self.id_columns:
            return self.ids[:, self.id_columns.index(name)]
        return self.numbers[:, ["price", "age"].index(name)]


def ranking(**changes):
    return Ranking(**{"negatives": 3, "draw": "uniform", "seed": 0, **changes})


@pytest.mark.parametrize("draw", ["uniform", "popularity"])
def test_candidates_are_distinct_items_that_the_user_did_not_like(draw):
    data = Dataset()
    drawn = draw_candidates(data, "test", data.label, ranking(draw=draw))
    rows = data.rows("test")
    assert drawn.row_C.tolist() == [row for row in rows if data.label[row]]
    assert drawn.row_C.tolist() == rows[drawn.place_C].tolist()
    liked = {(data.group[r], data.item_index[r]) for r in np.flatnonzero(data.label)}
    for row, candidates in zip(drawn.row_C, drawn.item_row_CK, strict=True):
        items = data.item_index[candidates].tolist()
        assert candidates[0] == row
        assert len(set(items)) == 4
        assert not {(data.group[row], item) for item in items[1:]} & liked
    again = draw_candidates(data, "test", data.label, ranking(draw=draw))
    assert np.array_equal(again.item_row_CK, drawn.item_row_CK)
    other = draw_candidates(data, "test", data.label, ranking(draw=draw, seed=1))
    assert not np.array_equal(other.item_row_CK, drawn.item_row_CK)
    assert drawn.protocol["cases"] == len(drawn.row_C)
    assert drawn.protocol["left_out"] == "items that the user likes in train or valid or test rows"


def test_validation_candidates_do_not_depend_on_test_labels():
    data, results = Dataset(), []
    for flip in (False, True):
        label = data.label.astype(np.float32)
        label[data.split == 2] = np.nan
        if flip:
            data.label = np.where(data.split == 2, 1 - data.label, data.label)
        results.append(draw_candidates(data, "valid", label, ranking()))
    assert np.array_equal(results[0].item_row_CK, results[1].item_row_CK)
    assert results[0].protocol["left_out"].endswith("likes in train or valid rows")


def test_items_are_drawn_by_their_weights():
    data = Dataset(20_000)
    data.group = np.arange(20_000, dtype=np.int32)  # a liked item each, and no other
    data.label[:] = np.arange(20_000) % 3 == 0
    popular = np.bincount(data.item_index[(data.label == 1) & (data.split == 0)], minlength=12)
    for draw, weight in (("uniform", np.ones(12)), ("popularity", popular)):
        drawn = draw_candidates(data, "test", data.label, ranking(negatives=1, draw=draw))
        items = data.item_index[drawn.item_row_CK]
        expected = np.zeros(12)
        for own in items[:, 0]:
            others = weight * (np.arange(12) != own)
            expected += others / others.sum()
        observed = np.bincount(items[:, 1], minlength=12)
        assert (np.square(observed - expected) / expected).sum() < 31.3  # chi squared, 11, .001


def test_fields_of_items_are_found():
    data = Dataset()
    first = np.array([np.flatnonzero(data.item_index == item)[0] for item in range(12)])
    assert item_fields(data, first) == ("item", "brand", "tags", "price")


def test_candidate_rows_take_item_fields_from_the_item():
    data = Dataset()
    drawn = draw_candidates(data, "test", data.label, ranking())
    (rows,) = candidate_blocks(data, drawn)
    assert isinstance(rows, CandidateRows)
    assert len(rows) == drawn.item_row_CK.size
    case, item = np.repeat(drawn.row_C, 4), drawn.item_row_CK.reshape(-1)
    for name in ("item", "brand", "price"):
        np.testing.assert_array_equal(rows.column(name), data.column(name)[item])
    for name in ("user", "hour", "age"):
        np.testing.assert_array_equal(rows.column(name), data.column(name)[case])
    for name, source in (("tags", item), ("liked", case)):
        values, lengths = rows.column(name).ids(np.arange(len(rows)))
        expected, sizes = data.column(name).ids(source)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(lengths, sizes)
    assert np.isnan(rows.labels(np.arange(3))).all()


def test_blocks_give_all_candidates(monkeypatch):
    monkeypatch.setattr("cki_rec.data.candidates.BLOCK", 9)  # two cases of four
    data = Dataset()
    drawn = draw_candidates(data, "test", data.label, ranking())
    ids = np.concatenate([rows.column("item") for rows in candidate_blocks(data, drawn)])
    assert np.array_equal(ids, data.column("item")[drawn.item_row_CK.reshape(-1)])


def test_mistakes_are_one_line():
    data = Dataset()
    with pytest.raises(UserError, match=r"negatives=12: a user has only \d+ items .* lower it to"):
        draw_candidates(data, "test", data.label, ranking(negatives=12))
    everything = Dataset()
    everything.group[:] = 3
    everything.label[:] = 1  # a user that likes every item
    with pytest.raises(UserError, match=r"has only 0 items to draw from; use .*ranking=null"):
        draw_candidates(everything, "test", everything.label, ranking())
    data.group = None
    with pytest.raises(UserError, match=r"evaluate\.ranking: data-1 has no users or no items"):
        draw_candidates(data, "test", data.label, ranking())


@pytest.mark.parametrize("name", ["sasrec", "deepfm"])
def test_candidates_that_share_histories_score_as_alone(name):
    data = Dataset()
    network = build(data.schema, name=name).eval()
    drawn = draw_candidates(data, "test", data.label, ranking())
    (rows,) = candidate_blocks(data, drawn)
    every, device = np.arange(len(rows)), torch.device("cpu")
    data.numbers[np.isnan(data.numbers)] = rows.numbers[np.isnan(rows.numbers)] = 0
    alone = predict(network, rows, data.schema, every, device)
    shared = predict(network, rows, data.schema, every, device, drawn.width)
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)
