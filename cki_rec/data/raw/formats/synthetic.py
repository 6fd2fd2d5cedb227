"""Synthetic data: raw files in a published format, written by a known click model on first use.

Files go to ``data.raw``, in one folder per set of options. The reader of the published format
(``data.synthetic.layout``) reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from cki_rec.config import Data, UserError
from cki_rec.data.raw.chunks import Check, Chunk
from cki_rec.data.raw.formats import avazu, criteo, movielens
from cki_rec.data.raw.reading import Reading
from cki_rec.files import new_folder

READERS: dict[str, tuple[Any, str]] = {
    "criteo": (criteo, "train.txt"),
    "avazu": (avazu, "train.csv"),
    "movielens": (movielens, ""),
}
"""Layout -> module that reads it, and the file to read; empty: the folder."""
logger = logging.getLogger(__name__)


def as_published(data: Data) -> Data:
    """Return the options that read the files in their published format; write absent files.

    Raises:
        UserError: An option is impossible, or the folder is not writable.
    """
    options = asdict(data.synthetic)
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    if not isinstance(data.raw, str):
        raise UserError(f"data.raw={data.raw}: expected the folder of synthetic files")
    folder = Path(data.raw) / f"synthetic-{data.synthetic.layout}-{key}"
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not folder.exists():
                    _write(data, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror or error}; free space or set data.raw "
            "to a writable folder"
        ) from None
    name = READERS[data.synthetic.layout][1]
    return replace(data, format=data.synthetic.layout, raw=str(folder / name))


def files(data: Data) -> list[Path]:
    """Return the files on disk that the rows depend on."""
    paths: list[Path] = READERS[data.synthetic.layout][0].files(as_published(data))
    return paths


def kinds(data: Data) -> dict[str, str]:
    """Return the kind of every field."""
    kinds_of: dict[str, str] = READERS[data.synthetic.layout][0].kinds(as_published(data))
    return kinds_of


def user(data: Data) -> str | None:
    """Return the column of users."""
    return "user" if data.synthetic.layout == "movielens" else None


def item(data: Data) -> str | None:
    """Return the column of items."""
    return "item" if data.synthetic.layout == "movielens" else None


def chunks(data: Data, reading: Reading) -> Iterator[Chunk | Check]:
    """Yield the rows."""
    yield from READERS[data.synthetic.layout][0].chunks(as_published(data), reading)


def true_logits(data: Data) -> Path:
    """Return the file of true logits, one per row."""
    return files(data)[0].parent / "logit.npy"


def _write(data: Data, folder: Path) -> None:
    """Write ``folder`` whole or not at all; the caller holds the lock."""
    from cki_rec.data.raw.click_model import write_raw  # slow, and workers do not need it

    logger.info("writing %s synthetic rows to %s", f"{data.synthetic.rows:,}", folder)
    with new_folder(folder) as temporary:
        write_raw(data.synthetic, temporary)
