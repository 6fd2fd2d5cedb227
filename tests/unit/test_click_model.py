"""Raw files of a known click model: formats, determinism and true metrics."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from cki_rec.config import Synthetic, UserError
from cki_rec.data.raw.click_model import (
    BLOCK,
    _draw_tokens,
    _parts,
    best_possible,
    vocabulary_size,
    write_raw,
)
from cki_rec.data.raw.synthetic_layouts import LAYOUTS, _hex

ROWS = 3000
SMALL = Synthetic(
    layout="movielens",
    rows=ROWS,
    vocabulary=0.05,
    skew=1.1,
    signal=1.2,
    drift=0.0,
    domains=1,
    difference=0.0,
    seed=3,
)
HEX = re.compile(r"[0-9a-f]{8}")
AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def options(**changes) -> Synthetic:
    return Synthetic(**(asdict(SMALL) | changes))


def write(tmp_path: Path, **changes) -> Path:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    write_raw(options(**changes), folder)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truth_of(folder: Path) -> dict:
    return json.loads((folder / "truth.json").read_text())


def ratings_of(folder: Path) -> pl.DataFrame:
    frame = pl.read_csv(folder / "ratings.csv")
    return frame.with_columns(click=(pl.col("rating") >= 4).cast(pl.Int8))


def rows_of(folder: Path, layout: str) -> list[list[str]]:
    text = (folder / LAYOUTS[layout].file).read_bytes().decode("ascii")
    end, between = ("\r\n" if layout == "movielens" else "\n"), "\t" if layout == "criteo" else ","
    assert text.endswith(end)
    assert "\0" not in text
    assert text.count("\n") == text.count(end)
    return [line.split(between) for line in text.removesuffix(end).split(end)]


def labels_of(folder: Path, layout: str) -> np.ndarray:
    rows = rows_of(folder, layout)
    if layout == "criteo":
        return np.array([row[0] for row in rows], int)
    if layout == "avazu":
        return np.array([row[1] for row in rows[1:]], int)
    return np.array([float(row[2]) >= 4 for row in rows[1:]], int)


def test_criteo_rows_look_like_criteo(tmp_path):
    rows = rows_of(write(tmp_path, layout="criteo"), "criteo")
    assert len(rows) == ROWS
    assert {len(row) for row in rows} == {40}
    assert {row[0] for row in rows} == {"0", "1"}
    counts = [[row[i] for row in rows] for i in range(1, 14)]
    assert all(value == str(int(value)) for column in counts for value in column if value)
    lowest = [min(int(value) for value in column if value) for column in counts]
    assert -3 <= lowest[1] < 0
    assert min(lowest[:1] + lowest[2:]) == 0
    shares = [column.count("") / ROWS for column in counts]
    assert shares[11] == pytest.approx(0.76, abs=0.04)
    assert shares[1] == 0
    tokens = [value for row in rows for value in row[14:]]
    assert all(HEX.fullmatch(value) for value in tokens if value)
    empty = [sum(not row[13 + i] for row in rows) / ROWS for i in range(1, 27)]
    assert empty[21] == pytest.approx(0.76, abs=0.04)
    assert empty[19] == 0


def test_avazu_rows_look_like_avazu(tmp_path):
    header, *rows = rows_of(write(tmp_path, layout="avazu"), "avazu")
    assert ",".join(header) == AVAZU_HEADER
    assert len(rows) == ROWS
    assert {len(row) for row in rows} == {24}
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    assert len(set(columns["id"])) == ROWS
    assert set(columns["click"]) == {"0", "1"}
    hours = [f"1410{day}{hour:02}" for day in range(21, 31) for hour in range(24)]
    assert sorted(set(columns["hour"])) == hours
    assert list(columns["hour"]) == sorted(columns["hour"])
    for name in header[3:]:
        first, last = header.index("site_id"), header.index("device_model")
        for value in columns[name]:
            if first <= header.index(name) <= last:
                assert HEX.fullmatch(value)
            else:
                assert value == str(int(value))
    assert {"-1", "100002"} <= set(columns["C20"])


def test_movielens_rows_look_like_movielens(tmp_path):
    folder = write(tmp_path)
    header, *rows = rows_of(folder, "movielens")
    assert header == ["userId", "movieId", "rating", "timestamp"]
    assert len(rows) == ROWS
    assert {row[2] for row in rows} == {f"{half / 2}" for half in range(1, 11)}
    times = [int(row[3]) for row in rows]
    assert times == sorted(times)
    assert times[-1] - times[0] > 2 * 365 * 86_400
    users, movies = (vocabulary_size(SMALL, name) for name in ("userId", "movieId"))
    assert {int(row[0]) for row in rows} <= set(range(1, users + 1))

    lines = (folder / "movies.csv").read_bytes().decode().split("\r\n")
    assert (lines[0], lines[-1]) == ("movieId,title,genres", "")
    assert len(lines) == movies + 2
    sizes = set()
    for number, line in enumerate(lines[1:-1], 1):
        movie, title, genres = line.split(",")
        assert (movie, title) == (str(number), f"Movie {number} (1987)")
        sizes.add(len(set(genres.split("|"))))
    assert {2, 3} <= sizes <= {1, 2, 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_options_alone_decide_the_bytes(layout, tmp_path):
    first, again = (bytes_of(write(tmp_path, layout=layout)) for _ in range(2))
    other = bytes_of(write(tmp_path, layout=layout, seed=4))
    assert first == again
    for name in {*first} - {"movies.csv"}:
        assert first[name] != other[name]


def test_first_rows_do_not_depend_on_how_many_follow(tmp_path):
    counts = (1000, BLOCK, BLOCK + 5000)
    folders = [write(tmp_path, layout="criteo", rows=rows) for rows in counts]
    texts = [(folder / "train.txt").read_bytes() for folder in folders]
    logits = [np.load(folder / "logit.npy") for folder in folders]
    for rows, text, logit, longer, further in zip(
        counts, texts, logits, texts[1:], logits[1:], strict=False
    ):
        assert text.count(b"\n") == rows
        assert longer.startswith(text)
        np.testing.assert_array_equal(logit, further[:rows])
    assert len(set(texts[2].splitlines())) == counts[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, {"drift": 1.0, "difference": 0.5, "domains": 3}])
def test_truth_agrees_with_the_files(layout, changes, tmp_path):
    rows = 40_000
    folder = write(tmp_path, layout=layout, rows=rows, **changes)
    truth, label = truth_of(folder), labels_of(folder, layout)
    logit = np.load(folder / "logit.npy")
    assert (logit.dtype, logit.shape) == (np.float32, (rows,))
    assert logit.std() == pytest.approx(1.2, rel=0.05)
    assert truth["rows"] == rows
    assert truth["positive_rate"] == label.mean()
    assert truth["positive_rate"] == pytest.approx(LAYOUTS[layout].positive_rate, abs=0.012)
    chance = 1 / (1 + np.exp(-logit.astype(float)))
    # four standard errors
    assert truth["auc"] == pytest.approx(roc_auc_score(label, logit), abs=0.012)
    assert truth["log_loss"] == pytest.approx(log_loss(label, chance), abs=0.01)
    assert {"auc": truth["auc"], "log_loss": truth["log_loss"]} == pytest.approx(
        best_possible([logit[:17], logit[17:]])
    )


@pytest.mark.parametrize("signal", [0.0, 0.5, 3.0])
def test_signal_is_the_deviation_of_the_logit(signal, tmp_path):
    folder = write(tmp_path, rows=50_000, signal=signal)
    assert np.load(folder / "logit.npy").std() == pytest.approx(signal, rel=0.05)
    truth = truth_of(folder)
    assert truth["positive_rate"] == pytest.approx(0.5, abs=0.015)
    if not signal:
        assert truth["auc"] == pytest.approx(0.5)
        assert truth["log_loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("deviation", [0.3, 1.5, 12.0])
def test_best_possible_agrees_with_drawn_labels(deviation):
    generator = np.random.default_rng(0)
    logit = generator.normal(-1, deviation, 100_000).astype(np.float32)
    chance = 1 / (1 + np.exp(-logit.astype(float)))
    draws = [generator.random(len(logit)) < chance for _ in range(12)]
    best = best_possible(np.array_split(logit, 7))
    aucs = [roc_auc_score(label, logit) for label in draws]
    losses = [log_loss(label, chance) for label in draws]
    error = 4 / np.sqrt(len(draws))
    assert best["auc"] == pytest.approx(np.mean(aucs), abs=error * np.std(aucs))
    assert best["log_loss"] == pytest.approx(np.mean(losses), abs=error * np.std(losses))


def test_best_possible_is_the_exact_expectation():
    generator = np.random.default_rng(1)
    logit = generator.normal(-1, 1.5, 20_000).astype(np.float32)
    chance = 1 / (1 + np.exp(-logit.astype(float)))
    weights = np.concatenate([chance, 1 - chance])
    label = np.repeat([1, 0], len(logit))
    best = best_possible([logit])
    expected = roc_auc_score(label, np.tile(logit, 2), sample_weight=weights)
    assert best["auc"] == pytest.approx(expected, abs=1e-5)
    expected = log_loss(label, np.tile(chance, 2), sample_weight=weights)
    assert best["log_loss"] == pytest.approx(expected, abs=1e-9)


def test_best_possible_of_nothing_and_of_certainty():
    assert best_possible([]) == {"auc": None, "log_loss": None}
    certain = best_possible([np.full(3, -2000, np.float32)])
    assert certain == {"auc": None, "log_loss": 0.0}
    assert best_possible([np.zeros(3, np.float32)])["auc"] == pytest.approx(0.5)
    assert best_possible([np.array([-30, 30], np.float32)])["auc"] == pytest.approx(1)


def test_vocabulary_scales_the_number_of_tokens(tmp_path):
    sizes = {v: options(layout="criteo", vocabulary=v) for v in (0.001, 1.0)}
    assert [vocabulary_size(o, "C10") for o in sizes.values()] == [93, 93145]
    assert vocabulary_size(sizes[0.001], "C20") == 2
    seen = {}
    for vocabulary in (0.05, 0.2):
        frame = ratings_of(write(tmp_path, rows=60_000, vocabulary=vocabulary, skew=0.0))
        seen[vocabulary] = frame["userId"].n_unique()
    assert seen == {0.05: 302, 0.2: 1208}


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.5])
def test_skew_is_the_exponent_of_the_power_law(skew):
    chosen = options(rows=BLOCK, vocabulary=1.0, skew=skew)
    draw = _draw_tokens(LAYOUTS["movielens"], chosen, np.random.default_rng(0))["userId"]
    size = vocabulary_size(chosen, "userId")
    assert 1 <= draw.min()
    assert draw.max() <= size
    edges = np.array([1, 2, 5, 30, 200, size + 1], float)
    mass = np.log(edges) if skew == 1 else edges ** (1 - skew) / (1 - skew)
    expected = np.diff(mass) / (mass[-1] - mass[0])
    share = np.histogram(draw, edges)[0] / BLOCK
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(BLOCK))


def test_distinct_tokens_have_distinct_text():
    tokens = np.arange(300_000, dtype=np.uint32)
    first, *others = _hex(tokens, 7).to_list()
    assert first == ""
    assert len(set(others)) == len(tokens) - 1
    assert {len(text) for text in others} == {8}


def parts_of(chosen: Synthetic, time: float, domain: int = 0) -> np.ndarray:
    """Return the weight of every user and item, and of pairs of them, at one time."""
    token = domain + chosen.domains * np.arange(20_000, dtype=np.uint32)
    tokens = {"userId": token, "movieId": token}
    return np.stack(_parts(LAYOUTS["movielens"], chosen, tokens, np.full(len(token), time)))


def correlations(one: np.ndarray, other: np.ndarray) -> list[float]:
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("drift", [0.0, 0.3, 1.0])
def test_drift_is_the_share_of_variance_that_moves(drift):
    chosen = options(drift=drift)
    start, middle, end = (parts_of(chosen, time) for time in (0.0, 0.5, 1.0))
    for parts in (start, middle, end):
        # a pair is a product of vectors of 4 normal deviates
        np.testing.assert_allclose(parts.std(1), [1, 1, 2], rtol=0.05)
        np.testing.assert_allclose(parts.mean(1), 0, atol=0.05)
        assert abs(correlations(parts[:1], parts[1:2])[0]) < 0.03
    assert correlations(start, end) == pytest.approx([1 - drift] * 3, abs=0.03)
    halfway = 1 - drift + drift * np.sqrt(0.5)
    assert correlations(start, middle) == pytest.approx([halfway] * 3, abs=0.03)
    assert correlations(middle, end) == pytest.approx([halfway] * 3, abs=0.03)


@pytest.mark.parametrize("difference", [0.0, 0.3, 1.0])
def test_difference_is_the_share_of_variance_of_a_domain(difference):
    chosen = options(difference=difference, domains=2)
    user = np.arange(40_000, dtype=np.uint32)
    weights = []
    for domain in (0, 1):
        tokens = {"userId": 2 * (user // 2) + domain, "movieId": user}
        weights.append(_parts(LAYOUTS["movielens"], chosen, tokens, np.zeros(len(user)))[1])
    assert correlations(weights[:1], weights[1:]) == pytest.approx([1 - difference], abs=0.03)
    assert np.std(weights) == pytest.approx(1, abs=0.03)


def test_seeds_give_unrelated_weights():
    one, other = parts_of(options(seed=1), 0.0), parts_of(options(seed=2), 0.0)
    assert correlations(one, other) == pytest.approx([0.0] * 3, abs=0.03)


def auc_of_rates(folder: Path, keys: list[str], known: pl.Expr, asked: pl.Expr) -> float:
    """Return the AUC on the rows ``asked`` of click rates learned from the rows ``known``."""
    frame = ratings_of(folder).with_row_index("row")
    rest = frame.filter(asked)
    score = np.zeros(len(rest))
    for key in keys:
        rates = frame.filter(known).group_by(key).agg(rate=pl.col("click").mean())
        joined = rest.join(rates, on=key, how="left", maintain_order="left")
        score += joined["rate"].fill_null(0.5).to_numpy()
    return float(roc_auc_score(rest["click"], score))


def test_drift_makes_rates_of_early_rows_worse_for_late_rows(tmp_path):
    row = pl.col("row")
    auc = {}
    for drift in (0.0, 0.5, 1.0):
        folder = write(tmp_path, rows=60_000, vocabulary=0.02, drift=drift, signal=1.5)
        auc[drift] = auc_of_rates(folder, ["userId", "movieId"], row < 30_000, row >= 30_000)
    assert auc[0.0] > auc[0.5] + 0.02
    assert auc[0.5] > auc[1.0] + 0.02


def test_difference_makes_rates_of_one_domain_worse_for_another(tmp_path):
    even = pl.col("userId") % 2 == 0
    auc = {}
    for difference in (0.0, 1.0):
        changes = {"difference": difference, "domains": 2, "signal": 1.5}
        folder = write(tmp_path, rows=60_000, vocabulary=0.02, **changes)
        auc[difference] = auc_of_rates(folder, ["movieId"], even, ~even)
    assert auc[0.0] > 0.6
    assert auc[1.0] < auc[0.0] - 0.05


def test_every_domain_has_a_token():
    for layout, chosen in LAYOUTS.items():
        many = options(layout=layout, domains=20, vocabulary=0.001)
        assert vocabulary_size(many, chosen.domain) == 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 0),
        ("vocabulary", 0.0),
        ("vocabulary", 1e6),
        ("skew", -0.1),
        ("signal", -1.0),
        ("drift", 1.5),
        ("drift", -0.5),
        ("difference", 2.0),
        ("domains", 0),
        ("seed", -1),
    ],
)
def test_impossible_options_are_named(key, value, tmp_path):
    with pytest.raises(UserError) as caught:
        write_raw(options(**{key: value}), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data.synthetic.{key}={value}: expected ")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extreme_options_still_write(layout, tmp_path):
    for changes in (
        {"rows": 1},
        {"skew": 100.0, "vocabulary": 1e-9},
        {"vocabulary": 300.0, "signal": 100.0} if layout != "movielens" else {"vocabulary": 1.0},
    ):
        chosen = {"rows": 50, **changes}
        folder = write(tmp_path, layout=layout, **chosen)
        assert len(labels_of(folder, layout)) == chosen["rows"]
        assert np.isfinite(np.load(folder / "logit.npy")).all()
