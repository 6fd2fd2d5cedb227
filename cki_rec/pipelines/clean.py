"""Delete leftovers, caches and runs that nothing refers to, after a list of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cki_rec.config import Config
from cki_rec.engine.record import RECORD, REMADE, Run
from cki_rec.pipelines.names import names_of
from cki_rec.pipelines.run_list import RUN_ID, folders, reported, size_of
from cki_rec.pipelines.teacher import TEACHERS

GROUPS = {
    "leftovers of unfinished runs": ("leftovers", "all"),
    "caches, which are computed again when they are read": ("leftovers", "all"),
    "runs that no name, no report and no kept run refers to": ("all",),
}
"""Title -> the values of ``delete`` that delete it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """A file or folder that may be deleted."""

    path: Path
    lock: Path
    """File whose lock shows that a program is at work there."""


def run(config: Config) -> None:
    """Log everything that may be deleted, by group; delete the groups that ``delete`` names."""
    out, encoded = Path(config.runtime.out), Path(config.runtime.encoded)
    groups = (
        [*_unfinished(out), *_leftovers_of_encoding(encoded)],
        list(_caches(out)),
        [_item(out, folder) for folder in unreferenced(out)],
    )
    total, left = 0, False
    for (title, words), items in zip(GROUPS.items(), groups, strict=True):
        sizes = [(item, size_of(item.path)) for item in items if not _is_locked(item.lock)]
        if not sizes:
            continue
        is_deleted = config.delete in words
        log.info("%s%s:", "deleted: " if is_deleted else "", title)
        for item, size in sizes:
            if is_deleted and not _delete(item):
                continue
            total += size
            log.info("  %8.1f MB  %s", size / 1e6, item.path)
        left = left or not is_deleted
    if not total and not left:
        log.info("nothing to clean in %s", out)
        return
    log.info("%.1f MB in all", total / 1e6)
    if left:
        log.info(
            "delete=leftovers deletes leftovers and caches, delete=all also the runs; name a run"
            " to keep it, e.g. cki-rec train name=monday"
        )


def unreferenced(out: Path) -> list[Path]:
    """Return the finished runs that no name, no report and no kept run refers to."""
    finished = {f.name: f / RECORD for f in folders(out) if Run(f).record is not None}
    kept, new = set[str](), {*names_of(out).values(), *(run_id for _, run_id in reported(out))}
    while new := {run_id for run_id in new if run_id in finished} - kept:
        kept |= new
        new = {other for run_id in new for other in RUN_ID.findall(finished[run_id].read_text())}
    return [out / run_id for run_id in sorted(finished) if run_id not in kept]


def _item(out: Path, folder: Path) -> Item:
    return Item(folder, out / "locks" / f"{folder.name}.lock")


def _unfinished(out: Path) -> Iterator[Item]:
    """Yield runs without a record, and runs that were to replace finished ones."""
    for folder in [*folders(out), *folders(out / REMADE)]:
        if folder.parent.name == REMADE or not (folder / RECORD).exists():
            yield _item(out, folder)


def _leftovers_of_encoding(encoded: Path) -> Iterator[Item]:
    for folder in sorted(encoded.glob("*-" + "[0-9a-f]" * 12 + ".tmp-*")):
        name = folder.name.rpartition("-")[0].rpartition("-")[0]
        yield Item(folder, encoded / f"{name}.lock")


def _caches(out: Path) -> Iterator[Item]:
    """Yield stored scores that are no part of a result."""
    for folder in folders(out):
        record = Run(folder).record
        files = {} if record is None else record["provenance"].get("files", {})
        for path in sorted(folder.glob("logits-*.npz")) if record is not None else []:
            if path.name not in files:
                yield Item(path, out / "locks" / f"{folder.name}.lock")
    for path in sorted((out / TEACHERS).glob("*.npz")):
        yield Item(path, out / "locks" / f"{TEACHERS}.lock")


def _is_locked(lock: Path) -> bool:
    try:
        with _held(lock):
            return False
    except Timeout:
        return True


def _delete(item: Item) -> bool:
    """Delete an item; return whether it is gone, which it is not if a program is at work there."""
    try:
        with _held(item.lock):
            if item.path.is_dir():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold a lock; without its file, nobody has it.

    Raises:
        Timeout: A program holds it.
    """
    if not lock.exists():
        yield
        return
    with FileLock(lock, timeout=0):
        yield
