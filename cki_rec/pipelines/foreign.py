"""``cki-rec merge`` of checkpoints that other programs have written."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cki_rec import COMMAND_VARIABLE
from cki_rec.checkpoints.formats import WRITERS
from cki_rec.config import Config, Merge, UserError, run_id, section
from cki_rec.engine import distributed
from cki_rec.engine.record import open_run
from cki_rec.merging.api import merge
from cki_rec.merging.extras import Extras
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.registry import Score
from cki_rec.merging.result import MergeResult
from cki_rec.merging.search import AUTO
from cki_rec.pipelines import card, foreign_streamed, preflight, stream_plan
from cki_rec.pipelines.foreign_evidence import evidence
from cki_rec.pipelines.foreign_inputs import SampleRows, network_of, rows_of
from cki_rec.pipelines.foreign_sources import (
    Foreign,
    check_module,
    differences,
    load,
    open_source,
    tables_of,
)
from cki_rec.pipelines.names import give
from cki_rec.pipelines.references import Reference
from cki_rec.pipelines.sources import check_distinct
from cki_rec.plugins import load_function, source_digest

DEFAULTS: dict[str, Any] = {
    **{"scope": "all", "tables": "same", "biases": "merge", "ablation": "none"},
    **{"max_rows": None, "vocabularies": [], "rows": "training", "learn.what": "none"},
}
"""Options that merges of other programs' checkpoints do not have -> their only value."""

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Merge as configured, and log a report with the place of the model.

    Raises:
        UserError: Options, sources or rows that do not fit together.
    """
    options = config.merge
    _check_options(options)
    with ExitStack() as stack:
        module = network_of(config)
        sources = [open_source(s, "merge.sources", module, stack) for s in options.sources]
        everyone = list(sources)
        if options.base is not None and "base" in preflight.needs_of(options):
            everyone.append(open_source(options.base, "merge.base", module, stack))
        tables = tables_of(config, sources[0], module)
        check_sources(everyone, tables, module)
        _check_format(sources[0], options)
        rows = rows_of(config, module)
        task = None
        if options.memory_gb is not None:
            symmetries = foreign_streamed.symmetries_of(config, module, rows)
            task = foreign_streamed.prepare(config, everyone, tables, symmetries)
        if config.check_only:
            log.info("the sources fit together: %d tensors each", len(sources[0].parts.names))
            for line in [] if task is None else foreign_streamed.plan_lines(config, task):
                log.info("  %s", line)
            return
        if options.method == AUTO and (rows is None or rows.labels is None):
            raise UserError(
                "merge=auto compares recipes on rows with labels. Set merge.batches to a function"
                " that returns [(inputs, labels), ...], or merge.data to a file with a column"
                " label; or choose a method, as merge=average"
            )
        digests = foreign_streamed.digests(everyone)
        check_distinct(digests[: len(sources)], [s.path for s in sources], "merge.sources")
        reads = _reads(config, everyone, tables, rows)
        out = Path(config.runtime.out)
        with open_run(out, run_id("merge", reads), config.runtime.force) as done:
            if done.record is None:
                with done.phase("merge"):
                    if task is not None:
                        result, facts, target = foreign_streamed.merge(config, task, done, reads)
                        facts["evidence"] = {"kind": task.kind, "tables": list(task.counted)}
                    else:
                        result, facts = _merge(config, everyone, tables, module, rows)
                        target = _write(options, sources[0], result.params, done.path)
                facts |= _common_facts(config, everyone[: len(sources)], tables, rows, facts)
                facts["sources"] = [
                    {**card.describe(s), "digest": digest}
                    for s, digest in zip(everyone, digests, strict=True)
                ]
                facts["model"] = target.name
                facts["command"] = os.environ.get(COMMAND_VARIABLE, "")
                card.write(done.path, result, facts)
                log.info("%s", result.report())
                done.finish(reads, {"hash": ""}, _recorded(result, facts))
    assert done.record is not None
    log.info("model: %s", out / done.path.name / done.record["result"]["model"])
    log.info("card: %s", out / done.path.name / card.README)
    give(config, done)


def check_paths(options: Merge) -> None:
    """Check that all sources are named by paths, in one process.

    Raises:
        UserError: They are not.
    """
    if distributed.world_size() > 1:
        raise UserError("checkpoints of other programs are merged in one process, not by torchrun")
    if any("path" not in source for source in options.sources):
        raise UserError(
            "merge.sources: name every source by its path; checkpoints of other programs and"
            " trainings of this one cannot be mixed"
        )


def _check_options(options: Merge) -> None:
    """Check that options are those of a merge by the library.

    Raises:
        UserError: One is for models that were trained here.
    """
    check_paths(options)
    if options.memory_gb is not None:
        stream_plan.check_streamed(replace(options, dtype=None))
    for key, only in DEFAULTS.items():
        value: Any = options
        for part in key.split("."):
            value = getattr(value, part)
        if value != only:
            raise UserError(
                f"merge.{key}={value}: is for models that cki-rec has trained; leave it at {only}"
            )
    if options.recalibrate and options.method != AUTO:
        raise UserError(
            "merge.recalibrate=true: is for models that cki-rec has trained; set it to false"
        )
    if isinstance(preflight.entry_of(options), Reference):
        raise UserError(
            f"merge={options.method}: is for models that cki-rec has trained; choose a method of"
            " cki-rec merge --list"
        )


def check_sources(
    everyone: Sequence[Foreign], tables: Sequence[str], module: nn.Module | None
) -> None:
    """Check that sources fit together, before any tensor is read.

    Raises:
        UserError: They do not; names the first difference.
    """
    for source in everyone:
        if not source.parts.names:
            raise UserError(f"{source.path}: holds no tensor of a model")
    if found := differences(everyone, tables):
        more = f" (and {len(found) - 1} more differences: cki-rec inspect)" if found[1:] else ""
        raise UserError(f"{found[0]}{more}")
    if module is not None:
        check_module(everyone, module)


def _check_format(first: Foreign, options: Merge) -> None:
    """Check that the result can be written.

    Raises:
        UserError: It cannot be in the form of the first source.
    """
    if first.stored.form not in WRITERS and options.format is None:
        raise UserError(
            f"{first.path}: is of cki-rec, with features that the other sources lack; set"
            f" merge.format to {', '.join(WRITERS)}"
        )


def _merge(
    config: Config,
    everyone: Sequence[Foreign],
    tables: Sequence[str],
    module: nn.Module | None,
    rows: SampleRows | None,
) -> tuple[MergeResult, dict[str, Any]]:
    """Return the merge by the library, and facts for its card."""
    options, number = config.merge, len(config.merge.sources)
    kind, counts = evidence(everyone[:number], tables, options.evidence)
    models = load(everyone, module, number)
    refine = options.refine
    if refine == "auto" or options.method == AUTO:
        refine = "none"
    score = rows.score(module) if rows and module is not None else None
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        result = merge(
            models[:number],
            options.method,
            base=models[number] if len(models) > number else None,
            counts=counts,
            module=module,
            batches=rows.batches if rows else None,
            align=options.align.by,
            repair=options.repair,
            refine=refine,
            effort=options.effort,
            starts=options.align.starts,
            score=score,
            dtype=dtype,
            seed=config.seed,
            extras=None if module is not None else Extras(tables=tables),
            **options.options,
        )
    except MergeError as error:
        hint = _hint(options, tables, kind, module)
        raise UserError(f"merge.method={options.method}: {error}{hint}") from error
    if score is not None and options.method != AUTO:
        result = replace(result, scores=_scores(models[:number], result, score))
    floats = {x.dtype for x in result.params.values() if x.is_floating_point()}
    return result, {
        "evidence": {"kind": kind, "tables": list(counts[0]) if counts else []},
        "types": {"result": sorted(map(str, floats))},
    }


def _scores(sources: Sequence[Params], result: MergeResult, score: Score) -> dict[str, float]:
    """Return the AUC of every source and of the result; empty if the rows have none."""
    models = {f"source {k}": model for k, model in enumerate(sources)}
    try:
        return {
            name: score(params)
            for name, params in {**models, result.recipe: result.params}.items()
        }
    except MergeError as error:
        log.warning("  no AUC of sources and result: %s", error)
        return {}


def _common_facts(
    config: Config,
    sources: Sequence[Foreign],
    tables: Sequence[str],
    rows: SampleRows | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Return the facts of all merges for the card; ``facts`` has those of this one."""
    types = {
        str(entry.dtype)
        for source in sources
        for entry in source.parts.entries.values()
        if entry.dtype.is_floating_point
    }
    if len(types) > 1:
        log.info("  sources are of %s; they are merged in float32", ", ".join(sorted(types)))
    return {
        "tables": list(tables),
        "types": {"sources": sorted(types), **facts["types"]},
        "rows": 0 if rows is None or rows.labels is None else len(rows.labels),
        "seed": config.seed,
    }


def _hint(options: Merge, tables: Sequence[str], kind: str, module: nn.Module | None) -> str:
    """Return the option that a failed merge may lack."""
    if preflight.needs_counts(options) and kind == "none":
        if not tables:
            return " (no table is known: set merge.table_names, or merge.module)"
        return " (merge.evidence: not all sources hold counts or optimizer state of a table)"
    return "" if module is not None else " (merge.module gives the network, merge.batches rows)"


def _write(options: Merge, first: Foreign, params: Params, folder: Path) -> Path:
    """Write the merged model into a folder; return its file or folder."""
    kept = {name: params[name] for name in first.parts.names}
    if options.format is not None and options.format != first.stored.form:
        return WRITERS[options.format](kept, folder)
    stored = {
        first.parts.names[name]: first.naming.restored(name, tensor)
        for name, tensor in kept.items()
    }
    return first.stored.written(stored, folder)


def _reads(
    config: Config, everyone: Sequence[Foreign], tables: Sequence[str], rows: SampleRows | None
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    options = section(config.merge)
    for name in ("label", "plugins", "sources", "base", "batches", "data", "module", "memory_gb"):
        options.pop(name, None)
    network = config.merge.module
    return {
        "foreign": [source.identity() for source in everyone],
        "merge": options,
        "tables": list(tables),
        "module": network and source_digest(load_function(network, "merge.module")),
        "rows": rows.digest() if rows else None,
        "source": preflight.source_of(config.merge),
        "seed": config.seed,
    }


def _recorded(result: MergeResult, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the result for the record of the run."""
    return {
        "chosen": None,
        "shares": result.shares,
        "alignment": result.alignment,
        "recipe": result.recipe,
        "scores": result.scores,
        **{name: facts[name] for name in ("model", "evidence", "types")},
        **({"streamed": facts["streamed"]} if "streamed" in facts else {}),
    }
