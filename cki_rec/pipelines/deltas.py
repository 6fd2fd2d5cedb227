"""``cki-rec export format=delta``: the changes since a base checkpoint; rows of the base."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cki_rec.checkpoints import Description, content_digest, describe, named_folder
from cki_rec.checkpoints.deltas import FOLDER, NEW_TOKENS, new_delta, write_dense, write_rows
from cki_rec.checkpoints.rows import RowReader
from cki_rec.config import Config, UserError
from cki_rec.data.encoding import tokens
from cki_rec.data.schema import OOV_ID
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.params import Params
from cki_rec.models.comparison import decides, differences
from cki_rec.pipelines import vocabularies
from cki_rec.pipelines.loading import find

BLOCK = 1 << 16
"""Rows that are compared at a time."""
MODEL, ACCUMULATOR, COUNTS = "model.", "accumulator.", "counts"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseRows:
    """The base of deltas, any of its rows at a time."""

    folder: Path
    about: Description
    reader: RowReader

    def tables(self) -> dict[str, list[str]]:
        """Return table -> the tensors with a row per row of it, as a delta names them."""
        groups: dict[str, list[str]] = {}
        for key in self.reader.entries:
            table = table_of(key)
            if table is not None and key.startswith((MODEL, ACCUMULATOR)):
                groups.setdefault(table, []).append(key)
        for table, keys in groups.items():
            keys.sort(key=lambda key: (not key.startswith(MODEL), key))
            if f"{COUNTS}.{table}" in self.reader.entries:
                keys.append(COUNTS)
        return groups

    def dense(self) -> Params:
        """Return the parameters that are no tables."""
        keys = [key for key in self.reader.keys(MODEL) if table_of(key) is None]
        return {key.removeprefix(MODEL): self.reader.read(key) for key in keys}

    def rows(self, key: str, table: str, rows: Tensor) -> Tensor:
        """Return rows of a tensor of a table; those of tokens that the base lacks stand for them.

        They are its row for unseen tokens, and zero counts and accumulators.

        Args:
            key: Name of the tensor.
            table: Its table.
            rows: ``(R,)`` int64, ascending.
        """
        name = full_name(key, table)
        known = int((rows < self.reader.entries[name].size[0]).sum())
        found = self.reader.read_rows(name, rows[:known])
        if known == len(rows):
            return found
        lacking = self.reader.read(name, OOV_ID, OOV_ID + 1)
        lacking = lacking if key.startswith(MODEL) else torch.zeros_like(lacking)
        return torch.cat([found, lacking.expand(len(rows) - known, *lacking.shape[1:])])


def full_name(key: str, table: str) -> str:
    """Return the name in a checkpoint of a tensor of a delta."""
    return f"{COUNTS}.{table}" if key == COUNTS else key


def base_folder(config: Config) -> Path:
    """Return the checkpoint that deltas are of.

    Raises:
        UserError: ``merge.base`` names none.
    """
    base = config.merge.base
    if base is None or "path" not in base:
        raise UserError(
            "merge.base: name the checkpoint that the delta starts from, as merge.base=monday"
        )
    return named_folder(base, "merge.base")


def export(config: Config) -> None:
    """Write the delta of a run since ``merge.base`` beside it, and log its size.

    Raises:
        UserError: The models differ in more than values and new tokens.
    """
    source, folder = find(config, "export"), base_folder(config)
    saved, before = describe(source.checkpoint), describe(folder)
    new_tokens = _new_tokens(config, saved, before, source.checkpoint, folder)
    target = source.home / FOLDER
    shutil.rmtree(target, ignore_errors=True)
    changed: dict[str, int] = {}
    with ExitStack() as stack:
        base = BaseRows(folder, before, stack.enter_context(RowReader(folder, "merge.base")))
        new = stack.enter_context(RowReader(source.checkpoint, str(config.run)))
        delta = stack.enter_context(new_delta(target, content_digest(folder), saved))
        write_dense(delta, BaseRows(source.checkpoint, saved, new).dense())
        for table, keys in base.tables().items():
            kept = [key for key in keys if full_name(key, table) in new.entries]
            rows, values = _changed(base, new, table, kept, saved.schema.table_sizes[table])
            write_rows(delta, table, rows, values)
            changed[table] = len(rows)
        for table, listed in new_tokens.items():
            tokens.write_tokens(delta / NEW_TOKENS, table, listed)
    for table, number in changed.items():
        log.info(
            "  table %s: %s of %s rows", table, f"{number:,}", saved.schema.table_sizes[table]
        )
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    log.info("delta: %s, %.2f MB", target, size / 1e6)


def _new_tokens(
    config: Config, saved: Description, before: Description, path: Path, base: Path
) -> dict[str, list[str]]:
    """Return the tokens that follow those of the base, per table that has some.

    Raises:
        UserError: The models are two networks, or tokens of the base have other ids.
    """
    for key, (ours, theirs) in differences(saved.model, before.model).items():
        if decides(key, saved.model):
            raise UserError(f"{path}: model.{key} is {ours}, of merge.base {theirs}")
    if saved.schema.features != before.schema.features:
        raise UserError(f"{path}: has other fields than merge.base {base}")
    found: dict[str, list[str]] = {}
    hashes, theirs = saved.schema.vocabulary_hashes, before.schema.vocabulary_hashes
    if tables := [table for table in hashes if hashes[table] != theirs[table]]:
        homes = [vocabularies.find_folder(config, p, s, "merge.base")
                 for p, s in ((base, before), (path, saved))]  # fmt: skip
        for table in tables:
            old, new = (
                vocabularies.tokens_of(s, home, table)
                for s, home in zip((before, saved), homes, strict=True)
            )
            if new[: len(old)] != old:
                raise UserError(
                    f"{path}: table '{table}' does not begin with the tokens of merge.base {base};"
                    " train on from it (train.start), or merge whole models with"
                    " merge.vocabularies"
                )
            found[table] = new[len(old) :]
    return found


def _changed(
    base: BaseRows, new: RowReader, table: str, keys: list[str], size: int
) -> tuple[Tensor, Params]:
    """Return the rows of a table that differ from the base, and their values."""
    found: dict[str, list[Tensor]] = {key: [] for key in keys}
    rows: list[Tensor] = []
    for first in range(0, size, BLOCK):
        block = torch.arange(first, min(first + BLOCK, size))
        after = {k: new.read(full_name(k, table), first, first + len(block)) for k in keys}
        is_changed = block >= base.about.schema.table_sizes[table]
        for key, values in after.items():
            is_changed |= differ(values, base.rows(key, table, block))
        rows.append(block[is_changed])
        for key, values in after.items():
            found[key].append(values[is_changed])
    return torch.cat(rows), {key: torch.cat(parts) for key, parts in found.items()}


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Return ``(R,)`` bool: which rows of two tensors differ in any bit but the sign of zero."""
    return (one != other).reshape(len(one), -1).any(1)


def overlaid(base: Mapping[str, Tensor], rows: Tensor, own: Tensor, values: Params) -> Params:
    """Return rows of a source: those of its base, and its own where they changed.

    Args:
        base: ``(R, ...)`` rows of the base.
        rows: ``(R,)`` their numbers.
        own: Numbers of the rows that the source changed, ascending.
        values: Its values in these rows.
    """
    result = {key: tensor.clone() for key, tensor in base.items()}
    if len(own):
        place = torch.searchsorted(own, rows).clamp(max=len(own) - 1)
        is_own = own[place] == rows
        for key, tensor in result.items():
            tensor[is_own] = values[key][place[is_own]]
    return result
