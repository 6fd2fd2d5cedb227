"""Rows by key on disk, divided by a hash of their keys, so that a part of all keys fits in memory.

Shape legend: V rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl

from cki_rec.checkpoints.formats.keyed import KEYS, Array, Column, KeyedRows, mixed

PART_BYTES = 1 << 25
"""Bytes of the rows of a part, of all sources together."""
MOST_PARTS = 512
"""Files that are open at a time; parts of texts have two each."""
BLOCK_BYTES = 1 << 22
"""Bytes of the rows that are divided at a time."""
HASHES = "hashes"
"""Column of the hashes of texts."""
KEY, LENGTH = "key", "length"
"""Fields of a record: the key or the hash of a text, and the characters of the text."""


class Partitions:
    """The rows of one table in files of records, one file per part.

    Args:
        folder: Takes the files.
        columns: Columns beside the keys.
        num: Number of parts, a power of two.
        is_text: Keys are texts.
    """

    def __init__(
        self, folder: Path, columns: Mapping[str, Column], num: int, is_text: bool
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._beside, self._is_text = folder, columns, is_text
        self.num = num
        self.dtype = record_type(columns, is_text)

    def fill(self, blocks: Iterable[KeyedRows], advance: Callable[[int], None]) -> None:
        """Write all rows."""
        with ExitStack() as stack:
            files = [stack.enter_context(self._file(p).open("wb")) for p in range(self.num)]
            texts = [
                stack.enter_context(self._text(p).open("wb"))
                for p in range(self.num if self._is_text else 0)
            ]
            for rows in blocks:
                self._add(rows, files, texts)
                advance(len(rows[KEYS]))

    def _add(self, rows: KeyedRows, files: Sequence[BinaryIO], texts: Sequence[BinaryIO]) -> None:
        keys = rows[KEYS]
        records = np.empty(len(keys), self.dtype)
        hashes = text_hashes(keys) if self._is_text else mixed(keys)
        records[KEY] = hashes.view(np.int64) if self._is_text else keys
        if self._is_text:
            records[LENGTH] = keys.str.len_chars().to_numpy()
        for name in self._beside:
            records[name] = rows[name]
        bits = self.num.bit_length() - 1
        parts = (hashes >> np.uint64(64 - bits)).astype(np.uint16) if bits else None
        order = np.arange(len(keys)) if parts is None else np.argsort(parts, kind="stable")
        sizes = [len(keys)] if parts is None else np.bincount(parts, minlength=self.num)
        raw = records.view(np.uint8).reshape(len(keys), self.dtype.itemsize)
        raw = raw if parts is None else np.take(raw, order, axis=0)
        words = keys.gather(order).to_list() if self._is_text else []
        start = 0
        for part, size in enumerate(sizes):
            if size:
                files[part].write(raw[start : start + size].data)
                if texts:
                    texts[part].write("".join(words[start : start + size]).encode())
            start += size

    def read(self, part: int) -> KeyedRows:
        """Return the rows of a part in their order; texts as a Series."""
        records = np.fromfile(self._file(part), self.dtype)
        rows: KeyedRows = {n: np.ascontiguousarray(records[n]) for n in self._beside}
        rows[KEYS] = np.ascontiguousarray(records[KEY])
        if self._is_text:
            text = self._text(part).read_bytes().decode()
            ends = np.cumsum(records[LENGTH], dtype=np.int64).tolist()
            words = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            rows[HASHES] = rows[KEYS].view(np.uint64)
            rows[KEYS] = pl.Series(words, dtype=pl.String)
        return rows

    def _file(self, part: int) -> Path:
        return self._folder / f"{part}.rows"

    def _text(self, part: int) -> Path:
        return self._folder / f"{part}.text"


def text_hashes(texts: pl.Series) -> Array:
    """Return ``(V,)`` uint64 hashes of texts; another release of polars may have others."""
    hashes: Array = texts.hash(0).to_numpy()
    return hashes


def record_type(columns: Mapping[str, Column], is_text: bool) -> np.dtype[Any]:
    """Return the type of a record: key, length of a text, and the columns."""
    fields: list[Any] = [(KEY, np.int64), *([(LENGTH, np.uint32)] if is_text else [])]
    fields += [(name, column.dtype, (column.width,)) for name, column in columns.items()]
    return np.dtype(fields)


def number_of_parts(total_bytes: int, is_text: bool) -> int:
    """Return the power of two of parts that makes them small."""
    num, most = 1, MOST_PARTS // 2 if is_text else MOST_PARTS
    while num < most and num * PART_BYTES < total_bytes:
        num *= 2
    return num


def ids_of(rows: Sequence[KeyedRows], is_text: bool) -> list[Array]:
    """Return per source ``(V,)`` uint64 ids of the keys of one part; equal keys have equal ids.

    They are ordered in all parts, part after part, however many there are. Texts have their
    hashes as ids. If two texts share one, all texts of the part have their rank.
    """
    if not is_text:
        return [mixed(each[KEYS]) for each in rows]
    hashes = np.concatenate([each[HASHES] for each in rows])
    texts = pl.concat([each[KEYS] for each in rows])
    order = np.argsort(hashes)
    twins = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not (texts.gather(order[twins]) == texts.gather(order[twins + 1])).all():
        hashes = texts.rank("dense").cast(pl.UInt64).to_numpy()
    return np.split(hashes, np.cumsum([len(each[KEYS]) for each in rows])[:-1])


def smallest(chunks: Callable[[], Iterable[Array]], count: int) -> int:
    """Return the number at place ``count`` (from 1) of all numbers in order, in four passes.

    Args:
        chunks: Yields arrays of uint64; called once per pass.
        count: Not above the number of numbers.
    """
    found = 0
    for shift in (48, 32, 16, 0):
        histogram = np.zeros(1 << 16, np.int64)
        for chunk in chunks():
            if shift < 48:
                chunk = chunk[chunk >> np.uint64(shift + 16) == found]
            digits = (chunk >> np.uint64(shift)) & np.uint64(0xFFFF)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(histogram)
        digit = int(np.searchsorted(ends, count))
        count -= int(ends[digit - 1]) if digit else 0
        found = (found << 16) | digit
    return found
