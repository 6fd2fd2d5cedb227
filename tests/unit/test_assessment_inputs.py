"""The assessment as a function and as text: inputs, errors, table, frame, figure."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from cki_rec.evaluation.assessment_plot import assessment_plot
from cki_rec.merging.assessment import PER_SOURCE, Assessment, assess
from cki_rec.merging.params import MergeError
from cki_rec.merging.symmetry import Slice, Symmetry, random_element, transform
from cki_rec.merging.terminal import MOST_ROWS, assessment_text

INF = float("inf")


class Recommender(nn.Module):
    """A table, a hidden layer with dropout and batch norm, an output."""

    def __init__(self, seed, num_rows=30):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(num_rows, 4)
        self.hidden = nn.Linear(4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, 1)

    def forward(self, ids):
        return self.out(self.drop(self.norm(self.hidden(self.table(ids))).relu()))[:, 0]


NORM = tuple(Slice(f"norm.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var"))
SYMMETRIES = [
    Symmetry(
        "permutation",
        16,
        (Slice("hidden.weight", 0), Slice("hidden.bias", 0), *NORM, Slice("out.weight", 1)),
    ),
    Symmetry("rotation", 4, (Slice("table.weight", 1), Slice("hidden.weight", 1))),
]
PAIR = [Recommender(seed).state_dict() for seed in (0, 1)]
IDS = [torch.arange(30), torch.arange(5)]


def changed(**tensors):
    return {**PAIR[1], **{name.replace("__", "."): value for name, value in tensors.items()}}


def test_modules_and_state_dicts_are_the_same():
    modules = [Recommender(seed).train() for seed in (0, 1)]
    copies = [{n: t.clone() for n, t in m.state_dict().items()} for m in modules]
    one = assess(modules, symmetries=SYMMETRIES, module=modules[0], batches=iter(IDS))
    other = assess(copies, symmetries=SYMMETRIES, module=modules[0], batches=IDS)
    assert one.rows == other.rows
    assert one.barrier == other.barrier
    for module, copy in zip(modules, copies, strict=True):  # nothing is changed
        assert module.training
        assert module.drop.training
        for name, tensor in module.state_dict().items():
            assert tensor.equal(copy[name])
    kinds = {row["name"]: row["kind"] for row in one.rows}
    assert kinds["table.weight"] == "table"
    assert kinds["norm"] == "layer"
    assert "norm.num_batches_tracked" not in kinds
    assert one.barrier["aligned"] is not None
    assert assess(copies).barrier is None
    assert assess(copies, module=modules[0], batches=IDS, points=0).barrier is None
    plain = {row["name"]: row["kind"] for row in assess(copies).rows}
    assert plain["table.weight"] == "tensor"
    named = {row["name"]: row["kind"] for row in assess(copies, tables=["table.weight"]).rows}
    assert named["table.weight"] == "table"


def test_symmetries_are_those_that_the_module_declares():
    class Declaring(Recommender):
        def symmetries(self):
            return SYMMETRIES

    declared = assess(PAIR, module=Declaring(0))
    assert declared.rows == assess(PAIR, symmetries=SYMMETRIES, module=MODULE).rows
    assert declared.rows[-1]["aligned_cosine"] is not None
    assert assess(PAIR, module=Declaring(0), symmetries=[]).rows[-1]["aligned_cosine"] is None
    assert assess(PAIR, module=Declaring(0), align="none").rows[-1]["aligned_cosine"] is None


def test_symmetries_are_found_and_models_may_have_several_forms():
    found = assess(PAIR, module=MODULE, batches=IDS)
    declared = assess(PAIR, module=MODULE, batches=IDS, symmetries=SYMMETRIES)
    rows = [found.rows[-1]["aligned_cosine"], declared.rows[-1]["aligned_cosine"]]
    assert rows[0] >= rows[1] - 1e-9  # more are found: signs
    assert rows[0] > found.rows[-1]["cosine"]
    wrapped = {f"module.{name}": t.clone() for name, t in PAIR[0].items()}
    double = {name: t.double() if t.is_floating_point() else t for name, t in PAIR[1].items()}
    other = assess([wrapped, double])
    assert other.rows[-1]["cosine"] == pytest.approx(found.rows[-1]["cosine"])


class Tied(nn.Module):
    """Two names of one table."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(7, 3)
        self.same = self.table

    def forward(self, ids):
        return (self.table(ids) * self.same(ids)).sum(-1)


def test_tied_tensors_are_compared_once():
    pair, counts = [Tied(0), Tied(1)], [{"same.weight": [1] * 7}] * 2
    got = assess(pair, module=pair[0], batches=[torch.arange(7)], counts=counts)
    assert [row["name"] for row in got.rows] == ["table.weight", "all parameters"]
    assert got.rows[0]["kind"] == "table"
    assert got.rows[0]["rows_all"] == 7
    assert got.rows[-1]["entries"] == 21


def test_the_package_offers_it():
    import cki_rec

    assert cki_rec.assess is assess
    assert cki_rec.Assessment is Assessment


def test_the_same_seed_gives_the_same_figures():
    one, other, third = (assess(PAIR, gate="full", seed=seed).rows for seed in (1, 1, 2))
    assert one == other
    assert one != third


class Listed(Recommender):
    """The same parameters, another form of the output."""

    def forward(self, ids):
        return [super().forward(ids)]


MODULE = Recommender(0)
COUNTS = [{"table.weight": torch.ones(30)}, {"table.weight": torch.ones(30)}]


@pytest.mark.parametrize(
    ("models", "options", "part"),
    [
        (PAIR[:1], {}, "two or more models, not 1"),
        ([], {}, "no models to merge: pass a list"),
        ([PAIR[0], changed(out__bias=torch.tensor([INF]))], {}, r"out\.bias: source 1 has NaN or"),
        ([PAIR[0], changed(out__bias=torch.ones(2))], {}, r"out\.bias: shapes differ"),
        ([PAIR[0], changed(more=torch.ones(2))], {}, "only in source 1: more"),
        (PAIR, {"base": changed(out__bias=torch.tensor([INF]))}, r"out\.bias: the base has NaN"),
        (PAIR, {"base": {"a": torch.ones(1)}}, "source 0 and the base have different tensors"),
        (PAIR, {"counts": COUNTS[:1]}, "counts of 1 sources for 2 models"),
        (PAIR, {"counts": [{"tabel": torch.ones(30)}] * 2}, "tabel: has counts but is no param"),
        (PAIR, {"counts": [{"table.weight": torch.ones(29)}] * 2}, r"table\.weight: counts \(29,"),
        (PAIR, {"align": "weight"}, "align='weight': one of none, weights, activations"),
        (PAIR, {"align": "weights"}, "align=weights: symmetries of the network are missing"),
        (
            PAIR,
            {"align": "activations", "symmetries": SYMMETRIES},
            "align=activations: module and batches are missing",
        ),
        (PAIR, {"batches": IDS}, "batches: module, the network that reads them, is missing"),
        (PAIR, {"batches": iter(()), "module": MODULE}, "batches is empty"),
        (PAIR, {"loss": lambda *_: 0.0, "module": MODULE}, "loss: module and batches are missing"),
        (PAIR, {"loss": lambda *_: 0.0, "score": lambda _: 0.0}, "score and loss"),
        (PAIR, {"score": lambda _: float("nan")}, "score returned NaN; it must return a number"),
        (PAIR, {"score": lambda _: 1.0, "points": 2}, "points must be at least 3"),
        (
            PAIR,
            {"module": Recommender(0, 31)},
            r"table\.weight: shapes differ, \(30, 4\) in the sources, \(31",
        ),
        (PAIR, {"module": nn.Identity()}, "only in the sources: table.weight, hidden.weight"),
        (PAIR, {"gates": {"x": None}}, "x: has a gate but is no parameter"),
        (PAIR, {"gates": {"out.weight": torch.ones(3, 3)}}, r"out\.weight: a gate of shape"),
        (PAIR, {"gate": "round"}, "gate kind 'round' is none of full"),
        (PAIR, {"a": 2.0}, r"table\.weight: a must be between 0 and 1"),
        (PAIR, {"bins": 0}, r"table\.weight: bins must be positive"),
        (PAIR, {"histogram": "mine"}, r"table\.weight: histogram: 'mine' is none of own"),
        (
            PAIR,
            {"module": Listed(0), "batches": IDS},
            "the module returns list, no floating tensor; give loss or score",
        ),
        (
            PAIR,
            {"symmetries": [Symmetry("permutation", 16, (Slice("out.weight", 1),))]}
            | {"module": MODULE, "batches": IDS},
            "alignment changed its scores",
        ),
    ],
)
def test_errors_are_one_line_that_names_the_place(models, options, part):
    with pytest.raises(MergeError, match=part) as caught:
        assess(models, **options)
    assert "\n" not in str(caught.value)


def test_odd_tensors_have_figures():
    models = [
        {"empty": torch.zeros(0, 3), "zero": torch.zeros(4), "one": torch.tensor(2.0)},
        {"empty": torch.zeros(0, 3), "zero": torch.zeros(4), "one": torch.tensor(-2.0)},
    ]
    rows = {row["name"]: row for row in assess(models, base=models[0]).rows}
    assert rows["empty"]["compatibility"] == 1
    assert rows["empty"]["cosine"] is rows["zero"]["cosine"] is None
    assert rows["empty"]["distance"] == rows["zero"]["distance"] == 0
    assert rows["one"]["distance"] == 2
    assert rows["one"]["cosine"] == -1
    assert rows["one"]["task_cosine"] is None  # the first source did not move
    assert rows["all parameters"]["entries"] == 5


def test_huge_entries_do_not_overflow():
    model = {"w": torch.tensor([1e30, -1e30, 2e30])}
    opposite = {"w": -model["w"]}
    row = assess([model, opposite], base=model).rows[0]
    assert row["cosine"] == pytest.approx(-1)
    assert row["distance"] == pytest.approx(2)


def test_an_assessment_is_plain_values():
    got = assess(PAIR, counts=COUNTS, module=MODULE, batches=IDS, symmetries=SYMMETRIES)
    import json
    from dataclasses import asdict

    again = Assessment(**json.loads(json.dumps(asdict(got), allow_nan=False)))
    assert again == got
    assert str(again) == str(got) == repr(got)
    keys = [list(row) for row in got.rows]
    assert all(key == keys[0] for key in keys)


def test_the_frame_has_a_column_per_source():
    got = assess([*PAIR, PAIR[0]], counts=[*COUNTS, COUNTS[0]])
    frame = got.frame()
    assert list(frame["name"]) == [row["name"] for row in got.rows]
    assert all(f"{key}_{k}" in frame for key in PER_SOURCE for k in range(3))
    assert not set(PER_SOURCE) & set(frame)
    table = frame[frame["name"] == "table.weight"].iloc[0]
    assert table["shape"] == "30x4"
    assert table["rows_all"] == 30
    assert [table[f"hard_{k}"] for k in range(3)] == got.rows[_place(got, "table.weight")]["hard"]


def _place(assessment, name):
    return [row["name"] for row in assessment.rows].index(name)


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_the_table_fits_the_terminal(width):
    got = assess(
        PAIR, counts=COUNTS, module=MODULE, batches=IDS, symmetries=SYMMETRIES, base=PAIR[0]
    )
    text = assessment_text(got.rows, got.barrier, got.suggestion, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    title = lines[0].split()
    assert ("kind" in title) == (width == 200)
    assert {"parameter", "compat", "dist", ">dist", "cos", ">cos"} <= set(title)
    names = [line.split()[0] for line in lines[1:] if line]
    assert names[: names.index("all") + 1] == [
        row["name"].split()[0][: len(names[0]) + 99] for row in got.rows
    ]
    assert "barrier (deviation): raw" in text
    assert got.suggestion.replace(" ", "") in text.replace("\n", "").replace(" ", "")


def test_the_table_shows_only_known_columns_and_the_first_rows():
    models = [{f"layer{k}.w": torch.randn(3) for k in range(MOST_ROWS + 5)} for _ in range(2)]
    text = assess(models).__repr__()
    assert ">cos" not in text.splitlines()[0]
    assert "rows" not in text.splitlines()[0]
    assert "(5 more compatible ones)" in text
    assert sum(line.startswith("layer") for line in text.splitlines()) == MOST_ROWS
    assert "barrier" not in text


def test_long_names_keep_their_end():
    name = f"{'a' * 90}.weight"
    text = assessment_text(assess([{name: torch.randn(3)}] * 2).rows, None, "Done.", 100)
    assert re.search(r"^\.\.\.a+\.weight ", text, re.M)


@pytest.mark.parametrize("with_barrier", [False, True])
def test_the_figure_is_one_stable_svg(with_barrier):
    options = {"module": MODULE, "batches": IDS} if with_barrier else {}
    got = assess(PAIR, symmetries=SYMMETRIES, **options)
    svg = assessment_plot(got.rows, got.barrier)
    assert svg == assessment_plot(got.rows, got.barrier)
    assert svg.count("<svg") == 1
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {
        "compatibility",
        "cosine of the sources",
        "table table.weight",
        "both",
        "local",
    } <= set(texts)
    assert ("0-1, aligned" in texts) == with_barrier


def test_a_figure_of_models_without_alignment_and_cosines():
    got = assess([{"w": torch.zeros(3)}, {"w": torch.zeros(3)}])
    assert "<svg" in assessment_plot(got.rows, got.barrier)


def test_a_permuted_copy_needs_no_repair():
    model, draw = Recommender(0).eval(), torch.Generator().manual_seed(1)
    elements = [random_element(symmetry, draw) for symmetry in SYMMETRIES]
    copy = transform(model.state_dict(), SYMMETRIES, elements)
    got = assess([model, copy], symmetries=SYMMETRIES, module=model, batches=IDS, counts=COUNTS)
    assert "then merge=evidence, without repair" in got.suggestion
    assert got.rows[-1]["aligned_distance"] == pytest.approx(0, abs=1e-5)
