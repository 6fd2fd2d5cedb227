"""Encoded data sets on disk: made once, found again by what they were made from.

A data set is the folder ``<name>-<key>``; the key is a hash of the encoding options and of the raw
bytes. It appears by one rename, so a folder that exists is complete. ``hash`` in its manifest
identifies the content; which rows a parent trains on (``data.partition``) is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cki_rec.config import Data, UserError
from cki_rec.data.dataset import (
    FORMAT_VERSION,
    MANIFEST,
    RAGGED,
    EncodedDataset,
    summary_lines,
    unseen_share,
)
from cki_rec.data.encode import SPLITS, Encoded, Ragged, check_options, encode
from cki_rec.data.formats import FORMATS
from cki_rec.data.raw import BadRows, RawRows

__all__ = ["EncodedDataset", "prepare", "summary_lines"]

logger = logging.getLogger(__name__)
_DIGESTS = "digests.json"


def prepare(data: Data, encoded_dir: str | Path) -> EncodedDataset:
    """Return the encoded data set that ``data`` asks for, made now or earlier.

    Two processes that prepare at once: one works, the other waits. What a killed preparation left
    is removed by the next one of the same name.

    Raises:
        UserError: An option, the raw data or the folder is not usable.
    """
    if data.format not in FORMATS:
        raise UserError(f"data.format={data.format}: expected one of {', '.join(FORMATS)}")
    if not re.fullmatch(r"[\w.-]+", data.name):
        raise UserError(f"data.name={data.name}: expected letters, digits, '_', '.' and '-' only")
    check_options(data)
    encoded_dir = Path(encoded_dir)
    source = _source(data, encoded_dir)
    key = _hash([FORMAT_VERSION, _options(data), [entry["sha256"] for entry in source]])[:12]
    folder = encoded_dir / f"{data.name}-{key}"
    if folder.exists():
        return EncodedDataset(folder)
    try:
        encoded_dir.mkdir(parents=True, exist_ok=True)
        lock = _acquire(encoded_dir / f"{data.name}.lock")
    except OSError as error:
        raise _unwritable(encoded_dir, error) from None
    try:
        if not folder.exists():
            _make(data, folder, source)
    finally:
        lock.release()
    return EncodedDataset(folder)


def _make(data: Data, folder: Path, source: list[dict[str, Any]]) -> None:
    """Encode and write ``folder``; the lock is held."""
    leftover = re.compile(re.escape(data.name) + r"-[0-9a-f]{12}\.tmp-\d+")
    for path in folder.parent.iterdir():
        if leftover.fullmatch(path.name):
            logger.info("removing %s, left by a preparation that was stopped", path)
            shutil.rmtree(path, ignore_errors=True)
    logger.info("encoding %s as %s", data.raw, folder)
    raw = FORMATS[data.format].read(Path(data.raw), data.fields, data.on_bad_row)
    for reason, entry in _skipped(raw.bad_rows).items():
        logger.info("skipped %d rows: %s, e.g. %s", entry["count"], reason, entry["examples"][0])
    encoded = encode(raw, data)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        _write(encoded, raw, data, source, temporary)
        temporary.rename(folder)
    except OSError as error:
        raise _unwritable(temporary, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    encoded: Encoded, raw: RawRows, data: Data, source: list[dict[str, Any]], folder: Path
) -> None:
    """Write columns and vocabularies, the manifest last."""
    columns = {name: _save(folder, name, array) for name, array in _columns(encoded)}
    for table, tokens in encoded.vocabularies.items():
        path = folder / f"vocabulary.{table}.json"
        path.write_text(json.dumps(tokens, indent=0), encoding="utf-8")
    schema = encoded.schema.to_json()
    hashes = {name: entry["sha256"] for name, entry in columns.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "hash": _hash([schema, _options(data), hashes]),
        "synthetic": False,
        "source": source,
        "options": _options(data),
        "schema": schema,
        "splits": _split_facts(encoded),
        "unseen_share": _unseen(encoded),
        "skipped": _skipped(raw.bad_rows),
        "columns": columns,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _columns(encoded: Encoded) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in ("label", "split", "timestamp", "group", "item_index"):
        yield name, getattr(encoded, name)
    for name, column in encoded.fields.items():
        if isinstance(column, Ragged):
            for piece in RAGGED:
                yield f"field.{name}.{piece}", getattr(column, piece)
        else:
            yield f"field.{name}", column


def _save(folder: Path, name: str, array: NDArray[Any]) -> dict[str, Any]:
    path = folder / f"{name}.npy"
    np.save(path, array, allow_pickle=False)
    return {
        "file": path.name,
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "bytes": path.stat().st_size,
        "sha256": _file_sha256(path),
    }


def _split_facts(encoded: Encoded) -> dict[str, dict[str, float]]:
    facts = {}
    for code, name in enumerate(SPLITS):
        label = encoded.label[encoded.split == code]
        facts[name] = {"rows": len(label), "positive_rate": float(label.mean())}
    return facts


def _unseen(encoded: Encoded) -> dict[str, dict[str, float | None]]:
    """Return the share of unseen ids per field in validation and test."""
    held_out = {name: np.flatnonzero(encoded.split == SPLITS.index(name)) for name in SPLITS[1:]}
    shares = {}
    for feature in encoded.schema.features:
        size = encoded.schema.table_sizes[feature.table]
        column = encoded.fields[feature.name]
        shares[feature.name] = {
            name: unseen_share(column, rows, size) for name, rows in held_out.items()
        }
    return shares


def _skipped(bad_rows: BadRows) -> dict[str, dict[str, Any]]:
    return {
        reason: {"count": count, "examples": bad_rows.examples[reason]}
        for reason, count in bad_rows.counts.items()
    }


def _options(data: Data) -> dict[str, Any]:
    """Return the options that decide the encoded content, and no other."""
    names = (
        "format", "fields", "label_threshold", "history_length", "min_count", "on_bad_row",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(data, name) for name in names}
    return {**options, "fields": list(data.fields), "split": asdict(data.split)}


def _source(data: Data, encoded_dir: Path) -> list[dict[str, Any]]:
    """Return name, size and sha256 of each raw file; digests of unchanged files are reused."""
    cache_path = encoded_dir / _DIGESTS
    try:
        cache = json.loads(cache_path.read_text(encoding="utf-8"))
        cache = cache if isinstance(cache, dict) else {}
    except (OSError, ValueError):
        cache = {}
    source = []
    is_changed = False
    for path in FORMATS[data.format].files(Path(data.raw)):
        try:
            facts = path.stat()
            stamp = [facts.st_size, facts.st_mtime_ns]
            entry = cache.get(str(path.resolve()))
            if not isinstance(entry, list) or entry[:2] != stamp:
                entry = [*stamp, _file_sha256(path)]
                cache[str(path.resolve())] = entry
                is_changed = True
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        source.append({"name": path.name, "size": facts.st_size, "sha256": entry[2]})
    if is_changed:
        try:
            encoded_dir.mkdir(parents=True, exist_ok=True)
            temporary = cache_path.with_name(f"{_DIGESTS}.tmp-{os.getpid()}")
            temporary.write_text(json.dumps(cache, indent=1), encoding="utf-8")
            temporary.replace(cache_path)
        except OSError as error:  # only a cache: the folder may be read-only and complete
            logger.debug("%s not written: %s", cache_path, error)
    return source


def _acquire(path: Path) -> FileLock:
    """Return the lock, held."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting: another process prepares this data set (%s)", path)
        lock.acquire()
    return lock


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written: {error.strerror or error}; free space or set "
        "runtime.encoded to a folder that can be written"
    )
