"""Rows in the common form -> splits, vocabularies and columns of ids on disk.

Text is read once, into codes (``staging``). All later passes read integers, by chunk or by block,
so memory holds the vocabularies and a few chunks, whatever the number of rows. The result depends
on rows and options alone, not on chunks, threads, processes or machines.

Facts about other rows that enter an encoded row are learned from training rows only: the tokens,
the order of their ids, and the items that a user liked before.

Shape legend: N rows, C columns of ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.columns import DOMAINS, ColumnFile, Ints, blocks
from cki_rec.data.encoding.earlier import NOTHING, Earlier
from cki_rec.data.encoding.engines import NUM_THREADS
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.history import write_history
from cki_rec.data.encoding.lookup import count_chunk, look_up, read_by_chunks
from cki_rec.data.encoding.normalize import id_columns
from cki_rec.data.encoding.numbers import (
    bucket_codes,
    key_values,
    ordered_keys,
    quantile_edges,
    standardize,
)
from cki_rec.data.encoding.split import (
    SPLITS,
    check_sizes,
    codes_by_key,
    draw_validation,
    share,
    split_codes,
)
from cki_rec.data.encoding.staging import DOMAIN, ITEM, USER, Staging, plan_columns, stage
from cki_rec.data.encoding.tokens import digest_with
from cki_rec.data.encoding.vocabulary import (
    Vocabulary,
    checked_size,
    frequent_tokens,
    hashed_vocabulary,
    learn_vocabulary,
    write_listed_vocabulary,
)
from cki_rec.data.prefetch import Run, one_by_one, threads
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.raw.reading import Reading, draws_validation
from cki_rec.data.schema import Feature, FeatureSchema


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of an encoding; its columns are files of the folder."""

    schema: FeatureSchema
    ids: list[str]
    """Names of the columns of ``ids.npy``."""
    numbers: dict[str, list[float]]
    """Numeric field -> shift and scale: a number x became (x - shift) / scale."""
    ranges: dict[str, dict[str, float | None]]
    """Numeric field -> smallest and largest number, and deviation in training rows."""
    edges: dict[str, list[float]]
    """Field of quantile buckets -> largest value of each bucket but the last."""
    splits: dict[str, dict[str, float | None]]
    """Split -> rows and positive rate (None without rows)."""
    unseen_share: dict[str, dict[str, float | None]]
    """Field -> split -> share of ids that are ``OOV_ID``; None: there are no ids."""


def encode(
    chunks: Iterable[Chunk | Check],
    reading: Reading,
    fields: tuple[Field, ...],
    data: Data,
    folder: Path,
    *,
    user: str | None,
    item: str | None,
    is_chronological: bool = False,
    rows_per_step: int = 1,
    earlier: Earlier = NOTHING,
    run: Run = one_by_one,
    is_local: bool = True,
) -> Encoded:
    """Encode rows into the columns of a data set.

    A vocabulary holds the tokens of at least ``min_count`` training rows, ordered by (-count,
    token). All other tokens share ``OOV_ID``. A missing value is the token ``""``. If a listed
    history shares the table, its occurrences and those of the other fields are counted apart. A
    token then enters the vocabulary if one of the two counts reaches ``min_count``, as in FuxiCTR.
    Occurrences in a history include repetitions and ids beyond ``max_length``.

    A history of liked items holds, by time, the latest ``data.history_length`` items that the user
    liked (label 1) in TRAINING rows with a strictly smaller timestamp. So no label of a validation
    or test row enters any input.

    Args:
        chunks: The rows, and checks of the pass over them.
        reading: State of the pass; receives the bad rows.
        fields: The fields to encode.
        data: Options of split, histories and numbers.
        folder: An empty folder; receives ``.npy`` columns and ``vocabulary.<table>.txt``.
        user: Column of users.
        item: Column of items.
        is_chronological: Whether rows without times are in chronological order.
        rows_per_step: Consecutive rows of one user that form one step in time.
        earlier: Facts that are not learned from these rows.
        run: Runs functions of chunks, here or elsewhere; results do not depend on it.
        is_local: Whether it runs them in this process, where they can share dictionaries.

    Raises:
        UserError: An option is impossible for these rows.
    """
    plan = plan_columns(fields, user, item, data.numeric_missing, data.buckets)
    plan.is_keyed = data.split.by == "hash"
    plan.domain, plan.domains = data.partition.column, data.partition.values
    if data.normalize_ids:
        plan.normalized = id_columns(fields, (user, item, data.partition.column))
    with closing(Staging(folder, plan)) as columns:
        shared = columns.dictionaries if is_local else {}
        for staged in run(partial(stage, plan, shared, reading.fork()), chunks):
            if isinstance(staged, Check):
                staged.run(reading)
            else:
                reading.merge(staged.reading, staged.num_read)
                columns.append(staged)
        if not columns.rows:
            kept = f" with a {data.partition.by} of data.partition.parts" if plan.domains else ""
            raise UserError(f"{data.raw}: no usable row{kept}; see data.on_bad_row")
        _finish_entities(columns)
        splits = _split(columns, data, is_chronological, rows_per_step, bool(data.vocabularies))
        edges = _bucket_quantiles(columns, earlier.edges)
        vocabularies = _vocabularies(columns, earlier, run)
        unseen = look_up(columns, vocabularies, run)
        numbers, ranges = _standardize(columns, earlier.numbers)
        schema = _schema(fields, vocabularies, {**numbers, **edges})
        of_earlier_rows = {field.name for field in fields if field.rows == "earlier"}
        for name, source in plan.histories.items():
            unseen[name] = write_history(
                columns, name, source, data.history_length, name in of_earlier_rows
            )
    shares = {f.name: unseen[f.name] for f in fields if f.name in unseen}
    names = [f.name for f in plan.ids]
    return Encoded(schema, names, numbers, ranges, edges, splits, shares)


def _finish_entities(columns: Staging) -> None:
    """Replace codes of users, items and domains by indices in the order of their tokens."""
    for name, target in ((USER, "group"), (ITEM, "item_index"), (DOMAIN, "domain")):
        if name not in columns.dictionaries:
            continue
        tokens, file = columns.dictionaries.pop(name).tokens(), columns.files[target]
        is_held = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in blocks(file.rows):
            is_held[file.read(start, stop)] = True
        if name == DOMAIN:
            values = tokens.filter(is_held).sort().to_list()
            (columns.folder / DOMAINS).write_text(json.dumps(values), encoding="utf-8")
        rank = np.zeros(len(tokens), dtype=np.int32)
        rank[is_held] = (tokens.filter(is_held).rank("ordinal") - 1).to_numpy()
        for start, stop in blocks(file.rows):
            file.write(start, rank[file.read(start, stop)])


def _split(
    columns: Staging, data: Data, is_chronological: bool, rows_per_step: int, is_listed: bool
) -> dict[str, dict[str, float | None]]:
    """Write the split of every row; return rows and positive rate of each."""
    files, split = columns.files, data.split
    if split.by == "hash":
        key, files["split"] = files.pop("key"), ColumnFile(columns.folder / "split.npy", np.uint8)
        for block in codes_by_key(split, key):
            files["split"].append(block)
        key.delete()
    elif split.by != "files":
        if split.by == "time" and "timestamp" not in files and not is_chronological:
            raise UserError(
                "data.split.by=time: these rows have no times; name their column in data.time, or "
                "set it to random"
            )
        codes = split_codes(
            split,
            columns.rows,
            group=files["group"].mapped() if "group" in files else None,
            timestamp=files["timestamp"].mapped() if "timestamp" in files else None,
            rows_per_step=rows_per_step,
            scratch=columns.folder,
        )
        files["split"] = ColumnFile(columns.folder / "split.npy", np.uint8)
        for block in codes:
            files["split"].append(block)
    elif "split" not in files:
        raise UserError(
            f"data.split.by=files: the files of {data.raw} define no split; set it to random or "
            "time"
        )
    elif draws_validation(split):
        draw_validation(split, files["split"])
    sizes, clicks = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for start, stop in blocks(columns.rows):
        code = files["split"].read(start, stop)
        sizes += np.bincount(code, minlength=3)
        clicks += np.bincount(code[files["label"].read(start, stop) == 1], minlength=3)
    check_sizes(split, sizes.tolist(), is_listed)
    if sizes[0] and clicks[0] in (0, sizes[0]):
        label = int(clicks[0] > 0)
        if FORMATS[data.format].has_threshold:
            where = f"data.label_threshold={data.label_threshold}"
            fix = "choose a threshold inside the range of ratings"
        else:
            where = f"{data.raw}"
            fix = "a model cannot learn from one class, set data.label or another data.split"
        raise UserError(f"{where}: all training rows have label {label}; {fix}")
    return {
        name: {"rows": int(rows), "positive_rate": share(int(positive), int(rows))}
        for name, rows, positive in zip(SPLITS, sizes, clicks, strict=True)
    }


def _bucket_quantiles(
    columns: Staging, fixed: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Replace the numbers of quantile fields by codes of buckets; return the edges.

    Args:
        columns: The columns.
        fixed: Edges of fields that are not learned.
    """
    plan, files = columns.plan, columns.files
    edges_of: dict[str, list[float]] = {}
    if not plan.quantiles:
        return {}
    keys, split = files["quantiles"], files["split"]
    for number, column in enumerate(plan.quantiles):
        known = (
            keys.read(start, stop)[split.read(start, stop) == 0, number]
            for start, stop in blocks(keys.rows)
        )
        if column.name in fixed:
            edges = ordered_keys(np.array(fixed[column.name], dtype=np.float64))
        else:
            edges = quantile_edges(known, plan.buckets, columns.folder)
        edges_of[column.name] = key_values(edges).tolist()
        fill_buckets(columns, number, edges)
    files.pop("quantiles").delete()
    return edges_of


def fill_buckets(columns: Staging, number: int, edges: Ints) -> None:
    """Write the codes of the buckets of one quantile field, the ``number``-th one."""
    plan, keys, ids = columns.plan, columns.files["quantiles"], columns.files["ids"]
    column = plan.quantiles[number]
    position = plan.ids.index(column)
    for span in columns.spans:
        start, stop = span.rows
        block = ids.read(start, stop)
        codes = bucket_codes(keys.read(start, stop)[:, number], edges)
        block[:, position] = span.tables[column.table][0] + codes
        ids.write(start, block)


def _count_training_rows(columns: Staging, run: Run) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """Return counts of codes in training rows per table: total ones, and those for ``min_count``.

    A total count sums over the fields of a table. The second dictionary has only tables with a
    listed history. Its count is the largest among each such history and all other fields together.
    """
    counts = {
        table: np.zeros(dictionary.size, dtype=np.int64)
        for table, dictionary in columns.dictionaries.items()
    }
    listed = [f for f in columns.plan.multi if f.kind == "history" and f.hash_size is None]
    of_history = {f.name: np.zeros_like(counts[f.table]) for f in listed}
    task = partial(count_chunk, read_by_chunks(columns), columns.plan.multi)
    for span, found in zip(columns.spans, run(task, columns.spans), strict=True):
        codes = columns.meanings(span) if span.tables else np.zeros(0, np.int32)
        places = {t: slice(*span.tables[t]) for t in counts if t in span.tables}
        for table, place in places.items():  # codes of a table are distinct
            counts[table][codes[place]] += found[None][place]
        for f in listed:
            of_history[f.name][codes[places[f.table]]] += found[f.name][places[f.table]]
    deciding: dict[str, Ints] = {}
    for f in listed:
        count = of_history[f.name]
        deciding[f.table] = np.maximum(deciding.get(f.table, counts[f.table]), count)
        counts[f.table] = counts[f.table] + count
    return counts, deciding


def _vocabularies(columns: Staging, earlier: Earlier, run: Run) -> dict[str, Vocabulary]:
    """Write the vocabulary of every table; each dictionary is freed afterwards.

    It is learned from training rows, or listed, or listed with new tokens of training rows.
    """
    every = {f.table: f for f in reversed([*columns.plan.ids, *columns.plan.multi])}
    listed = {**earlier.tokens, **earlier.buckets}
    are_fixed = not earlier.grows and columns.dictionaries.keys() <= listed.keys()
    counts, deciding = ({}, {}) if are_fixed else _count_training_rows(columns, run)

    def write(column: Field) -> Vocabulary:
        table = column.table
        if column.hash_size is not None:
            return hashed_vocabulary(column.hash_size)
        path = columns.folder / f"vocabulary.{table}.txt"
        tokens = columns.dictionaries.pop(table).tokens()
        count, decide = counts.pop(table, None), deciding.pop(table, None)
        known = listed.get(table)
        if known is None:
            assert count is not None
            return learn_vocabulary(table, tokens, count, column.min_count, path, decide)
        if earlier.grows and table not in earlier.buckets:
            assert count is not None
            frequent = frequent_tokens(tokens, count, column.min_count, decide)["token"]
            known = pl.concat([known, frequent.rename(known.name)]).unique(maintain_order=True)
        checked_size(table, len(known))
        return write_listed_vocabulary(tokens, known, path)

    with threads(NUM_THREADS) as run_all:
        return dict(zip(every, run_all(write, every.values()), strict=True))


def _schema(
    fields: tuple[Field, ...],
    vocabularies: dict[str, Vocabulary],
    numbers: dict[str, list[float]],
) -> FeatureSchema:
    """Return the schema; facts learned about numbers enter the hashes of their fields."""
    kinds = {"numeric": "categorical", "time": "categorical"}
    features = tuple(
        Feature(f.name, "", "numeric")
        if f.is_number
        else Feature(f.name, f.table, kinds.get(f.kind, f.kind))
        for f in fields
    )
    tables = dict.fromkeys(f.table for f in features if f.kind != "numeric")
    hashes = {table: vocabularies[table].hash for table in tables}
    for name, facts in numbers.items():
        hashes[name] = digest_with(hashes.get(name), facts)
    return FeatureSchema(
        features=features,
        table_sizes={table: vocabularies[table].size for table in tables},
        vocabulary_hashes=hashes,
    )


def _standardize(
    columns: Staging, fixed: Mapping[str, Sequence[float]]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float | None]]]:
    """Write standardized numbers; return shift and scale per field, and facts about its values."""
    fields, files = columns.plan.numbers, columns.files
    if not fields:
        return {}, {}
    is_scaled = np.array([field.transform == "log1p" for field in fields])
    files["numbers"] = ColumnFile(columns.folder / "numbers.npy", np.float32, len(fields))
    raw = files.pop("raw_numbers")
    known = np.array([fixed.get(field.name, (np.nan, np.nan)) for field in fields])
    facts = standardize(raw, files["numbers"], files["split"], is_scaled, known.T)
    raw.delete()
    shifts: dict[str, list[float]] = {}
    ranges: dict[str, dict[str, float | None]] = {}
    for field, column in zip(fields, facts.T.tolist(), strict=True):
        shifts[field.name] = column[:2]
        values = [None if np.isnan(value) else value for value in column[2:]]
        ranges[field.name] = dict(zip(("low", "high", "deviation"), values, strict=True))
    return shifts, ranges
