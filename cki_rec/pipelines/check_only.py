"""Report all that fits and all that differs before a merge: ``merge check_only=true``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import TENSORS, Checkpoint, content_digest, outline
from cki_rec.config import Config, Merge, UserError
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed, sharded
from cki_rec.engine.lookups import merging_module
from cki_rec.engine.sampling import sample_statistics
from cki_rec.merging.api import FITTED
from cki_rec.merging.registry import Method
from cki_rec.merging.search import AUTO
from cki_rec.merging.steps import ScarceSample, check_sample
from cki_rec.pipelines import compatibility, preflight, stream_plan, vocabularies
from cki_rec.pipelines.compatibility import Finding, State
from cki_rec.pipelines.preflight import entry_of
from cki_rec.pipelines.references import Reference
from cki_rec.pipelines.sources import Source, Sources, base_warning, check_distinct, find, title
from cki_rec.pipelines.vocabularies import Joined

BASE = "base "
"""Begins the name of the base among the sources."""
SAMPLE = "sample"
"""Finding about the number of rows that a repair fits layers on."""

log = logging.getLogger(__name__)


def report(config: Config) -> None:
    """Log all that fits and all that differs, for every merge that is configured.

    Nothing is trained, encoded or written (``cki-rec merge check_only=true``).

    Raises:
        UserError: A merge would not run; the first reason.
    """
    config = preflight.without_unused(config)
    if config.merge.memory_gb is not None:
        _report_streamed(config)
        return
    is_search = config.merge.method == AUTO
    if is_search:
        preflight.check_options(config)
    merges, problems, num_left_out = preflight.recipes_of(config) if is_search else [config], [], 0
    for each in merges:
        findings = _findings(each, preflight.needs_rows(each.merge) or is_search)
        log.info("merge %s (%s):", each.merge.label, each.merge.method)
        for finding in findings:
            log.info("  %-20s %-10s %s", finding.check, finding.state, finding.reason)
        impossible = [f for f in findings if f.state == "impossible"]
        if is_search and impossible and all(f.check == SAMPLE for f in impossible):
            log.info("  auto leaves it out")
            num_left_out += 1
        else:
            problems += [(each.merge.method, finding) for finding in impossible]
    if problems:
        (method, finding), more = problems[0], len(problems) - 1
        raise UserError(
            f"check_only: merge.method={method} would not run: {finding.check}: {finding.reason}"
            + (f" (and {more} more, above)" if more else "")
        )
    if num_left_out == len(merges):
        raise UserError("check_only: auto would not run: it leaves out every recipe (see above)")
    log.info("it would run")


def _report_streamed(config: Config) -> None:
    """Log the plan of a merge from disk to disk; no table is read.

    Raises:
        UserError: It would not run.
    """
    stream_plan.check_options(config)
    deltas = [(delta, "merge.sources") for delta in config.merge.sources]
    if preflight.needs_base(config):
        assert config.merge.base is not None
        deltas.append((config.merge.base, "merge.base"))
    found = [Source(title(d), "", find(config, d, option)) for d, option in deltas]
    num = len(config.merge.sources)
    sources = Sources(found[:num], [], found[num] if len(found) > num else None)
    preflight.check_sources(config, sources, None)
    outlines = [outline(source.folder) for source in found]
    plan = stream_plan.plan_of(config, outlines, num, stream_plan.tables_of(outlines[0].params))
    log.info("merge %s (%s):", config.merge.label, config.merge.method)
    files = (found[0].folder / TENSORS).glob("*.distcp")
    for line in stream_plan.described(plan, files, Path(config.runtime.out)):
        log.info("  %s", line)
    log.info("it would run")


def _findings(config: Config, reads_rows: bool) -> list[Finding]:
    """Return all findings that are possible; some need the absence of earlier ones."""
    options, findings = config.merge, list[Finding]()
    entry_of(options)
    try:
        preflight.check_options(config)
    except UserError as error:
        findings.append(Finding("method", "impossible", str(error)))
    deltas = [(title(d), d, "merge.sources") for d in options.sources]
    if options.base and preflight.needs_base(config):
        deltas.append((f"{BASE}{title(options.base)}", options.base, "merge.base"))
    loaded: list[tuple[str, Path, Checkpoint]] = []
    for name, delta, option in deltas:
        folder, problem = _found(config, delta, option)
        if folder is None or problem:
            findings.append(Finding("checkpoint", "impossible", f"{name}: {problem}"))
            continue
        (saved,) = sharded.load([folder])
        loaded.append((name, folder, saved))
        findings.append(Finding("checkpoint", "ok", f"{name}: {folder}"))
    findings += _repeated(loaded)
    if loaded:
        compared, joined = _compare(config, loaded, len(deltas))
        names = [name for name, _, _ in loaded]
        findings += [*compared, *_rows(config, joined, names, reads_rows)]
    return findings


def _found(
    config: Config, delta: Mapping[str, Any], option: str
) -> tuple[Path | None, str | None]:
    """Return the folder of a source, and the problem with it; every process checks a share."""
    folder, problem = None, None
    try:
        folder = find(config, delta, option)
        outline(folder, distributed.share())
    except UserError as error:
        problem = str(error)
    return folder, next(filter(None, distributed.exchange(problem)), None)


def _repeated(loaded: Sequence[tuple[str, Path, Checkpoint]]) -> list[Finding]:
    """Return whether two sources are the same checkpoint, or the base is one of them."""
    base = [folder for name, folder, _ in loaded if name.startswith(BASE)]
    sources = [(name, folder) for name, folder, _ in loaded if not name.startswith(BASE)]
    try:
        digests = [content_digest(folder) for _, folder in sources]
        check_distinct(digests, [name for name, _ in sources], "merge.sources")
    except UserError as error:
        return [Finding("checkpoint", "impossible", str(error))]
    warnings = [base_warning(folder, [f for _, f in sources]) for folder in base]
    return [Finding("base", "differs", warning) for warning in warnings if warning]


def _compare(
    config: Config, loaded: Sequence[tuple[str, Path, Checkpoint]], expected: int
) -> tuple[list[Finding], list[Checkpoint]]:
    """Return the differences of the sources, and the sources, joined if they can be."""
    options = config.merge
    names, saved = [name for name, _, _ in loaded], [c for _, _, c in loaded]
    is_joined = bool(options.vocabularies) and len(loaded) == expected
    joined, notes = Joined(saved), list[Finding]()
    hashes = [one.schema.vocabulary_hashes for one in saved]
    if is_joined or any(hash_of != hashes[0] for hash_of in hashes):
        try:
            nulls: list[Any] = [None] * len(loaded)
            look = options if is_joined else replace(options, vocabularies=nulls)
            pairs = [(folder, one) for _, folder, one in loaded]
            folders = vocabularies.folders_of(replace(config, merge=look), pairs)
            joined = vocabularies.joined(saved, folders, min(len(saved), len(options.sources)))
        except UserError as error:
            state: State = "impossible" if is_joined else "differs"
            notes.append(Finding("token lists", state, str(error)))
    outlines = [outline(folder, distributed.share()) for _, folder, _ in loaded]
    findings = compatibility.compare(outlines, names, is_joined, joined.rows)
    findings[2:2] = [*notes, *(Finding("overlap", "differs", line) for line in joined.warnings)]
    if is_joined:
        saved = joined.checkpoints
    merges = not isinstance(entry_of(options), Reference)
    findings += compatibility.finite(saved, names, merges)
    findings += compatibility.row_counts(
        *(saved, names, preflight.needs_counts(options), options.method, options.evidence)
    )
    fits = all(f.state != "impossible" for f in findings)
    sources = saved[: len(options.sources)]
    if fits and merges:
        is_aligned = options.align.by != "none"
        findings += compatibility.alignment(
            sources,
            names[: len(sources)],
            is_aligned,
            config.seed,
            joined.owners,
            options.evidence,
        )
    return [*findings, _memory(outlines, options)], sources


def _rows(
    config: Config, sources: Sequence[Checkpoint], names: Sequence[str], reads_rows: bool
) -> list[Finding]:
    """Return whether the rows that are read exist and fit the sources."""
    if not reads_rows:
        return [Finding("needs", "ok", "no data set")]
    subject = "rows of the data set"
    try:
        preflight.check_encoding(config, sources[0])
        dataset = store.find(config.data, config.runtime.encoded)
        if dataset is None:
            return [Finding("needs", "differs", f"{subject}: not encoded yet; merge encodes them")]
        preflight.check_rows_fit(config, sources, names, dataset)
    except UserError as error:
        return [Finding("needs", "impossible", f"{subject}: {error}")]
    fits = Finding("needs", "ok", f"{subject}: {dataset.folder.name}")
    return [fits, *_sample(config, sources[0], dataset)]


def _sample(config: Config, first: Checkpoint, dataset: EncodedDataset) -> list[Finding]:
    """Return whether the sample of rows is large enough for the repair."""
    options = config.merge
    if options.repair not in FITTED or len(options.sources) == 1:
        return []
    network = merging_module(first.schema, first.model)
    rows = sample_statistics(network, dataset, first.schema, options.sample, config.seed)
    try:
        warnings = check_sample(options.repair, first.params, rows)
    except ScarceSample as error:
        return [Finding(SAMPLE, "impossible", f"merge.{error}")]
    return [Finding(SAMPLE, "differs", f"merge.{warning}") for warning in warnings]


def _memory(checkpoints: Sequence[Checkpoint], options: Merge) -> Finding:
    """Return an estimate of the memory of the merge, beside that of this machine."""
    size = compatibility.num_bytes
    sources = sum(size(c.params) + size(c.accumulators) + size(c.counts) for c in checkpoints)
    params = sum(size(c.params) for c in checkpoints)
    total = sources + params // len(checkpoints)
    total += sources if options.vocabularies else 0
    entry = entry_of(options)
    total += params if isinstance(entry, Method) and entry.full_weights else 0
    if preflight.has_anchor(options, checkpoints[0]):  # the best so far and the next
        total += 2 * params // len(checkpoints)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state: State = "ok" if total < available else "differs"
    return Finding(
        "memory", state, f"about {total / 2**20:,.1f} MiB of {available / 2**20:,.0f} MiB"
    )
