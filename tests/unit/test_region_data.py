"""Data sets with regions: tiny invented files of their forms, and the real ones."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from samples import GOLDEN, composed, make_data, one_line_error, read_rows, shared_data

from cki_rec.config import Data, Partition, Split
from cki_rec.data.encoding.store import prepare
from cki_rec.data.raw.reading import LABEL, TIME

SPLIT = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
RAW = {
    "douban_book": GOLDEN / "douban_book",
    "yelp_city": GOLDEN / "yelp_city",
    "completejourney": GOLDEN / "completejourney",
    "avazu_15k": GOLDEN / "avazu_15k.csv",
}
REGIONS = {
    "douban_book": ("user_location", ["31", "40"]),
    "yelp_city": ("business_city", ["31", "35", "40"]),
    "completejourney": ("store_id", ["367", "406"]),
    "avazu_15k": ("hour", ["00", "01", "12"]),
}


def tiny(choice: str, **changes) -> Data:
    return make_data(choice, raw=str(RAW[choice]), min_count=1, split=SPLIT, **changes)


@pytest.mark.parametrize("choice", RAW)
def test_every_preset_reads_its_form_with_regions(choice, tmp_path):
    by, parts = REGIONS[choice]
    partition = Partition(by=by, parts=parts, seed=0)
    rows, _ = read_rows(tiny(choice, partition=partition))
    dataset = prepare(tiny(choice, partition=partition), tmp_path / "encoded")
    regions = rows[by].cast(pl.String).to_list()
    assert dataset.parts(partition).names == parts
    assert len(dataset) == sum(region in parts for region in regions)
    for place, part in enumerate(parts):
        rows_of = [dataset.parts(partition).rows(split, place) for split in range(3)]
        assert sum(map(len, rows_of)) == regions.count(part)
    named = [
        entry if isinstance(entry, str) else entry["name"] for entry in composed(choice).fields
    ]
    assert [feature.name for feature in dataset.schema.features] == named


def test_attributes_describe_users_and_items():
    rows, _ = read_rows(tiny("yelp_city"))
    lines = [
        line.split("\t")
        for line in (RAW["yelp_city"] / "user_business.dat").read_text().split("\n")[:-1]
    ]
    assert rows.select("user", "item").rows() == [(user, item) for user, item, _ in lines]
    assert rows[LABEL].to_list() == [int(int(rating) >= 4) for *_, rating in lines]
    of_item = dict(rows.select("item", "business_city").iter_rows())
    assert of_item["1"] == "31"
    assert of_item["12"] == "40"
    described = (RAW["yelp_city"] / "business_category.dat").read_text().split("\n")[:-1]
    categories = [line.split("\t")[1] for line in described if line.startswith("5\t")]
    assert rows.filter(item="5")["business_category"][0].split("|") == categories
    assert rows.filter(user="3")["user_compliment"].null_count() == len(rows.filter(user="3"))


def test_spaces_separate_columns_too(tmp_path):
    folder = shutil.copytree(RAW["douban_book"], tmp_path / "spaced")
    ratings = folder / "user_book.dat"
    ratings.write_text(ratings.read_text().replace("\t", " "))
    plain, spaced = tiny("douban_book"), replace(tiny("douban_book"), raw=str(folder))
    assert read_rows(spaced)[0].equals(read_rows(plain)[0])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda f: (f / "user_book.dat").unlink(), "contains no ratings user_ITEM.dat"),
        (
            lambda f: (f / "user_book.dat").write_text("1\t2\tgood\n"),
            "user_book.dat, line 1: not a n",
        ),
        (
            lambda f: (f / "book_year.dat").write_text("1\n"),
            "book_year.dat, line 1: missing field",
        ),
    ],
)
def test_damaged_ratings_are_named(tmp_path, change, part):
    folder = shutil.copytree(RAW["douban_book"], tmp_path / "books")
    change(folder)
    data = replace(tiny("douban_book"), raw=str(folder))
    assert part in one_line_error(prepare, data, tmp_path / "encoded")


@pytest.mark.parametrize("negatives", [1, 3])
def test_negatives_are_products_of_the_store_that_the_household_never_buys(negatives):
    rows, _ = read_rows(tiny("completejourney", negatives=negatives))
    purchases = pl.read_parquet(RAW["completejourney"] / "transactions.parquet")
    step = np.arange(len(rows)) // (1 + negatives)
    assert rows[LABEL].to_list() == [int(n % (1 + negatives) == 0) for n in range(len(rows))]
    clicked, drawn = rows.filter(pl.col(LABEL) == 1), rows.filter(pl.col(LABEL) == 0)
    assert clicked["item"].to_list() == purchases["product_id"].cast(pl.String).to_list()
    for name in ("user", "store_id", TIME):  # those of the purchase
        assert rows[name].to_list() == clicked[name].gather(step).to_list()
    bought = set(clicked.select("user", "item").iter_rows())
    assert not bought & set(drawn.select("user", "item").iter_rows())
    sold = set(clicked.select("store_id", "item").iter_rows())
    inside = [pair in sold for pair in drawn.select("store_id", "item").iter_rows()]
    assert sum(inside) > 0.8 * len(inside)  # others: the household buys all of the store
    again, _ = read_rows(tiny("completejourney", negatives=negatives))
    assert again.equals(rows)
    other, _ = read_rows(tiny("completejourney", negatives=negatives, negatives_seed=1))
    assert not other.equals(rows)


def test_negatives_are_drawn_by_sales(tmp_path):
    """A product with nine of ten sales to others is drawn nine times of ten."""
    folder = shutil.copytree(RAW["completejourney"], tmp_path / "journey")
    first = pl.read_parquet(folder / "transactions.parquet").head(1)
    first = first.with_columns(store_id=pl.lit(1, pl.Int64))
    own = pl.concat(
        [first.with_columns(household_id=pl.lit(1, pl.Int64), product_id=pl.lit(100, pl.Int64))]
        * 2000
    )
    others = [
        first.with_columns(household_id=pl.lit(2, pl.Int64), product_id=pl.lit(p, pl.Int64))
        for p in (101, 102)
    ]
    pl.concat([own, *[others[0]] * 900, *[others[1]] * 100]).write_parquet(
        folder / "transactions.parquet"
    )
    rows, _ = read_rows(replace(tiny("completejourney"), raw=str(folder)))
    drawn = rows.filter((pl.col(LABEL) == 0) & (pl.col("user") == "1"))["item"]
    assert 0.87 < (drawn == "101").mean() < 0.93


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda f: (f / "products.parquet").unlink(), "contains no products.parquet"),
        (lambda f: (f / "demographics.parquet").write_bytes(b"no"), "demographics.parquet: no P"),
        (
            lambda f: pl.DataFrame({"product_id": [1]}).write_parquet(f / "products.parquet"),
            "products.parquet: no column manufacturer_id",
        ),
        (
            lambda f: pl.read_parquet(f / "transactions.parquet")
            .with_columns(store_id=pl.lit(None, pl.Int64))
            .write_parquet(f / "transactions.parquet"),
            "transactions.parquet), row 1: missing field",
        ),
        (
            lambda f: pl.read_parquet(f / "transactions.parquet").head(1)
            .write_parquet(f / "transactions.parquet"),
            "buys nearly every product",
        ),
    ],
)  # fmt: skip
def test_damaged_purchases_are_named(tmp_path, change, part):
    folder = shutil.copytree(RAW["completejourney"], tmp_path / "journey")
    change(folder)
    data = replace(tiny("completejourney"), raw=str(folder))
    assert part in one_line_error(prepare, data, tmp_path / "encoded")


def test_purchases_have_parts_by_time(tmp_path):
    partition = Partition(by="time", parts=3, seed=0)
    dataset = prepare(tiny("completejourney", partition=partition), tmp_path / "encoded")
    part = dataset.parts(partition).part.astype(int)
    assert (np.diff(part[np.argsort(dataset.timestamp, kind="stable")]) >= 0).all()
    assert np.bincount(part).tolist() == [40, 40, 40]


def test_rows_without_a_store_are_skipped_if_asked(tmp_path):
    folder = shutil.copytree(RAW["completejourney"], tmp_path / "journey")
    frame = pl.read_parquet(folder / "transactions.parquet").with_row_index()
    frame = frame.with_columns(store_id=pl.when(pl.col("index") > 3).then("store_id")).drop(
        "index"
    )
    frame.write_parquet(folder / "transactions.parquet")
    data = replace(tiny("completejourney"), raw=str(folder), on_bad_row="skip")
    rows, reading = read_rows(data)
    assert reading.counts == {"missing field": 4}
    assert len(rows) == 2 * (len(frame) - 4)


def real(choice: str, tmp_path):
    """Return the real files in the form that the preset expects."""
    folder = shared_data(choice)
    if choice == "avazu_15k":
        return folder / "avazu_15k.csv.gz"
    if choice != "douban_book":
        return folder
    made = tmp_path / "raw"
    made.mkdir()
    for path in folder.glob("hin_*.dat"):
        shutil.copy(path, made / path.name.removeprefix("hin_"))
    shutil.copy(folder / "selfrec_test.txt", made / "user_book.dat")  # a fifth of the ratings
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "by", "parts", "rows"),
    [
        ("douban_book", "user_location", [33, 373, 13, 314, 11], 54_154),
        ("yelp_city", "business_city", [31, 35, 40, 10, 26], 174_512),
        ("completejourney", "store_id", [367, 406, 356, 292, 381], 2 * 152_936),
        ("avazu_15k", "hour", ["00", "01", "02"], 1_157),
    ],
)
def test_real_data_have_these_regions(choice, by, parts, rows, tmp_path):
    partition = Partition(by=by, parts=parts, seed=0)
    threshold = {"label_threshold": 5.0} if choice == "douban_book" else {}  # 4 and 5 alone
    raw = str(real(choice, tmp_path))
    data = make_data(choice, raw=raw, partition=partition, **threshold)
    dataset = prepare(data, tmp_path / "encoded")
    assert len(dataset) == rows
    sizes = np.bincount(dataset.parts(partition).part)
    assert (np.diff(sizes) < 0).all() or choice == "avazu_15k"  # the largest first
    for part in parts:
        assert len(dataset.rows("test", partition, part)) > 10
