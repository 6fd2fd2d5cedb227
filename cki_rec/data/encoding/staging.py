"""The only pass over the text: rows -> columns of codes on disk, and dictionaries of tokens.

A code replaces a token until all rows are read and training rows can be counted. So text is parsed
once. The codes of a chunk are its own: they number the distinct tokens of all its tables. So any
thread or process can make them (``stage``), and ``Staging`` translates distinct tokens only.
Threads share the dictionaries of ``Staging``, so that nothing is left to translate. Memory holds
the dictionaries and a few chunks.

Shape legend: N rows, C columns of ids, K codes of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cki_rec.data.columns import ColumnFile, Ids
from cki_rec.data.encoding.fields import Field, liked_field
from cki_rec.data.encoding.normalize import normalized
from cki_rec.data.encoding.numbers import as_number, as_token, bucket_tokens, ordered_keys
from cki_rec.data.encoding.split import row_keys
from cki_rec.data.encoding.vocabulary import Dictionary, hash_tokens
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.reading import LABEL, SPLIT, TIME, Reading, with_time_fields

USER, ITEM, DOMAIN = "user of a row", "item of a row", "domain of a row"
"""Names of the dictionaries of ``group``, ``item_index`` and ``domain``."""
TYPES: dict[str, type[np.generic]] = {
    "label": np.uint8,
    "timestamp": np.int64,
    "split": np.uint8,
    "key": np.uint64,
    "raw_numbers": np.float64,
    "quantiles": np.int64,
}
"""File -> type of its values; all others are int32."""


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
    normalized: dict[str, str | None] = field(default_factory=dict)
    """Columns whose ids are normalized -> separator of their ids (None: one id)."""

    domain: str | None = None
    """Raw column whose values are parts (``data.partition.by``)."""
    domains: list[str] | None = None
    """Values of this column that are kept; None: all."""

    @property
    def entities(self) -> list[tuple[str, str, str]]:
        """Return dictionary, raw column and file of users and of items, if rows have them."""
        both = ((USER, self.user, "group"), (ITEM, self.item, "item_index"))
        return [(name, raw, file) for name, raw, file in both if raw is not None]

    @property
    def indexed(self) -> list[tuple[str, str, str]]:
        """Return dictionary, raw column and file of users, of items and of domains."""
        domain = [] if self.domain is None else [(DOMAIN, self.domain, "domain")]
        return [*self.entities, *domain]


def plan_columns(
    fields: tuple[Field, ...],
    user: str | None,
    item: str | None,
    missing: float | None,
    buckets: int,
) -> Plan:
    """Return the file and the column of every field."""
    ids = [f for f in fields if f.kind not in ("multi", "history") and not f.is_number]
    histories = {}
    for history in (f for f in fields if f.kind == "history" and not f.is_listed):
        source = liked_field(history, ids)
        if source is None:
            source = replace(history, name=history.column, kind="categorical")
            ids.append(source)
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


@dataclass(frozen=True, slots=True)
class Staged:
    """One chunk as columns."""

    columns: dict[str, NDArray[Any]]
    """File -> its rows."""
    tables: dict[str, pl.Series | Ids]
    """Table -> its distinct tokens in the order of codes; or their codes in the dictionary of
    ``Staging``, the codes of buckets, or the ids of hashes. The codes of a table follow those of
    the table before."""
    entities: dict[str, pl.Series]
    """``USER`` and ``ITEM`` -> their distinct tokens in the order of codes."""
    reading: Reading
    """Bad rows of the chunk."""
    num_read: int = 0
    """Good rows of the chunk, before those of other domains are left out."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.columns.get("label", ()))


def stage(
    plan: Plan, shared: Mapping[str, Dictionary], reading: Reading, chunk: Chunk | Check
) -> Staged | Check:
    """Return a chunk as columns; return a check as it is.

    Args:
        plan: The columns.
        shared: Table -> the dictionary of ``Staging``; empty in another process.
        reading: State of the pass at its start, with the treatment of bad rows.
        chunk: A chunk or a check.

    Raises:
        UserError: A row is bad and ``reading.on_bad_row`` is ``error``.
    """
    if isinstance(chunk, Check):
        return chunk
    own = reading.fork()
    return _stage_frame(plan, shared, chunk.frame(own), own)


def _stage_frame(
    plan: Plan, shared: Mapping[str, Dictionary], frame: pl.DataFrame, reading: Reading
) -> Staged:
    """Return rows in the common form as columns."""
    num_read = len(frame)
    frame = normalized(frame, plan.normalized) if num_read else frame
    if num_read and plan.domain is not None and plan.domains is not None:
        domain = pl.col(plan.domain).cast(pl.String).fill_null("")
        frame = frame.filter(domain.is_in(plan.domains))
    if frame.is_empty():
        return Staged({}, {}, {}, reading, num_read)
    times = [f.column for f in plan.ids if f.kind == "time"]
    frame = with_time_fields(frame, times) if times else frame
    columns = {"label": frame[LABEL].to_numpy()}
    for raw, file in ((TIME, "timestamp"), (SPLIT, "split")):
        if raw in frame.columns:
            columns[file] = frame[raw].to_numpy()
    if plan.is_keyed:
        columns["key"] = row_keys(frame, [raw for _, raw, _ in plan.entities])
    if plan.numbers:
        values = frame.select(as_number(f, plan.missing).alias(f.name) for f in plan.numbers)
        columns["raw_numbers"] = values.to_numpy()
    if plan.quantiles:
        values = frame.select(as_number(f, plan.missing).alias(f.name) for f in plan.quantiles)
        keys = [ordered_keys(values[f.name].to_numpy()) for f in plan.quantiles]
        columns["quantiles"] = np.stack(keys, axis=1)
    entities: dict[str, pl.Series] = {}
    for name, raw, file in plan.indexed:
        dictionary = Dictionary()
        columns[file] = dictionary.codes(frame[raw].cast(pl.String))
        entities[name] = dictionary.tokens()
    dictionaries = {
        f.table: shared[f.table] if f.table in shared else Dictionary()
        for f in [*plan.ids, *plan.multi]
    }
    codes = _codes(frame, plan, dictionaries)
    codes |= {f.name: _append_multi(columns, frame, f, dictionaries[f.table]) for f in plan.multi}
    tables: dict[str, pl.Series | Ids] = {}
    for f in [*plan.ids, *plan.multi]:
        if f.transform == "quantile":
            tables[f.table] = np.arange(plan.buckets + 1, dtype=np.int32)
        elif f.table in shared:
            if f.table not in tables:
                same = [g.name for g in [*plan.ids, *plan.multi] if g.table == f.table]
                tables[f.table], own = distinct([codes[name] for name in same])
                codes |= dict(zip(same, own, strict=True))
        elif f.table not in tables:
            tokens = dictionaries[f.table].tokens()
            size = f.hash_size
            tables[f.table] = tokens if size is None else hash_tokens(tokens, size).to_numpy()
    first = _firsts(tables)
    if plan.ids:
        columns["ids"] = np.empty((len(frame), len(plan.ids)), dtype=np.int32)
    for position, f in enumerate(plan.ids):
        np.add(codes[f.name], first[f.table], out=columns["ids"][:, position])
    for f in plan.multi:
        columns[f"multi.{f.name}.values"] = codes[f.name] + first[f.table]
    return Staged(columns, tables, entities, reading, num_read)


def distinct(arrays: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
    """Return the distinct codes of all arrays, and the place of each entry among them."""
    size, total = 1 + max(int(a.max(initial=0)) for a in arrays), sum(map(len, arrays))
    if size > 16 * total:  # a table of all codes would be slower than sorting those that are there
        found, places = np.unique(np.concatenate(arrays), return_inverse=True)
        return found, np.split(places, np.cumsum([len(a) for a in arrays])[:-1])
    is_held = np.zeros(size, dtype=np.bool_)
    for array in arrays:
        is_held[array] = True
    held = np.flatnonzero(is_held).astype(np.int32)
    place = np.zeros(size, dtype=np.int32)
    place[held] = np.arange(len(held), dtype=np.int32)
    return held, [place[array] for array in arrays]


def _firsts(tables: dict[str, pl.Series | Ids]) -> dict[str, int]:
    """Return the first code of every table."""
    sizes = [len(tokens) for tokens in tables.values()]
    return dict(zip(tables, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True)) if sizes else {}


def _codes(frame: pl.DataFrame, plan: Plan, dictionaries: dict[str, Dictionary]) -> dict[str, Ids]:
    """Return the codes of the columns of ids, each as its own table has them."""
    codes: dict[str, Ids] = {}
    others: list[Field] = []
    for f in plan.ids:
        if f.transform == "quantile":  # written once edges are known
            codes[f.name] = np.zeros(len(frame), dtype=np.int32)
            continue
        of_numbers = _codes_of_integers(frame, f, plan.missing, dictionaries[f.table])
        if of_numbers is None:
            others.append(f)
        else:
            codes[f.name] = of_numbers
    physical = frame.select(
        _token(f, plan.missing).cast(dictionaries[f.table].dtype).to_physical().fill_null(0)
        .alias(f.name)
        for f in others
    )  # fmt: skip
    for f in others:
        codes[f.name] = physical[f.name].to_numpy().view(np.int32)
        dictionaries[f.table].grow(int(codes[f.name].max()))
    return codes


def _codes_of_integers(
    frame: pl.DataFrame, column: Field, missing: float | None, dictionary: Dictionary
) -> Ids | None:
    """Return codes of whole numbers, whose tokens are made once per distinct number.

    None: the field has no such numbers, or their range is much larger than the number of rows.
    """
    if column.kind != "numeric" or frame.schema[column.column] != pl.Int64:
        return None
    values = frame[column.column]
    low, high = values.min() or 0, values.max() or 0
    assert isinstance(low, int)
    assert isinstance(high, int)
    if high - low > 4 * len(values):
        return None
    place = (values - (low - 1)).fill_null(0).to_numpy()  # 0: missing
    is_held = np.zeros(high - low + 2, dtype=np.bool_)
    is_held[place] = True
    held = np.flatnonzero(is_held)
    numbers = pl.Series(column.column, held + (low - 1)).set(pl.Series(held == 0), None)
    tokens = numbers.to_frame().select(as_token(column, missing)).to_series()
    codes = np.zeros(len(is_held), dtype=np.int32)
    codes[held] = dictionary.codes(tokens)
    taken: Ids = codes[place]
    return taken


def _append_multi(
    columns: dict[str, NDArray[Any]], frame: pl.DataFrame, column: Field, dictionary: Dictionary
) -> Ids:
    """Return the codes of every row in the order of the text; codes of a set are distinct.

    Their number per row becomes a column.
    """
    assert column.separator is not None
    split = pl.col(column.column)
    if not isinstance(frame.schema[column.column], pl.List):
        split = split.str.split(column.separator)
    split = split.list.eval(pl.element().filter(pl.element() != ""))
    if column.kind == "multi":
        split = split.list.unique(maintain_order=True)
        split = split if column.max_length is None else split.list.head(column.max_length)
    lists = frame.select(split.alias("token")).to_series()
    lengths = lists.list.len().fill_null(0)
    columns[f"multi.{column.name}.lengths"] = lengths.to_numpy()
    return dictionary.codes(lists.filter(lengths > 0).explode())


def _token(column: Field, missing: float | None) -> pl.Expr:
    if column.kind == "numeric":
        return as_token(column, missing)
    token = pl.col(column.column).cast(pl.String)
    return token if column.prefix is None else token.str.head(column.prefix)


@dataclass(frozen=True, slots=True)
class Span:
    """Where one chunk lies in the files of a ``Staging``."""

    rows: tuple[int, int]
    """Start and stop."""
    codes: tuple[int, int]
    """Start and stop of its K codes in ``codes.npy``."""
    tables: dict[str, tuple[int, int]]
    """Table -> start and stop of its codes among the K codes."""
    multi: dict[str, tuple[int, int]]
    """Field with several ids a row -> start and stop of its values."""

    @property
    def num_codes(self) -> int:
        """Return K."""
        return self.codes[1] - self.codes[0]


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
        self.spans: list[Span] = []
        """One entry per chunk with rows."""
        for column in [*plan.ids, *plan.multi]:
            if column.hash_size is None and column.table not in self.dictionaries:
                is_fixed = column.transform == "quantile"
                tokens = bucket_tokens(plan.buckets) if is_fixed else None
                self.dictionaries[column.table] = Dictionary(tokens)
        for name, _, _ in plan.indexed:
            self.dictionaries[name] = Dictionary()

    @property
    def rows(self) -> int:
        """Return the number of rows so far."""
        return self.files["label"].rows if self.files else 0

    def append(self, staged: Staged) -> None:
        """Append the rows of a chunk."""
        if not staged.rows:
            return
        start = self.rows
        columns = dict(staged.columns)
        for name, _, file in self.plan.indexed:
            columns[file] = self.dictionaries[name].codes(staged.entities[name])[columns[file]]
        codes = [
            self.dictionaries[table].codes(tokens) if isinstance(tokens, pl.Series) else tokens
            for table, tokens in staged.tables.items()
        ]
        for table, each in zip(staged.tables, codes, strict=True):
            if table in self.dictionaries:  # threads have no lock for the size
                self.dictionaries[table].grow(int(each.max(initial=0)))
        if codes:
            columns["codes"] = np.concatenate(codes)
        for name, array in columns.items():
            if name not in self.files:
                width = array.shape[1] if array.ndim == 2 else None
                path = self.folder / f"{name}.npy"
                self.files[name] = ColumnFile(path, TYPES.get(name, np.int32), width)
            self.files[name].append(array)
        first = _firsts(staged.tables)
        self.spans.append(
            Span(
                rows=(start, self.rows),
                codes=self._last("codes", columns),
                tables={t: (first[t], first[t] + len(staged.tables[t])) for t in first},
                multi={
                    f.name: self._last(f"multi.{f.name}.values", columns) for f in self.plan.multi
                },
            )
        )

    def meanings(self, span: Span) -> Ids:
        """Return ``(K,)``: the code of a dictionary or bucket, or the hash, of each code."""
        return self.files["codes"].read(*span.codes)

    def close(self) -> None:
        """Close all files."""
        with ExitStack() as stack:  # all of them, even if the disk is full
            for file in self.files.values():
                stack.callback(file.close)

    def _last(self, name: str, columns: dict[str, NDArray[Any]]) -> tuple[int, int]:
        """Return start and stop of the values that were appended last."""
        if name not in columns:
            return 0, 0
        stop = self.files[name].rows
        return stop - len(columns[name]), stop
