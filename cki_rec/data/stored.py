"""Files of an encoded data set: their recorded facts, their checks and how they are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import UserError
from cki_rec.files import file_digest

HEADER_BYTES = 128
"""Size of a ``.npy`` file without rows."""


def file_facts(path: Path) -> dict[str, Any]:
    """Return the facts that ``check_file`` and ``open_column`` compare a file with."""
    facts: dict[str, Any] = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }
    if path.suffix == ".npy":
        array = load_array(path, is_empty=facts["bytes"] <= HEADER_BYTES)
        facts.update(dtype=str(array.dtype), shape=list(array.shape))
    return facts


def check_file(folder: Path, facts: dict[str, Any], verify: str) -> None:
    """Compare a file with its recorded facts.

    Args:
        folder: Folder of the file.
        facts: Result of ``file_facts``.
        verify: ``fast`` compares the size, ``full`` the digest too.

    Raises:
        UserError: The file is missing, unreadable or changed.
    """
    path = folder / facts["file"]
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise damaged(path, f"{size:,} bytes, expected {facts['bytes']:,}")
        if verify == "full" and file_digest(path) != facts["sha256"]:
            raise damaged(path, "its content has changed since it was written")
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: The file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except ValueError as error:
        raise damaged(path, f"not JSON ({error})") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def load_array(path: Path, is_empty: bool = False) -> NDArray[Any]:
    """Return an array, memory-mapped unless it is empty.

    Raises:
        UserError: The file is missing, unreadable or not an array.
    """
    try:
        array: NDArray[Any] = np.load(
            path, mmap_mode=None if is_empty else "r", allow_pickle=False
        )
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except (ValueError, EOFError) as error:
        raise damaged(path, str(error)) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return array


def open_column(folder: Path, facts: dict[str, Any]) -> NDArray[Any]:
    """Return one column, memory-mapped.

    Raises:
        UserError: The file cannot be opened, or its type or shape differs from ``facts``.
    """
    path = folder / facts["file"]
    array = load_array(path, is_empty=0 in facts["shape"])
    if list(array.shape) != facts["shape"] or str(array.dtype) != facts["dtype"]:
        expected = f"{facts['dtype']} {facts['shape']}"
        raise damaged(path, f"{array.dtype} {list(array.shape)}, expected {expected}")
    return array


def damaged(path: Path, problem: str) -> UserError:
    """Return the error for a file of an encoded data set that has changed since it was written."""
    return UserError(
        f"{path}: damaged: {problem}; delete the folder {path.parent}, it is then prepared again"
    )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read: {error.strerror}; make the file readable or set runtime.encoded"
    )
