"""Facts of earlier data sets that an encoding takes over: tokens, and learned facts of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from cki_rec.config import Data, UserError
from cki_rec.data.encoding.fields import Field
from cki_rec.data.encoding.tokens import (
    NUMBERS,
    digest_with,
    hash_of,
    home_of,
    join_tokens_of,
    list_digests,
    number_facts,
)

KEYS = {"log1p": "numbers", "quantile": "quantile_edges"}
"""Transform that is learned from rows -> the entry of its facts in a manifest."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """Facts that are not learned from the rows of this data set."""

    tokens: Mapping[str, pl.Series] = field(default_factory=dict)
    """Table -> its tokens in the order of ids; the tokens of other tables are learned."""
    grows: bool = False
    """Tokens of training rows that these lists lack are added to them."""
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Field of transform log1p -> shift and scale; those of other fields are learned."""
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Field of transform quantile -> largest value of each bucket but the last."""
    buckets: Mapping[str, pl.Series] = field(default_factory=dict)
    """Table of such fields -> its tokens; none are added."""

    def options(self) -> dict[str, Any]:
        """Return the options of a data set's content, as JSON values; none if all is learned.

        Token lists enter by content: their paths do not matter.
        """
        options: dict[str, Any] = {}
        if self.tokens:
            options["vocabularies"] = _hashes(self.tokens)
        if self.grows:
            options["new_tokens"] = "add"
        if self.numbers or self.edges:
            facts = {**self.numbers, **self.edges}
            options["numbers_from"] = {
                "facts": {name: list(values) for name, values in facts.items()},
                "buckets": _hashes(self.buckets),
            }
        return options


NOTHING = Earlier()


def earlier_facts(data: Data, fields: Sequence[Field]) -> Earlier:
    """Return the facts that ``data.vocabularies`` and ``data.numbers_from`` name.

    Buckets of quantiles have the tokens of ``data.numbers_from``, so that equal numbers get equal
    ids.

    Raises:
        UserError: A list or a fact is missing, or facts would be learned beside listed tokens.
    """
    learning = [f for f in fields if f.learns]
    if data.new_tokens == "add" and not data.vocabularies:
        raise UserError(
            "data.new_tokens=add: requires the lists that it adds to; set data.vocabularies to"
            " those of an earlier data set or run"
        )
    if data.vocabularies and data.numbers_from is None and learning:
        first = learning[0]
        raise UserError(
            f"data.vocabularies: transform={first.transform} of field '{first.name}' is"
            " learned from rows; set data.numbers_from to the set or run whose facts it takes, or"
            " its transform to as_is, ln_squared, edges or token"
        )
    numbers: dict[str, list[float]] = {}
    edges: dict[str, list[float]] = {}
    tokens, buckets = dict[str, pl.Series](), dict[str, pl.Series]()
    if data.numbers_from is not None and learning:
        known = number_facts(home_of(data.numbers_from))
        for f in learning:
            facts = known[KEYS[f.transform or ""]].get(f.name)
            if facts is None:
                raise UserError(
                    f"data.numbers_from={data.numbers_from}: holds no transform={f.transform} of"
                    f" field '{f.name}'; name a data set or a run that was encoded with this field"
                )
            (numbers if f.transform == "log1p" else edges)[f.name] = facts
        tables = [f.table for f in learning if f.transform == "quantile"]
        buckets = join_tokens_of([data.numbers_from], tables, "data.numbers_from")
    if data.vocabularies:
        named = [f.table for f in fields if not f.is_number and f.hash_size is None]
        tables = [table for table in dict.fromkeys(named) if table not in buckets]
        tokens = join_tokens_of(data.vocabularies, tables)
    return Earlier(tokens, data.new_tokens == "add", numbers, edges, buckets)


def write_numbers(folder: Path, homes: Sequence[Path], hashes: Mapping[str, str]) -> None:
    """Write the learned facts of numbers of a model beside its token lists, if it has some.

    Args:
        folder: The folder of token lists.
        homes: Encoded data sets, or such folders of other models, that may hold them.
        hashes: Vocabulary hashes of the model, which cover the facts of its fields.
    """
    facts: dict[str, dict[str, Sequence[float]]] = {key: {} for key in KEYS.values()}
    for home in homes:
        try:
            known = number_facts(home)
        except UserError:  # it has none, or is another data set that is damaged
            continue
        listed = list_digests(home) if any(known.values()) else {}
        for key, each in known.items():
            for name, values in each.items():
                if hashes.get(name) == digest_with(listed.get(name), values):
                    facts[key].setdefault(name, values)
    if any(facts.values()):
        (folder / NUMBERS).write_text(json.dumps(facts, indent=1))


def _hashes(lists: Mapping[str, pl.Series]) -> dict[str, str]:
    return {table: hash_of(tokens) for table, tokens in lists.items()}
