"""Merges of deltas: ``merge.base=yesterday merge.deltas=[...]``, in changed rows alone.

A source is its base with the rows of its delta. Rows that no delta has stay those of the base, as
in every merge of equal rows. So the result is that of whole models, and the method is the same
function, on fewer rows.

Shape legend: K deltas, R rows that a delta changes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints import (
    CHECKPOINT,
    DESCRIPTION,
    FORMAT,
    TENSORS,
    Checkpoint,
    Description,
    content_digest,
    describe,
    file_digests,
)
from cki_rec.checkpoints.deltas import (
    FOLDER,
    NEW_TOKENS,
    Delta,
    new_delta,
    open_delta,
    write_dense,
    write_rows,
)
from cki_rec.checkpoints.rows import RowReader
from cki_rec.config import Config, Merge, UserError, run_id, section
from cki_rec.data.dataset import MANIFEST
from cki_rec.data.encoding import tokens
from cki_rec.data.encoding.vocabulary import read_vocabulary
from cki_rec.data.provenance import Provenance
from cki_rec.engine.block_writer import BlockWriter, write_metadata
from cki_rec.engine.networks import declared
from cki_rec.engine.record import Run, open_run
from cki_rec.merging.optimizer_state import merge_accumulators, merge_counts
from cki_rec.merging.params import MergeError, Params, is_finite
from cki_rec.merging.registry import MergeInputs, Method
from cki_rec.merging.rows import Block
from cki_rec.merging.streaming import Mixer
from cki_rec.models.comparison import decides, differences
from cki_rec.pipelines import preflight, vocabularies
from cki_rec.pipelines.deltas import (
    ACCUMULATOR,
    BLOCK,
    COUNTS,
    MODEL,
    BaseRows,
    base_folder,
    full_name,
    overlaid,
)
from cki_rec.pipelines.merge_inputs import fixed_rules
from cki_rec.pipelines.names import give

METADATA_ALONE = (0, 1 << 62)
"""Share of the files of a base whose digests are checked: the first one, which is small."""
INSTEAD = "name whole models in merge.sources"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sources:
    """The base and the deltas of a merge."""

    base: BaseRows
    digest: str
    """``content_digest`` of the base."""
    deltas: Sequence[Delta]

    @property
    def about(self) -> Description:
        """Return the description of the merged model."""
        first = self.deltas[0].about
        origins = [self.base.about.origin, *(delta.about.origin for delta in self.deltas)]
        return replace(first, origin=Provenance.union(origins))


def run(config: Config) -> None:
    """Merge deltas as configured; log the changed rows, and the folders of the result."""
    folder = base_folder(config)
    check_options(config)
    deltas = [open_delta(Path(path)) for path in config.merge.deltas]
    is_whole = config.merge.write == "model"
    about = describe(folder) if is_whole else describe(folder, METADATA_ALONE)
    digest = content_digest(folder)
    _check_fit(config, deltas, about, digest)
    if config.check_only:
        log.info("%d deltas fit the base %s", len(deltas), folder)
        return
    reads = _reads(config, digest, deltas)
    with (
        RowReader(folder, "merge.base") as reader,
        open_run(Path(config.runtime.out), run_id("merge", reads), config.runtime.force) as done,
    ):
        if done.record is None:
            sources = Sources(BaseRows(folder, about, reader), digest, deltas)
            try:
                with done.phase("merge"):
                    result = _merge(config, sources, done)
            except MergeError as error:
                raise UserError(f"merge.method={config.merge.method}: {error}") from error
            done.finish(reads, {"hash": about.origin.data_hash}, result)
    assert done.record is not None
    for table, number in done.record["result"]["changed_rows"].items():
        log.info("  table %s: %s changed rows", table, f"{number:,}")
    log.info("delta: %s", done.path / FOLDER)
    if is_whole:
        log.info("model: %s", done.checkpoint)
    give(config, done)


def check_options(config: Config) -> None:
    """Check all options that can be checked without files.

    Raises:
        UserError: The method needs more than the rows that changed, or options exclude each other.
    """
    options, where = config.merge, "merge.deltas merges changed rows alone"
    entry = preflight.entry_of(options)
    is_possible = isinstance(entry, Method) and entry.row_wise and entry.statistics is None
    if not is_possible or "first_rows" in getattr(entry, "inputs", ()):
        raise UserError(
            f"{where}, but merge.method={options.method} needs whole tables; choose another method"
            f" (average, evidence, sequential, moving_average), or {INSTEAD}"
        )
    assert isinstance(entry, Method)
    try:
        entry.check(options.options, len(options.deltas))
    except MergeError as error:
        raise UserError(f"merge.options: {error}") from None
    if options.sources != config.suite.sources:
        raise UserError("merge.deltas and merge.sources are both set; leave one of them out")
    chosen = [name for name, x in {**entry.options, **options.options}.items() if x is None]
    for name, is_set in {
        **{f"options.{name}=null": True for name in chosen},
        f"align.by={options.align.by}": options.align.by != "none",
        f"repair={options.repair}": options.repair != "none",
        f"refine={options.refine}": options.refine != "none",
        "recalibrate=true": options.recalibrate,
        f"learn.what={options.learn.what}": options.learn.what != "none",
        f"ablation={options.ablation}": options.ablation != "none",
        f"dtype={options.dtype}": options.dtype is not None,
        "vocabularies": bool(options.vocabularies),
        f"method={options.method}": preflight.needs_rows(options),
    }.items():
        if is_set:
            raise UserError(
                f"{where}, but merge.{name} needs whole models or rows of data; set it to another"
                f" value, or {INSTEAD}"
            )


def _check_fit(config: Config, deltas: Sequence[Delta], base: Description, digest: str) -> None:
    """Check that deltas are of the base, and of one vocabulary.

    Raises:
        UserError: They are not.
    """
    named = config.merge.deltas
    for name, delta in zip(named, deltas, strict=True):
        if delta.base != digest:
            raise UserError(
                f"{name}: is a delta of another base (digest {delta.base[:12]}, merge.base has"
                f" {digest[:12]}); name that base, or make the delta again from this one"
            )
        schema, first = delta.about.schema, deltas[0].about.schema
        changed = list(differences(delta.about.model, base.model))
        if schema.features != base.schema.features or any(decides(k, base.model) for k in changed):
            raise UserError(f"{name}: has another network or other fields than merge.base")
        for table, known in schema.vocabulary_hashes.items():
            if known != first.vocabulary_hashes[table]:
                raise UserError(
                    f"{name}: has other new tokens of table '{table}' than {named[0]}, so rows of"
                    " equal number are of other tokens; name whole models in merge.sources, with"
                    " merge.vocabularies"
                )
    digests = [delta.digest for delta in deltas]
    for place, each in enumerate(digests):
        if each in digests[:place]:
            raise UserError(f"merge.deltas: {named[place]} is there twice; name every delta once")


def _merge(config: Config, sources: Sources, done: Run) -> dict[str, Any]:
    """Write the merged delta, and the model if configured; return the result."""
    base, deltas, about = sources.base, sources.deltas, sources.about
    mixer = _mixer(config, sources)
    shutil.rmtree(done.path / FOLDER, ignore_errors=True)
    changed: dict[str, int] = {}
    with new_delta(done.path / FOLDER, sources.digest, about) as folder:
        dense, shares = _dense(mixer, base, deltas)
        write_dense(folder, dense)
        for table, keys in base.tables().items():
            each = [delta.table(table) for delta in deltas]
            kept = [key for key in keys if all(key in values for _, values in each)]
            rows = torch.cat([own for own, _ in each]).unique()
            parts = list(_table(mixer, base, table, kept, rows, each))
            values = {key: torch.cat([part[key] for part, _ in parts]) for key in kept}
            write_rows(folder, table, rows, values)
            changed[table] = len(rows)
            shares |= _mean_shares([(len(p[kept[0]]), share) for p, share in parts])
        if (deltas[0].folder / NEW_TOKENS).is_dir():
            shutil.copytree(deltas[0].folder / NEW_TOKENS, folder / NEW_TOKENS)
    if config.merge.write == "model":
        _write_model(sources, open_delta(done.path / FOLDER), done)
        _write_lists(config, sources, done.path)
    names = ("chosen", "alignment", "learned", "anchor", "recalibration", "valid_auc")
    return {**dict.fromkeys(names), "shares": shares or None, "changed_rows": changed}


def _mixer(config: Config, sources: Sources) -> Mixer:
    """Return the method with its inputs."""
    options, base, about = config.merge, sources.base, sources.about
    entries = base.reader.entries
    shapes = {
        key.removeprefix(MODEL): torch.empty(entries[key].size, device="meta")
        for key in base.reader.keys(MODEL)
    }
    has_counts = base.reader.keys(COUNTS) != []
    if preflight.needs_counts(options) and not has_counts:
        raise UserError(f"{base.folder}: holds no row counts, which merge.method needs (evidence)")
    outline = Checkpoint(shapes, {}, {}, about.model, about.schema, about.origin)
    inputs = MergeInputs(
        seed=config.seed,
        counts=[{}] * len(sources.deltas) if has_counts else (),
        base=_floats(base.dense()),
        symmetries=declared(outline).symmetries,
        statistics={},
    )
    rule = preflight.method_of(options)
    return Mixer(rule, rule.filled(options.options), fixed_rules(options, shapes), inputs)


def _dense(
    mixer: Mixer, base: BaseRows, deltas: Sequence[Delta]
) -> tuple[Params, dict[str, list[float]]]:
    """Return the merged parameters that are no tables, and the shares of the deltas."""
    models = [delta.dense() for delta in deltas]
    for delta, model in zip(deltas, models, strict=True):
        for name, tensor in base.dense().items():
            if name not in model or model[name].shape != tensor.shape:
                raise UserError(f"{delta.folder}: {name} is missing, or has another shape")
    merged, shares = mixer.mix([_floats(model) for model in models])
    return {name: merged.get(name, tensor) for name, tensor in models[0].items()}, shares


def _floats(params: Params) -> Params:
    return {name: tensor for name, tensor in params.items() if tensor.is_floating_point()}


def _table(
    mixer: Mixer,
    base: BaseRows,
    table: str,
    keys: Sequence[str],
    rows: Tensor,
    deltas: Sequence[tuple[Tensor, Params]],
) -> Iterator[tuple[Params, dict[str, list[float] | None]]]:
    """Yield merged rows of the tensors of a table, and the shares of its parameters."""
    for block in rows.split(BLOCK):
        known = {key: base.rows(key, table, block) for key in keys}
        each = [overlaid(known, block, own, values) for own, values in deltas]
        counts = [source[COUNTS] for source in each] if COUNTS in keys else []
        merged: Params = {}
        shares: dict[str, list[float] | None] = {}
        for key in keys:
            tensors = [source[key] for source in each]
            if key == COUNTS:
                merged |= merge_counts([{key: tensor} for tensor in tensors], is_disjoint=False)
            elif key.startswith(ACCUMULATOR):
                merged |= merge_accumulators([{key: x} for x in tensors], is_rotated=False)
            else:
                name = key.removeprefix(MODEL)
                mixed = Block(0, tensors, known[key], counts=counts)
                merged[key], shares[name] = mixer.mix_block(name, mixed)
                if not is_finite(merged[key]):
                    raise MergeError(f"{name}: the result has NaN or infinite entries")
        yield merged, shares


def _mean_shares(
    parts: Sequence[tuple[int, dict[str, list[float] | None]]],
) -> dict[str, list[float]]:
    """Return per parameter the mean share of each delta in the changed rows."""
    parts = [(number, share) for number, share in parts if number]
    total = sum(number for number, _ in parts)
    means: dict[str, list[float]] = {}
    for name in parts[0][1] if parts else ():
        each = [(number, share[name]) for number, share in parts]
        if all(share is not None for _, share in each):
            columns = zip(*([x * n for x in share or ()] for n, share in each), strict=True)
            means[name] = [sum(column) / total for column in columns]
    return means


def _write_model(sources: Sources, delta: Delta, done: Run) -> None:
    """Write the base with the rows of a delta as a checkpoint, block by block."""
    reader, about = sources.base.reader, delta.about
    partial = done.path / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    folder = partial / CHECKPOINT / TENSORS
    folder.mkdir(parents=True)
    shapes: dict[str, Any] = {}
    with BlockWriter(folder, 0, resume=False) as writer:
        for name, tensor in delta.dense().items():
            writer.write(f"{MODEL}{name}", 0, tensor)
            shapes[f"{MODEL}{name}"] = (tensor.shape, tensor.dtype)
        for table, keys in sources.base.tables().items():
            rows, values = delta.table(table)
            size = about.schema.table_sizes[table]
            for key in (key for key in keys if key in values):
                name, tensor = full_name(key, table), values[key]
                shapes[name] = ((size, *tensor.shape[1:]), reader.entries[name].properties.dtype)
                for first in range(0, size, BLOCK):
                    block = torch.arange(first, min(first + BLOCK, size))
                    begin, end = torch.searchsorted(rows, torch.tensor([first, first + BLOCK]))
                    written = sources.base.rows(key, table, block)
                    written[rows[begin:end] - first] = tensor[begin:end]
                    writer.write(name, first, written)
        reader.check_unchanged()
        digest = writer.finish()
        write_metadata(folder, writer.written, shapes)
    content = {
        "format": FORMAT,
        "model": section(about.model),
        "schema": about.schema.to_json(),
        **about.origin.to_json(),
        "position": None,
        "files": {writer.name: digest, ".metadata": file_digests(folder)[".metadata"]},
    }
    (partial / CHECKPOINT / DESCRIPTION).write_text(json.dumps(content, indent=1))
    (partial / CHECKPOINT).rename(done.checkpoint)
    shutil.rmtree(partial)


def _write_lists(config: Config, sources: Sources, target: Path) -> None:
    """Write the token lists of the merged model: those of the base, and new tokens."""
    base, schema = sources.base, sources.about.schema
    for path in sorted((sources.deltas[0].folder / NEW_TOKENS).glob("vocabulary.*.txt")):
        table = path.stem.removeprefix("vocabulary.")
        home = vocabularies.find_folder(config, base.folder, base.about, "merge.base")
        known = vocabularies.tokens_of(base.about, home, table)
        listed = [*known, *read_vocabulary(path)]
        if tokens.hash_of(listed) != schema.vocabulary_hashes[table]:
            raise UserError(f"{path}: does not follow the tokens of merge.base; make it again")
        tokens.write_tokens(target / tokens.FOLDER, table, listed)
    places = [base.folder.parent / tokens.FOLDER]
    places += sorted(p.parent for p in Path(config.runtime.encoded).glob(f"*/{MANIFEST}"))
    vocabularies.carry(target / tokens.FOLDER, schema, places)


def _reads(config: Config, digest: str, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return everything that the result depends on."""
    options: Merge = config.merge
    names = ("method", "options", "scope", "tables", "biases", "write")
    rule = {name: getattr(options, name) for name in names}
    return {
        "base": digest,
        "deltas": [delta.digest for delta in deltas],
        "merge": rule,
        "source": preflight.source_of(options),
        "seed": config.seed,
    }
