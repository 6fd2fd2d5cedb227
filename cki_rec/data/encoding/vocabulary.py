"""Tokens -> ids: dictionaries that grow chunk by chunk, vocabularies and hashes.

Shape legend: T tokens of a dictionary, V ids of a table.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cki_rec.config import UserError
from cki_rec.data.columns import FIRST_ID, OOV_ID, Ids, Ints
from cki_rec.files import file_digest

LARGEST_TABLE = 2**31 - 1
"""Largest number of ids of a table, since ids are int32."""


class Dictionary:
    """All tokens so far, each with a code; codes are in no particular order.

    Args:
        tokens: Fixed tokens in the order of codes; None: the dictionary grows.
    """

    def __init__(self, tokens: list[str] | None = None) -> None:
        self._fixed = tokens
        self.size = 1 if tokens is None else len(tokens)
        """T."""
        self._categories = pl.Categories.random()
        # polars drops the mapping if no series uses it; the missing token has code 0
        self._keep = pl.Series([""], dtype=self.dtype)

    @property
    def dtype(self) -> pl.Categorical:
        """Return the polars type whose physical values are codes."""
        return pl.Categorical(self._categories)

    def grow(self, code: int) -> None:
        """Record that ``code`` and all smaller codes exist.

        Raises:
            UserError: There are more tokens than ids.
        """
        if code >= LARGEST_TABLE:
            raise UserError(
                f"data.fields: a field has more than {LARGEST_TABLE:,} different tokens; hash it: "
                "{name: ..., hash_size: 100000000}"
            )
        self.size = max(self.size, code + 1)

    def codes(self, tokens: pl.Series) -> Ids:
        """Return the code of every token, 0 if it is missing; new tokens get new codes.

        Raises:
            UserError: There are more tokens than ids.
        """
        physical = tokens.cast(self.dtype).to_physical().fill_null(0).to_numpy()
        self.grow(int(physical.max(initial=0)))
        codes: Ids = physical.view(np.int32)
        return codes

    def tokens(self) -> pl.Series:
        """Return ``(T,)`` tokens in the order of codes."""
        if self._fixed is not None:
            return pl.Series(self._fixed, dtype=pl.String)
        codes = pl.Series(np.arange(self.size, dtype=np.uint32))
        return codes.cat.to(self.dtype).cast(pl.String).fill_null("")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a table, and the id of every code."""

    size: int
    """V, reserved ids included."""
    hash: str
    """sha256 of the tokens in the order of ids."""
    id_of_code: Ids
    """``(T,)`` id of each code."""


def learn_vocabulary(
    table: str,
    tokens: pl.Series,
    counts: Ints,
    min_count: int,
    path: Path,
    deciding: Ints | None = None,
) -> Vocabulary:
    """Learn a vocabulary from counts, and write it: one token per line in the order of ids.

    Args:
        table: Name of the table, for messages.
        tokens: ``(T,)`` tokens in the order of codes.
        counts: ``(T,)`` number of training rows with each token.
        min_count: Fewest rows of a token; rarer tokens share ``OOV_ID``.
        path: Path of the file.
        deciding: ``(T,)`` counts to compare with ``min_count``; None: ``counts``.

    Raises:
        UserError: There are more tokens than ids.
    """
    listed = frequent_tokens(tokens, counts, min_count, deciding)
    size = checked_size(table, len(listed))
    ids = np.full(len(tokens), OOV_ID, dtype=np.int32)
    ids[listed["code"].to_numpy()] = np.arange(FIRST_ID, size, dtype=np.int32)
    listed.select("token").write_csv(path, include_header=False, quote_style="never")
    return Vocabulary(size, file_digest(path), ids)


def frequent_tokens(
    tokens: pl.Series, counts: Ints, min_count: int, deciding: Ints | None = None
) -> pl.DataFrame:
    """Return ``code`` and ``token`` of the tokens of a vocabulary, ordered by (-count, token).

    The arguments are those of ``learn_vocabulary``.
    """
    codes = pl.Series("code", np.arange(len(tokens), dtype=np.uint32))
    frame = pl.DataFrame({"code": codes, "token": tokens, "count": counts})
    is_frequent = (counts if deciding is None else deciding) >= min_count
    listed = frame.filter(pl.Series(is_frequent))
    return listed.sort(["count", "token"], descending=[True, False])


def checked_size(table: str, num_tokens: int) -> int:
    """Return the number of ids of a table with so many tokens.

    Raises:
        UserError: There are more than ids.
    """
    size = FIRST_ID + num_tokens
    if size > LARGEST_TABLE:
        raise UserError(
            f"data.fields: table {table} has {size:,} ids, expected at most {LARGEST_TABLE:,}; "
            f"raise data.min_count or hash the field: {{name: {table}, hash_size: 100000000}}"
        )
    return size


def write_listed_vocabulary(tokens: pl.Series, listed: pl.Series, path: Path) -> Vocabulary:
    """Write a vocabulary that is a list of tokens, in the format of ``learn_vocabulary``.

    Args:
        tokens: ``(T,)`` tokens in the order of codes; tokens outside the list share ``OOV_ID``.
        listed: All tokens of the vocabulary, in the order of ids.
        path: Path of the file.
    """
    size = FIRST_ID + len(listed)
    ids = pl.DataFrame({"token": listed, "id": np.arange(FIRST_ID, size, dtype=np.int32)})
    joined = pl.DataFrame({"token": tokens}).join(
        ids, on="token", how="left", maintain_order="left"
    )
    listed.to_frame().write_csv(path, include_header=False, quote_style="never")
    id_of_code = joined["id"].fill_null(OOV_ID).to_numpy()
    return Vocabulary(size, file_digest(path), id_of_code)


def read_vocabulary(path: Path) -> list[str]:
    """Return the tokens of a vocabulary file; the first one has id ``FIRST_ID``."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [line.decode() for line in lines]


def hash_tokens(tokens: pl.Series, size: int) -> pl.Series:
    """Return the ids (UInt32) of tokens in a table of ``size`` hashes, equal on all machines.

    Reference:
        Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009; the hash
        is CRC-32.
    """
    distinct = Dictionary()
    codes = distinct.codes(tokens)
    ids = [FIRST_ID + zlib.crc32(token.encode()) % size for token in distinct.tokens()]
    return pl.Series(np.array(ids, dtype=np.uint32)[codes])


def hashed_vocabulary(size: int) -> Vocabulary:
    """Return the vocabulary of a table of ``size`` hashes."""
    return Vocabulary(FIRST_ID + size, f"crc32 modulo {size}", np.empty(0, np.int32))
