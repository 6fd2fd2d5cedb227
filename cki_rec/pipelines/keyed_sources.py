"""Sources of a merge by raw key: opened, matched by table, compared."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cki_rec.checkpoints.formats import dcp, dynamicemb, is_own, open_stored
from cki_rec.checkpoints.formats.keyed import KeyedTable
from cki_rec.checkpoints.formats.managed_collision import (
    EVIDENCE,
    ManagedTable,
    modules_of,
)
from cki_rec.checkpoints.formats.stored import digest_of
from cki_rec.checkpoints.formats.vocabulary_files import VocabularyTable
from cki_rec.config import Config, UserError
from cki_rec.pipelines.foreign_sources import Foreign, differences, open_source, tables_of

KEYS = "keys"
"""Entry of a source: its vocabulary file, or table -> vocabulary file."""
log = logging.getLogger(__name__)
FORMAT = "dynamicemb"
"""``merge.format`` of a dump, whatever the first source is."""


@dataclass(frozen=True, slots=True)
class KeyedSource:
    """One opened source."""

    path: str
    tables: dict[str, KeyedTable]
    rest: Foreign | None
    """Its other tensors; None: a dump of tables alone."""
    names: dict[str, str]
    """Name of every tensor of the checkpoint -> its full name."""

    def digest(self) -> str:
        """Return a digest of the content."""
        files = [path for table in self.tables.values() for path in table.files()]
        parts = [digest_of(files)] if files else []
        return " ".join([*parts, *([self.rest.stored.digest()] if self.rest else [])])

    def describe(self) -> dict[str, Any]:
        """Return the facts about it for a card."""
        titles = dict.fromkeys(table.title for table in self.tables.values())
        entries = list(self.rest.parts.entries.values()) if self.rest else []
        files = [path for table in self.tables.values() for path in table.files()]
        return {
            "path": self.path,
            "format": ", ".join([*([self.rest.stored.title] if self.rest else []), *titles]),
            "tensors": len(entries) + len(self.tables),
            "bytes": sum(e.bytes for e in entries) + sum(f.stat().st_size for f in files),
            "keys": {name: table.num_rows for name, table in self.tables.items()},
        }


def is_keyed(sources: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a source has tables by raw key."""
    return any(KEYS in source or _has_keys(source.get("path")) for source in sources)


def _has_keys(path: object) -> bool:
    if not isinstance(path, str) or not Path(path).exists():
        return False
    if dynamicemb.recognizes(Path(path)):
        return True
    if is_own(Path(path)):
        return False
    try:
        stored = open_stored(Path(path))
    except UserError:  # reported where it is read
        return False
    try:
        return any(name.rpartition(".")[2] in EVIDENCE for name in stored.entries)
    finally:
        stored.close()


def open_keyed(
    config: Config, source: Mapping[str, Any], option: str, stack: ExitStack
) -> KeyedSource:
    """Return a source, opened; no value is read.

    Raises:
        UserError: Its files are damaged or do not belong together.
    """
    path = source.get("path")
    if not isinstance(path, str):
        raise UserError(f"{option}: {dict(source)}, no path; tables by raw key are named by paths")
    tables: dict[str, KeyedTable] = {}
    rest: Foreign | None = None
    names: dict[str, str] = {}
    is_dump = dynamicemb.recognizes(Path(path))
    if is_dump:
        tables |= dynamicemb.tables_of(path)
    if not is_dump or dcp.recognizes(Path(path)):
        named = {key: value for key, value in source.items() if key != KEYS}
        rest = open_source(named, option, None, stack)
        for module in modules_of(path, rest.parts):
            tables[module.weight] = ManagedTable(path, rest.stored, rest.parts, module)
        for name, file in _vocabularies(config, source, rest, option).items():
            tables[name] = VocabularyTable(path, rest.stored, rest.parts, name, Path(file))
        names = rest.parts.names
        rest = _without(rest, tables)
    elif KEYS in source:
        raise UserError(f"{option}, {KEYS}: {path} is a dump, which holds its keys; leave it out")
    if not tables:
        raise UserError(
            f"{option}: {path} has no keys; add its vocabulary, {{path: {path}, {KEYS}: FILE}}"
        )
    return KeyedSource(path, tables, rest, names)


def _vocabularies(
    config: Config, source: Mapping[str, Any], rest: Foreign, option: str
) -> dict[str, str]:
    """Return table -> vocabulary file.

    Raises:
        UserError: A table is not there, or none or several could be meant.
    """
    named = source.get(KEYS)
    entries = rest.parts.entries
    matrices = [n for n, e in entries.items() if len(e.shape) == 2 and e.dtype.is_floating_point]
    if named is None:
        return {}
    if isinstance(named, str):
        meant = tables_of(config, rest, None) or matrices
        if len(meant) != 1:
            listed = ", ".join(meant[:12]) or "no matrix"
            raise UserError(
                f"{option}, {KEYS}: {named} could belong to {listed}; write"
                f" {KEYS}: {{TABLE: FILE}}"
            )
        return {meant[0]: named}
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{option}, {KEYS}: must be a file, or {{TABLE: FILE, ...}}")
    for table in named:
        if table not in matrices:
            listed = ", ".join(matrices[:12])
            raise UserError(f"{option}, {KEYS}: {table} is no table; there are {listed}")
    return dict(named)


def _without(rest: Foreign, tables: Mapping[str, KeyedTable]) -> Foreign:
    """Return the tensors of a checkpoint that belong to no table by raw key."""
    prefixes = tuple(t.module.prefix for t in tables.values() if isinstance(t, ManagedTable))
    counts = {t.counts_name for t in tables.values() if isinstance(t, VocabularyTable)}
    names = {
        name: full
        for name, full in rest.parts.names.items()
        if name not in {*tables, *counts} and not (prefixes and name.startswith(prefixes))
    }
    entries = {name: rest.parts.entries[name] for name in names}
    return replace(rest, parts=replace(rest.parts, names=names, entries=entries))


def matched_tables(sources: Sequence[KeyedSource]) -> dict[str, list[KeyedTable]]:
    """Return name in the first source -> the table in every source.

    Names of other forms match if their last words do: ``embedding_bags.user.weight`` and ``user``.

    Raises:
        UserError: A source lacks a table, or keys are texts in some sources of dumps.
    """
    result: dict[str, list[KeyedTable]] = {}
    first = sources[0]
    for name in first.tables:
        result[name] = [_counterpart(name, first, source) for source in sources]
    for source in sources[1:]:
        taken = {table.name for each in result.values() for table in each}
        for name in source.tables:
            if name not in taken:
                raise UserError(f"{first.path}: table {name} is missing; {source.path} has it")
    for name, tables in result.items():
        for table in tables:
            is_other = table.is_text and not isinstance(tables[0], VocabularyTable)
            if is_other:
                raise UserError(
                    f"{name}: keys are integers in {tables[0].path}, texts in {table.path}; map"
                    " them to the same integers first"
                )
    return result


def check_rest(sources: Sequence[KeyedSource]) -> None:
    """Check that the tensors beside tables by raw key fit together, before any value is read.

    A first source without such tensors is a dump of tables; those of others are left out.

    Raises:
        UserError: They do not; names the first difference.
    """
    first = sources[0]
    if first.rest is None or not first.rest.parts.names:
        if any(source.rest and source.rest.parts.names for source in sources):
            log.info("  only tables are merged: %s has no other tensors", first.path)
        return
    for source in sources:
        if source.rest is None:
            name = next(iter(first.rest.parts.names))
            raise UserError(f"{source.path}: tensor {name} is missing; {first.path} has it")
    if found := differences([source.rest for source in sources if source.rest], []):
        raise UserError(found[0])


def _counterpart(name: str, first: KeyedSource, source: KeyedSource) -> KeyedTable:
    if name in source.tables:
        return source.tables[name]
    alike = [table for other, table in source.tables.items() if _word(other) == _word(name)]
    if len(alike) != 1:
        held = ", ".join(list(source.tables)[:12])
        raise UserError(
            f"{source.path}: table {name} is missing; {first.path} has it (here are {held})"
        )
    return alike[0]


def _word(name: str) -> str:
    """Return the last word of the name of a table."""
    return re.split(r"[./]", name.removesuffix(".weight"))[-1]
