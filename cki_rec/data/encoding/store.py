"""Encoded data sets on disk: written once, and identified by options and raw files.

A data set is the folder ``<name>-<key>``. The key is a hash of the encoding options and of the raw
bytes. The folder appears by one rename, so a folder that exists is complete. ``hash`` in its
manifest identifies the content. ``data.partition`` does not enter either hash, unless its parts
are values of a column: then this column is stored, and rows of other values are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from cki_rec.config import PARTITIONS, Config, Data, UserError, nearest
from cki_rec.data.columns import blocks
from cki_rec.data.dataset import FORMAT_VERSION, MANIFEST, EncodedDataset
from cki_rec.data.encoding import engines
from cki_rec.data.encoding.earlier import Earlier, earlier_facts
from cki_rec.data.encoding.encode import Encoded, encode
from cki_rec.data.encoding.engines import NUM_THREADS
from cki_rec.data.encoding.fields import Field, fields_to_json, resolve_fields
from cki_rec.data.encoding.findings import log_unseen, warn_of_findings
from cki_rec.data.encoding.split import SPLITS, check_split
from cki_rec.data.parts import NO_PARTITION
from cki_rec.data.prefetch import Run, threads
from cki_rec.data.raw.click_model import best_possible
from cki_rec.data.raw.content import file_names
from cki_rec.data.raw.formats import FORMATS, Format, recorded_name
from cki_rec.data.raw.reading import Reading
from cki_rec.data.raw.source import (
    fetch_if_absent,
    published_files,
    published_names,
    source_facts,
)
from cki_rec.data.stored import file_facts
from cki_rec.files import new_folder, write_atomically
from cki_rec.progress import progress

__all__ = ["EncodedDataset", "find", "prepare", "prepared"]

logger = logging.getLogger(__name__)
PREPARATION = "preparation.json"
"""File with time and memory of a preparation; it is not part of the content."""
_CONTENT_OPTIONS = (
    "format", "label", "label_threshold", "user", "item", "time", "time_form", "numeric_missing",
    "buckets", "history_length", "negatives", "negatives_seed", "on_bad_row",
)  # fmt: skip


def prepared(config: Config) -> EncodedDataset:
    """Encode the data set of a configuration, unless it is encoded already, and open it.

    Raises:
        UserError: An option, the raw data or the folder is not usable.
    """
    runtime = config.runtime
    return prepare(config.data, runtime.encoded, runtime.chunk_mb, runtime.workers, runtime.engine)


def prepare(
    data: Data,
    encoded_dir: str | Path,
    chunk_mb: int = 16,
    workers: int = 1,
    engine: str = "processes",
) -> EncodedDataset:
    """Encode the data set ``data``, unless it is encoded already, and open it.

    If two processes prepare the same name, one encodes and the other waits. Leftovers of killed
    preparations of this name are removed.

    Args:
        data: Options of the data set.
        encoded_dir: The folder of encoded data sets.
        chunk_mb: MiB of raw text to encode at a time; results do not depend on it.
        workers: Processes that encode, see ``engines.engine``; results do not depend on them.
        engine: ``processes`` or ``ray``.

    Raises:
        UserError: An option, the raw data or the folder is not usable.
    """
    reader = _reader(data)
    if data.fetch:
        fetch_if_absent(data)
    data = reader.resolve(data)
    fields = resolve_fields(data, reader.kinds(data))
    _check_entities(data, reader, fields)
    encoded_dir = Path(encoded_dir)
    start = time.perf_counter()
    source = source_facts(data, encoded_dir)
    earlier = earlier_facts(data, fields)
    options = _options(data, fields, earlier)
    folder = encoded_dir / _name(data, options, source)
    if (folder / PREPARATION).exists():
        return _opened(folder, data)
    try:
        encoded_dir.mkdir(parents=True, exist_ok=True)
        lock = _acquire(encoded_dir / f"{data.name}.lock")
    except OSError as error:
        raise _unwritable(encoded_dir, error) from None
    try:
        if not folder.exists():
            run, is_local = engines.engine(engine, workers), engines.is_local(engine, workers)
            _make(data, reader, fields, earlier, options, folder, source, chunk_mb, run, is_local)
        if not (folder / PREPARATION).exists():
            _finish(data, folder, start)
    finally:
        lock.release()
    return _opened(folder, data)


def find(data: Data, encoded_dir: str | Path) -> EncodedDataset | None:
    """Return the encoded data set ``data`` if it exists, else None; encode nothing.

    Raises:
        UserError: An option or the raw data is not usable.
    """
    reader = _reader(data)
    data = reader.resolve(data)
    fields = resolve_fields(data, reader.kinds(data))
    encoded_dir = Path(encoded_dir)
    options = _options(data, fields, earlier_facts(data, fields))
    folder = encoded_dir / _name(data, options, source_facts(data, encoded_dir))
    return EncodedDataset(folder, data.verify) if (folder / PREPARATION).exists() else None


def raw_digests(data: Data, encoded_dir: str | Path) -> set[str]:
    """Return the sha256 of every raw file; fetch and encode nothing.

    Raises:
        UserError: An option or the raw data is not usable.
    """
    data = _reader(data).resolve(data)
    return {file["sha256"] for file in source_facts(data, Path(encoded_dir))}


def _opened(folder: Path, data: Data) -> EncodedDataset:
    """Return an encoded data set, and log warnings about it."""
    dataset = EncodedDataset(folder, data.verify)
    warn_of_findings(dataset)
    return dataset


def _reader(data: Data) -> Format:
    """Return the reader of the raw files, after all checks that need no raw file.

    Raises:
        UserError: An option is impossible for every raw file.
    """
    if data.format not in FORMATS:
        raise UserError(f"data.format={data.format}: expected one of {', '.join(FORMATS)}")
    check_split(data.split)
    published_files(data)
    return FORMATS[data.format]


def _name(data: Data, options: dict[str, Any], source: list[dict[str, Any]]) -> str:
    key = _hash([FORMAT_VERSION, options, [entry["sha256"] for entry in source]])[:12]
    return f"{data.name}-{key}"


def _check_entities(data: Data, reader: Format, fields: Sequence[Field]) -> None:
    """Check that rows have the users and items that split and partition require.

    Raises:
        UserError: They are missing or numeric.
    """
    has = {"user": reader.user(data), "item": reader.item(data)}
    by = data.partition.by
    _check_domain(data, reader)
    if by in has and has[by] is None:
        raise UserError(
            f"data.partition.by={by}: these rows have no {by}s; set it to random, time or none, "
            f"or name their column in data.{by}"
        )
    if data.split.by == "hash" and not any(has.values()):
        raise UserError(
            "data.split.by=hash: these rows have neither users nor items; set it to random or "
            "time, or name their columns in data.user and data.item"
        )
    numbers = [f.name for f in fields if f.kind == "numeric" and f.column in has.values()]
    if data.split.by == "hash" and numbers:
        raise UserError(
            f"data.split.by=hash: requires the text of users and items, and field {numbers[0]} is"
            " numeric; set it to random or time, or remove the field from data.fields"
        )
    if data.split.by == "leave_last_out" and has["user"] is None:
        raise UserError(
            "data.split.by=leave_last_out: these rows have no users; set it to random or time"
        )


def _check_domain(data: Data, reader: Format) -> None:
    """Check that rows have the column whose values are parts.

    Raises:
        UserError: They have not, or its cells list several values.
    """
    by, known = data.partition.by, reader.kinds(data)
    if data.partition.column is None:
        return
    if by == "file" and not reader.has_free_kinds:
        raise UserError(
            f"data.partition.by=file: requires data.format=csv or parquet (got {data.format}); set"
            " it to user, item, time or random"
        )
    columns = [name for name, kind in known.items() if kind in ("categorical", "numeric")]
    if by != "file" and by not in columns:
        choices = list(dict.fromkeys([*PARTITIONS, *columns]))
        problem = f"a column of kind {known[by]}, expected one value a row" if by in known else ""
        raise UserError(
            f"data.partition.by={by}: {problem or f'no column of {data.raw}'}; "
            f"{nearest(by, choices)}one of {', '.join(choices)}"
        )


def _make(
    data: Data,
    reader: Format,
    fields: tuple[Field, ...],
    earlier: Earlier,
    options: dict[str, Any],
    folder: Path,
    source: list[dict[str, Any]],
    chunk_mb: int,
    engine: AbstractContextManager[Run],
    is_local: bool,
) -> None:
    """Encode and write ``folder``; the caller holds the lock."""
    leftover = re.compile(re.escape(data.name) + r"-[0-9a-f]{12}\.tmp-\d+")
    for path in folder.parent.iterdir():
        if leftover.fullmatch(path.name):
            logger.info("removing %s, a leftover of a killed preparation", path)
            shutil.rmtree(path, ignore_errors=True)
    logger.info("encoding %s as %s", data.raw, folder)
    reading = Reading(data.on_bad_row, chunk_mb << 20, has_published=reader.has_published)
    num_bytes = sum(entry["size"] for entry in source)
    try:
        with new_folder(folder) as temporary:
            with progress("encoding", num_bytes, "bytes") as advance:
                reading.advance = advance
                with engine as run:
                    encoded = encode(
                        reader.chunks(data, reading),
                        reading,
                        fields,
                        data,
                        temporary,
                        user=reader.user(data),
                        item=reader.item(data),
                        is_chronological=reader.is_chronological(data),
                        rows_per_step=reader.rows_per_step(data),
                        earlier=earlier,
                        run=run,
                        is_local=is_local,
                    )
            _write_manifest(data, reader, options, encoded, reading, source, temporary)
    except OSError as error:
        raise _unwritable(folder, error) from None
    except UserError as error:
        if not reading.counts:
            raise
        raise UserError(f"{error} (skipped before: {reading.summary()})") from None
    log_unseen(EncodedDataset(folder))
    for reason, count in reading.counts.items():
        logger.info("skipped %d rows: %s, e.g. %s", count, reason, reading.examples[reason][0])


def _finish(data: Data, folder: Path, start: float) -> None:
    """Partition the rows and record time and memory; the caller holds the lock.

    The encoded set is complete by now, so a failure here does not repeat the encoding.
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
    paths = sorted(folder.iterdir())
    with threads(NUM_THREADS) as run:
        files = dict(zip((path.stem for path in paths), run(file_facts, paths), strict=True))
    schema = encoded.schema.to_json()
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "hash": _hash([schema, options, hashes]),
        "synthetic": reader.true_logits is not None,
        "source": source,
        "published": published_names(data, reading.md5),
        "should_be_published_as": data.published,
        "options": options,
        "schema": schema,
        "id_columns": encoded.ids,
        "numbers": encoded.numbers,
        "number_ranges": encoded.ranges,
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
    """Return AUC and LogLoss of the true click model per split; None if it is unknown.

    It is unknown too if rows of other domains are left out.
    """
    true_logits = FORMATS[data.format].true_logits
    if true_logits is None or data.partition.values is not None:
        return None
    logit = np.load(true_logits(data), mmap_mode="r")
    split = np.load(folder / "split.npy", mmap_mode="r")

    def logits(code: int) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        for start, stop in blocks(len(logit)):
            yield logit[start:stop][split[start:stop] == code]

    return {name: best_possible(logits(code)) for code, name in enumerate(SPLITS)}


def _options(data: Data, fields: tuple[Field, ...], earlier: Earlier) -> dict[str, Any]:
    """Return the options that the encoded content depends on."""
    options: dict[str, Any] = {name: getattr(data, name) for name in _CONTENT_OPTIONS}
    options["format"] = recorded_name(data.format)
    if data.time_form == "auto":
        options["time_form"] = "seconds"  # of formats that do not read it
    options |= FORMATS[data.format].recorded_forms(data)
    if data.normalize_ids:
        options["normalize_ids"] = True
    if FORMATS[data.format].true_logits is not None:
        options["synthetic"] = asdict(data.synthetic)
    if data.partition.column is not None:
        options["domain"] = {"column": data.partition.column, "values": data.partition.values}
        if data.partition.by == "file":
            options["domain"]["files"] = list(
                file_names(FORMATS[data.format].files(data)).values()
            )
    return {
        **options,
        **earlier.options(),
        "fields": fields_to_json(fields),
        "split": asdict(data.split),
    }


def _acquire(path: Path) -> FileLock:
    """Return the acquired lock."""
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
        "runtime.encoded to a writable folder"
    )
