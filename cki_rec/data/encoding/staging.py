"""The only pass over the text: rows -> columns of codes on disk, and dictionaries of tokens.

A code replaces a token until all rows are read and training rows can be counted. So text is parsed
once, and memory holds the dictionaries and one chunk.

Shape legend: N rows, C columns of ids.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.data.columns import ColumnFile
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.numbers import as_number, as_token, bucket_tokens, ordered_keys
from cki_rec.data.encoding.split import row_keys
from cki_rec.data.encoding.vocabulary import Dictionary, hash_tokens
from cki_rec.data.raw.reading import LABEL, SPLIT, TIME, with_time_fields

USER, ITEM = "user of a row", "item of a row"
"""Names of the dictionaries of ``group`` and ``item_index``."""


@dataclass(slots=True)
class Plan:
    """The file and the column of every field."""

    ids: list[Field]
    """Columns of ``ids.npy``, one id per row. Fields that only a history requires come last."""
    multi: list[Field]
    """Fields whose ids a raw column lists, including listed histories."""
    numbers: list[Field]
    """Columns of ``numbers.npy``."""
    histories: dict[str, Field]
    """History of liked items -> the field whose ids it holds."""
    user: str | None
    """Raw column of users."""
    item: str | None
    """Raw column of items."""
    missing: float | None
    """Value of an empty number; None: it stays missing."""
    buckets: int
    """Number of quantile buckets."""
    quantiles: list[Field] = field(default_factory=list)
    """Fields of quantile buckets."""
    is_keyed: bool = False
    """Whether to store a key per row, which determines its split."""


def plan_columns(
    fields: tuple[Field, ...],
    user: str | None,
    item: str | None,
    missing: float | None,
    buckets: int,
) -> Plan:
    """Return the file and the column of every field."""
    ids = [f for f in fields if f.kind not in ("multi", "history") and not f.is_number]
    by_column = {f.column: f for f in ids if f.kind == "categorical"}
    histories = {}
    for history in (f for f in fields if f.kind == "history" and not f.is_listed):
        source = by_column.get(history.column)
        if source is None:
            source = replace(history, name=history.column, kind="categorical")
            ids.append(source)
            by_column[history.column] = source
        histories[history.name] = source
    return Plan(
        ids=ids,
        multi=[f for f in fields if f.is_listed],
        numbers=[f for f in fields if f.is_number],
        histories=histories,
        user=user,
        item=item,
        missing=missing,
        buckets=buckets,
        quantiles=[f for f in ids if f.transform == "quantile"],
    )


class Staging:
    """Columns that grow chunk by chunk, in a folder.

    Args:
        folder: Folder of the files.
        plan: The columns.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.dictionaries: dict[str, Dictionary] = {}
        self.files: dict[str, ColumnFile] = {}
        for column in [*plan.ids, *plan.multi]:
            if column.hash_size is None and column.table not in self.dictionaries:
                is_fixed = column.transform == "quantile"
                tokens = bucket_tokens(plan.buckets) if is_fixed else None
                self.dictionaries[column.table] = Dictionary(tokens)
        for name, raw in ((USER, plan.user), (ITEM, plan.item)):
            if raw is not None:
                self.dictionaries[name] = Dictionary()

    @property
    def rows(self) -> int:
        """Return the number of rows so far."""
        return self.files["label"].rows if self.files else 0

    def append(self, frame: pl.DataFrame) -> None:
        """Append rows in the common form."""
        if frame.is_empty():
            return
        plan = self.plan
        times = [f.column for f in plan.ids if f.kind == "time"]
        frame = with_time_fields(frame, times) if times else frame
        self._add("label", frame[LABEL].to_numpy(), np.uint8)
        for raw, target, dtype in ((TIME, "timestamp", np.int64), (SPLIT, "split", np.uint8)):
            if raw in frame.columns:
                self._add(target, frame[raw].to_numpy(), dtype)
        if plan.is_keyed:
            named = [column for column in (plan.user, plan.item) if column is not None]
            self._add("key", row_keys(frame, named), np.uint64)
        if plan.ids:
            self._add("ids", self._codes(frame), np.int32, len(plan.ids))
        if plan.numbers:
            values = frame.select(as_number(f, plan.missing).alias(f.name) for f in plan.numbers)
            self._add("raw_numbers", values.to_numpy(), np.float64, len(plan.numbers))
        if plan.quantiles:
            values = frame.select(as_number(f, plan.missing).alias(f.name) for f in plan.quantiles)
            keys = [ordered_keys(values[f.name].to_numpy()) for f in plan.quantiles]
            self._add("quantiles", np.stack(keys, axis=1), np.int64, len(keys))
        for column in plan.multi:
            self._append_multi(frame, column)
        for name, column_name, target in (
            (USER, plan.user, "group"),
            (ITEM, plan.item, "item_index"),
        ):
            if column_name is not None:
                token = pl.col(column_name).cast(pl.String)
                physical = frame.select(_physical(token, self.dictionaries[name])).to_series()
                self.dictionaries[name].grow(_top(physical))
                self._add(target, physical.to_numpy(), np.int32)

    def close(self) -> None:
        """Close all files."""
        with ExitStack() as stack:  # all of them, even if the disk is full
            for file in self.files.values():
                stack.callback(file.close)

    def _codes(self, frame: pl.DataFrame) -> NDArray[np.int32]:
        """Return ``(rows, C)`` codes of one chunk; codes of hashed fields are their ids."""
        missing = self.plan.missing
        expressions = [
            pl.repeat(0, pl.len(), dtype=pl.UInt32)  # replaced once edges are known
            if column.transform == "quantile"
            else _hashed(_token(column, missing), column.hash_size)
            if column.hash_size is not None
            else _physical(_token(column, missing), self.dictionaries[column.table])
            for column in self.plan.ids
        ]
        names = [column.name for column in self.plan.ids]
        columns = frame.select(e.alias(n) for e, n in zip(expressions, names, strict=True))
        codes: NDArray[np.uint32] = columns.to_numpy(order="c")
        for column, top in zip(self.plan.ids, codes.max(axis=0).tolist(), strict=True):
            if column.hash_size is None:
                self.dictionaries[column.table].grow(top)
        return codes.view(np.int32)

    def _append_multi(self, frame: pl.DataFrame, column: Field) -> None:
        """Append the codes of every row in the order of the text; codes of a set are distinct."""
        assert column.separator is not None
        split = pl.col(column.column).str.split(column.separator)
        split = split.list.eval(pl.element().filter(pl.element() != ""))
        if column.kind == "multi":
            split = split.list.unique(maintain_order=True)
            split = split if column.max_length is None else split.list.head(column.max_length)
        lists = frame.select(split.alias("token")).to_series()
        lengths = lists.list.len().fill_null(0)
        tokens = lists.filter(lengths > 0).explode().alias("token")
        token = pl.col("token")
        if column.hash_size is not None:
            codes = tokens.to_frame().select(_hashed(token, column.hash_size)).to_series()
        else:
            dictionary = self.dictionaries[column.table]
            codes = tokens.to_frame().select(_physical(token, dictionary)).to_series()
            dictionary.grow(_top(codes))
        self._add(f"multi.{column.name}.values", codes.to_numpy(), np.int32)
        self._add(f"multi.{column.name}.lengths", lengths.to_numpy(), np.int32)

    def _add(
        self, name: str, array: NDArray[Any], dtype: type[np.generic], width: int | None = None
    ) -> None:
        if name not in self.files:
            self.files[name] = ColumnFile(self.folder / f"{name}.npy", dtype, width)
        self.files[name].append(array)


def _token(column: Field, missing: float | None) -> pl.Expr:
    if column.kind == "numeric":
        return as_token(column, missing)
    token = pl.col(column.column).cast(pl.String)
    return token if column.prefix is None else token.str.head(column.prefix)


def _physical(token: pl.Expr, dictionary: Dictionary) -> pl.Expr:
    """Return the codes of tokens; a missing token is the empty token, code 0."""
    return token.cast(dictionary.dtype).to_physical().fill_null(0)


def _hashed(token: pl.Expr, size: int) -> pl.Expr:
    """Return the hashed ids of tokens; a missing token is the empty token."""
    return token.fill_null("").map_batches(
        lambda tokens: hash_tokens(tokens, size), return_dtype=pl.UInt32
    )


def _top(codes: pl.Series) -> int:
    return int(codes.to_numpy().max(initial=0))
