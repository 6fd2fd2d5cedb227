"""Models of separately encoded data sets on one vocabulary: the union by raw token."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints import Checkpoint, Description, describe, row_counts
from cki_rec.config import Config, UserError
from cki_rec.data.dataset import MANIFEST
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.earlier import write_numbers
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.schema import FIRST_ID, OOV_ID, FeatureSchema
from cki_rec.engine import distributed, sharded
from cki_rec.engine.embeddings import table_of
from cki_rec.engine.joining import mean_rows, on_union, with_new_rows
from cki_rec.files import file_digest
from cki_rec.merging.params import Params
from cki_rec.merging.vocabulary import join_tokens, owned, to_union
from cki_rec.pipelines.overlap import low_overlap
from cki_rec.pipelines.provenance import check_rows, other_tables

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Joined:
    """Checkpoints whose tables have the same rows."""

    checkpoints: list[Checkpoint]
    owners: dict[str, Tensor] = field(default_factory=dict)
    """Per table parameter whose vocabularies differed, ``(K, U)``: which rows a source has; of
    several processes, the rows of this one."""
    tokens: dict[str, list[str]] = field(default_factory=dict)
    """Of tables whose vocabularies differed."""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per such table: tokens of all sources together, of each, and those that all have."""
    warnings: list[str] = field(default_factory=list)
    """One line per table of which the sources share few tokens."""


def folders_of(config: Config, checkpoints: Sequence[tuple[Path, Checkpoint]]) -> list[Path]:
    """Return the folders of the sources' token lists: as configured, or searched for if null.

    The search looks beside the checkpoint (merged models), then among encoded data sets.

    Raises:
        UserError: The number of folders differs from that of sources, or a search fails.
    """
    named = config.merge.vocabularies
    check_folders(named, len(checkpoints))
    folders = []
    for k, (name, (home, saved)) in enumerate(zip(named, checkpoints, strict=True)):
        if name is not None:
            folders.append(Path(name))
            continue
        folders.append(find_folder(config, home, saved, f"merge.vocabularies[{k}]"))
    return folders


def check_folders(named: Sequence[str | None], num_models: int) -> None:
    """Check that ``merge.vocabularies`` has one folder per model, and that each exists.

    Raises:
        UserError: It has not.
    """
    if len(named) != num_models:
        raise UserError(
            f"merge.vocabularies: {len(named)} folders for {num_models} models (sources, then the"
            " base if the method needs one); null: search"
        )
    for k, name in enumerate(named):
        if name is not None and not Path(name).is_dir():
            raise UserError(f"merge.vocabularies[{k}]={name}: no such folder; null: search")


def find_folder(config: Config, home: Path, saved: Checkpoint | Description, where: str) -> Path:
    """Return the folder that has the token lists of a checkpoint.

    Raises:
        UserError: There is none.
    """
    encoded = Path(config.runtime.encoded)
    lists = [*config.merge.vocabularies, *config.data.vocabularies]
    named = [Path(name) for name in lists if name is not None]
    beside = home.parent / tokens.FOLDER
    places = [beside, *named, *sorted(p.parent for p in encoded.glob("*/manifest.json"))]
    folder = tokens.find_tokens(places, _listed(saved))
    if folder is None:
        raise UserError(
            f"{where}: no encoded data set under {encoded} has the vocabularies of this model;"
            " name its folder in merge.vocabularies or data.vocabularies, or set"
            " runtime.encoded"
        )
    return folder


def joined(checkpoints: Sequence[Checkpoint], folders: Sequence[Path], num_sources: int) -> Joined:
    """Return checkpoints on the union of their vocabularies; the first keeps its ids.

    Nothing is joined where fields or tables differ too; ``compatibility.compare`` lists them.

    Args:
        checkpoints: Sources, then the base if there is one; of several processes, their rows.
        folders: Where the tokens of each are.
        num_sources: Number of sources; only they count as owners of rows.

    Raises:
        UserError: Tables that cannot be joined, or token lists that are not the models'.
    """
    first = checkpoints[0].schema
    if any(c.schema.features != first.features for c in checkpoints):
        return Joined(list(checkpoints))
    hashes = [c.schema.vocabulary_hashes for c in checkpoints]
    differing = [name for name in hashes[0] if len({h.get(name) for h in hashes}) > 1]
    result = Joined(list(checkpoints))
    maps: list[dict[str, Tensor]] = [{} for _ in checkpoints]
    sizes, digests = dict(first.table_sizes), dict(first.vocabulary_hashes)
    for table in differing:
        lists = [tokens_of(c, f, table) for c, f in zip(checkpoints, folders, strict=True)]
        union, rows = join_tokens(lists, FIRST_ID)
        result.tokens[table] = union
        sizes[table], digests[table] = FIRST_ID + len(union), tokens.hash_of(union)
        for source_maps, moved in zip(maps, rows, strict=True):
            source_maps[table] = moved
        has = owned(rows[:num_sources], sizes[table])
        held = has[:, sharded.rows_of(sizes[table])]
        result.owners |= {n: held for n in checkpoints[0].params if table_of(n) == table}
        result.rows[table] = {
            "tokens": len(union),
            "of_each": [len(listed) for listed in lists[:num_sources]],
            "of_all": int(has.all(0).sum()) - FIRST_ID,
        }
        num_shared = result.rows[table]["of_all"]
        if warning := low_overlap(table, lists[:num_sources], num_shared):
            result.warnings.append(warning)
    if differing:
        schema = replace(first, table_sizes=sizes, vocabulary_hashes=digests)
        result.checkpoints = [
            replace(_moved(c, source_maps, sizes), schema=schema)
            for c, source_maps in zip(checkpoints, maps, strict=True)
        ]
    return result


def log_overlap(joined: Joined) -> None:
    """Log the tokens that the sources share, per joined table, and warn if they are few."""
    for table, facts in joined.rows.items():
        each = " and ".join(f"{size:,}" for size in facts["of_each"])
        log.info("  table %s: %s tokens, %s shared by all", table, each, f"{facts['of_all']:,}")
    for warning in joined.warnings:
        log.warning("  %s", warning)


def on_rows_of(
    config: Config, home: Path, dataset: EncodedDataset, is_mean: bool = False
) -> Checkpoint:
    """Return a checkpoint on the vocabularies of a data set that lists all its tokens, and more.

    Its scores do not change: tokens that it lacks look up its row for unseen tokens.

    Args:
        config: Folders of token lists.
        home: The checkpoint.
        dataset: The data set.
        is_mean: Tokens that it lacks get the mean of its rows of tokens instead.

    Raises:
        UserError: The data set lacks tokens, or the model's token lists are missing.
    """
    (saved,) = sharded.load([home])
    schema, maps = _on_rows(config, home, saved, dataset)
    moved = replace(_moved(saved, maps, schema.table_sizes), schema=schema)
    if is_mean:
        tables = {name: table for name in saved.params if (table := table_of(name)) in maps}
        means = mean_rows(saved.params, tables, saved.schema, FIRST_ID)
        moved.params = with_new_rows(moved.params, tables, maps, schema.table_sizes, means)
    return moved


def counts_on_rows_of(config: Config, home: Path, dataset: EncodedDataset) -> Params:
    """Return the row counts of a checkpoint on the vocabularies of a data set, of all rows.

    Raises:
        UserError: As ``on_rows_of``.
    """
    saved = describe(home)
    schema, maps = _on_rows(config, home, saved, dataset)
    counts = row_counts(home)
    known = {table: rows for table, rows in maps.items() if table in counts}
    return to_union(counts, known, schema.table_sizes, None)


def _on_rows(
    config: Config, home: Path, saved: Checkpoint | Description, dataset: EncodedDataset
) -> tuple[FeatureSchema, dict[str, Tensor]]:
    """Return the schema of a model on the vocabularies of a data set, and where its rows go."""
    model_schema, data_schema = saved.schema, dataset.schema
    maps, hashes = {}, data_schema.vocabulary_hashes
    differing = [
        t for t in model_schema.table_sizes if model_schema.vocabulary_hashes[t] != hashes[t]
    ]
    folder = find_folder(config, home, saved, str(home))
    for table in differing:
        paths = [tokens.path_of(home, table) for home in (dataset.folder, folder)]
        if tokens.begins_with(*paths) and file_digest(paths[0]) == hashes[table]:
            maps[table] = torch.arange(model_schema.table_sizes[table])  # a vocabulary that grew
            continue
        listed = dataset.vocabulary(table)
        union, (_, maps[table]) = join_tokens([listed, tokens_of(saved, folder, table)], FIRST_ID)
        if len(union) > len(listed):
            raise UserError(
                f"{home}: has {len(union) - len(listed):,} tokens of table '{table}' that"
                f" {dataset.folder.name} does not list; encode the rows with the lists of all"
                " models: data.vocabularies=[FOLDER,...]"
            )
    sizes = {table: data_schema.table_sizes[table] for table in model_schema.table_sizes}
    schema = replace(
        model_schema,
        table_sizes=sizes,
        vocabulary_hashes={t: hashes[t] for t in model_schema.vocabulary_hashes},
    )
    return schema, maps


def write(folder: Path, joined: Joined, known: Sequence[Path]) -> None:
    """Write the token lists of all tables that have some, so that rows can be scored later."""
    for table, listed in joined.tokens.items():
        tokens.write_tokens(folder, table, listed)
    carry(folder, joined.checkpoints[0].schema, known)


def carry(folder: Path, schema: FeatureSchema, known: Iterable[Path]) -> None:
    """Put token lists and learned facts of numbers of a model beside it, unless they are there.

    Files are hard links where the disk has them. Lists that no folder has are left out.

    Args:
        folder: The folder ``vocabulary`` of the run.
        schema: Features of the model.
        known: Encoded data sets, or such folders of other models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    homes = [home for home in known if home.is_dir() and home != folder]
    for table, digest in schema.vocabulary_hashes.items():
        path = tokens.path_of(folder, table)
        home = None if path.exists() else tokens.find_tokens(homes, {table: digest})
        if home is not None and (source := tokens.path_of(home, table)).is_file():
            try:
                os.link(source, path)
            except OSError:  # another disk, or one without links
                copy = path.with_name(f".{path.name}.tmp-{os.getpid()}")
                shutil.copyfile(source, copy)
                copy.replace(path)
    if not (folder / tokens.NUMBERS).exists():
        write_numbers(folder, homes, schema.vocabulary_hashes)


def carry_merged(config: Config, run: Path, like: Path, sources: Sequence[Path]) -> None:
    """Put the token lists of a merged model beside it, from where its sources have theirs.

    All processes call this; the first one writes.

    Args:
        config: The folder of encoded data sets.
        run: Run directory of the merge.
        like: A checkpoint with the vocabularies of the merged one.
        sources: Checkpoints of the sources.
    """
    schema = describe(like, distributed.share()).schema
    if distributed.rank() == 0:
        known = [source.parent / tokens.FOLDER for source in sources]
        known += sorted(p.parent for p in Path(config.runtime.encoded).glob(f"*/{MANIFEST}"))
        carry(run / tokens.FOLDER, schema, known)


def _listed(saved: Checkpoint | Description) -> dict[str, str]:
    """Return the hashes of those tables that have tokens."""
    hashes = saved.schema.vocabulary_hashes
    return {
        t: hashes[t] for t in saved.schema.table_sizes if not hashes[t].startswith(tokens.HASHED)
    }


def tokens_of(saved: Checkpoint | Description, folder: Path, table: str) -> list[str]:
    """Return the tokens of a table of a model, from a folder of token lists.

    Raises:
        UserError: The list is missing or another one, or the table cannot be joined by tokens.
    """
    if table not in saved.schema.table_sizes:
        raise UserError(
            f"{folder}: the numbers of field '{table}' were scaled otherwise in the other data"
            " sets, so they cannot be joined; give it the transform ln_squared, edges or token"
        )
    digest = saved.schema.vocabulary_hashes[table]
    if digest.startswith(tokens.HASHED):
        raise UserError(
            f"{folder}: ids of table '{table}' are hashes ({digest}), in the other models others,"
            " so rows cannot be joined; train with the same hash_size"
        )
    return tokens.read_tokens(folder, table, digest)


def _moved(saved: Checkpoint, maps: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Checkpoint:
    def moved(tensors: Params, lacking: int | None) -> Params:
        tables = {name: table_of(name) or name for name in tensors}
        return on_union(tensors, tables, maps, saved.schema.table_sizes, sizes, lacking)

    try:
        return replace(
            saved,
            params=moved(saved.params, OOV_ID),
            accumulators=moved(saved.accumulators, None),
            counts=moved(saved.counts, None),
        )
    except ValueError as error:
        raise UserError(f"checkpoint: {error}; its tensors and its schema disagree") from None


def on_data_set(
    config: Config,
    folder: Path,
    name: str,
    dataset: EncodedDataset,
    scratch: Path,
    is_mean: bool = False,
) -> tuple[Description, Path]:
    """Return the description and the folder of a model that can be trained on a data set.

    The folder is ``scratch`` if the model had to be moved to the data set's vocabularies.
    ``is_mean`` is that of ``on_rows_of``.

    Raises:
        UserError: As for ``check_rows`` and ``on_rows_of``.
    """
    saved = describe(folder)
    check_rows(saved, dataset, name)
    if not other_tables(saved, dataset):
        return saved, folder
    moved = on_rows_of(config, folder, dataset, is_mean)
    tensors = {"model": moved.params, "accumulator": moved.accumulators, "counts": moved.counts}
    sharded.save(scratch, tensors, moved, moved.origin)
    return describe(scratch), scratch
