"""The merge from disk to disk, in blocks of rows: ``merge.memory_gb``.

Facts about whole tables are computed in passes over the sources. Then every block of rows is read,
merged and written, with its counts and optimizer accumulators. Threads read and merge blocks, and
one writes them in their order. Meanwhile the digests of the sources are computed. A program that
was killed goes on after the last block that its journal has.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
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
    check_files,
    content_digest,
    outline,
)
from cki_rec.checkpoints.rows import RowReader
from cki_rec.config import Config, section
from cki_rec.data import prefetch
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed, sharded
from cki_rec.engine.block_writer import BlockWriter, Written, write_metadata
from cki_rec.engine.host_memory import keep_freed_memory
from cki_rec.engine.networks import declared
from cki_rec.engine.record import Run
from cki_rec.files import file_digest, write_atomically
from cki_rec.merging.alignment import align, products_of
from cki_rec.merging.optimizer_state import merge_accumulators, merge_counts
from cki_rec.merging.params import MergeError, Params, is_finite
from cki_rec.merging.registry import MergeInputs
from cki_rec.merging.rows import in_blocks
from cki_rec.merging.streaming import Mixer, in_shared_basis, moved, only_on
from cki_rec.merging.symmetry import transform
from cki_rec.pipelines import compatibility, preflight
from cki_rec.pipelines.evidence import counts_of, keys_of, kind_of
from cki_rec.pipelines.merge_inputs import fixed_rules
from cki_rec.pipelines.sources import Sources
from cki_rec.pipelines.stream_plan import plan_of, tables_of
from cki_rec.pipelines.stream_sources import Reader, Stream, Writer
from cki_rec.pipelines.unfinished import PARTIAL, begin, forget, kept_or_forgotten
from cki_rec.progress import progress

FACTS = "facts.pt"
"""File of the facts about whole tables, in the folder of an unfinished merge."""


def merge(
    config: Config, models: Sources, run: Run, is_disjoint: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge into a checkpoint of ``run``; return facts about the data, and the result.

    Raises:
        UserError: Sources that do not fit, that have NaN, or that change; a budget that is too
            small.
        OSError: The checkpoint cannot be written.
    """
    options, folder = config.merge, run.path.parent / PARTIAL / run.path.name
    everyone = [*models.merged, *([models.base] if models.base else [])]
    outlines = [outline(source.folder, None) for source in everyone]
    compatibility.require(compatibility.compare(outlines, [source.name for source in everyone]))
    tables, first = tables_of(outlines[0].params), outlines[: len(models.merged)]
    counts_of(first, preflight.needs_counts(options), options.evidence)
    kind = run.facts["evidence"] = kind_of(first, options.evidence)
    plan = plan_of(config, outlines, len(models.merged), tables)
    reads = {
        "sources": [content_digest(source.folder) for source in everyone],
        "merge": section(options) | {"memory_gb": None},
        "world_size": distributed.world_size(),
    }
    plan, is_resumed = begin(folder, f"{CHECKPOINT}/{TENSORS}", plan, reads)
    keep_freed_memory()
    torch.set_num_threads(1)  # of one operation: blocks are small
    with kept_or_forgotten(folder, options.method), ExitStack() as stack:
        readers: list[Reader] = [
            stack.enter_context(RowReader(each.folder, each.name)) for each in everyone
        ]
        stream = Stream(
            *(readers, outlines[0].params, tables, keys_of(outlines[0], kind)),
            *(declared(outlines[0]).symmetries, len(models.merged), plan),
            processes=sharded.ShardProcesses(outlines[0].schema),
            run=stack.enter_context(prefetch.threads(plan.threads)),
            digests=_digests([each.folder for each in everyone], plan.threads, stack),
        )
        result = _checkpoint(config, stream, first, folder, is_resumed, is_disjoint)
    if distributed.rank() == 0:
        (folder / CHECKPOINT).rename(run.checkpoint)
        forget(folder)
    distributed.barrier()
    result["streamed"] = {"block_rows": plan.rows, "memory_gb": options.memory_gb}
    return {"hash": outlines[0].origin.data_hash}, result


def _digests(folders: Sequence[Path], num_threads: int, stack: ExitStack) -> list[Future[None]]:
    """Start the checks of the files of checkpoints; processes share the work.

    A single thread computes them now.
    """
    number, total = distributed.share()
    shares = [((number + place) % total, total) for place in range(len(folders))]
    if num_threads == 1:
        for folder, share in zip(folders, shares, strict=True):
            check_files(folder, share)
        return []
    pool = stack.enter_context(ThreadPoolExecutor(len(folders)))
    return [pool.submit(check_files, *pair) for pair in zip(folders, shares, strict=True)]


def _checkpoint(
    config: Config,
    stream: Stream,
    outlines: Sequence[Checkpoint],
    folder: Path,
    is_resumed: bool,
    is_disjoint: bool,
) -> dict[str, Any]:
    """Write the merged checkpoint into ``folder``; return the result."""
    tensors = folder / CHECKPOINT / TENSORS
    types = _types(stream, config.merge.dtype)
    with BlockWriter(tensors, distributed.rank(), is_resumed, types) as writer:
        facts = merge_tensors(config, stream, writer, folder, is_disjoint)
        digest = writer.finish()
    files = dict(distributed.exchange((writer.name, digest)))
    blocks = [block for each in distributed.exchange(writer.written) for block in each]
    if distributed.rank() == 0:
        sizes = {key: stream.readers[0].entries[key].size for key in types}
        write_metadata(tensors, blocks, {key: (sizes[key], types[key]) for key in types})
        files[".metadata"] = file_digest(tensors / ".metadata")
        content = _description(outlines, dict(sorted(files.items())))
        (folder / CHECKPOINT / DESCRIPTION).write_text(json.dumps(content, indent=1))
    names = ("chosen", "learned", "anchor", "recalibration", "valid_auc")
    result = {
        **dict.fromkeys(names),
        "shares": mean_shares(stream, facts["shares"], blocks),
        "alignment": facts["alignment"],
    }
    merged = [types[f"model.{name}"] for name in stream.params]
    compatibility.note_types(result, outlines, merged, config.merge.dtype is not None)
    return result


def merge_tensors(
    config: Config, stream: Stream, writer: Writer, folder: Path, is_disjoint: bool
) -> dict[str, Any]:
    """Merge all tensors into ``writer``; return the shares of those held whole, and alignment.

    Args:
        config: The configuration.
        stream: The sources.
        writer: It takes the parameters under ``model.NAME``.
        folder: Folder of the unfinished merge.
        is_disjoint: The sources saw different rows, so their counts add up.

    Raises:
        UserError: A source has NaN, or changes.
        MergeError: The result has NaN, or the method refuses its inputs.
    """
    dense = stream.dense()
    symmetries = stream.symmetries
    sources, base = dense[: stream.num], dense[stream.num] if len(dense) > stream.num else None
    facts = _facts(config, stream, sources, base, folder / FACTS)
    elements = facts["elements"]
    is_rotated = config.merge.align.by != "none"
    if elements:
        acting = only_on(list(sources[0]), symmetries)
        pairs = zip(sources, elements, strict=True)
        sources = [transform(params, acting, each) for params, each in pairs]
    mixer = _mixer(config, stream, base, facts["statistics"])
    merged, shares = mixer.mix(sources)
    number, total = distributed.rank(), sum(len(stream.params[n]) for n in stream.tables)
    with progress(f"merge {config.merge.label}", total) as advance:
        if number == 0:
            for name, tensor in {**merged, **stream.integers()}.items():
                writer.write(f"model.{name}", 0, _checked(name, tensor))
        tasks = [
            (name, span)
            for name in stream.tables
            if number == 0 or sharded.is_divided(len(stream.params[name]))
            for span in stream.spans(name)
            if not writer.has(f"model.{name}", span.start)
        ]
        merge_rows = partial(_merge_rows, stream, mixer, elements, is_rotated, is_disjoint)
        for (name, span), (state, rows, share) in zip(
            tasks, stream.run(merge_rows, tasks), strict=True
        ):
            for key, tensor in state.items():
                writer.write(key, span.start, tensor)
            writer.write(f"model.{name}", span.start, rows, share)
            advance(len(rows))
            stream.check_digests(wait=False)
    stream.check_digests(wait=True)
    for reader in stream.readers:
        reader.check_unchanged()
    return {"shares": shares, "alignment": facts["alignment"]}


def _merge_rows(
    stream: Stream,
    mixer: Mixer,
    elements: Sequence[Sequence[Tensor]],
    is_rotated: bool,
    is_disjoint: bool,
    task: tuple[str, slice],
) -> tuple[Params, Tensor, list[float] | None]:
    """Return counts and accumulators, merged rows of a table, and the share of each source.

    Raises:
        UserError: A row of a source is not finite.
        MergeError: A merged row is not finite.
    """
    name, span = task
    block, others = stream.with_state(name, span, stream.groups(name)[:-1])
    if elements:
        block = moved(block, name, only_on([name], stream.symmetries), elements)
    rows, share = mixer.mix_block(name, block)
    state = _optimizer_state(others, is_rotated, is_disjoint)
    return state, _checked(name, rows, span.start), share


def _facts(
    config: Config, stream: Stream, dense: Sequence[Params], base: Params | None, file: Path
) -> dict[str, Any]:
    """Return group elements and statistics of whole tables; an earlier program may have them."""
    if file.exists():
        known: dict[str, Any] = torch.load(file, weights_only=True)
        return known
    rule, names = preflight.method_of(config.merge), list(stream.tables)
    symmetries, is_aligned = stream.symmetries, config.merge.align.by != "none"
    num_rows = sum(len(stream.params[name]) for name in names)
    elements: list[list[Tensor]] = []
    facts: dict[str, Any] | None = None
    if is_aligned and stream.num > 1:
        shaped = [{**stream.params, **params} for params in dense]
        floats = [{n: x for n, x in m.items() if x.is_floating_point()} for m in shaped]
        slices = [part.parameter for symmetry in symmetries for part in symmetry.slices]
        moving = [name for name in names if name in slices]
        with progress("compare tables", num_rows) as advance:
            products = {name: products_of(stream.rows(name, advance)) for name in moving}
        found = stream.processes.agree(
            align(
                *(floats, symmetries, products),
                anchored_start=stream.anchored_start,
                starts=config.merge.align.starts,
                seed=config.seed,
            )
        )
        elements = found.elements
        facts = {
            "by": config.merge.align.by,
            "agreement": found.agreement,
            "agreement_before": found.agreement_before,
            "sweeps": found.sweeps,
        }
    statistics: dict[str, Tensor] = {}
    if rule.statistics is not None:
        acting = only_on(list(dense[0]), symmetries)
        whole = list(dense)
        if elements:
            whole = [transform(m, acting, e) for m, e in zip(dense, elements, strict=True)]
        with progress("facts about tables", 0) as advance:
            rows = {name: stream.rows(name, advance) for name in names}
            if elements:
                rows = {n: in_shared_basis(r, symmetries, elements) for n, r in rows.items()}
            options = rule.filled(config.merge.options)
            statistics = rule.collect({**in_blocks(whole, base), **rows}, options) or {}
    result = {"elements": elements, "alignment": facts, "statistics": statistics}
    if distributed.rank() == 0:
        stream_bytes = io.BytesIO()
        torch.save(result, stream_bytes)
        write_atomically(file, stream_bytes.getvalue())
    return result


def _mixer(
    config: Config, stream: Stream, base: Params | None, statistics: dict[str, Tensor]
) -> Mixer:
    """Return the method with its inputs."""
    rule = preflight.method_of(config.merge)
    inputs = MergeInputs(
        seed=config.seed,
        counts=[{}] * stream.num if stream.counted else (),
        base=base,
        symmetries=stream.symmetries,
        statistics=statistics,
    )
    options = rule.filled(config.merge.options)
    return Mixer(rule, options, fixed_rules(config.merge, stream.params), inputs)


def _optimizer_state(
    others: dict[str, list[Tensor]], is_rotated: bool, is_disjoint: bool
) -> Params:
    """Return merged accumulators and counts of some rows."""
    merged: Params = {}
    for key, tensors in others.items():
        groups = [{key: tensor} for tensor in tensors]
        if key.startswith("counts."):
            merged |= merge_counts(groups, is_disjoint)
        else:
            merged |= merge_accumulators(groups, is_rotated)
    return merged


def _checked(name: str, tensor: Tensor, first: int = 0) -> Tensor:
    """Return a merged tensor that is finite.

    Raises:
        MergeError: It is not.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        raise MergeError(f"{name}: the result has NaN or infinite entries, from row {first:,} on")
    return tensor


def mean_shares(
    stream: Stream, dense: dict[str, list[float]], blocks: Sequence[Written]
) -> dict[str, list[float]] | None:
    """Return the mean share of each source per parameter, over all rows of tables.

    Args:
        stream: The sources.
        dense: Those of the parameters that are no tables.
        blocks: All written blocks.
    """
    shares = dict(dense)
    for name in stream.tables:
        if means := _mean([b for b in blocks if b.key == f"model.{name}"]):
            shares[name] = means
    return {n: shares[n] for n in stream.params if n in shares} or None


def _mean(blocks: Sequence[Written]) -> list[float] | None:
    """Return the mean share of each source over all rows of a table."""
    if not blocks or blocks[0].shares is None:
        return None
    total = max(1, sum(block.sizes[0] for block in blocks))
    each = [[share * block.sizes[0] for share in block.shares or ()] for block in blocks]
    return [sum(values) / total for values in zip(*each, strict=True)]


def _types(stream: Stream, dtype: str | None) -> dict[str, torch.dtype]:
    """Return the type of every merged tensor; that of parameters may be configured."""
    keys = [f"model.{name}" for name in stream.params if name not in stream.tables]
    keys += [key for name in stream.tables for key in stream.groups(name)]
    entries = stream.readers[0].entries
    types = {key: entries[key].properties.dtype for key in keys}
    if dtype is None:
        return types
    floats = [f"model.{name}" for name, x in stream.params.items() if x.is_floating_point()]
    return types | dict.fromkeys(floats, getattr(torch, dtype))


def _description(outlines: Sequence[Checkpoint], files: dict[str, str]) -> dict[str, Any]:
    """Return the description of the merged checkpoint."""
    return {
        "format": FORMAT,
        "model": section(outlines[0].model),
        "schema": outlines[0].schema.to_json(),
        **Provenance.union([saved.origin for saved in outlines]).to_json(),
        "position": None,
        "files": files,
    }
