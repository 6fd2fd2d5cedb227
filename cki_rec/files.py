"""Files and folders that are written whole or not at all, and digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK_BYTES = 1 << 18
"""They stay in a cache until they are digested."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and replace an existing one.

    Missing parent folders are created.

    Raises:
        OSError: The file cannot be written; ``filename`` is set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that is renamed to ``path`` when the block ends.

    If the block raises, the temporary folder is removed and ``path`` does not appear. Temporary
    folders that killed processes left are removed first, so callers hold a lock on ``path``.

    Raises:
        OSError: The folder cannot be created, or ``path`` is a folder that is not empty.
    """
    for leftover in path.parent.glob(f"{path.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the digest of the content of a file, in hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")
