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
"""Folder of token lists in the run directory of a model."""
CHECKPOINT = "checkpoint"
"""Name of the checkpoint folder beside it."""
NUMBERS = "numbers.json"
"""File in it with learned facts of numbers: shift and scale of log1p, edges of quantiles."""
HASHED = "crc32 modulo "
"""Prefix of the vocabulary hash of a table whose ids are hashes, which has no tokens."""
_BLOCK = 1 << 20
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
    if manifest["hashes"].get(table) == digest or _has(path, table, digest):
        raise UserError(
            f"{path}: ids of table '{table}' are ranges of numbers that each data set learned, so"
            " they cannot be joined; give data.fields the same edges, or data.numbers_from"
        )
    raise UserError(
        f"{path}: differs from the tokens that the model was trained with (hash {actual[:12]}, its"
        f" checkpoint has {digest[:12]}); {FIX}"
    )


def join_tokens_of(
    folders: Sequence[str], tables: Iterable[str], option: str = "data.vocabularies"
) -> dict[str, pl.Series]:
    """Return per table the tokens of all folders, in the order of first appearance.

    Args:
        folders: Encoded data sets, runs, or folders that ``write_tokens`` wrote.
        tables: Names of tables.
        option: The option that names the folders, for messages.

    Raises:
        UserError: A list is missing or damaged.
    """
    joined = {}
    for table in tables:
        lists = [_listed(home_of(folder), table, option) for folder in folders]
        joined[table] = pl.concat(lists).unique(maintain_order=True)
    return joined


def home_of(folder: str) -> Path:
    """Return the folder that holds token lists: that of a run, or an encoded data set itself."""
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return path
    nested = (path.parent if path.name == CHECKPOINT else path) / FOLDER
    return nested if nested.is_dir() else path


def number_facts(home: Path) -> dict[str, dict[str, list[float]]]:
    """Return the learned facts of numbers in a folder of token lists or an encoded data set.

    Returns:
        ``numbers`` (field -> shift and scale) and ``quantile_edges`` (field -> edges).

    Raises:
        UserError: The file is missing or damaged.
    """
    is_set = (home / MANIFEST).is_file()
    path = home / (MANIFEST if is_set else NUMBERS)
    keys = ("numbers", "quantile_edges")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {str(n): [float(x) for x in values] for n, values in content[key].items()}
            for key in keys
        }
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; name an encoded data set, or a run of this release"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); encode or train it again") from None


def _listed(folder: Path, table: str, option: str) -> pl.Series:
    path = path_of(folder, table)
    if not path.is_file():
        raise UserError(
            f"{option}: {path}: missing, but a field has the table '{table}'; name"
            " encoded data sets or runs with this table"
        )
    facts = (_manifest(path.parent) or {"files": {}})["files"].get(path.stem, {})
    if facts.get("sha256", actual := file_digest(path)) != actual:
        raise UserError(f"{path}: damaged: its hash differs from {MANIFEST}; encode it again")
    try:
        return pl.Series(table, vocabulary.read_vocabulary(path), dtype=pl.String)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}: {path}: damaged: not UTF-8 ({error.reason}); encode it again"
        ) from None


def begins_with(path: Path, other: Path) -> bool:
    """Return whether a token list begins with all tokens of another one; reads them in blocks."""
    if not path.is_file() or not other.is_file():
        return False
    with path.open("rb") as longer, other.open("rb") as shorter:
        while block := shorter.read(_BLOCK):
            if longer.read(len(block)) != block:
                return False
    return True


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
        elif all(_has(path_of(folder, table), table, digest) for table, digest in hashes.items()):
            return folder
    return None


def _has(path: Path, table: str, digest: str) -> bool:
    """Return whether a file holds the tokens of a table, with the edges of its buckets if any."""
    if not path.is_file():
        return False
    actual, edges = file_digest(path), None
    if (path.parent / NUMBERS).is_file():
        edges = number_facts(path.parent)["quantile_edges"].get(table)
    return digest == (actual if edges is None else digest_with(actual, edges))


def list_digests(home: Path) -> dict[str, str]:
    """Return table -> sha256 of its token list, of all lists in a folder."""
    manifest = _manifest(home) or {"files": {}}
    digests = {}
    for path in home.glob("vocabulary.*.txt"):
        known = manifest["files"].get(path.stem, {}).get("sha256")
        digests[path.stem.removeprefix("vocabulary.")] = known or file_digest(path)
    return digests


def digest_with(digest: str | None, facts: Sequence[float]) -> str:
    """Return the vocabulary hash of a field with learned facts of numbers.

    Args:
        digest: Hash of its tokens; None: it has none.
        facts: Shift and scale, or edges.
    """
    return hashlib.sha256(json.dumps([digest, list(facts)]).encode()).hexdigest()


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
