"""Splits, vocabularies, ids and histories against independent implementations."""

import csv
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import EMBEDDED, FIELDS, LATEST, make_data, read_rows

from cki_rec.config import Data, Split, UserError
from cki_rec.data.columns import Ragged
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.split import split_codes
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.chunks import Chunk
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.raw.reading import LABEL, TIME
from cki_rec.data.schema import FIRST_ID, OOV_ID, PADDING_ID
from cki_rec.data.test_labels import all_labels


@pytest.fixture
def encode_files(tmp_path):
    """Function (data) -> the encoded data set."""
    return lambda data: prepare(data, tmp_path / "encoded")


@pytest.fixture
def encode_frame(tmp_path, monkeypatch):
    """Function (frame, **options) -> the encoded data set of these rows of MovieLens."""

    def make(frame: pl.DataFrame, **changes) -> EncodedDataset:
        rows = frame.with_columns(
            (pl.col("rating") >= 4).cast(pl.UInt8).alias(LABEL), pl.col("timestamp").alias(TIME)
        )
        chunks = [Chunk(lambda _: rows)]
        movielens = replace(FORMATS["movielens"], chunks=lambda data, reading: iter(chunks))
        monkeypatch.setitem(FORMATS, "movielens", movielens)
        return prepare(make_data(**changes), tmp_path / "frames")

    return make


def codes_of(split: Split, tmp_path: Path, group, timestamp, rows_per_step: int = 1):
    result = split_codes(
        split,
        len(group),
        group=group,
        timestamp=timestamp,
        rows_per_step=rows_per_step,
        scratch=tmp_path,
    )
    return np.concatenate(list(result))


def ids_of(encoded: EncodedDataset, name: str, row: int) -> list[int]:
    column = encoded.column(name)
    if isinstance(column, Ragged):
        return column.ids(np.array([row]))[0].tolist()
    return [int(column[row])]


def decoded(encoded: EncodedDataset, name: str, row: int) -> list[str | None]:
    table = next(f.table for f in encoded.schema.features if f.name == name)
    tokens = encoded.vocabulary(table)
    ids = ids_of(encoded, name, row)
    return [None if i == OOV_ID else tokens[i - FIRST_ID] for i in ids]


def pandas_rows(folder: Path) -> pd.DataFrame:
    """Read the csv form by other means than the package does."""
    ratings = pd.read_csv(folder / "ratings.csv")
    movies = pd.read_csv(folder / "movies.csv")
    movies["year"] = movies["title"].str.extract(r"\((\d{4})\)\s*$")[0].fillna("")
    rows = ratings.merge(movies, on="movieId", how="left")
    rows["hour"] = pd.to_datetime(rows["timestamp"], unit="s", utc=True).dt.hour.astype(str)
    rows["user"], rows["item"] = rows["userId"].astype(str), rows["movieId"].astype(str)
    return rows


@pytest.mark.parametrize("by", ["random", "time", "leave_last_out"])
def test_decoded_rows_equal_pandas(by, encode_files):
    encoded = encode_files(make_data(split=Split(by=by, fractions=[0.6, 0.2, 0.2], seed=1)))
    rows = pandas_rows(LATEST)
    is_train = encoded.split == 0
    for name in ("user", "item", "year", "hour"):
        known = set(rows[name][is_train])
        want = [token if token in known else None for token in rows[name]]
        assert [decoded(encoded, name, r)[0] for r in range(len(rows))] == want
    assert all_labels(encoded).tolist() == (rows["rating"] >= 4).astype(int).tolist()
    assert encoded.timestamp.tolist() == rows["timestamp"].tolist()


def test_genres_decode_to_distinct_genres_of_the_movie(encode_files):
    encoded = encode_files(make_data())
    rows = pandas_rows(LATEST)
    listed = [[] if g == "(no genres listed)" else list(dict.fromkeys(g.split("|")))
              for g in rows["genres"]]  # fmt: skip
    known = {g for genres, code in zip(listed, encoded.split, strict=True) if code == 0
             for g in genres}  # fmt: skip
    for row, genres in enumerate(listed):
        result = decoded(encoded, "genres", row)
        assert [g for g in result if g is not None] == [g for g in genres if g in known]
        assert (None in result) == (not known.issuperset(genres))
        assert result.count(None) <= 1
    assert any(not genres for genres in listed)


def test_ids_follow_count_then_token_of_training_rows(encode_files):
    encoded = encode_files(make_data())
    rows = pandas_rows(LATEST)
    for name in ("user", "item", "year"):
        counts = Counter(rows[name][encoded.split == 0])
        want = sorted(counts, key=lambda token: (-counts[token], token))
        assert encoded.vocabulary(name) == want
        assert encoded.schema.table_sizes[name] == len(want) + 2
    assert (PADDING_ID, OOV_ID, FIRST_ID) == (0, 1, 2)


def test_no_vocabulary_token_comes_from_validation_or_test_rows_alone(encode_frame):
    frame = pl.DataFrame(
        {
            "rating": [5.0, 1.0, 5.0, 1.0],
            "timestamp": [1, 2, 3, 4],
            "user": ["a", "a", "b", "c"],
            "item": ["x", "y", "late", "later"],
        }
    )
    split = Split(by="time", fractions=[0.5, 0.25, 0.25], seed=0)
    encoded = encode_frame(frame, split=split, fields=["user", "item"])
    assert encoded.vocabulary("user") == ["a"]
    assert encoded.vocabulary("item") == ["x", "y"]
    assert encoded.column("item").tolist() == [2, 3, OOV_ID, OOV_ID]
    assert encoded.group.tolist() == [0, 0, 1, 2]


def test_rare_tokens_share_the_unseen_id(encode_files):
    encoded = encode_files(make_data(min_count=3))
    rows = pandas_rows(LATEST)
    counts = Counter(rows["item"][encoded.split == 0])
    remaining = {item for item, count in counts.items() if count >= 3}
    assert 0 < len(remaining) < len(counts)
    assert set(encoded.vocabulary("item")) == remaining
    for row, item in enumerate(rows["item"]):
        assert (ids_of(encoded, "item", row) == [OOV_ID]) == (item not in remaining)


def test_unseen_tokens_of_a_row_are_one_id(encode_frame):
    frame = pl.DataFrame(
        {
            "rating": [5.0, 1.0, 5.0, 1.0],
            "timestamp": [1, 2, 3, 4],
            "user": ["a"] * 4,
            "item": ["x"] * 4,
            "genres": ["A", "B", "new|A|newer|newest", "new|new|newer"],
        }
    )
    split = Split(by="time", fractions=[0.5, 0.25, 0.25], seed=0)
    encoded = encode_frame(frame, split=split, fields=["genres"])
    result = [ids_of(encoded, "genres", row) for row in range(4)]
    assert result == [[2], [3], [OOV_ID, 2], [OOV_ID]]


def test_history_without_item_field_uses_table_item(encode_files):
    encoded = encode_files(make_data(fields=["user", "history"]))
    assert set(encoded.schema.table_sizes) == {"user", "item"}
    assert [feature.name for feature in encoded.schema.features] == ["user", "history"]


def brute_force_history(
    data: Data, encoded: EncodedDataset, items, row: int, splits=(0,)
) -> list[int]:
    earlier = [
        (encoded.timestamp[other], other)
        for other in range(len(all_labels(encoded)))
        if encoded.group[other] == encoded.group[row]
        and encoded.timestamp[other] < encoded.timestamp[row]
        and all_labels(encoded)[other] == 1
        and encoded.split[other] in splits
    ]
    return [int(items[other]) for _, other in sorted(earlier)][-data.history_length :]


@pytest.mark.parametrize("by", ["random", "time", "leave_last_out"])
def test_history_is_earlier_liked_training_items(by, encode_files):
    data = make_data(split=Split(by=by, fractions=[0.6, 0.2, 0.2], seed=3))
    encoded = encode_files(data)
    for row in range(len(all_labels(encoded))):
        want = brute_force_history(data, encoded, encoded.column("item"), row)
        assert ids_of(encoded, "history", row) == want


HASHED = {"name": "hashed", "column": "item", "hash_size": 5}


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        (["user", "item", HASHED, "history"], "item"),
        (["user", HASHED, "item", "history"], "item"),
        (["user", HASHED, "history"], "hashed"),
        (["user", "item", HASHED, {"name": "history", "table": "hashed"}], "hashed"),
    ],
)
def test_history_holds_ids_of_the_table_that_it_looks_up(fields, source, encode_files):
    data = make_data(fields=fields)
    encoded = encode_files(data)
    (history,) = (f for f in encoded.schema.features if f.kind == "history")
    assert history.table == source
    for row in range(len(all_labels(encoded))):
        want = brute_force_history(data, encoded, encoded.column(source), row)
        assert ids_of(encoded, "history", row) == want


@pytest.mark.parametrize("by", ["time", "leave_last_out"])
def test_history_of_all_earlier_rows(by, encode_files):
    split = Split(by=by, fractions=[0.6, 0.2, 0.2], seed=3)
    fields = ["user", "item", {"name": "history", "rows": "earlier"}]
    data = make_data(split=split, fields=fields)
    encoded = encode_files(data)
    plain = encode_files(make_data(split=split, fields=["user", "item", "history"]))
    assert encoded.hash != plain.hash
    differ = 0
    for row in range(len(all_labels(encoded))):
        want = brute_force_history(data, encoded, encoded.column("item"), row, (0, 1, 2))
        assert ids_of(encoded, "history", row) == want
        differ += want != ids_of(plain, "history", row)
    assert differ


def test_history_of_training_rows_is_the_default(encode_files):
    fields = ["user", "item", {"name": "history", "rows": "train"}]
    result = [encode_files(make_data(fields=f)) for f in (fields, ["user", "item", "history"])]
    assert result[0].hash == result[1].hash


def test_history_of_embedded_data_equals_brute_force_on_some_rows(encode_files):
    split = Split(by="random", fractions=[0.8, 0.1, 0.1], seed=0)
    data = make_data(split=split, raw=str(EMBEDDED), history_length=50)
    encoded = encode_files(data)
    rows_of_user = [np.flatnonzero(encoded.group == user) for user in (0, 5, 413)]
    generator = np.random.default_rng(0)
    for rows in rows_of_user:
        for row in generator.choice(rows, 20):
            liked = rows[
                (encoded.timestamp[rows] < encoded.timestamp[row])
                & (all_labels(encoded)[rows] == 1)
                & (encoded.split[rows] == 0)
            ]
            liked = liked[np.argsort(encoded.timestamp[liked], kind="stable")][-50:]
            assert ids_of(encoded, "history", row) == encoded.column("item")[liked].tolist()


def test_labels_of_validation_and_test_rows_enter_no_input(encode_frame):
    """Flipping every held-out label changes no field."""
    frame, _ = read_rows(make_data())
    encoded = encode_frame(frame, name="as_is")
    held_out = pl.Series(encoded.split != 0)
    flipped = frame.with_columns(
        pl.when(held_out).then(5.5 - pl.col("rating")).otherwise(pl.col("rating")).alias("rating")
    )
    other = encode_frame(flipped, name="flipped")
    assert (all_labels(other) != all_labels(encoded)).any()
    for name in FIELDS:
        rows = range(len(all_labels(encoded)))
        assert [ids_of(encoded, name, r) for r in rows] == [ids_of(other, name, r) for r in rows]


def test_random_split_has_the_asked_sizes_and_depends_on_the_seed(tmp_path):
    group, timestamp = np.zeros(100, np.int32), np.arange(100)
    codes = [
        codes_of(Split(by="random", fractions=[0.8, 0.1, 0.1], seed=seed),
                 tmp_path, group, timestamp)
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert np.bincount(codes[0]).tolist() == [80, 10, 10]
    assert (codes[0] == codes[1]).all()
    assert (codes[0] != codes[2]).any()


def test_time_split_gives_oldest_rows_to_training(tmp_path):
    timestamp = np.array([5, 1, 4, 2, 3, 3, 9, 8, 7, 6])
    split = Split(by="time", fractions=[0.4, 0.3, 0.3], seed=0)
    code = codes_of(split, tmp_path, np.zeros(10, np.int32), timestamp)
    assert code.tolist() == [1, 0, 1, 0, 0, 0, 2, 2, 2, 1]


def test_leave_last_out_takes_last_two_rows_by_time_then_order(tmp_path):
    group = np.array([1, 0, 1, 0, 1, 0, 2, 2], np.int32)
    timestamp = np.array([9, 1, 3, 1, 4, 1, 1, 2])
    split = Split(by="leave_last_out", fractions=[], seed=0)
    code = codes_of(split, tmp_path, group, timestamp)
    assert code.tolist() == [2, 0, 0, 1, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": []}, "data.fields: empty"),
        ({"fields": ["user", "user"]}, "data.fields: user named twice"),
        ({"label_threshold": 9.0}, "data.label_threshold=9.0: all training rows have label 0"),
        ({"split": Split(by="time", fractions=[0.8, 0.1], seed=0)}, "data.split.fractions="),
        ({"split": Split(by="time", fractions=[0.8, 0.1, 0.2], seed=0)}, "with sum 1"),
        ({"split": Split(by="time", fractions=[1.1, -0.2, 0.1], seed=0)}, "each 0 or more"),
        (
            {"split": Split(by="random", fractions=[0.9, 0.0, 0.1], seed=0)},
            "no valid row of 20; raise its share in data.split.fractions=[0.9, 0.0, 0.1]",
        ),
        ({"split": Split(by="time", fractions=[0.9, 0.1, 0.0], seed=0)}, "no test row of 20"),
        ({"split": Split(by="time", fractions=[0.0, 0.5, 0.5], seed=0)}, "no train row of 20"),
    ],
)
def test_impossible_option_is_named(changes, message, encode_files):
    with pytest.raises(UserError) as caught:
        encode_files(make_data(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_leave_last_out_without_long_histories_is_refused(encode_frame):
    frame = pl.DataFrame(
        {
            "rating": [5.0, 1.0, 5.0, 1.0],
            "timestamp": [1, 2, 3, 4],
            "user": ["a", "b", "c", "d"],
            "item": ["x"] * 4,
        }
    )
    split = Split(by="leave_last_out", fractions=[], seed=0)
    with pytest.raises(UserError, match="users with 3 rows or more"):
        encode_frame(frame, split=split, fields=["item"])


ratings = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(1, 5),
        st.sampled_from(["0.5", "3.5", "4.0", "5.0"]),
        st.integers(0, 10),
    ),
    min_size=6,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(rows=ratings, seed=st.integers(0, 3), min_count=st.integers(1, 2))
def test_any_ratings_survive_encode_and_decode(tmp_path_factory, rows, seed, min_count):
    path = tmp_path_factory.mktemp("any") / "raw.zip"
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
        archive.writestr("x/ratings.csv", "\r\n".join(lines))
        movies = ["movieId,title,genres", *(f'{m},"M, {m} (199{m})",A|B{m}|A' for m in range(6))]
        archive.writestr("x/movies.csv", "\r\n".join(movies))
    split = Split(by="random", fractions=[0.5, 0.25, 0.25], seed=seed)
    data = make_data(split=split, raw=str(path), min_count=min_count)
    try:
        encoded = prepare(data, path.parent / "encoded")
    except UserError as error:
        assert "label_threshold" in str(error)  # noqa: PT017 training rows of one class
        return
    assert np.bincount(encoded.split, minlength=3).sum() == len(rows)
    train = [row for row, code in zip(rows, encoded.split, strict=True) if code == 0]
    items = Counter(str(row[1]) for row in train)
    for number, (_, movie, rating, _) in enumerate(rows):
        is_known = items[str(movie)] >= min_count
        assert decoded(encoded, "item", number) == [str(movie) if is_known else None]
        assert all_labels(encoded)[number] == (float(rating) >= 4)
        want = brute_force_history(data, encoded, encoded.column("item"), number)
        assert ids_of(encoded, "history", number) == want


def test_golden_sample_is_valid_csv():
    """The sample quotes as MovieLens does; a reader that is not ours agrees on the titles."""
    with (LATEST / "movies.csv").open(newline="") as file:
        titles = [row["title"] for row in csv.DictReader(file)]
    assert titles[1] == "11'09\"01 - September 11 (2002)"
