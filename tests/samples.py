"""Data options and raw samples that several tests use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cki_rec.config import Data, Partition, Split, UserError, parse, register_resolvers
from cki_rec.data.encoding.fields import resolve_fields
from cki_rec.data.raw.formats import FORMATS
from cki_rec.data.raw.reading import Reading

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LATEST = GOLDEN / "movielens_latest"
EMBEDDED = ROOT / "data" / "ml-latest-small.zip"
FIELDS = ["user", "item", "genres", "year", "hour", "history"]


@lru_cache
def composed(choice: str) -> Data:
    """Return conf/data/<choice>.yaml as the command line reads it."""
    from cki_rec.cli import compose_config

    register_resolvers()
    return parse(compose_config([f"data={choice}"])).data


def make_data(choice: str = "movielens_small", **changes: Any) -> Data:
    """Return options of a small MovieLens sample, or of another choice, with changes."""
    data = composed(choice)
    defaults: dict[str, Any] = {"partition": Partition(by="none", parts=1, seed=0)}
    if choice == "movielens_small":
        split = Split(by="random", fractions=[0.6, 0.2, 0.2], seed=0)
        defaults.update(name="sample", raw=str(LATEST), history_length=3, split=split)
    return replace(data, **(defaults | changes))


def read_rows(data: Data, block_bytes: int = 1 << 24) -> tuple[pl.DataFrame, Reading]:
    """Return all rows in the common form, and what the reading found."""
    reading = Reading(data.on_bad_row, block_bytes)
    reader = FORMATS[data.format]
    resolve_fields(data, reader.kinds(data))
    return pl.concat(list(reader.read(data, reading))), reading


def one_line_error(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message that an action refuses its arguments with; it must be one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def shared_data(name: str) -> Path:
    """Return a file that may not be redistributed, or skip the test."""
    folder = os.environ.get("CKI_REC_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"CKI_REC_DATA names no folder with {name}")
    return Path(folder) / name


def slow_but(quick: list[str], names: Iterable[str]) -> list[Any]:
    """Return parameters of a test; those that are not ``quick`` run in ``make test-all`` only."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
