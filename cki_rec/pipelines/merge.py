"""Make one model out of several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints import checkpoint
from cki_rec.checkpoints.checkpoint import Checkpoint
from cki_rec.config import Config, UserError, nearest, run_id, section, with_delta
from cki_rec.data.encoding import store, tokens
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.provenance import Provenance
from cki_rec.engine import distributed, sharded
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.sampling import sample_statistics
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.mixing import source_shares
from cki_rec.merging.params import check_finite, widened
from cki_rec.merging.registry import METHODS, MergeInputs, Method, check_options
from cki_rec.merging.vocabulary import shared_rows
from cki_rec.models import build_model
from cki_rec.pipelines import (
    checking,
    external,
    looking,
    matching,
    merging,
    rules,
    several,
    train,
    vocabularies,
)
from cki_rec.pipelines.scores import predictions, recalibrated, scorer
from cki_rec.pipelines.vocabularies import Joined

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One parent at rest."""

    name: str
    """As the configuration names it."""
    identity: str
    """Run id, or a digest of an external checkpoint."""
    folder: Path
    """Of its checkpoint."""


def run(config: Config) -> None:
    """Merge as configured; say where the model is and what was taken from whom."""
    with several.processes(config):
        if config.check_only:
            ways = recipes_of(config) if config.merge.method == "best_of" else [config]
            checking.check(config, ways, method_of)
            return
        done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    result = done.record["result"]
    for name, shares in (result["shares"] or {}).items():
        log.info("  %-52s %s", name, "  ".join(f"{share:6.1%}" for share in shares))
    warn_if_worse(config, result)
    if result["kept"] is None:
        log.info("model: %s", done.checkpoint)
    else:
        log.info("kept as they are: %s", ", ".join(result["kept"]))


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished integration of ``config``; train its sources if they are not there.

    Raises:
        UserError: Unknown method; sources that do not fit together; no data where it is needed.
    """
    options, method = config.merge, method_of(config)
    looks = looking.needs_rows(options)
    several.check(options, method, looks)
    sources = sources_of(config)
    start = start_of(config)
    dataset = (
        store.prepare(config.data, config.runtime.encoded, config.runtime.chunk_mb)
        if looks
        else None
    )
    rule = section(options)
    del rule["sources"], rule["label"], rule["vocabularies"]
    rule["start"] = None if start is None else start.identity
    reads = {
        "sources": [source.identity for source in sources],
        "merge": rule,
        "data": dataset.hash if dataset else None,
        "model": section(config.model) if looks else None,
        "batch_size": config.train.batch_size if looks else None,
        "seed": config.seed,
    }
    if options.vocabularies:  # which ones, their hashes in the sources say
        reads["vocabularies"] = "joined"
    parts = [train.part_of(source.folder) for source in sources]
    is_disjoint = method.merges_parameters and train.are_disjoint(parts)
    if is_disjoint:
        reads["counts"] = "sum"
    with open_run(Path(config.runtime.out), run_id("merge", reads), force) as run:
        if run.record is None:
            _integrate(config, sources, start, dataset, run, reads, is_disjoint)
    return run


def method_of(config: Config) -> Method:
    """Return the configured method, of which all is known to fit that needs no model.

    Raises:
        UserError: There is none of that name; it does not have these options, does not take so
            many sources, or needs a start that is not given.
    """
    name = config.merge.method
    if name not in METHODS:
        raise UserError(
            f"merge.method={name}: {nearest(name, METHODS)}one of {', '.join(METHODS)}"
        )
    method, options = METHODS[name], config.merge
    try:
        check_options(name, options.options)
    except ValueError as error:
        raise UserError(f"merge.options: {error}") from None
    if options.control != "none" and not method.merges_parameters:
        raise UserError(
            f"merge.control={options.control}: merge.method={name} keeps its sources as they are"
        )
    if options.recalibrate and not method.merges_parameters and name != "best_of":
        raise UserError(
            f"merge.recalibrate=true: merge.method={name} keeps its sources as they are"
        )
    if name == "best_of":
        _check_recipes(config)
    if options.repair != "none" and not rules.takes_all_alike(options):
        raise UserError(
            f"merge.repair={options.repair}: makes layers compute the mean of all sources,"
            f" which merge.method={name} with these options does not want; use"
            " method=evidence or average, scope=all, bias=mix, or repair=none"
        )
    if method.models == "2" and len(options.sources) > 2:
        raise UserError(f"merge.method={name}: takes 2 models, not {len(options.sources)}")
    is_joined = options.vocabularies and not config.data.vocabularies
    if is_joined and (not method.merges_parameters or looking.needs_labels(options)):
        why = "keeps its sources as they are"
        if method.merges_parameters or name == "best_of":
            why = "looks at rows, which are not encoded with the joined vocabularies"
        raise UserError(
            f"merge.vocabularies: merge.method={name} {why}; use merge=evidence, or"
            " data.vocabularies=[FOLDER,...], the encoded data sets of the sources"
        )
    if options.vocabularies and options.gate.train == "trunk":
        raise UserError(
            "merge.vocabularies: merge.gate.train=trunk trains on tables of the first"
            " source, which lack rows of others; use merge.gate.train=frozen"
        )
    if "base" in method.needs and options.align.by != "none" and len(options.sources) > 2:
        raise UserError(
            f"merge.method={name}: more than two sources are aligned to their mean, where the"
            " start is not; use merge.align.by=none"
        )
    if "base" in method.needs and options.base is None:
        raise UserError(
            f"merge.method={name}: needs the model that all sources started from; name it:"
            " merge.base={path: ...}, or {train.epochs: 0} for their initial weights, as"
            " suite=shards does"
        )
    return method


def start_of(config: Config) -> Source | None:
    """Return the common start if the method needs it; None where it does not."""
    start = config.merge.base
    if start is None or "base" not in METHODS[config.merge.method].needs:
        return None
    return resolve(config, [start])[0]


def resolve(config: Config, deltas: Sequence[dict[str, Any]]) -> list[Source]:
    """Return the models that config deltas and paths name; missing runs are trained.

    Several processes train none: they say how to.
    """
    sources = []
    for delta in deltas:
        if "path" in delta:
            folder = external.folder_of(delta, "merge.sources")
            sources.append(Source(str(delta["path"]), external.identity(folder), folder))
        elif distributed.world_size() > 1:
            folder = checking.find(config, delta)
            sources.append(Source(str(delta), folder.parent.name, folder))
        else:
            done = train.ensure(with_delta(config, delta))
            sources.append(Source(str(delta), done.path.name, done.checkpoint))
    return sources


def sources_of(config: Config) -> list[Source]:
    """Return what the method chooses from or merges: parents, or the recipes of ``best_of``."""
    options = config.merge
    if options.method != "best_of":
        return resolve(config, options.sources)
    found = []
    for place, (delta, way) in enumerate(zip(options.recipes, recipes_of(config), strict=True)):
        try:
            run = ensure(way)
        except looking.ScarceSample as error:
            log.warning("  merge.recipes[%d] is left out: %s", place, error)
            continue
        found.append(Source(str(delta), run.path.name, run.checkpoint))
    if not found:
        raise UserError("merge.recipes: none could be made; see the warnings above")
    return found


def _check_recipes(config: Config) -> None:
    """Check what can be known of ``best_of`` before its first candidate is made.

    Raises:
        UserError: There are none, or one gives no model of its own.
    """
    if not config.merge.recipes:
        raise UserError("merge.recipes is empty: best_of has nothing to choose from")
    for place, way in enumerate(recipes_of(config)):
        try:
            merges_parameters = way.merge.method != "best_of" and method_of(way).merges_parameters
        except UserError as error:
            raise UserError(f"merge.recipes[{place}]: {error}") from None
        if not merges_parameters:
            raise UserError(f"merge.recipes[{place}]: {way.merge.method} makes no model to choose")


def recipes_of(config: Config) -> list[Config]:
    """Return the integrations that ``best_of`` chooses from."""
    plain = {"merge.method": "evidence", "merge.recipes": []}
    return [
        with_delta(config, plain | {f"merge.{key}": value for key, value in delta.items()})
        for delta in config.merge.recipes
    ]


def _integrate(
    config: Config,
    sources: list[Source],
    start: Source | None,
    dataset: EncodedDataset | None,
    run: Run,
    reads: dict[str, Any],
    is_disjoint: bool,
) -> None:
    options = config.merge
    everyone = [*sources, *([replace(start, name=f"start {start.name}")] if start else [])]
    names = [source.name for source in everyone]
    loaded = sharded.load(
        [source.folder for source in everyone],
        lambda outlines: checkpoint.check_compatible(outlines, names),
    )
    homes: list[Path] = []
    joined = Joined(loaded)
    if options.vocabularies and options.method != "best_of":  # whose recipes are joined
        homes = vocabularies.folders_of(
            config, [(s.folder, c) for s, c in zip(everyone, loaded, strict=True)]
        )
        joined = vocabularies.joined(loaded, homes, len(sources))
    checkpoint.check_compatible(joined.checkpoints, names)
    checkpoints = joined.checkpoints[: len(sources)]
    begun = None if start is None else joined.checkpoints[-1]
    first = checkpoints[0]
    if dataset is not None:
        looking.check_encoding(config, first)
        looking.check_sources(config, checkpoints, dataset, names)
    data = train.data_facts(dataset) if dataset else {"hash": first.origin.data_hash}
    result: dict[str, Any] = dict.fromkeys(
        ("shares", "kept", "gate", "global", "alignment", "lead", "recalibration", "valid_auc")
    )

    with run.phase("merge"):
        if not METHODS[options.method].merges_parameters:
            kept = sources[-1:] if options.method == "newest_source" else sources
            if options.method in ("best_source", "best_of"):
                assert dataset is not None
                kept = [best_source(config, dataset, sources)]
                if options.method == "best_of":
                    result["valid_auc"] = _judged(config, dataset, kept[0])
            result["kept"] = [source.identity for source in kept]
        else:
            try:
                tensors = _merged(config, checkpoints, begun, dataset, result, joined.owners)
                tensors["counts"] = merging.evidence_of_all(
                    [c.counts for c in checkpoints], is_disjoint
                )
            except ValueError as error:
                raise UserError(f"merge.method={options.method}: {error}") from None
            looked_at = [] if dataset is None else [dataset.origin]
            origin = Provenance.union([*(c.origin for c in joined.checkpoints), *looked_at])
            sharded.save(run.checkpoint, tensors, first, origin)
            if homes:
                vocabularies.write(run.path / tokens.FOLDER, joined, homes)
                result["vocabularies"] = joined.rows
    if distributed.rank() == 0:
        run.finish(reads, data, result)


def _merged(
    config: Config,
    checkpoints: list[Checkpoint],
    start: Checkpoint | None,
    dataset: EncodedDataset | None,
    result: dict[str, Any],
    owners: dict[str, Tensor],
) -> dict[str, dict[str, Any]]:
    """Return the tensors of the new model's checkpoint; tell ``result`` how it came about."""
    options, first = config.merge, checkpoints[0]
    dtypes = {name: tensor.dtype for name, tensor in first.params.items()}
    checkpoints = [replace(c, params=widened(c.params)) for c in checkpoints]
    first = checkpoints[0]
    checkpoints = [first, *(rules.control(options, c, config.seed) for c in checkpoints[1:])]
    counts = merging.counts_of(checkpoints, merging.uses_counts(options))
    observe = None
    if options.repair not in ("none", "rescale") and options.align.by == "none":
        if options.base is None and len(checkpoints) > 1:
            log.warning(
                "  merge.repair=%s without alignment: sources that do not share a start"
                " compute nothing sensible on each other's tables",
                options.repair,
            )
    if looking.looks_at_rows(options):
        assert dataset is not None
        network = build_model(first.schema, first.model, torch.device("cpu"))
        observe = sample_statistics(network, dataset, first.schema, options.sample, config.seed)
        if options.repair not in ("none", "rescale") and len(checkpoints) > 1:
            looking.check_sample(options, first.params, observe)
    models = [c.params for c in checkpoints]
    votes = merging.votes_of(models, counts, owners)
    models, result["alignment"] = matching.aligned(
        options, models, votes, first, observe, config.seed
    )
    score = None if dataset is None else scorer(config, dataset, first)
    given = MergeInputs(
        seed=config.seed,
        counts=counts,
        base=None if start is None else widened(start.params),
        score=score,
        owners=owners,
        **looking.seen(config, models, first, dataset, observe),
    )
    params, weights, result["gate"] = merging.merge(config, models, given, dataset, first)
    if weights is not None:
        params, weights, result["lead"] = matching.repaired(
            options, params, models, weights, votes, first, observe, score
        )
        trained = merging.trunk_parameters(options, params)
        shares = sharded.mean_shares(source_shares(weights, models), first.schema)
        result["shares"] = {name: of for name, of in shares.items() if name not in trained}
        result["global"] = rules.entropy_report(options, shared_rows(models, owners), config.seed)
    check_finite([params], "the result")
    if options.recalibrate:
        assert dataset is not None
        params, result["recalibration"] = recalibrated(config, params, dataset, first)
    return {
        "model": {name: tensor.to(dtypes[name]) for name, tensor in params.items()},
        "accumulator": matching.accumulators(
            merging.evidence_of_all([c.accumulators for c in checkpoints], is_disjoint=False),
            options,
        ),
    }


def best_source(config: Config, dataset: EncodedDataset, sources: Sequence[Source]) -> Source:
    """Return the source with the best AUC on all validation rows; the first of equals."""
    return max(sources, key=lambda source: _valid_auc(config, dataset, source))


def _valid_auc(config: Config, dataset: EncodedDataset, source: Source) -> float:
    label = dataset.labels(dataset.rows("valid"))
    logits = predictions(config, dataset, source.identity, source.folder)["valid"]
    return auc(label, logits) or 0.0


def _judged(config: Config, dataset: EncodedDataset, kept: Source) -> dict[str, Any]:
    """Return validation AUC of the best candidate, and of the best of what it was made of."""
    best = best_source(config, dataset, resolve(config, config.merge.sources))
    own, other = (_valid_auc(config, dataset, source) for source in (kept, best))
    return {"kept": own, "best_source": other, "name": best.name}


def warn_if_worse(config: Config, result: dict[str, Any]) -> None:
    """Say so if what ``best_of`` kept is below the best of its sources on validation rows."""
    found = result.get("valid_auc")  # older records have none
    if found is not None and found["kept"] < found["best_source"]:
        log.warning(
            "  %s: validation AUC %.4f, below the %.4f of its source %s; keep that one"
            " (merge=best_source)",
            *(config.merge.label, found["kept"], found["best_source"], found["name"]),
        )
