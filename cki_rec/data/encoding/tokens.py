"""Token lists of models, which checkpoints identify by hash.

A folder with token lists is an encoded data set, or was written by ``write_tokens`` next to a
merged model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from cki_rec.config import UserError
from cki_rec.data.dataset import MANIFEST
from cki_rec.data.encoding import vocabulary
from cki_rec.files import file_digest

FOLDER = "vocabulary"
"""Folder of token lists in the run directory of a merged model."""
HASHED = "crc32 modulo "
"""Prefix of the vocabulary hash of a table whose ids are hashes, which has no tokens."""
FIX = "set merge.vocabularies to the encoded data set that the model was trained on"


def path_of(folder: Path, table: str) -> Path:
    """Return the path of the tokens of a table in a folder."""
    return folder / f"vocabulary.{table}.txt"


def read_tokens(folder: Path, table: str, digest: str) -> list[str]:
    """Return the tokens of a table in the order of ids; their hash must be ``digest``.

    Raises:
        UserError: The list is missing, different or damaged, or the ids of the table are learned
            from numbers.
    """
    path = path_of(folder, table)
    if not path.is_file():
        raise UserError(f"{path}: missing, but the model has this table; {FIX}")
    actual = file_digest(path)
    if actual == digest:
        return vocabulary.read_vocabulary(path)
    manifest = _manifest(folder) or {"files": {}, "hashes": {}}
    written = manifest["files"].get(path.stem, {}).get("sha256", actual)
    if written != actual:
        raise UserError(f"{path}: damaged: its hash differs from {MANIFEST}; encode it again")
    if manifest["hashes"].get(table) == digest:
        raise UserError(
            f"{path}: ids of table '{table}' are ranges of numbers that each data set learned, so"
            " they cannot be joined; give data.fields the same edges"
        )
    raise UserError(
        f"{path}: differs from the tokens that the model was trained with (hash {actual[:12]}, its"
        f" checkpoint has {digest[:12]}); {FIX}"
    )


def join_tokens_of(folders: Sequence[str], tables: Iterable[str]) -> dict[str, pl.Series]:
    """Return per table the tokens of all folders, in the order of first appearance.

    Args:
        folders: Encoded data sets, merged runs, or folders that ``write_tokens`` wrote.
        tables: Names of tables.

    Raises:
        UserError: A list is missing or damaged.
    """
    joined = {}
    for table in tables:
        lists = [_listed(Path(folder), table) for folder in folders]
        joined[table] = pl.concat(lists).unique(maintain_order=True)
    return joined


def _listed(folder: Path, table: str) -> pl.Series:
    nested = folder / FOLDER
    path = path_of(nested if nested.is_dir() else folder, table)
    if not path.is_file():
        raise UserError(
            f"data.vocabularies: {path}: missing, but a field has the table '{table}'; name"
            " encoded data sets or merged runs with this table"
        )
    facts = (_manifest(path.parent) or {"files": {}})["files"].get(path.stem, {})
    if facts.get("sha256", actual := file_digest(path)) != actual:
        raise UserError(f"{path}: damaged: its hash differs from {MANIFEST}; encode it again")
    try:
        return pl.Series(table, vocabulary.read_vocabulary(path), dtype=pl.String)
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.vocabularies: {path}: damaged: not UTF-8 ({error.reason}); encode it again"
        ) from None


def write_tokens(folder: Path, table: str, tokens: Iterable[str]) -> None:
    """Write the tokens of a table in the format of ``learn_vocabulary``."""
    path = path_of(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(f"{token}\n".encode() for token in tokens)


def hash_of(tokens: Iterable[str]) -> str:
    """Return the vocabulary hash of tokens in the order of ids, which is that of their file."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(f"{token}\n".encode())
    return digest.hexdigest()


def find_tokens(folders: Iterable[Path], hashes: Mapping[str, str]) -> Path | None:
    """Return the first folder with all tables and hashes of ``hashes``; None: there is none."""
    for folder in folders:
        manifest = _manifest(folder)
        if manifest is not None:
            if hashes.items() <= manifest["hashes"].items():
                return folder
        elif all(_has(path_of(folder, table), digest) for table, digest in hashes.items()):
            return folder
    return None


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return hashes and files of an encoded data set; None if the folder is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {
            "hashes": dict(manifest["schema"]["vocabulary_hashes"]),
            "files": dict(manifest["files"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
