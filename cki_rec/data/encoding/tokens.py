"""Token lists of models: found by the hash that a checkpoint names, in folders that keep them.

A folder is an encoded data set, or what ``write_tokens`` left beside a merged model.
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
"""In the run directory of a merged model: the token lists of its tables."""
HASHED = "crc32 modulo "
"""Begins the vocabulary hash of a table whose ids are hashes: it has no tokens."""
WHICH = "name the encoded data set that it was trained on in merge.vocabularies"


def path_of(folder: Path, table: str) -> Path:
    """Return where a folder keeps the tokens of a table."""
    return folder / f"vocabulary.{table}.txt"


def read_tokens(folder: Path, table: str, digest: str) -> list[str]:
    """Return the tokens of a table in the order of ids, if they are those of the hash.

    Raises:
        UserError: The folder has none, others, or damaged ones; or numbers make the table's ids,
            whose meaning is not in tokens alone.
    """
    path = path_of(folder, table)
    if not path.is_file():
        raise UserError(f"{path}: not there, but the model has such a table; {WHICH}")
    found = file_digest(path)
    if found == digest:
        return vocabulary.read_vocabulary(path)
    kept = _manifest(folder) or {"files": {}, "hashes": {}}
    written = kept["files"].get(path.stem, {}).get("sha256", found)
    if written != found:
        raise UserError(f"{path}: damaged: its hash differs from {MANIFEST}; encode it again")
    if kept["hashes"].get(table) == digest:
        raise UserError(
            f"{path}: ids of table '{table}' are ranges of numbers, learnt from each data set, so"
            " they cannot be joined; give data.fields the same edges"
        )
    raise UserError(
        f"{path}: not what the model was trained with (hash {found[:12]}, its checkpoint has"
        f" {digest[:12]}), or damaged; {WHICH}"
    )


def join_tokens_of(folders: Sequence[str], tables: Iterable[str]) -> dict[str, pl.Series]:
    """Return per table the tokens of all folders, in the order of first appearance.

    Args:
        folders: Encoded data sets, what ``write_tokens`` left, or merged runs that hold it.
        tables: Which.

    Raises:
        UserError: A list is not there, or is damaged.
    """
    found = {}
    for table in tables:
        lists = [_listed(Path(folder), table) for folder in folders]
        found[table] = pl.concat(lists).unique(maintain_order=True)
    return found


def _listed(folder: Path, table: str) -> pl.Series:
    nested = folder / FOLDER
    path = path_of(nested if nested.is_dir() else folder, table)
    if not path.is_file():
        raise UserError(
            f"data.vocabularies: {path}: not there, but a field has the table '{table}'; name"
            " encoded data sets or merged runs that have it"
        )
    kept = (_manifest(path.parent) or {"files": {}})["files"].get(path.stem, {})
    if kept.get("sha256", found := file_digest(path)) != found:
        raise UserError(f"{path}: damaged: its hash differs from {MANIFEST}; encode it again")
    try:
        return pl.Series(table, vocabulary.read_vocabulary(path), dtype=pl.String)
    except UnicodeDecodeError as error:
        raise UserError(f"data.vocabularies: {path}: damaged: no UTF-8 ({error.reason})") from None


def write_tokens(folder: Path, table: str, tokens: Iterable[str]) -> None:
    """Write the tokens of a table, one a line, as ``learn_vocabulary`` does."""
    path = path_of(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.writelines(f"{token}\n".encode() for token in tokens)


def hash_of(tokens: Iterable[str]) -> str:
    """Return the vocabulary hash of tokens in the order of ids: that of the file."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(f"{token}\n".encode())
    return digest.hexdigest()


def find_tokens(folders: Iterable[Path], hashes: Mapping[str, str]) -> Path | None:
    """Return the first folder that keeps the tables of these hashes; None: there is none."""
    for folder in folders:
        kept = _manifest(folder)
        if kept is not None:
            if hashes.items() <= kept["hashes"].items():
                return folder
        elif all(_has(path_of(folder, table), digest) for table, digest in hashes.items()):
            return folder
    return None


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return hashes and files of an encoded data set; None where there is no readable one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kept = {
            "hashes": dict(found["schema"]["vocabulary_hashes"]),
            "files": dict(found["files"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept
