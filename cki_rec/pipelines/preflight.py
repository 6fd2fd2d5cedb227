"""All checks of a merge, before any tensor is read or any source is trained for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import Checkpoint, load, outline
from cki_rec.config import Config, Merge, UserError, nearest, with_delta
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed
from cki_rec.engine.networks import declared
from cki_rec.merging.methods import METHODS
from cki_rec.merging.params import MergeError
from cki_rec.merging.registry import Method
from cki_rec.pipelines import compatibility, vocabularies
from cki_rec.pipelines.compatibility import Finding, State
from cki_rec.pipelines.provenance import check_data, check_rows
from cki_rec.pipelines.references import REFERENCES, Reference
from cki_rec.pipelines.sources import Sources, find
from cki_rec.pipelines.vocabularies import Joined

AUTO = "auto"
"""Value of ``merge.method`` that searches ``merge.recipes``."""
RECIPE = {"merge.method": "evidence", "merge.recipes": []}
"""Options from which a recipe starts."""
TRAINING_ROWS = frozenset({"fisher", "moments", "imitate"})
"""Inputs of methods that are computed on training rows."""
INSTEAD = "use merge=evidence or merge=aligned_weights, or start it without torchrun"

log = logging.getLogger(__name__)


def entry_of(options: Merge) -> Method | Reference | None:
    """Return the configured method or reference; None for a search over recipes.

    Raises:
        UserError: There is none of that name; the message holds the nearest one.
    """
    name = options.method
    if name == AUTO:
        return None
    if name not in METHODS and name not in REFERENCES:
        known = [AUTO, *METHODS, *REFERENCES]
        raise UserError(f"merge.method={name}: {nearest(name, known)}one of {', '.join(known)}")
    return METHODS[name] if name in METHODS else REFERENCES[name]


def method_of(options: Merge) -> Method:
    """Return the configured merge method; the configuration is known to have one."""
    return METHODS[options.method]


def is_single_model(options: Merge) -> bool:
    """Return whether the result is one model of unchanged size."""
    entry = entry_of(options)
    return not isinstance(entry, Reference) or entry.single_model


def recipes_of(config: Config) -> list[Config]:
    """Return the merges that ``auto`` searches."""
    return [
        with_delta(
            config,
            RECIPE | {f"merge.{key}": value for key, value in recipe.items()},
            f"merge.recipes[{place}]",
        )
        for place, recipe in enumerate(config.merge.recipes)
    ]


def needs_of(options: Merge) -> frozenset[str]:
    """Return the inputs that the configured method or reference needs."""
    entry = entry_of(options)
    return frozenset({"score"}) if entry is None else entry.needs(options.options)


def needs_base(config: Config) -> bool:
    """Return whether the method, or a recipe of the search, needs a base model."""
    merges = recipes_of(config) if config.merge.method == AUTO else [config]
    return any("base" in needs_of(each.merge) for each in merges)


def needs_counts(options: Merge) -> bool:
    """Return whether the merge needs row counts."""
    return "counts" in needs_of(options) or options.tables == "evidence"


def needs_labels(options: Merge) -> bool:
    """Return whether the merge reads labels of validation rows, whatever the network."""
    return options.recalibrate or options.learn.what != "none" or "score" in needs_of(options)


def needs_activations(options: Merge) -> bool:
    """Return whether the method, the alignment or the repair runs models on training rows."""
    is_aligned = options.align.by == "activations" or options.repair != "none"
    return bool(TRAINING_ROWS & needs_of(options)) or (len(options.sources) > 1 and is_aligned)


def needs_rows(options: Merge) -> bool:
    """Return whether the merge reads rows of the data set."""
    return needs_labels(options) or needs_activations(options)


def check_options(config: Config) -> None:
    """Check all options of a merge that can be checked without files.

    Raises:
        UserError: An unknown method or option, or options that exclude each other.
    """
    options = config.merge
    entry = entry_of(options)
    _check_processes(options, entry)
    if entry is None:
        _check_recipes(config)
        return
    if options.vocabularies:
        num_bases = int("base" in needs_of(options))
        vocabularies.check_folders(options.vocabularies, len(options.sources) + num_bases)
    where = f"merge.method={options.method}"
    if isinstance(entry, Reference):
        if options.options:
            raise UserError(f"merge.options: {where} has no options")
        for name, is_set in {
            f"ablation={options.ablation}": options.ablation != "none",
            "recalibrate=true": options.recalibrate,
            f"repair={options.repair}": options.repair != "none",
            f"learn.what={options.learn.what}": options.learn.what != "none",
        }.items():
            if is_set:
                raise UserError(f"merge.{name}: {where} merges no parameters; leave it out")
        if options.vocabularies and not config.data.vocabularies:
            raise UserError(
                f"merge.vocabularies: {where} merges no parameters; use merge=evidence, or"
                " data.vocabularies=[FOLDER,...], the encoded data sets of the sources"
            )
        return
    try:
        entry.check(options.options, len(options.sources))
    except MergeError as error:
        raise UserError(f"merge.options: {error}") from None
    if options.learn.what == "gates" and not entry.can_learn(options.options):
        raise UserError(f"merge.learn.what=gates: {where} has no gate to learn")
    is_mean = options.scope == "all" and options.biases == "merge"
    if options.repair != "none" and not (entry.averages_dense and is_mean):
        means = " or ".join(name for name, known in METHODS.items() if known.averages_dense)
        raise UserError(
            f"merge.repair={options.repair} requires method={means}, scope=all and biases=merge"
            f" (got {options.method}, {options.scope}, {options.biases}); use merge.repair=none"
        )
    if options.vocabularies and not config.data.vocabularies and needs_labels(options):
        readers = {
            "merge.recalibrate=true": options.recalibrate,
            f"merge.learn.what={options.learn.what}": options.learn.what != "none",
            where: True,
        }
        reader = next(name for name, reads in readers.items() if reads)
        raise UserError(
            f"merge.vocabularies: {reader} reads rows, which are not encoded with the joined"
            " vocabularies; leave it out, or set data.vocabularies=[FOLDER,...] to the encoded"
            " data sets of the sources"
        )
    if options.vocabularies and options.learn.what == "trunk":
        raise UserError(
            "merge.vocabularies: merge.learn.what=trunk trains on tables of the first source,"
            " which lack rows of others; use merge.learn.what=gates"
        )
    if "base" in entry.needs(options.options):
        if options.align.by != "none" and len(options.sources) > 2:
            raise UserError(
                f"{where}: more than two sources are aligned to their mean, but the base is not;"
                " use merge.align.by=none"
            )
        if options.base is None:
            raise UserError(
                f"{where} needs the model that all sources started from; set"
                " merge.base={path: ...}, or {train.epochs: 0} for their initial weights, as"
                " suite=shards does"
            )


def _check_recipes(config: Config) -> None:
    if not config.merge.recipes:
        raise UserError("merge.recipes is empty: auto has nothing to choose from")
    for place, recipe in enumerate(recipes_of(config)):
        try:
            if recipe.merge.method == AUTO or isinstance(entry_of(recipe.merge), Reference):
                raise UserError(f"{recipe.merge.method} makes no model to choose")
            check_options(recipe)
        except UserError as error:
            raise UserError(f"merge.recipes[{place}]: {error}") from None


def _check_processes(options: Merge, entry: Method | Reference | None) -> None:
    """Check that a merge can run on the present number of processes."""
    if distributed.world_size() == 1:
        return
    if not isinstance(entry, Method) or not entry.row_wise:
        row_wise = ", ".join(name for name, known in METHODS.items() if known.row_wise)
        raise UserError(
            f"merge.method={options.method} needs whole models in one process; on several"
            f" processes merge.method is one of {row_wise}; {INSTEAD}"
        )
    for name, is_set in {
        f"align.by={options.align.by}": options.align.by == "activations",
        f"repair={options.repair}": options.repair != "none",
        "recalibrate=true": options.recalibrate,
        f"learn.what={options.learn.what}": options.learn.what != "none",
        f"ablation={options.ablation}": options.ablation != "none",
        "vocabularies": bool(options.vocabularies),
        f"options of {options.method} that validation rows choose (null)": needs_labels(options),
    }.items():
        if is_set:
            raise UserError(f"merge.{name} needs whole models in one process; {INSTEAD}")


def check_rows_fit(
    config: Config,
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    dataset: EncodedDataset,
) -> None:
    """Check that the rows of a data set may be read for a merge.

    All sources must fit if labels are read, else the first.

    Raises:
        UserError: A source was trained on other rows or tokens, or rows would choose a source but
            are encoded with the vocabulary of one.
    """
    options = config.merge
    _check_encoding(config, checkpoints[0])
    reads_labels = needs_labels(options) or has_anchor(options, checkpoints[0])
    judged = checkpoints if reads_labels else checkpoints[:1]
    fits = check_rows if isinstance(entry_of(options), Reference) else check_data
    for checkpoint, name in zip(judged, names, strict=False):
        fits(checkpoint, dataset, name)


def has_anchor(options: Merge, saved: Checkpoint) -> bool:
    """Return whether the repair copies modules from one source, chosen on validation rows."""
    if options.repair != "project" or len(options.sources) == 1:
        return False
    return bool(declared(saved).elementwise)


def _check_encoding(config: Config, saved: Checkpoint) -> None:
    is_joined = config.merge.vocabularies and not config.data.vocabularies
    if is_joined and has_anchor(config.merge, saved):
        raise UserError(
            "merge.repair=project chooses a source by validation rows. These are not encoded with"
            " the joined vocabularies; use repair=select_units, or set"
            " data.vocabularies=[FOLDER,...] to the encoded data sets of the sources"
        )


def check_sources(config: Config, sources: Sources, dataset: EncodedDataset | None) -> None:
    """Check that sources and base hold the same network and fit the rows, by their outlines.

    Args:
        config: The configuration. If it joins vocabularies, rows are checked after that.
        sources: The models.
        dataset: The rows that are read; None: no rows.

    Raises:
        UserError: A damaged checkpoint, the first difference, or rows that do not fit.
    """
    models = [*sources.merged, *([sources.base] if sources.base else [])]
    outlines = [outline(model.folder, distributed.share()) for model in models]
    names = [model.name for model in models]
    is_joined = bool(config.merge.vocabularies)
    compatibility.require(compatibility.compare(outlines, names, is_joined))
    if dataset is not None and not is_joined:
        check_rows_fit(config, outlines[: len(sources.merged)], names, dataset)


def report(config: Config) -> None:
    """Log all that fits and all that differs, for every merge that is configured.

    Nothing is trained, encoded or written (``cki-rec merge check_only=true``).

    Raises:
        UserError: A merge would not run; the first reason.
    """
    if distributed.world_size() > 1:
        raise UserError(
            "check_only=true runs in one process; start it without torchrun (on several, merge"
            " compares its sources before it reads them)"
        )
    is_search = config.merge.method == AUTO
    if is_search:
        check_options(config)
    for each in recipes_of(config) if is_search else [config]:
        findings = _findings(each, needs_rows(each.merge) or is_search)
        log.info("merge %s (%s):", each.merge.label, each.merge.method)
        for finding in findings:
            log.info("  %-20s %-10s %s", finding.check, finding.state, finding.reason)
        impossible = [f for f in findings if f.state == "impossible"]
        if impossible:
            more = f" (and {len(impossible) - 1} more, above)" if len(impossible) > 1 else ""
            raise UserError(
                f"check_only: merge.method={each.merge.method} would not run:"
                f" {impossible[0].check}: {impossible[0].reason}{more}"
            )
    log.info("it would run")


def _findings(config: Config, reads_rows: bool) -> list[Finding]:
    """Return all findings that are possible; some need the absence of earlier ones."""
    options, findings = config.merge, list[Finding]()
    entry_of(options)
    try:
        check_options(config)
    except UserError as error:
        findings.append(Finding("method", "impossible", str(error)))
    deltas = [(str(d), d, "merge.sources") for d in options.sources]
    if options.base and needs_base(config):
        deltas.append((f"base {options.base}", options.base, "merge.base"))
    loaded: list[tuple[str, Path, Checkpoint]] = []
    for name, delta, option in deltas:
        try:
            folder = find(config, delta, option)
            loaded.append((name, folder, load(folder)))
            findings.append(Finding("checkpoint", "ok", f"{name}: {folder}"))
        except UserError as error:
            findings.append(Finding("checkpoint", "impossible", f"{name}: {error}"))
    if loaded:
        compared, joined = _compare(config, loaded, len(deltas))
        names = [name for name, _, _ in loaded]
        findings += [*compared, *_rows(config, joined, names, reads_rows)]
    return findings


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
    findings = compatibility.compare(saved, names, is_joined, joined.rows)
    findings[2:2] = notes
    if is_joined:
        saved = joined.checkpoints
    merges = not isinstance(entry_of(options), Reference)
    findings += compatibility.finite(saved, names, merges)
    findings += compatibility.row_counts(saved, names, needs_counts(options), options.method)
    fits = all(f.state != "impossible" for f in findings)
    sources = saved[: len(options.sources)]
    if fits and merges:
        is_aligned = options.align.by != "none"
        findings += compatibility.alignment(sources, names, is_aligned, config.seed, joined.owners)
    return [*findings, _memory(saved, options)], sources


def _rows(
    config: Config, sources: Sequence[Checkpoint], names: Sequence[str], reads_rows: bool
) -> list[Finding]:
    """Return whether the rows that are read exist and fit the sources."""
    if not reads_rows:
        return [Finding("needs", "ok", "no data set")]
    subject = "rows of the data set"
    try:
        _check_encoding(config, sources[0])
        dataset = store.find(config.data, config.runtime.encoded)
        if dataset is None:
            return [Finding("needs", "differs", f"{subject}: not encoded yet; merge encodes them")]
        check_rows_fit(config, sources, names, dataset)
    except UserError as error:
        return [Finding("needs", "impossible", f"{subject}: {error}")]
    return [Finding("needs", "ok", f"{subject}: {dataset.folder.name}")]


def _memory(checkpoints: Sequence[Checkpoint], options: Merge) -> Finding:
    """Return an estimate of the memory of the merge, beside that of this machine."""
    size = compatibility.num_bytes
    sources = sum(size(c.params) + size(c.accumulators) + size(c.counts) for c in checkpoints)
    params = sum(size(c.params) for c in checkpoints)
    total = sources + params // len(checkpoints)
    total += sources if options.vocabularies else 0
    entry = entry_of(options)
    total += params if isinstance(entry, Method) and entry.full_weights else 0
    if has_anchor(options, checkpoints[0]):  # the best so far and the next
        total += 2 * params // len(checkpoints)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state: State = "ok" if total < available else "differs"
    return Finding(
        "memory", state, f"about {total / 2**20:,.1f} MiB of {available / 2**20:,.0f} MiB"
    )
