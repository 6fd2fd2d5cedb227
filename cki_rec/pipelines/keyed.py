"""``cki-rec merge`` of tables by raw key: their rows are joined by key, in bounded memory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cki_rec import COMMAND_VARIABLE
from cki_rec.checkpoints.formats import WRITERS
from cki_rec.checkpoints.formats.keyed import KEYS
from cki_rec.config import Config, Merge, UserError, run_id, section
from cki_rec.engine import distributed
from cki_rec.engine.record import open_run
from cki_rec.files import new_folder
from cki_rec.merging.keyed import KeyedMixer, mixer_of
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.registry import Method
from cki_rec.merging.result import MergeResult
from cki_rec.merging.rows import Block
from cki_rec.merging.streaming import Mixer
from cki_rec.pipelines import card, preflight
from cki_rec.pipelines.foreign import DEFAULTS
from cki_rec.pipelines.keyed_sources import KeyedSource, check_rest, matched_tables, open_keyed
from cki_rec.pipelines.keyed_tables import JoinedTable, use_of
from cki_rec.pipelines.keyed_writing import DUMP, capacity, check_form, writer_of
from cki_rec.pipelines.names import give
from cki_rec.pipelines.sources import check_distinct
from cki_rec.progress import progress

ONLY: dict[str, Any] = {
    **{key: value for key, value in DEFAULTS.items() if key != "max_rows"},
    **{"align.by": "none", "repair": "none", "refine": "none", "recalibrate": False},
    **{"module": None, "batches": None, "data": None, "dtype": None, "memory_gb": None},
}
"""Options that merges by raw key do not have -> their only value."""
FORMATS = (None, DUMP)

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Merge as configured, and log a report with the place of the result.

    Raises:
        UserError: Options or sources that do not fit together.
        OSError: The result cannot be written.
    """
    options = config.merge
    method = _check_options(options)
    torch.set_num_threads(config.runtime.threads or 1)  # parts are small
    with ExitStack() as stack:
        sources = [open_keyed(config, s, "merge.sources", stack) for s in options.sources]
        tables = matched_tables(sources)
        check_rest(sources)
        for each in tables.values():
            check_form(each, options.format)
        uses = {name: use_of(each, options.evidence) for name, each in tables.items()}
        if "counts" in method.needs(options.options) and not all(uses.values()):
            name = next(name for name, use in uses.items() if not use)
            raise UserError(
                f"merge.method={options.method}: needs counts or scores of {name}, and not all"
                " sources have them; use merge=average"
            )
        joined = {name: JoinedTable(name, each, uses[name]) for name, each in tables.items()}
        if config.check_only:
            keys = sum(each.num_rows for table in joined.values() for each in table.tables)
            log.info("the sources fit together: %s keys of %s", f"{keys:,}", ", ".join(tables))
            return
        digests = [source.digest() for source in sources]
        check_distinct(digests, [source.path for source in sources], "merge.sources")
        reads = _reads(config, digests)
        out = Path(config.runtime.out)
        with open_run(out, run_id("merge", reads), config.runtime.force) as done:
            if done.record is None:
                with done.phase("merge"):
                    result, facts = _merge(config, method, sources, joined, uses, done.path)
                facts["sources"] = [
                    {**source.describe(), "digest": digest}
                    for source, digest in zip(sources, digests, strict=True)
                ]
                facts["command"] = os.environ.get(COMMAND_VARIABLE, "")
                card.write(done.path, result, facts)
                log.info("%s", result.report())
                names = ("model", "evidence", "types", "keys", "shared_keys")
                content = {name: facts[name] for name in names}
                content |= {"chosen": None, "shares": result.shares, "alignment": None}
                done.finish(reads, {"hash": ""}, content | {"recipe": result.recipe})
    assert done.record is not None
    recorded = done.record["result"]
    for name, number in recorded["keys"].items():
        shared = f"{recorded['shared_keys'][name]:,}"
        log.info("  %s: %s keys, %s of them in several sources", name, f"{number:,}", shared)
    log.info("model: %s", out / done.path.name / recorded["model"])
    log.info("card: %s", out / done.path.name / card.README)
    give(config, done)


def _check_options(options: Merge) -> Method:
    """Return the method; check that options are those of a merge by raw key.

    Raises:
        UserError: They are not.
    """
    if distributed.world_size() > 1:
        raise UserError("tables by raw key are merged in one process, not by torchrun")
    method = preflight.entry_of(options)
    if not isinstance(method, Method):
        raise UserError(
            f"merge={options.method}: reads rows of data, so it cannot merge tables by raw key;"
            " choose a row-wise method, as merge=average or merge=evidence"
        )
    for key, only in ONLY.items():
        value: Any = options
        for part in key.split("."):
            value = getattr(value, part)
        if value != only:
            raise UserError(
                f"merge.{key}={value}: is not possible for tables by raw key; leave it at {only}"
            )
    if options.format not in FORMATS:
        raise UserError(
            f"merge.format={options.format}: tables by raw key are written in the form of the"
            f" first source, or as {DUMP}"
        )
    return method


def _merge(
    config: Config,
    method: Method,
    sources: Sequence[KeyedSource],
    joined: dict[str, JoinedTable],
    uses: dict[str, str],
    folder: Path,
) -> tuple[MergeResult, dict[str, Any]]:
    """Write the merged model into ``folder``; return the merge, and facts for its card."""
    options = config.merge
    total = sum(each.num_rows for table in joined.values() for each in table.tables)
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="parts.tmp-", dir=folder)
        scratch = Path(stack.enter_context(temporary))
        target = stack.enter_context(new_folder(folder / "model"))
        with progress("divide keys", total) as advance:
            for i, table in enumerate(joined.values()):
                table.divide(scratch / f"table{i}", advance)
        rest = _rest(sources)
        try:
            mixer = _mixer(config, method, joined, uses, rest)
            params, shares = mixer.mix(rest) if rest[0] else ({}, {})
            numbers, shared = dict[str, int](), dict[str, int]()
            with progress(f"merge {options.label}", total) as advance:
                for i, (name, table) in enumerate(joined.items()):
                    most = capacity(table.tables[0], options.format, options.max_rows)
                    keyed = KeyedMixer(name, mixer)
                    place = scratch / f"values{i}"
                    written = _write(table, keyed, most, target, place, options.format, advance)
                    params |= written.params
                    numbers[name], shared[name] = written.keys, written.shared
                    if written.shares is not None:
                        shares[name] = written.shares
        except MergeError as error:
            raise UserError(f"merge.method={options.method}: {error}") from error
        _write_rest(sources[0], params, target, options.format)
    types = sorted({str(each.dtype) for table in joined.values() for each in table.tables})
    first = sorted({str(table.tables[0].dtype) for table in joined.values()})
    kinds = sorted({use or "none" for use in uses.values()})
    held = {**dict.fromkeys(joined, torch.empty(0)), **params}  # tables of dumps are in files
    warnings = [
        f"{name}: no key is in several sources; are all keys of the same form?"
        for name in joined
        if len(sources) > 1 and not shared[name]
    ]
    result = MergeResult(held, shares or None, recipe=options.method, warnings=warnings)
    return result, dict(
        model="model",
        evidence={"kind": ", ".join(kinds), "tables": [n for n, use in uses.items() if use]},
        tables=list(joined),
        keys=numbers,
        shared_keys=shared,
        types={"sources": types, "result": first},
        rows=0,
        seed=config.seed,
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """One merged table."""

    keys: int
    shared: int
    """Keys that several sources have."""
    shares: list[float] | None
    """Mean share of each source."""
    params: Params
    """Tensors that the checkpoint takes."""


def _write(
    table: JoinedTable,
    mixer: KeyedMixer,
    max_rows: int | None,
    target: Path,
    scratch: Path,
    form: str | None,
    advance: Any,
) -> _Written:
    """Write one merged table."""
    gone, limit = (0, None) if max_rows is None else table.limit(max_rows)
    if gone:
        stay = f"{max_rows:,}"
        log.info("  %s: %s keys of least use leave, %s stay", table.name, f"{gone:,}", stay)
    writer = writer_of(table, mixer, target, scratch, form)
    keys, shared, sums = 0, 0, [0.0] * len(table.tables)
    has_shares = True
    with closing(writer):
        for merged in table.merged(mixer, limit):
            writer.add(merged.rows)
            size = len(merged.rows[KEYS])
            keys, shared = keys + size, shared + merged.shared
            has_shares = has_shares and merged.shares is not None
            pairs = zip(sums, merged.shares or sums, strict=True)
            sums = [total + size * share for total, share in pairs]
            advance(size)
        params = writer.finish()
    shares = [total / max(1, keys) for total in sums] if has_shares else None
    return _Written(keys, shared, shares, params)


def _mixer(
    config: Config,
    method: Method,
    joined: dict[str, JoinedTable],
    uses: dict[str, str],
    rest: Sequence[Params],
) -> Mixer:
    """Return the method with its facts about whole tables."""
    rows: dict[str, Any] = {name: table.blocks for name, table in joined.items()}
    for name in rest[0]:
        rows[name] = lambda name=name: [Block(0, [params[name] for params in rest])]
    options = config.merge.options
    return mixer_of(method, options, config.seed, all(uses.values()), len(rest), rows)


def _rest(sources: Sequence[KeyedSource]) -> list[Params]:
    """Return the floating tensors of every source that belong to no table by raw key."""
    first = sources[0].rest
    if first is None:
        return [{} for _ in sources]
    names = [n for n, e in first.parts.entries.items() if e.dtype.is_floating_point]
    models = [{n: s.rest.tensor(n) for n in names} for s in sources if s.rest]
    return [
        {n: x.to(torch.promote_types(x.dtype, torch.float32)) for n, x in model.items()}
        for model in models
    ]


def _write_rest(first: KeyedSource, params: Params, target: Path, form: str | None) -> None:
    """Write the checkpoint that is beside dumps, or that holds the merged tables."""
    if first.rest is None:
        return
    entries = first.rest.parts.entries
    kept = {
        name: params[name].to(entry.dtype) if name in params else first.rest.tensor(name)
        for name, entry in entries.items()
    }
    kept |= {name: tensor for name, tensor in params.items() if name not in entries}
    if form == DUMP and kept:
        WRITERS["dcp"](kept, target)
    elif kept:
        restored = first.rest.naming.restored
        stored = {first.names[name]: restored(name, tensor) for name, tensor in kept.items()}
        first.rest.stored.written(stored, target)


def _reads(config: Config, digests: Sequence[str]) -> dict[str, Any]:
    """Return everything that the result depends on."""
    options = section(config.merge)
    for name in ("label", "plugins", "sources", "base", "memory_gb"):
        options.pop(name, None)
    return {
        "keyed": list(digests),
        "merge": options,
        "source": preflight.source_of(config.merge),
        "seed": config.seed,
    }
