"""``cki-rec merge check_only=true``: would these sources merge, before any work is done."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec import COMMAND_VARIABLE
from cki_rec.checkpoints import checkpoint
from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Config, UserError, with_delta
from cki_rec.data.encoding import store
from cki_rec.merging.options import in_yaml
from cki_rec.merging.registry import METHODS, needs_of
from cki_rec.pipelines import compatibility, looking, train, vocabularies
from cki_rec.pipelines.compatibility import Finding, State
from cki_rec.pipelines.external import folder_of
from cki_rec.pipelines.vocabularies import Joined

NOT_OF_TRAINING = ("merge", "suite.", "finetune", "evaluate", "check_only", "name", "-")
"""Begin the words of a command that say nothing of how a source is trained."""

log = logging.getLogger(__name__)


def check(
    config: Config,
    ways: Sequence[Config],
    method_of: Callable[[Config], Any],
) -> None:
    """Print what fits and what does not, for every way to integrate that is configured.

    Nothing is trained, encoded or written.

    Args:
        config: As configured.
        ways: The integrations that it asks for: itself, or its recipes.
        method_of: Raises what is wrong with the method's options.

    Raises:
        UserError: An integration would not run; the first reason.
    """
    if config not in ways:
        method_of(config)
    for way in ways:
        looks = any(looking.needs_rows(each.merge) for each in (way, config))
        findings = _findings(way, method_of, looks)
        log.info("merge %s (%s):", way.merge.label, way.merge.method)
        for finding in findings:
            log.info("  %-20s %-10s %s", finding.check, finding.state, finding.reason)
        wrong = [f for f in findings if f.state == "impossible"]
        if wrong:
            more = f" (and {len(wrong) - 1} more, above)" if len(wrong) > 1 else ""
            raise UserError(
                f"check_only: merge.method={way.merge.method} would not run:"
                f" {wrong[0].check}: {wrong[0].reason}{more}"
            )
    log.info("it would run")


def _findings(
    config: Config,
    method_of: Callable[[Config], Any],
    looks_at_rows: bool,
) -> list[Finding]:
    """Return all that can be said; the rest needs what is found impossible before it."""
    options, found = config.merge, []
    try:
        method_of(config)
    except UserError as error:
        if options.method not in METHODS:
            raise
        found.append(Finding("method", "impossible", str(error)))
    deltas = [(str(delta), delta) for delta in options.sources]
    if options.base and "base" in METHODS[options.method].needs:
        deltas.append((f"start {options.base}", options.base))
    loaded: list[tuple[str, Path, Checkpoint]] = []
    for name, delta in deltas:
        try:
            folder = find(config, delta)
            loaded.append((name, folder, checkpoint.load(folder)))
            found.append(Finding("checkpoint", "ok", f"{name}: {folder}"))
        except UserError as error:
            found.append(Finding("checkpoint", "impossible", f"{name}: {error}"))
    if loaded:
        compared, joined = _compared(config, loaded, len(deltas))
        names = [name for name, _, _ in loaded]
        found += [*compared, *_data(config, joined, names, looks_at_rows)]
    return found


def _compared(
    config: Config, loaded: Sequence[tuple[str, Path, Checkpoint]], expected: int
) -> tuple[list[Finding], list[Checkpoint]]:
    """Return what sources differ in, and the sources, joined where they can be."""
    options = config.merge
    names, saved = [name for name, _, _ in loaded], [c for _, _, c in loaded]
    found = [*compatibility.architecture(saved, names), *compatibility.features(saved, names)]
    is_joined = bool(options.vocabularies) and len(loaded) == expected
    joined = Joined(saved)
    hashes = [one.schema.vocabulary_hashes for one in saved]
    if is_joined or any(own != hashes[0] for own in hashes):
        try:
            nulls: list[Any] = [None] * len(loaded)
            look = options if is_joined else replace(options, vocabularies=nulls)
            pairs = [(folder, one) for _, folder, one in loaded]
            homes = vocabularies.folders_of(replace(config, merge=look), pairs)
            joined = vocabularies.joined(saved, homes, min(len(saved), len(options.sources)))
        except UserError as error:
            state: State = "impossible" if is_joined else "differs"
            found.append(Finding("token lists", state, str(error)))
    found += compatibility.vocabularies(saved, names, joined.rows, is_joined)
    if is_joined or not joined.rows:
        saved = joined.checkpoints
        found += compatibility.tensors(saved, names)
    merges_parameters = METHODS[options.method].merges_parameters
    found += compatibility.finite(saved, names, merges_parameters)
    found += compatibility.evidence(saved, names, options)
    fits = all(f.state != "impossible" for f in found if f.check not in ("method", "checkpoint"))
    if fits and merges_parameters:
        sources = saved[: len(options.sources)]
        found += compatibility.alignment(sources, names, options, config.seed, joined.owners)
    return [*found, compatibility.memory(saved, options)], saved[: len(options.sources)]


def _data(
    config: Config, sources: Sequence[Checkpoint], names: Sequence[str], looks_at_rows: bool
) -> list[Finding]:
    """Return whether the rows that are looked at are there, and fit the sources."""
    options = config.merge
    needs = needs_of(options.method, options.options)
    if not looks_at_rows and not needs & {"fisher", "moments"}:
        return [Finding("needs", "ok", "no data set")]
    what = "rows of the data set"
    try:
        looking.check_encoding(config, sources[0])
        dataset = store.find(config.data, config.runtime.encoded)
    except UserError as error:
        return [Finding("needs", "impossible", f"{what}: {error}")]
    if dataset is None:
        return [Finding("needs", "differs", f"{what}: not encoded yet; integrate will do it")]
    try:
        looking.check_sources(config, sources, dataset, names)
    except UserError as error:
        return [Finding("needs", "impossible", f"{what}: {error}")]
    return [Finding("needs", "ok", f"{what}: {dataset.folder.name}")]


def find(config: Config, delta: dict[str, Any]) -> Path:
    """Return the checkpoint folder of a source that is there.

    Raises:
        UserError: It is not; the command that makes it.
    """
    if "path" in delta:
        return folder_of(delta, "merge.sources")
    changed = with_delta(config, delta)
    dataset = store.find(changed.data, changed.runtime.encoded)
    if dataset is not None:
        run = train.run_of(changed, dataset)
        if run.record is not None:
            return run.checkpoint
    raise UserError(f"not trained yet; make it: {_command(delta)}")


def _command(delta: dict[str, Any]) -> str:
    """Return the command that trains a source, from the one that was given."""
    given = shlex.split(os.environ.get(COMMAND_VARIABLE, ""))[2:]
    kept = [
        word
        for word in given
        if not word.startswith(NOT_OF_TRAINING) and word.split("=")[0] not in delta
    ]
    changes = [f"{key}={in_yaml(value)}" for key, value in delta.items()]
    return shlex.join(["cki-rec", "train", *kept, *changes])
