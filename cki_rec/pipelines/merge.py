"""Make one model out of several: ``cki-rec merge``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cki_rec.checkpoints import Checkpoint, Description, describe
from cki_rec.config import Config, UserError, run_id, with_delta
from cki_rec.data.encoding import store, tokens
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed, sharded
from cki_rec.engine.lookups import merging_module
from cki_rec.engine.networks import merging_network
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.sampling import sample_statistics
from cki_rec.merging.api import merge
from cki_rec.merging.extras import Extras, Learned
from cki_rec.merging.optimizer_state import merge_accumulators, merge_counts
from cki_rec.merging.options import in_yaml
from cki_rec.merging.params import MergeError, NotPossible
from cki_rec.merging.result import MergeResult
from cki_rec.merging.search import AUTO
from cki_rec.merging.steps import calibrate_model
from cki_rec.pipelines import (
    check_only,
    choice,
    continuous,
    foreign,
    keyed,
    preflight,
    refine,
    sources,
    train,
    vocabularies,
)
from cki_rec.pipelines.compatibility import compare, finite, note_types, require
from cki_rec.pipelines.evidence import counts_of, kind_of
from cki_rec.pipelines.foreign_sources import is_foreign
from cki_rec.pipelines.keyed_sources import is_keyed
from cki_rec.pipelines.merge_identity import merge_reads
from cki_rec.pipelines.merge_inputs import ablated, fisher, fixed_rules, learning
from cki_rec.pipelines.names import give
from cki_rec.pipelines.predictions import calibrator, scorer, valid_auc
from cki_rec.pipelines.provenance import data_facts
from cki_rec.pipelines.references import REFERENCES
from cki_rec.pipelines.sources import Source, Sources, are_disjoint, shard_of
from cki_rec.pipelines.stream_plan import check_options
from cki_rec.pipelines.streamed import merge as merge_streamed
from cki_rec.pipelines.vocabularies import Joined

LARGE = 10_000_000
"""Entries of a model from which the steps of its merge are logged."""

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Merge as configured; log the folder of the model and the shares of its sources."""
    if config.merge.deltas:
        if distributed.rank() == 0:
            continuous.run(config)
        return
    if is_keyed(config.merge.sources):
        if distributed.rank() == 0:
            keyed.run(config)
        return
    if is_foreign(config):
        if distributed.rank() == 0:
            foreign.run(config)
        return
    if config.check_only:
        check_only.report(config)
        return
    done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    result = done.record["result"]
    out, chosen = Path(config.runtime.out), result["chosen"]
    shares_by_name = choice.shares_of(out, done.path.name) or {}
    if shares_by_name:
        log.info("mean share of each source, in the order of the sources:")
    for name, shares in shares_by_name.items():
        log.info("  %-52s %s", name, "  ".join(f"{share:6.1%}" for share in shares))
    warn_if_unchanged(config, result)
    if fitted := result.get("refinement"):
        log.info("refined: validation AUC %.4f, before %.4f", fitted["auc"], fitted["start_auc"])
    if scores := result.get("valid_auc"):
        if not done.seconds:  # else they have been logged
            choice.log_scores(scores)
        log.info("chosen: %s", scores.get("titles", {}).get(chosen[0], chosen[0]))
    for folder in [done.checkpoint] if chosen is None else choice.folders(out, chosen):
        log.info("model: %s", folder)
    give(config, done, chosen)


def ensure(config: Config, models: Sources | None = None, force: bool = False) -> Run:
    """Return the finished merge of ``config``; merge, and train missing sources, if there is none.

    Args:
        config: The configuration.
        models: Its sources, if they are resolved already.
        force: Merge again.

    Raises:
        UserError: Options, sources or data that do not fit together.
    """
    config = preflight.without_unused(config)
    check_options(config)
    models = models or resolve(config)
    preflight.check_logit_scale(config, models)
    options = config.merge
    if options.refine != "none" and options.method != AUTO:
        closed = replace(options, refine="none", recalibrate=False)
        return _refined(config, models, model_of(replace(config, merge=closed), models), force)
    dataset = None
    if preflight.needs_rows(options):
        dataset = store.prepared(config)
    candidates, base = models.merged, models.base
    if options.method == AUTO:
        candidates = _recipes(config, models)
    if "base" not in preflight.needs_of(options):
        base = None
    is_disjoint = options.method not in REFERENCES and are_disjoint(
        [shard_of(source) for source in candidates]
    )
    reads = merge_reads(config, candidates, base, dataset, is_disjoint)
    if preflight.is_refined_search(options):
        best = choice.best_of(config, models, candidates, dataset)
        for changed in refine.variants(config, models):
            refined = _refined(changed, models, best, force=False)
            steps = changed.merge.refinement.map_steps
            name = f"{best.name}, refine={changed.merge.refine}, map_steps={steps}"
            candidates.append(Source(name, refined.path.name, refined.checkpoint))
        reads["sources"] = [source.identity for source in candidates]
    with open_run(Path(config.runtime.out), run_id("merge", reads), force) as run:
        if run.record is None:
            with run.phase("merge"):
                if options.method == AUTO or options.method in REFERENCES:
                    chosen, scores = choice.choose_model(config, models, candidates, dataset)
                    result = _result(chosen=chosen, valid_auc=scores)
                    data = _data_facts(dataset, describe(candidates[0].folder))
                else:
                    used = replace(models, merged=candidates, base=base)
                    data, result = _merge(config, used, dataset, run, is_disjoint)
                    if not config.merge.vocabularies:  # else they are there
                        everyone = [source.folder for source in candidates]
                        vocabularies.carry_merged(config, run.path, everyone[0], everyone)
            if distributed.rank() == 0:
                run.finish(reads, data, result)
    return run


def resolve(config: Config, needs_suite: bool = False) -> Sources:
    """Return the sources of a merge, and of its suite if needed (``sources.resolve``).

    Raises:
        UserError: They are deltas, or as for ``sources.resolve``.
    """
    if config.merge.deltas:
        raise UserError(
            "merge.deltas: only cki-rec merge takes deltas; give its result a name, and use that"
        )
    return sources.resolve(config, preflight.needs_base(config), needs_suite)


def model_of(config: Config, models: Sources) -> Source:
    """Return the one model that the configured merge gives."""
    done = ensure(config, models)
    assert done.record is not None
    warn_if_unchanged(config, done.record["result"])
    chosen = done.record["result"]["chosen"]
    if chosen is None:
        return Source(config.merge.label, done.path.name, done.checkpoint)
    for source in models.merged:
        if source.identity in chosen:
            return source
    run = Run(Path(config.runtime.out) / chosen[0])  # the best of a search
    return Source(config.merge.label, chosen[0], run.checkpoint)


def _has_statistics(saved: Checkpoint) -> bool:
    return any(name.endswith("running_mean") for name in saved.params)


def warn_if_unchanged(config: Config, result: dict[str, Any]) -> None:
    """Log a warning if no recipe of a search is above the best source on validation rows."""
    scores = result.get("valid_auc")  # records of early releases have none
    if scores is None:
        return
    if scores["chosen"] < scores["best_source"]:  # in early releases
        log.warning(
            "  %s: validation AUC %.4f, below the %.4f of its source %s; use that one"
            " (merge=best_source)",
            *(config.merge.label, scores["chosen"], scores["best_source"], scores["name"]),
        )
    elif scores.get("is_source"):
        log.warning(
            "  %s: no recipe is above the validation AUC %.4f of the source %s, which is returned"
            " unchanged",
            *(config.merge.label, scores["best_source"], scores["name"]),
        )


def _result(**entries: Any) -> dict[str, Any]:
    names = ("shares", "chosen", "learned", "alignment", "anchor", "recalibration", "valid_auc")
    return {**dict.fromkeys(names), **entries}


def _recipes(config: Config, models: Sources) -> list[Source]:
    """Return the merged model of every recipe of ``auto``."""
    candidates = []
    for place, (delta, recipe) in enumerate(
        zip(config.merge.recipes, preflight.recipes_of(config), strict=True)
    ):
        try:
            run = ensure(recipe, models)
        except UserError as error:
            if not isinstance(error.__cause__, NotPossible):
                raise
            log.warning("  merge.recipes[%d] is left out: %s", place, error)
            continue
        name = ", ".join([recipe.merge.method, *(f"{k}={in_yaml(v)}" for k, v in delta.items())])
        candidates.append(Source(name, run.path.name, run.checkpoint))
        if run.seconds:  # made just now
            done = f"{place + 1} of {len(config.merge.recipes)}, {sum(run.seconds.values()):.1f} s"
            log.info("  recipe %s: %s", done, name)
    if not candidates:
        raise UserError("merge.recipes: none could be made; see the warnings above")
    return candidates


def _refined(config: Config, models: Sources, start: Source, force: bool) -> Run:
    """Return the finished refinement of a model, recalibrated if so configured."""
    if config.merge.refinement.start == "initial":
        initial = train.ensure(with_delta(config, {"train.epochs": 0}))
        start = Source("initial weights", initial.path.name, initial.checkpoint)
    fitted = refine.ensure(config, models, start, force)
    reads = {"refined": fitted.path.name, "recalibrate": config.merge.recalibrate}
    with open_run(Path(config.runtime.out), run_id("merge", reads), force) as run:
        if run.record is None:
            with run.phase("merge"):
                data, result = _finished(config, start, fitted, run)
                everyone = [source.folder for source in (start, *models.merged)]
                vocabularies.carry_merged(config, run.path, run.checkpoint, everyone)
            if distributed.rank() == 0:
                run.finish(reads, data, result)
    return run


def _finished(
    config: Config, start: Source, fitted: Run, run: Run
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the refined model, or its start if that is better; return facts and result."""
    assert fitted.record is not None
    dataset = store.prepared(config)
    before, after = valid_auc(config, dataset, start), fitted.record["result"]["valid_auc"]
    (saved,) = sharded.load([fitted.checkpoint if after > before else start.folder])
    params, calibration = saved.params, None
    if config.merge.recalibrate:
        network = merging_network(saved, config.seed, is_aligned=False)
        fit = calibrator(config, dataset, saved)(params)
        params, calibration = calibrate_model(params, network, fit)
        if calibration.reason:
            log.warning("  merge.recalibrate=true: not done, %s", calibration.reason)
    tensors = {"model": params, "accumulator": saved.accumulators, "counts": saved.counts}
    sharded.save(run.checkpoint, tensors, saved, saved.origin)
    if fitted.record["result"]["best_epoch"] == 0 and distributed.rank() == 0:
        log.warning("  %s: no pass gains on validation rows; not refined", config.merge.label)
    result = _result(recalibration=asdict(calibration) if calibration else None)
    result["refinement"] = {
        "start_auc": before,
        "auc": after,
        **fitted.record["provenance"]["teacher"],
    }
    return data_facts(dataset), result


def _merge(
    config: Config,
    models: Sources,
    dataset: EncodedDataset | None,
    run: Run,
    is_disjoint: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge into a checkpoint of ``run``; return facts about the data, and the result."""
    if config.merge.memory_gb is not None:
        return merge_streamed(config, models, run, is_disjoint)
    preflight.check_sources(config, models, dataset)
    everyone = [*models.merged]
    if models.base is not None:
        everyone.append(replace(models.base, name=f"base {models.base.name}"))
    names = [source.name for source in everyone]
    loaded = sharded.load([source.folder for source in everyone])
    require(finite(loaded, names, is_required=True))
    joined, folders = Joined(loaded), list[Path]()
    if config.merge.vocabularies:
        pairs = [(s.folder, c) for s, c in zip(everyone, loaded, strict=True)]
        folders = vocabularies.folders_of(config, pairs)
        joined = vocabularies.joined(loaded, folders, len(models.merged))
        vocabularies.log_overlap(joined)
        require(compare(joined.checkpoints, names))
        if dataset is not None:
            preflight.check_rows_fit(
                config, joined.checkpoints[: len(models.merged)], names, dataset
            )
    checkpoints = joined.checkpoints[: len(models.merged)]
    base = joined.checkpoints[-1] if models.base is not None else None
    first = checkpoints[0]
    run.facts["evidence"] = kind_of(checkpoints, config.merge.evidence)
    try:
        merged = _merge_params(config, checkpoints, base, dataset, joined)
    except NotPossible as error:
        raise UserError(f"merge.{error}") from error
    except MergeError as error:
        raise UserError(f"merge.method={config.merge.method}: {error}") from error
    for warning in merged.warnings:
        log.warning("  merge.%s", warning)
    if len(checkpoints) > 1 and config.merge.repair == "none" and _has_statistics(first):
        log.warning(
            "  %s: statistics of batch norms are merged like weights and may not fit the result;"
            " merge.repair=rescale computes them anew from training rows",
            config.merge.label,
        )
    is_rotated = config.merge.align.by != "none" or config.merge.repair == "project"
    tensors: sharded.Groups = {
        "model": merged.params,
        "accumulator": merge_accumulators([c.accumulators for c in checkpoints], is_rotated),
        "counts": merge_counts([c.counts for c in checkpoints], is_disjoint),
    }
    seen = [] if dataset is None else [dataset.origin]
    origin = Provenance.union([*(c.origin for c in joined.checkpoints), *seen])
    sharded.save(run.checkpoint, tensors, first, origin)
    result = _result(
        shares=merged.shares,
        alignment=merged.alignment,
        anchor=merged.anchor,
        learned=_learning_facts(merged.learned),
        recalibration=asdict(merged.calibration) if merged.calibration else None,
    )
    types = [tensor.dtype for tensor in merged.params.values()]
    note_types(result, loaded, types, config.merge.dtype is not None)
    if folders:
        if distributed.rank() == 0:
            vocabularies.write(run.path / tokens.FOLDER, joined, folders)
        result["vocabularies"] = joined.rows
    return _data_facts(dataset, first), result


def _merge_params(
    config: Config,
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None,
    dataset: EncodedDataset | None,
    joined: Joined,
) -> MergeResult:
    """Call the merge of the library with all that the configuration names."""
    options, first = config.merge, checkpoints[0]
    models = [first.params, *(ablated(config, c) for c in checkpoints[1:])]
    activations = None
    if preflight.needs_activations(options):
        assert dataset is not None
        module = merging_module(first.schema, first.model)
        size, seed = options.sample, config.seed
        activations = sample_statistics(module, dataset, first.schema, size, seed)
    network = merging_network(first, config.seed, options.align.by != "none")
    return merge(
        models,
        options.method,
        base=None if base is None else base.params,
        counts=counts_of(checkpoints, preflight.needs_counts(options), options.evidence),
        symmetries=network.symmetries,
        module=activations.network if activations else network.module,
        batches=activations.batches if activations else None,
        align=options.align.by,
        repair=options.repair,
        starts=options.align.starts,
        score=None if dataset is None else scorer(config, dataset, first),
        seed=config.seed,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        progress=_log_step if sum(t.numel() for t in models[0].values()) > LARGE else None,
        extras=Extras(
            tables=network.tables,
            probe=network.probe,
            logit_scale=network.logit_scale,
            fisher=fisher(config, first, dataset, activations),
            learn=learning(config, checkpoints, dataset, joined),
            calibrate=calibrator(config, dataset, first)
            if dataset and options.recalibrate
            else None,
            fixed=fixed_rules(options, first.params),
            row_mask=joined.owners,
            processes=sharded.ShardProcesses(first.schema),
            recorded_alignment=True,
            in_place=True,
        ),
        **options.options,
    )


def _log_step(step: str, done: int, total: int) -> None:
    if done < total:
        log.info("  %s, step %d of %d", step, done + 1, total)


def _learning_facts(learned: Learned | None) -> dict[str, Any] | None:
    if learned is None:
        return None
    return {"best_epoch": learned.epoch, "valid_auc": learned.valid_metric}


def _data_facts(dataset: EncodedDataset | None, first: Checkpoint | Description) -> dict[str, Any]:
    return data_facts(dataset) if dataset else {"hash": first.origin.data_hash}
