"""Frames of raw rows are encoded as their files were: every id and number of every row."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import numpy as np
import polars as pl
import pytest
from conftest import compose_tree

from cki_rec.config import UserError, parse
from cki_rec.data.columns import Ragged
from cki_rec.data.encoding import store
from cki_rec.data.encoding.frames import encode_frame, raw_rows
from cki_rec.data.encoding.rules import encoder_of
from cki_rec.notebook import _from_pandas

FIELDS = [
    *("user", "item", "weekday", "history"),
    {"name": "price", "kind": "numeric", "transform": "log1p"},
    {"name": "size", "kind": "numeric", "transform": "as_is"},
    {"name": "age", "kind": "numeric", "transform": "quantile"},
    {"name": "tags", "kind": "multi", "max_length": 2},
    {"name": "past", "kind": "history", "separator": "|", "max_length": 2, "table": "item"},
    {"name": "hashed", "column": "item", "hash_size": 7},
]


def prepared(tmp_path, *overrides):
    data = parse(compose_tree("data=movielens_small", *overrides)).data
    return data, store.prepare(data, tmp_path / "encoded")


def csv_data(tmp_path, fields=FIELDS, rows=200):
    draw = np.random.default_rng(0)
    lines = ["y,user,item,at,price,size,age,tags,past"]
    for _ in range(rows):
        past = "|".join(f"i{n}" for n in draw.integers(0, 12, draw.integers(0, 4)))
        tags = "|".join(f"t{n}" for n in draw.integers(0, 5, draw.integers(0, 4)))
        price, age = (f"{draw.random():.3f}" if draw.random() < 0.9 else "" for _ in range(2))
        cells = [draw.integers(0, 2), f'u{draw.integers(0, 9)},"i{draw.integers(0, 12)}"']
        cells += [1_700_000_000 + draw.integers(0, 10**6), price, draw.integers(0, 99), age]
        lines.append(",".join(map(str, [*cells, tags, past])))
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    data = prepared_options(path)
    data = replace(data, fields=fields)
    return path, store.prepare(data, tmp_path / "encoded")


def prepared_options(path):
    data = parse(compose_tree("data=movielens_small")).data
    return replace(
        data,
        **dict(name="mine", format="csv", raw=str(path), label="y", user="user", item="item"),
        **dict(time="at", time_form="seconds", published=None, numeric="log1p", buckets=4),
    )


def encoded(frame, dataset):
    schema = dataset.schema
    hashes = schema.vocabulary_hashes
    tables = {f.table for f in schema.lookups if not hashes[f.table].startswith("crc32")}
    tokens = {table: dataset.vocabulary(table) for table in tables}
    return encode_frame(frame, encoder_of([dataset], schema, tokens), schema)


def check_equal(rows, dataset, numbers):
    for feature in dataset.schema.features:
        ours, theirs = rows.column(feature.name), dataset.column(feature.name)
        if isinstance(theirs, Ragged):
            for one, other in zip(ours.ids(numbers), theirs.ids(numbers), strict=True):
                np.testing.assert_array_equal(one, other, err_msg=feature.name)
        elif feature.kind == "numeric":
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6, err_msg=feature.name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=feature.name)


def test_rows_of_a_csv_are_encoded_as_in_the_data_set(tmp_path):
    path, dataset = csv_data(tmp_path)
    every = np.arange(len(dataset))
    for options in ({"infer_schema_length": 0}, {}):  # as text, and typed
        frame = pl.read_csv(path, **options)
        check_equal(encoded(frame, dataset), dataset, every)
    typed = frame.drop("y").with_columns(pl.col("tags", "past").str.split("|"))
    check_equal(encoded(typed, dataset), dataset, every)  # lists, and no labels
    pandas = pytest.importorskip("pandas").read_csv(path)
    check_equal(encoded(_from_pandas(pandas), dataset), dataset, every)


@pytest.mark.parametrize(
    "choice", ["movielens", "avazu", pytest.param("criteo", marks=pytest.mark.slow)]
)
def test_rows_of_other_formats_are_encoded_as_in_the_data_set(tmp_path, raw_zip, choice):
    overrides = [f"data.raw={raw_zip}", "data.fields=[user,item,genres,hour,history]"]
    if choice != "movielens":
        overrides = [f"data=synthetic_{choice}", "data.synthetic.rows=300"]
        overrides.append(f"data.raw={tmp_path / 'raw'}")
    data, dataset = prepared(tmp_path, *overrides)
    check_equal(encoded(raw_rows(data), dataset), dataset, np.arange(len(dataset)))


def test_a_missing_column_and_a_bad_value_are_one_line(tmp_path):
    path, dataset = csv_data(tmp_path)
    frame = pl.read_csv(path, infer_schema_length=0)
    with pytest.raises(UserError, match=r"frame: no column price; .*it has y, user"):
        encoded(frame.drop("price"), dataset)
    bad = frame.with_columns(price=pl.lit("cheap"))
    with pytest.raises(
        UserError, match=r"frame, row 1: column price: found 'cheap', expected a finite number"
    ):
        encoded(bad, dataset)


def test_histories_need_the_user_among_the_fields(tmp_path):
    fields = [field for field in FIELDS if field != "user"]
    path, dataset = csv_data(tmp_path, fields)
    with pytest.raises(UserError, match="history: histories are looked up by the id of the user"):
        encoded(pl.read_csv(path, infer_schema_length=0), dataset)


@pytest.mark.parametrize("table", ["item", "hashed"])
def test_histories_of_one_of_two_fields_of_the_item_are_encoded_as_in_the_data_set(
    tmp_path, table
):
    hashed = {"name": "hashed", "column": "item", "hash_size": 7}
    fields = ["user", "item", hashed, {"name": "history", "table": table}]
    path, dataset = csv_data(tmp_path, fields)
    every = np.arange(len(dataset))
    frame = pl.read_csv(path, infer_schema_length=0)
    check_equal(encoded(frame, dataset), dataset, every)
    ids, lengths = dataset.column("history").ids(every)
    tokens = ["", "", *dataset.vocabulary("item")]
    if table == "item":  # the tokens of a row, listed by the caller
        starts = np.cumsum(lengths) - lengths
        texts = [
            "|".join(tokens[i] for i in ids[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]
        check_equal(
            encoded(frame.with_columns(pl.Series("@history", texts)), dataset), dataset, every
        )


def test_unknown_tokens_of_a_frame_are_out_of_vocabulary(tmp_path):
    _, dataset = csv_data(tmp_path, ["user", "item"])
    frame = pl.DataFrame({"user": ["nobody", None], "item": ["i1", "i1"]})
    rows = encoded(frame, dataset)
    assert rows.column("user").tolist() == [1, 1]
    assert (rows.column("item") > 1).all()


def test_every_transform_and_form_of_text_is_that_of_the_data_set(tmp_path):
    """Missing words, decimal commas, times as text, ids of several forms, prefixes, buckets."""
    draw = np.random.default_rng(1)
    lines = ["y;user;at;amount;price;depth;code"]
    for n in range(120):
        user = draw.choice(["7", "7.0", " 7", "8", "-", "1.2E+01", "caf\u00e9", "cafe\u0301"])
        at = f"2024-03-{1 + n % 28:02d} {n % 24:02d}:30:00{draw.choice(['', 'Z', '+02:00'])}"
        numbers = [draw.choice(["-", "1.234,5", f"{draw.integers(0, 50)},25"]) for _ in range(3)]
        lines.append(";".join([str(n % 2), user, at, *numbers, f"ab{draw.integers(0, 90)}"]))
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    entries = [
        *({"name": "user"}, {"name": "hour"}, {"name": "weekend"}),
        {"name": "amount", "kind": "numeric", "transform": "ln_squared"},
        {"name": "price", "kind": "numeric", "transform": "edges", "edges": [0, 5, 20, 1000]},
        {"name": "depth", "kind": "numeric", "transform": "as_is"},
        {"name": "tenth", "column": "code", "prefix": 3, "min_count": 2},
        {"name": "plain", "column": "depth", "kind": "numeric", "transform": "token"},
        {"name": "bucket", "column": "amount", "kind": "numeric", "transform": "quantile"},
    ]
    data = replace(prepared_options(path), item=None, fields=entries)
    for missing in (None, 3):
        forms = {"missing": ["-"], "number_form": "decimal_comma", "normalize_ids": True}
        forms |= {"time_form": "iso", "separator": "semicolon", "numeric_missing": missing}
        dataset = store.prepare(replace(data, **forms), tmp_path / "encoded")
        frame = pl.read_csv(path, separator=";", infer_schema_length=0)
        check_equal(encoded(frame, dataset), dataset, np.arange(len(dataset)))


def test_typed_rows_of_parquet_are_encoded_as_in_the_data_set(tmp_path):
    """Whole numbers, floats, dates and lists keep their types; csv text of them means the same."""
    draw, num = np.random.default_rng(2), 90
    days = [datetime(2024, 3, 1 + n % 28, n % 24) for n in range(num)]
    frame = pl.DataFrame(
        {"y": [n % 2 for n in range(num)], "user": draw.integers(0, 9, num), "at": days}
    ).with_columns(
        whole=pl.Series(draw.integers(0, 5, num)),
        steps=pl.Series(draw.integers(0, 5, num) / 2),
        flag=pl.Series(draw.integers(0, 2, num) == 1),
        tags=pl.Series([[f"t{m}" for m in range(n % 3)] for n in range(num)]),
    )
    path = tmp_path / "mine.parquet"
    frame.write_parquet(path)
    token = {"kind": "numeric", "transform": "token"}
    entries = [*("user", "hour", "flag"), {"name": "tags", "kind": "multi"}]
    entries += [{"name": "whole", **token}, {"name": "steps", **token}]
    data = replace(prepared_options(path), format="parquet", item=None, fields=entries)
    dataset = store.prepare(data, tmp_path / "encoded")
    every = np.arange(num)
    check_equal(encoded(frame.drop("y"), dataset), dataset, every)
    text = frame.with_columns(pl.col("tags").list.join("|"), pl.col("at").dt.epoch("s"))
    text.write_csv(tmp_path / "mine.csv")
    text = pl.read_csv(tmp_path / "mine.csv", infer_schema_length=0)
    check_equal(encoded(text, dataset), dataset, every)
