"""Digests of the files of a folder, computed once per process and state of a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from cki_rec.files import file_digest


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of the files of a folder; an empty list without a folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def file_digests(folder: Path, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
    """Return the sha256 digest of the files of a folder, by name.

    A file is read again only after a change of its size or modification time.

    Args:
        folder: The folder.
        share: ``(first, step)``: every ``step``-th file, so that processes can share the work.
    """
    first, step = share
    return {name: one_digest(folder / name) for name in file_names(folder)[first::step]}


def one_digest(path: Path) -> str:
    """Return the sha256 digest of a file; it is read again only after a change."""
    status = path.stat()
    return _cached_digest(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _cached_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    return file_digest(path)
