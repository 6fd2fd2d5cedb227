"""The merge from disk to disk, in blocks of rows: ``merge.memory_gb``.

Facts about whole tables are computed in passes over the sources. Then every block of rows is read,
merged and written, with its counts and optimizer accumulators. A thread reads ahead and another
one writes. A program that was killed goes on after the last block that its journal has.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
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
    content_digest,
    file_digests,
    outline,
)
from cki_rec.checkpoints.rows import RowReader
from cki_rec.config import Config, UserError, section
from cki_rec.data.prefetch import prefetch
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed, sharded
from cki_rec.engine.block_writer import BlockWriter, Written, write_metadata
from cki_rec.engine.networks import declared
from cki_rec.engine.record import Run
from cki_rec.files import write_atomically
from cki_rec.merging.alignment import align, products_of
from cki_rec.merging.optimizer_state import merge_accumulators, merge_counts
from cki_rec.merging.params import MergeError, Params, is_finite
from cki_rec.merging.registry import MergeInputs
from cki_rec.merging.rows import in_blocks
from cki_rec.merging.streaming import Mixer, in_shared_basis, moved, only_on
from cki_rec.merging.symmetry import transform
from cki_rec.pipelines import preflight
from cki_rec.pipelines.evidence import counts_of, keys_of, kind_of
from cki_rec.pipelines.merge_inputs import fixed_rules
from cki_rec.pipelines.sources import Sources
from cki_rec.pipelines.stream_plan import Plan, plan_of, tables_of
from cki_rec.pipelines.stream_sources import Stream, Writer
from cki_rec.progress import progress

PARTIAL = "partial"
"""Folder of merges that are not finished, beside the runs."""
PLAN, FACTS = "plan.json", "facts.pt"

log = logging.getLogger(__name__)


def merge(
    config: Config, models: Sources, run: Run, is_disjoint: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge into a checkpoint of ``run``; return facts about the data, and the result.

    Raises:
        UserError: Sources that do not fit, that have NaN, or that change; a budget that is too
            small.
        OSError: The checkpoint cannot be written.
    """
    options = config.merge
    torch.set_num_threads(config.runtime.threads or 1)  # blocks are small; two more threads copy
    share = distributed.share()
    everyone = [*models.merged, *([models.base] if models.base else [])]
    with ThreadPoolExecutor(len(everyone)) as pool:  # remembered, so checks do not read again
        list(pool.map(lambda source: file_digests(source.folder / TENSORS, share), everyone))
    preflight.check_sources(config, models, None)
    outlines = [outline(source.folder, share) for source in everyone]
    tables = tables_of(outlines[0].params)
    plan = plan_of(config, outlines, len(models.merged), tables)
    partial_folder = run.path.parent / PARTIAL / run.path.name
    reads = {
        "sources": [content_digest(source.folder) for source in everyone],
        "merge": section(options) | {"memory_gb": None},
        "world_size": distributed.world_size(),
    }
    plan, is_resumed = begin(partial_folder, f"{CHECKPOINT}/{TENSORS}", plan, reads)
    try:
        with ExitStack() as stack:
            readers = [
                stack.enter_context(RowReader(source.folder, source.name)) for source in everyone
            ]
            first = outlines[: len(models.merged)]
            counts_of(first, preflight.needs_counts(options), options.evidence)
            kind = run.facts["evidence"] = kind_of(first, options.evidence)
            stream = Stream(
                *(readers, outlines[0].params, tables, keys_of(outlines[0], kind)),
                *(declared(outlines[0]).symmetries, len(models.merged), plan),
                *(sharded.ShardProcesses(outlines[0].schema), set()),
            )
            result = _checkpoint(config, stream, first, partial_folder, is_resumed, is_disjoint)
    except MergeError as error:
        forget(partial_folder)
        raise UserError(f"merge.method={options.method}: {error}") from error
    except Exception:
        forget(partial_folder)
        raise
    if distributed.rank() == 0:
        (partial_folder / CHECKPOINT).rename(run.checkpoint)
    forget(partial_folder)
    distributed.barrier()
    result["streamed"] = {"block_rows": plan.rows, "memory_gb": options.memory_gb}
    return {"hash": outlines[0].origin.data_hash}, result


def begin(folder: Path, inside: str, plan: Plan, reads: dict[str, Any]) -> tuple[Plan, bool]:
    """Return the plan, and whether an earlier program began this merge; make its folder.

    Blocks of a merge that goes on are as large as they were.

    Args:
        folder: Folder of the unfinished merge.
        inside: Folder in it that takes tensors.
        plan: Plan of the merge if it begins now.
        reads: Everything that the bytes of the tensors depend on.
    """
    if distributed.rank() == 0:
        try:
            known = json.loads((folder / PLAN).read_text())
        except (OSError, ValueError):
            known = None
        is_resumed = known is not None and known["reads"] == json.loads(json.dumps(reads))
        is_resumed = is_resumed and known["rows"] <= plan.rows  # else blocks exceed the budget
        if not is_resumed:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / inside).mkdir(parents=True)
            content = {"reads": reads, "rows": plan.rows}
            write_atomically(folder / PLAN, json.dumps(content).encode())
        rows = known["rows"] if is_resumed else plan.rows
    else:
        is_resumed, rows = False, plan.rows
    is_resumed, rows = distributed.from_first((is_resumed, rows))
    if is_resumed and distributed.rank() == 0:
        log.info("  an earlier program began this merge; it goes on after its last block")
    return replace(plan, rows=rows), is_resumed


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
    with BlockWriter(tensors, distributed.rank(), is_resumed) as writer:
        facts = merge_tensors(config, stream, writer, folder, is_disjoint)
        digest = writer.finish()
    files = dict(distributed.exchange((writer.name, digest)))
    blocks = [block for each in distributed.exchange(writer.written) for block in each]
    if distributed.rank() == 0:
        write_metadata(tensors, blocks, _shapes(stream))
        files |= {name: file_digests(tensors)[name] for name in (".metadata",)}
        content = _description(outlines, dict(sorted(files.items())))
        (folder / CHECKPOINT / DESCRIPTION).write_text(json.dumps(content, indent=1))
    names = ("chosen", "learned", "anchor", "recalibration", "valid_auc")
    return {
        **dict.fromkeys(names),
        "shares": mean_shares(stream, facts["shares"], blocks),
        "alignment": facts["alignment"],
    }


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
    dense = [stream.dense(reader) for reader in stream.readers]
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
        for name in stream.tables:
            if number > 0 and not sharded.is_divided(len(stream.params[name])):
                continue
            groups = stream.groups(name)
            spans = [s for s in stream.spans(name) if not writer.has(groups[-1], s.start)]
            acting = only_on([name], symmetries)
            read = (stream.with_state(name, span, groups[:-1]) for span in spans)
            for block, others in prefetch(read):
                if elements:
                    block = moved(block, name, acting, elements)
                rows, share = mixer.mix_block(name, block)
                found = _optimizer_state(name, others, is_rotated, is_disjoint)
                for key, tensor in found.items():
                    writer.write(key, block.first, tensor)
                writer.write(groups[-1], block.first, _checked(name, rows, block.first), share)
                advance(len(rows))
    for reader in stream.readers:
        reader.check_unchanged()
    return {"shares": shares, "alignment": facts["alignment"]}


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
        base = (
            stream.dense(stream.readers[stream.num]) if len(stream.readers) > stream.num else None
        )
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
    name: str, others: dict[str, list[Tensor]], is_rotated: bool, is_disjoint: bool
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


def _shapes(stream: Stream) -> dict[str, tuple[Any, torch.dtype]]:
    """Return shape and dtype of every merged tensor."""
    keys = [f"model.{name}" for name in stream.params if name not in stream.tables]
    for name in stream.tables:
        keys += stream.groups(name)
    entries = stream.readers[0].entries
    return {key: (entries[key].size, entries[key].properties.dtype) for key in keys}


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


def forget(folder: Path) -> None:
    """Remove the files of an unfinished merge."""
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other merges are not finished
            folder.parent.rmdir()
