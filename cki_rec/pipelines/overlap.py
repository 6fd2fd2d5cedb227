"""Tokens that sources share, and forms of the same id that keep them apart."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

LOW_OVERLAP = 0.1
"""Share of the smallest token list below which an overlap is low."""
SUSPECT_SHARE = 0.5
"""Share of the smallest token list that a common form must recover to be suspected."""
_DECIMAL = re.compile(r"([+-]?\d+)\.0*")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d+)?[eE]\+?\d+")


def _without_exponent(token: str) -> str:
    if not _EXPONENT.fullmatch(token):
        return token
    value = float(token)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else token


FORMS: dict[str, Callable[[str], str]] = {
    "a trailing .0": lambda token: _DECIMAL.sub(r"\1", token),
    "an exponent": _without_exponent,
    "outer spaces": str.strip,
    "NFC and NFD letters": lambda token: unicodedata.normalize("NFC", token),
}
"""Difference between two forms of an id -> the function that removes it."""


def low_overlap(table: str, lists: Sequence[Sequence[str]], num_shared: int) -> str | None:
    """Return a warning if sources share few tokens of a table; it names the suspected form.

    Args:
        table: Name of the table.
        lists: The tokens of every source.
        num_shared: Number of tokens that all of them have.
    """
    smallest = min(map(len, lists))
    if len(lists) < 2 or not smallest or num_shared >= LOW_OVERLAP * smallest:
        return None
    suspected = [
        name
        for name, plain in FORMS.items()
        if _num_shared(lists, plain) - num_shared >= SUSPECT_SHARE * smallest
    ]
    joined = f"table '{table}': the sources share {num_shared:,} of {smallest:,} tokens"
    if not suspected:
        return f"{joined}; are the ids of all sources from one system?"
    return (
        f"{joined}; ids seem to differ by {', '.join(suspected)}: encode all data sets with"
        " data.normalize_ids=true"
    )


def _num_shared(lists: Sequence[Sequence[str]], plain: Callable[[str], str]) -> int:
    return len(set.intersection(*({plain(token) for token in tokens} for tokens in lists)))
