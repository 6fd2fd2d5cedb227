"""Rows in the common form -> splits, vocabularies, columns of ids on disk.

Text is read once, into codes (``provisional``); what follows are passes over integers, block by
block, so memory holds the vocabularies and a block, however many rows there are. The result is a
function of rows and options: no chunk, thread or machine changes a byte of it.

Whatever an encoded row says about other rows (which tokens exist and how their ids are ordered,
what the user liked before) is learnt from training rows only.

Shape legend: N rows, M ids of a field with several ids a row, C columns of ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.columns import RAGGED, ColumnFile, Ids, Ints, add_counts, blocks
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.history import write_history
from cki_rec.data.encoding.numbers import bucket_codes, key_values, quantile_edges, standardize
from cki_rec.data.encoding.split import (
    SPLITS,
    check_sizes,
    codes_by_key,
    draw_validation,
    share,
    split_codes,
)
from cki_rec.data.encoding.staging import ITEM, USER, Staging, plan_columns
from cki_rec.data.encoding.vocabulary import (
    Vocabulary,
    hashed_vocabulary,
    learn_vocabulary,
    write_listed_vocabulary,
)
from cki_rec.data.raw.reading import draws_validation
from cki_rec.data.schema import OOV_ID, Feature, FeatureSchema


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoding found; the columns are files of its folder."""

    schema: FeatureSchema
    ids: list[str]
    """Names of the columns of ``ids.npy``."""
    numbers: dict[str, list[float]]
    """Numeric field -> what was subtracted, and then divided by."""
    edges: dict[str, list[float]]
    """Field of quantile buckets -> largest value of each bucket but the last."""
    splits: dict[str, dict[str, float]]
    unseen_share: dict[str, dict[str, float | None]]
    """Field -> split -> share of unseen ids; None: no ids."""


def encode(
    chunks: Iterable[pl.DataFrame],
    fields: tuple[Field, ...],
    data: Data,
    folder: Path,
    *,
    user: str | None,
    item: str | None,
    is_chronological: bool = False,
    rows_per_step: int = 1,
    listed: Mapping[str, pl.Series] | None = None,
) -> Encoded:
    """Write the data set that ``data`` asks for into ``folder``.

    Vocabularies hold the tokens of at least ``min_count`` training rows, by (-count, token); all
    other tokens share ``OOV_ID``. A missing value is the token ``""``. Where a history that a
    raw column lists shares a table, a token stays if the history, with repetitions and before it
    is cut to ``max_length``, or the other fields hold it ``min_count`` times, as in FuxiCTR.

    Any other history holds, by time, the latest ``data.history_length`` items that the user liked
    (label 1) in TRAINING rows with a strictly smaller timestamp. No label of a validation or test
    row enters any input.

    Args:
        chunks: Rows in the common form of ``cki_rec.data.raw.reading``.
        fields: What to encode.
        data: Split, history and options of numbers.
        folder: Empty; holds ``.npy`` columns and ``vocabulary.<table>.txt`` afterwards.
        user: Column that names the user of a row.
        item: Column that names the item of a row.
        is_chronological: Whether rows without times stand in the order of time.
        rows_per_step: Rows of one user that stand together for one step in time.
        listed: Table -> its tokens in the order of ids, all other tokens share ``OOV_ID``;
            None: vocabularies are learnt, as above.

    Raises:
        UserError: An option is impossible for these rows.
    """
    plan = plan_columns(fields, user, item, data.numeric_missing, data.buckets)
    plan.is_keyed = data.split.by == "hash"
    with closing(Staging(folder, plan)) as columns:
        for chunk in chunks:
            columns.append(chunk)
        if not columns.rows:
            raise UserError(f"{data.raw}: no usable row; see data.on_bad_row")
        _finish_entities(columns)
        splits = _split(columns, data, is_chronological, rows_per_step)
        edges = _bucket_quantiles(columns)
        if listed is None:
            vocabularies = _vocabularies(columns, *_count_training_rows(columns))
        else:
            vocabularies = _given_vocabularies(columns, listed)
        unseen = _look_up(columns, vocabularies)
        numbers = _standardize(columns)
        schema = _schema(fields, vocabularies, {**numbers, **edges})
        earlier = {field.name for field in fields if field.rows == "earlier"}
        for name, source in plan.histories.items():
            unseen[name] = write_history(
                columns, name, source, data.history_length, name in earlier
            )
    shares = {f.name: unseen[f.name] for f in fields if f.name in unseen}
    return Encoded(schema, [f.name for f in plan.ids], numbers, edges, splits, shares)


def _finish_entities(columns: Staging) -> None:
    """Turn codes of users and items into indices by the order of tokens, whatever the codes."""
    for name, target in ((USER, "group"), (ITEM, "item_index")):
        if name not in columns.dictionaries:
            continue
        tokens, file = columns.dictionaries.pop(name).tokens(), columns.files[target]
        is_held = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in blocks(file.rows):
            is_held[file.read(start, stop)] = True
        rank = np.zeros(len(tokens), dtype=np.int32)
        rank[is_held] = (tokens.filter(is_held).rank("ordinal") - 1).to_numpy()
        for start, stop in blocks(file.rows):
            file.write(start, rank[file.read(start, stop)])


def _split(
    columns: Staging, data: Data, is_chronological: bool, rows_per_step: int
) -> dict[str, dict[str, float]]:
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
                "choose random"
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
            f"data.split.by=files: {data.raw} does not come divided; choose random or time"
        )
    elif draws_validation(split):
        draw_validation(split, files["split"])
    sizes, clicks = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for start, stop in blocks(columns.rows):
        code = files["split"].read(start, stop)
        sizes += np.bincount(code, minlength=3)
        clicks += np.bincount(code[files["label"].read(start, stop) == 1], minlength=3)
    check_sizes(split, sizes.tolist())
    if clicks[0] in (0, sizes[0]):
        label = int(clicks[0] > 0)
        mend = "a model cannot learn from one class"
        if data.format == "movielens":
            mend = "choose a threshold inside the range of ratings"
            where = f"data.label_threshold={data.label_threshold}"
        else:
            where = f"{data.raw}"
        raise UserError(f"{where}: all training rows have label {label}; {mend}")
    return {
        name: {"rows": int(rows), "positive_rate": int(positive) / int(rows)}
        for name, rows, positive in zip(SPLITS, sizes, clicks, strict=True)
    }


def _bucket_quantiles(columns: Staging) -> dict[str, list[float]]:
    """Replace numbers that become quantile buckets by the codes of their buckets; return edges."""
    plan, files, found = columns.plan, columns.files, {}
    if not plan.quantiles:
        return {}
    keys, ids, split = files["quantiles"], files["ids"], files["split"]
    for number, column in enumerate(plan.quantiles):
        position = plan.ids.index(column)
        known = (
            keys.read(start, stop)[split.read(start, stop) == 0, number]
            for start, stop in blocks(keys.rows)
        )
        edges = quantile_edges(known, plan.buckets, columns.folder)
        found[column.name] = key_values(edges).tolist()
        for start, stop in blocks(keys.rows):
            block = ids.read(start, stop)
            block[:, position] = bucket_codes(keys.read(start, stop)[:, number], edges)
            ids.write(start, block)
    files.pop("quantiles").delete()
    return found


def _count_training_rows(columns: Staging) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """Return, per table, how often training rows hold each code, and the count that keeps it.

    The first sums up the fields of a table. The second, for tables with a listed history, is the
    largest of the counts of each such history and of all other fields together.
    """
    plan, files = columns.plan, columns.files
    counts = {
        table: np.zeros(dictionary.size, dtype=np.int64)
        for table, dictionary in columns.dictionaries.items()
    }
    for start, stop in blocks(columns.rows):
        is_train = files["split"].read(start, stop) == 0
        block = files["ids"].read(start, stop)[is_train] if plan.ids else None
        for position, column in enumerate(plan.ids):
            if column.hash_size is None and block is not None:
                add_counts(counts[column.table], block[:, position])
    deciding: dict[str, Ints] = {}
    for column in sorted(plan.multi, key=lambda c: c.kind == "history"):
        if column.hash_size is not None:
            continue
        total = counts[column.table]
        own = np.zeros_like(total) if column.kind == "history" else total
        for start, stop, values, lengths in _multi_blocks(columns, column):
            is_train = np.repeat(files["split"].read(start, stop) == 0, lengths)
            add_counts(own, values[is_train])
        if column.kind == "history":
            deciding[column.table] = np.maximum(deciding.get(column.table, total), own)
            counts[column.table] = total + own
    return counts, deciding


def _vocabularies(
    columns: Staging, counts: dict[str, Ints], deciding: dict[str, Ints]
) -> dict[str, Vocabulary]:
    """Write the vocabulary of every table; dictionaries are let go one by one."""
    found: dict[str, Vocabulary] = {}
    for column in [*columns.plan.ids, *columns.plan.multi]:
        table = column.table
        if table in found:
            continue
        if column.hash_size is not None:
            found[table] = hashed_vocabulary(column.hash_size)
            continue
        tokens = columns.dictionaries.pop(table).tokens()
        path = columns.folder / f"vocabulary.{table}.txt"
        decide = deciding.pop(table, None)
        found[table] = learn_vocabulary(
            table, tokens, counts.pop(table), column.min_count, path, decide
        )
    return found


def _given_vocabularies(
    columns: Staging, listed: Mapping[str, pl.Series]
) -> dict[str, Vocabulary]:
    """Write the vocabularies that are given; dictionaries are let go one by one."""
    found: dict[str, Vocabulary] = {}
    for column in [*columns.plan.ids, *columns.plan.multi]:
        table = column.table
        if column.hash_size is not None:
            found[table] = hashed_vocabulary(column.hash_size)
        elif table not in found:
            tokens = columns.dictionaries.pop(table).tokens()
            path = columns.folder / f"vocabulary.{table}.txt"
            found[table] = write_listed_vocabulary(tokens, listed[table], path)
    return found


def _schema(
    fields: tuple[Field, ...],
    vocabularies: dict[str, Vocabulary],
    numbers: dict[str, list[float]],
) -> FeatureSchema:
    """Return the schema; what was learnt about numbers is part of what their fields mean."""
    kinds = {"numeric": "categorical", "time": "categorical"}
    features = tuple(
        Feature(f.name, "", "numeric")
        if f.is_number
        else Feature(f.name, f.table, kinds.get(f.kind, f.kind))
        for f in fields
    )
    tables = dict.fromkeys(f.table for f in features if f.kind != "numeric")
    hashes = {table: vocabularies[table].hash for table in tables}
    for name, learnt in numbers.items():
        text = json.dumps([hashes.get(name), learnt])
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return FeatureSchema(
        features=features,
        table_sizes={table: vocabularies[table].size for table in tables},
        vocabulary_hashes=hashes,
    )


def _look_up(
    columns: Staging, vocabularies: dict[str, Vocabulary]
) -> dict[str, dict[str, float | None]]:
    """Replace codes by ids; return the share of unseen ids per field in validation and test."""
    plan, files = columns.plan, columns.files
    totals = np.zeros(3, dtype=np.int64)
    unseen = np.zeros((3, len(plan.ids)), dtype=np.int64)
    for start, stop in blocks(columns.rows):
        split = files["split"].read(start, stop)
        totals += np.bincount(split, minlength=3)
        if not plan.ids:
            continue
        block = files["ids"].read(start, stop)
        for position, column in enumerate(plan.ids):
            if column.hash_size is None:
                id_of_code = vocabularies[column.table].id_of_code
                block[:, position] = id_of_code[block[:, position]]
        files["ids"].write(start, block)
        for code in (1, 2):
            unseen[code] += (block[split == code] == OOV_ID).sum(0)
    shares: dict[str, dict[str, float | None]] = {
        column.name: {
            name: share(unseen[code, position], totals[code])
            for code, name in enumerate(SPLITS)
            if code
        }
        for position, column in enumerate(plan.ids)
    }
    for column in plan.multi:
        shares[column.name] = _look_up_multi(columns, column, vocabularies[column.table])
    return shares


def _look_up_multi(
    columns: Staging, column: Field, vocabulary: Vocabulary
) -> dict[str, float | None]:
    """Replace codes by ids, return the unseen shares.

    The unseen tokens of a set become one id; a history is cut to its length.
    """
    name = f"multi.{column.name}"
    unseen, totals = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    types: dict[str, type[np.generic]] = dict(values=np.int32, starts=np.int64, lengths=np.int32)
    pieces = {
        piece: ColumnFile(columns.folder / f"field.{column.name}.{piece}.npy", types[piece])
        for piece in RAGGED
    }
    for start, stop, codes, code_lengths in _multi_blocks(columns, column):
        ids = codes if column.hash_size is not None else vocabulary.id_of_code[codes]
        if column.kind == "multi":
            values, lengths = _one_unseen_a_row(ids, code_lengths)
        else:
            values, lengths = _cut(ids, code_lengths, column.max_length, column.keep)
        ends = pieces["values"].rows + np.cumsum(lengths, dtype=np.int64)
        pieces["values"].append(values)
        pieces["starts"].append(ends - lengths)
        pieces["lengths"].append(lengths)
        split = np.repeat(columns.files["split"].read(start, stop), lengths)
        totals += np.bincount(split, minlength=3)
        unseen += np.bincount(split[values == OOV_ID], minlength=3)
    for piece in ("values", "lengths"):
        columns.files.pop(f"{name}.{piece}").delete()
    columns.files.update({f"field.{column.name}.{piece}": file for piece, file in pieces.items()})
    return {n: share(unseen[code], totals[code]) for code, n in enumerate(SPLITS) if code}


def _one_unseen_a_row(ids: Ids, lengths: Ids) -> tuple[Ids, Ids]:
    """Return the rows with all but the first unseen id of each row dropped."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    unseen = np.flatnonzero(ids == OOV_ID)
    is_kept = np.ones(len(ids), dtype=np.bool_)
    is_kept[unseen[1:][row[unseen[1:]] == row[unseen[:-1]]]] = False
    return ids[is_kept], np.bincount(row[is_kept], minlength=len(lengths)).astype(np.int32)


def _cut(ids: Ids, lengths: Ids, most: int | None, keep: str | None) -> tuple[Ids, Ids]:
    """Return the rows with at most ``most`` ids each, the ``latest`` or the ``first``."""
    if most is None:
        return ids, lengths
    ends = np.cumsum(lengths, dtype=np.int64)
    limits = ends if keep == "latest" else ends - lengths
    place = np.arange(len(ids)) - np.repeat(limits, lengths)
    is_kept = place >= -most if keep == "latest" else place < most
    return ids[is_kept], np.minimum(lengths, most)


def _multi_blocks(columns: Staging, column: Field) -> Iterator[tuple[int, int, Ids, Ids]]:
    """Yield start and stop of every block of rows, its codes and their number per row."""
    name, position = f"multi.{column.name}", 0
    for start, stop in blocks(columns.rows):
        lengths = columns.files[f"{name}.lengths"].read(start, stop)
        end = position + int(lengths.sum(dtype=np.int64))
        yield start, stop, columns.files[f"{name}.values"].read(position, end), lengths
        position = end


def _standardize(columns: Staging) -> dict[str, list[float]]:
    """Standardize numbers; return what was subtracted from and divided by, per field."""
    fields = columns.plan.numbers
    if not fields:
        return {}
    is_scaled = np.array([field.transform == "log1p" for field in fields])
    facts = standardize(columns.files["numbers"], columns.files["split"], is_scaled)
    return {field.name: facts[:, position].tolist() for position, field in enumerate(fields)}
