"""Numeric fields -> tokens or standardized floats.

Shape legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.data.columns import ColumnFile, Ints, blocks
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.split import order_statistics

LARGEST_FLOAT = float(np.finfo(np.float32).max)
"""Limit to which larger numbers are clipped."""
LARGEST_INTEGER = 2.0**53
"""Limit of integers that float64 represents exactly."""
MISSING_KEY = np.iinfo(np.int64).min
"""Key of a missing value in ``ordered_keys``."""


def as_token(field: Field, missing: float | None) -> pl.Expr:
    r"""Return the token of a number; the token of a missing number is null.

    ``ln_squared`` is :math:`\lfloor \ln(x)^2 \rfloor` above 2, and the integer part otherwise.

    Reference:
        Zhu et al., BARS: Towards Open Benchmarking for Recommender Systems, SIGIR 2022: the
        preprocessing of Criteo_x4.

    Differs:
        Follows the published code; the text of the paper has log2 instead of ln.
    """
    value = _filled(field, missing)
    if field.transform == "ln_squared":
        value = value.cast(pl.Float64).clip(lower_bound=-LARGEST_INTEGER)
        logarithm = value.log()
        squared = (logarithm * logarithm).floor()
        return pl.when(value > 2).then(squared).otherwise(value).cast(pl.Int64).cast(pl.String)
    if field.transform == "edges":
        assert field.edges is not None
        first, *others = field.edges
        above = ((value > edge).cast(pl.Int64) for edge in others[:-1])
        bucket = pl.sum_horizontal(pl.lit(0, dtype=pl.Int64), *above)
        is_inside = (value > first) & (value <= others[-1])
        return pl.when(is_inside).then(bucket).cast(pl.String)
    assert field.transform == "token"
    return value.cast(pl.String)


def as_number(field: Field, missing: float | None) -> pl.Expr:
    """Return the number before standardization; a missing number is NaN.

    ``log1p`` is log(1 + abs(x)) with the sign of x.
    """
    value = _filled(field, missing).cast(pl.Float64).clip(-LARGEST_FLOAT, LARGEST_FLOAT)
    if field.transform == "log1p":
        value = value.sign() * value.abs().log1p()
    return value.fill_null(float("nan"))


def _filled(field: Field, missing: float | None) -> pl.Expr:
    """Return the raw number, or ``missing`` if it is empty."""
    value = pl.col(field.column)
    if missing is None:
        return value
    return value.fill_null(int(missing) if missing == int(missing) else missing)


def ordered_keys(values: NDArray[np.float64]) -> Ints:
    """Return int64 keys with the order of the values; the key of NaN is ``MISSING_KEY``."""
    bits = (values + 0.0).view(np.int64)  # + 0.0: no negative zero
    keys: Ints = bits ^ ((bits >> 63) & np.iinfo(np.int64).max)
    keys[np.isnan(values)] = MISSING_KEY
    return keys


def key_values(keys: Ints) -> NDArray[np.float64]:
    """Return the values of ``ordered_keys``."""
    bits = keys ^ ((keys >> 63) & np.iinfo(np.int64).max)
    return bits.view(np.float64)


def quantile_edges(keys: Iterator[Ints], buckets: int, scratch: Path) -> Ints:
    """Return the distinct largest keys of the first ``buckets - 1`` buckets of equal size.

    Args:
        keys: Keys of training rows, block by block.
        buckets: Number of buckets.
        scratch: Folder for a temporary file.
    """
    known = ColumnFile(scratch / "keys.tmp", np.int64)
    for block in keys:
        known.append(block[block != MISSING_KEY])
    ranks = [max(0, -(-known.rows * part // buckets) - 1) for part in range(1, buckets)]
    edges = np.empty(0, dtype=np.int64)
    if known.rows:
        edges = np.unique(order_statistics(known.mapped(), ranks))
    known.delete()
    return edges


def bucket_codes(keys: Ints, edges: Ints) -> NDArray[np.int64]:
    """Return the code of each key: 0 if missing, else 1 + the number of smaller edges."""
    codes = 1 + np.searchsorted(edges, keys, side="left")
    return np.where(keys == MISSING_KEY, 0, codes)


def bucket_tokens(buckets: int) -> list[str]:
    """Return the token of every code."""
    return ["", *(str(number) for number in range(buckets))]


def standardize(
    raw: ColumnFile,
    numbers: ColumnFile,
    split: ColumnFile,
    is_scaled: NDArray[np.bool_],
    known_facts: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Standardize columns by training rows; missing values become the mean.

    Sums are float64 and are taken block by block in a fixed order, so that the result depends on
    the rows alone.

    Args:
        raw: ``(N, columns)`` float64 with NaN for missing. Float32 would make neighbours of large
            numbers equal.
        numbers: An empty float32 file; receives the result.
        split: ``(N,)`` split codes.
        is_scaled: ``(columns,)``; other columns keep their scale, with missing values filled.
        known_facts: ``(2, columns)`` shift and scale of columns that take over those of an earlier
            data set; NaN for others.

    Returns:
        ``(5, columns)`` float64: shift and scale, smallest and largest number of all rows, and the
        standard deviation in training rows. The last three are NaN without numbers.
    """
    width = len(is_scaled)
    total, squares, known = np.zeros(width), np.zeros(width), np.zeros(width)
    low, first, high, last = np.full((4, width), np.nan)
    for start, stop in blocks(raw.rows):
        block = raw.read(start, stop)
        low, high = np.fmin(low, np.fmin.reduce(block)), np.fmax(high, np.fmax.reduce(block))
        block = block[split.read(start, stop) == 0]
        if len(block):
            first = np.fmin(first, np.fmin.reduce(block))
            last = np.fmax(last, np.fmax.reduce(block))
        known += (~np.isnan(block)).sum(0)
        total += np.nansum(block, 0)
    is_constant = first == last  # a mean of equal numbers may differ from them
    mean = np.where(is_constant, first, total / np.maximum(known, 1))
    for start, stop in blocks(raw.rows):
        block = raw.read(start, stop)[split.read(start, stop) == 0]
        squares += np.nansum((block - mean) ** 2, 0)
    deviation = np.sqrt(squares / np.maximum(known, 1))
    scale = np.where(deviation > 0, deviation, 1.0)
    shift = np.where(is_scaled, mean, 0.0)
    scale = np.where(is_scaled, scale, 1.0)
    if known_facts is not None:
        is_known = ~np.isnan(known_facts[0])
        mean = np.where(is_known, known_facts[0], mean)
        shift = np.where(is_known, known_facts[0], shift)
        scale = np.where(is_known, known_facts[1], scale)
    for start, stop in blocks(raw.rows):
        numbers.append(scaled(raw.read(start, stop), mean, shift, scale))
    return np.stack([shift, scale, low, high, np.where(known > 0, deviation, np.nan)])


def scaled(
    block: NDArray[np.float64],
    mean: NDArray[np.float64],
    shift: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return standardized numbers, one column per field; missing values become the mean."""
    filled = np.where(np.isnan(block), mean, block)
    return ((filled - shift) / scale).astype(np.float32)
