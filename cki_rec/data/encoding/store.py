"""Encoded data sets on disk: made once, found again by what they were made from.

A data set is the folder ``<name>-<key>``; the key is a hash of the encoding options and of the raw
bytes. It appears by one rename, so a folder that exists is complete. ``hash`` in its manifest
identifies the content; which rows a parent trains on (``data.partition``) is no part of it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from cki_rec import project_root
from cki_rec.config import Data, UserError, nearest
from cki_rec.data.columns import blocks
from cki_rec.data.dataset import FORMAT_VERSION, MANIFEST, EncodedDataset
from cki_rec.data.encoding.encode import Encoded, encode
from cki_rec.data.encoding.fields import Field, fields_to_json, resolve_fields
from cki_rec.data.encoding.split import SPLITS, check_split
from cki_rec.data.encoding.tokens import hash_of, join_tokens_of
from cki_rec.data.parts import NO_PARTITION
from cki_rec.data.prefetch import prefetch
from cki_rec.data.raw.click_model import best_possible
from cki_rec.data.raw.download import fetch
from cki_rec.data.raw.formats import FORMATS, Format, recorded_name, synthetic
from cki_rec.data.raw.reading import Reading
from cki_rec.data.stored import file_facts
from cki_rec.files import file_digest, new_folder, write_atomically
from cki_rec.progress import progress

__all__ = ["EncodedDataset", "find", "prepare"]

logger = logging.getLogger(__name__)
_DIGESTS = "digests.json"
PREPARATION = "preparation.json"
"""Time and memory that a preparation took: no part of its content."""
_CONTENT_OPTIONS = (
    "format", "label", "label_threshold", "user", "item", "time", "time_form", "numeric_missing",
    "buckets", "history_length", "negatives", "negatives_seed", "on_bad_row",
)  # fmt: skip


def prepare(data: Data, encoded_dir: str | Path, chunk_mb: int = 16) -> EncodedDataset:
    """Return the encoded data set that ``data`` asks for, made now or earlier.

    Two processes that prepare at once: one works, the other waits. What a killed preparation left
    is removed by the next one of the same name.

    Args:
        data: Which data set.
        encoded_dir: The folder of encoded data sets.
        chunk_mb: Raw text encoded at a time, in MiB; no result depends on it.

    Raises:
        UserError: An option, the raw data or the folder is not usable.
    """
    reader = _reader(data)
    if data.fetch:
        _fetch(data)
    fields = resolve_fields(data, reader.kinds(data))
    _check_entities(data, reader, fields)
    encoded_dir = Path(encoded_dir)
    start = time.perf_counter()
    source = _source(data, encoded_dir)
    listed = _listed(data, fields)
    options = _options(data, fields, listed)
    folder = encoded_dir / _name(data, options, source)
    if (folder / PREPARATION).exists():
        return EncodedDataset(folder, data.verify)
    try:
        encoded_dir.mkdir(parents=True, exist_ok=True)
        lock = _acquire(encoded_dir / f"{data.name}.lock")
    except OSError as error:
        raise _unwritable(encoded_dir, error) from None
    try:
        if not folder.exists():
            _make(data, reader, fields, listed, options, folder, source, chunk_mb)
        if not (folder / PREPARATION).exists():
            _finish(data, folder, start)
    finally:
        lock.release()
    return EncodedDataset(folder, data.verify)


def find(data: Data, encoded_dir: str | Path) -> EncodedDataset | None:
    """Return the encoded data set that ``data`` asks for if it is there; make nothing.

    Raises:
        UserError: As ``prepare``.
    """
    fields = resolve_fields(data, _reader(data).kinds(data))
    encoded_dir = Path(encoded_dir)
    options = _options(data, fields, _listed(data, fields))
    folder = encoded_dir / _name(data, options, _source(data, encoded_dir))
    return EncodedDataset(folder, data.verify) if (folder / PREPARATION).exists() else None


def _reader(data: Data) -> Format:
    """Return the reader of the raw files.

    Raises:
        UserError: An option that no raw file could mend.
    """
    if data.format not in FORMATS:
        raise UserError(f"data.format={data.format}: expected one of {', '.join(FORMATS)}")
    if not re.fullmatch(r"[\w.-]+", data.name):
        raise UserError(f"data.name={data.name}: expected letters, digits, '_', '.' and '-' only")
    check_split(data.split)
    _published_files(data)
    return FORMATS[data.format]


def _name(data: Data, options: dict[str, Any], source: list[dict[str, Any]]) -> str:
    key = _hash([FORMAT_VERSION, options, [entry["sha256"] for entry in source]])[:12]
    return f"{data.name}-{key}"


def _check_entities(data: Data, reader: Format, fields: Sequence[Field]) -> None:
    """Refuse to divide rows by what they do not have, before anything is read.

    Raises:
        UserError: Rows without users or items, or with numbers for them, and an option that needs
            them.
    """
    has = {"user": reader.user(data), "item": reader.item(data)}
    by = data.partition.by
    if by in has and has[by] is None:
        raise UserError(
            f"data.partition.by={by}: these rows have no {by}s; choose random, time or none, or "
            f"name their column in data.{by}"
        )
    if data.split.by == "hash" and not any(has.values()):
        raise UserError(
            "data.split.by=hash: these rows have no users and no items; choose random or time, or "
            "name their columns in data.user and data.item"
        )
    numbers = [f.name for f in fields if f.kind == "numeric" and f.column in has.values()]
    if data.split.by == "hash" and numbers:
        raise UserError(
            f"data.split.by=hash: field {numbers[0]} makes numbers of users or items, but rows are"
            " divided by their text; choose random or time, or leave it out of data.fields"
        )
    if data.split.by == "leave_last_out" and has["user"] is None:
        raise UserError(
            "data.split.by=leave_last_out: these rows have no users; choose random or time"
        )


def _make(
    data: Data,
    reader: Format,
    fields: tuple[Field, ...],
    listed: dict[str, pl.Series] | None,
    options: dict[str, Any],
    folder: Path,
    source: list[dict[str, Any]],
    chunk_mb: int,
) -> None:
    """Encode and write ``folder``; the lock is held."""
    leftover = re.compile(re.escape(data.name) + r"-[0-9a-f]{12}\.tmp-\d+")
    for path in folder.parent.iterdir():
        if leftover.fullmatch(path.name):
            logger.info("removing %s, left by a preparation that was stopped", path)
            shutil.rmtree(path, ignore_errors=True)
    logger.info("encoding %s as %s", data.raw, folder)
    reading = Reading(data.on_bad_row, chunk_mb << 20, has_published=reader.has_published)
    num_bytes = sum(entry["size"] for entry in source)
    try:
        with new_folder(folder) as temporary:
            with progress("encoding", num_bytes, "bytes") as advance:
                reading.advance = advance
                encoded = encode(
                    prefetch(reader.read(data, reading)),
                    fields,
                    data,
                    temporary,
                    user=reader.user(data),
                    item=reader.item(data),
                    is_chronological=reader.is_chronological(data),
                    rows_per_step=reader.rows_per_step(data),
                    listed=listed,
                )
            _write_manifest(data, reader, options, encoded, reading, source, temporary)
    except OSError as error:
        raise _unwritable(folder, error) from None
    for reason, count in reading.counts.items():
        logger.info("skipped %d rows: %s, e.g. %s", count, reason, reading.examples[reason][0])


def _finish(data: Data, folder: Path, start: float) -> None:
    """Count the ids of every part, and note what the preparation took; the lock is held.

    The set itself is complete, so what fails here costs no second encoding.
    """
    for partition in (data.partition, NO_PARTITION):
        EncodedDataset(folder).parts(partition)
    facts = {
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    path = folder / PREPARATION
    try:
        write_atomically(path, json.dumps(facts).encode())
    except OSError as error:
        raise _unwritable(path, error) from None


def _write_manifest(
    data: Data,
    reader: Format,
    options: dict[str, Any],
    encoded: Encoded,
    reading: Reading,
    source: list[dict[str, Any]],
    folder: Path,
) -> None:
    files = {path.stem: file_facts(path) for path in sorted(folder.iterdir())}
    schema = encoded.schema.to_json()
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "hash": _hash([schema, options, hashes]),
        "synthetic": data.format == "synthetic",
        "source": source,
        "published": _published(data, reading.md5),
        "should_be_published_as": data.published,
        "options": options,
        "schema": schema,
        "id_columns": encoded.ids,
        "numbers": encoded.numbers,
        "quantile_edges": encoded.edges,
        "is_chronological": reader.is_chronological(data),
        "splits": encoded.splits,
        "best_possible": _best_possible(data, folder),
        "unseen_share": encoded.unseen_share,
        "skipped": {
            reason: {"count": count, "examples": reading.examples[reason]}
            for reason, count in reading.counts.items()
        },
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _best_possible(data: Data, folder: Path) -> dict[str, Any] | None:
    """Return AUC and LogLoss of the true click model per split; None where nobody knows it."""
    if data.format != "synthetic":
        return None
    logit = np.load(synthetic.true_logits(data), mmap_mode="r")
    split = np.load(folder / "split.npy", mmap_mode="r")

    def logits(code: int) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        for start, stop in blocks(len(logit)):
            yield logit[start:stop][split[start:stop] == code]

    return {name: best_possible(logits(code)) for code, name in enumerate(SPLITS)}


def _published(data: Data, found: dict[str, str]) -> dict[str, str | None]:
    """Return which published file each raw file is, by the md5 of its content; None: of none."""
    registry, wanted = _published_files(data)
    names = {
        md5: f"{name}/{file}" for name, files in registry.items() for file, md5 in files.items()
    }
    for file, md5 in found.items():
        expected = wanted.get(file.removesuffix(".csv"), md5)
        if md5 != expected:
            what = f"{file} is not the file published as {data.published} (md5 {md5}, published"
            if data.fetch:
                raise UserError(f"{data.raw}: {what} {expected}); delete it and fetch it again")
            logger.warning("%s %s): results are not comparable", what, expected)
    return {file: names.get(md5) for file, md5 in found.items()}


def _published_files(data: Data) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return all published files, and those that ``data`` should be: file -> md5.

    Raises:
        UserError: ``data.published`` is no entry.
    """
    registry = cast(
        dict[str, dict[str, str]],
        OmegaConf.to_container(OmegaConf.load(project_root() / "conf" / "published.yaml")),
    )
    if data.published is not None and data.published not in registry:
        raise UserError(
            f"data.published={data.published}: {nearest(data.published, registry)}"
            f"expected one of {', '.join(registry)}"
        )
    return registry, registry.get(data.published or "", {})


def _fetch(data: Data) -> None:
    """Download the raw file, unless it is there.

    Raises:
        UserError: It cannot be fetched by a program, or the download failed.
    """
    if not isinstance(data.raw, str):
        raise UserError(f"data.raw={data.raw}: expected one path to download to")
    if data.format == "synthetic" or glob.glob(data.raw):
        return
    target = Path(data.raw)
    if data.download.url is None:
        raise UserError(
            f"{target}: not there, and no program may fetch it: {data.download.by_hand}; then put "
            "it there or set data.raw"
        )
    fetch(data.download.url, target, md5=data.download.md5)


def _listed(data: Data, fields: tuple[Field, ...]) -> dict[str, pl.Series] | None:
    """Return the tokens that ``data.vocabularies`` gives every table; None: they are learnt.

    Raises:
        UserError: A list is not there; or numbers are learnt from rows, which no list holds.
    """
    if not data.vocabularies:
        return None
    for field in fields:
        if field.learns:
            raise UserError(
                f"data.vocabularies: what field '{field.name}' becomes ({field.transform}) is"
                " learnt from the rows at hand, so it would mean other things than before; give it"
                " transform: as_is, ln_squared, edges or token"
            )
    tables = dict.fromkeys(f.table for f in fields if not f.is_number and f.hash_size is None)
    return join_tokens_of(data.vocabularies, tables)


def _options(
    data: Data, fields: tuple[Field, ...], listed: dict[str, pl.Series] | None
) -> dict[str, Any]:
    """Return the options that decide the encoded content, and no other."""
    options: dict[str, Any] = {name: getattr(data, name) for name in _CONTENT_OPTIONS}
    options["format"] = recorded_name(data.format)
    if data.format == "synthetic":
        options["synthetic"] = asdict(data.synthetic)
    if listed is not None:  # where the lists are does not matter
        options["vocabularies"] = {table: hash_of(tokens) for table, tokens in listed.items()}
    return {**options, "fields": fields_to_json(fields), "split": asdict(data.split)}


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
    for path in FORMATS[data.format].files(data):
        try:
            facts = path.stat()
            stamp = [facts.st_size, facts.st_mtime_ns]
            entry = cache.get(str(path.resolve()))
            if not isinstance(entry, list) or entry[:2] != stamp:
                entry = [*stamp, file_digest(path)]
                cache[str(path.resolve())] = entry
                is_changed = True
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        source.append({"name": path.name, "size": facts.st_size, "sha256": entry[2]})
    if is_changed:
        try:
            write_atomically(cache_path, json.dumps(cache, indent=1).encode())
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


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written: {error.strerror or error}; free space or set "
        "runtime.encoded to a folder that can be written"
    )
