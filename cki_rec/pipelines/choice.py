"""The choice of a model on validation rows: by a reference, or among the recipes of a search."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cki_rec.config import Config
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine.record import Run
from cki_rec.evaluation.statistics import delong
from cki_rec.merging.search import AUTO, choose
from cki_rec.pipelines import preflight
from cki_rec.pipelines.predictions import predictions, valid_auc
from cki_rec.pipelines.references import REFERENCES
from cki_rec.pipelines.sources import Source, Sources, is_external

log = logging.getLogger(__name__)


def best_of(
    config: Config, models: Sources, candidates: Sequence[Source], dataset: EncodedDataset | None
) -> Source:
    """Return the best of the merges and sources on validation rows."""
    assert dataset is not None
    preflight.check_sources(config, replace(models, merged=[*candidates]), dataset)
    everyone = {each.identity: each for each in [*candidates, *models.merged]}
    return choose(everyone.items(), lambda source: valid_auc(config, dataset, source)).best


def choose_model(
    config: Config, models: Sources, candidates: Sequence[Source], dataset: EncodedDataset | None
) -> tuple[list[str], dict[str, Any] | None]:
    """Return the identities of the chosen models, and the scores of a search.

    A reference that combines all sources chooses all of them.

    Args:
        config: The configuration: a reference, or a search.
        models: The sources.
        candidates: The models to choose from; a search has the sources too.
        dataset: The data set of the validation rows; None: nothing is scored.
    """

    def score(source: Source) -> float:
        assert dataset is not None
        return valid_auc(config, dataset, source)

    preflight.check_sources(config, replace(models, merged=[*candidates]), dataset)
    if config.merge.method != AUTO:
        choice_of = REFERENCES[config.merge.method].choose
        chosen = candidates if choice_of is None else [choice_of(candidates, score)]
        return [source.identity for source in chosen], None
    everyone = {each.identity: each for each in [*candidates, *models.merged]}
    choice = choose(everyone.items(), score)
    best, best_source = choice.best, max(models.merged, key=score)
    if dataset is not None and not _gains(config, dataset, best, best_source):
        best = best_source
    facts = {
        "chosen": score(best),
        "best_source": score(best_source),
        "name": best_source.name,
        "is_source": best in models.merged,
        "all": choice.scores,
        "titles": {identity: source.name for identity, source in everyone.items()},
    }
    seconds = {identity: _seconds(config, source) for identity, source in everyone.items()}
    log_scores(facts, seconds)
    return [best.identity], facts


def log_scores(scores: Mapping[str, Any], seconds: Mapping[str, float] = {}) -> None:
    """Log the candidates of a search, the best first; early releases recorded no titles."""
    titles = scores.get("titles", {})
    for identity, auc in sorted(scores["all"].items(), key=lambda entry: -entry[1]):
        took = f", {seconds[identity]:6.1f} s" if identity in seconds else ""
        log.info("  %.4f validation AUC%s: %s", auc, took, titles.get(identity, identity))


def shares_of(out: Path, identity: str) -> dict[str, list[float]] | None:
    """Return the mean shares of the sources in a merge; of a refined one, before that.

    Args:
        out: Folder of runs.
        identity: A merge, or a search, whose chosen model counts; None for other models.
    """
    record = Run(out / identity).record or {}
    reads, result = record.get("config", {}), record.get("result", {})
    if "refined" in reads:
        fitted = Run(out / reads["refined"]).record or {}
        return shares_of(out, fitted.get("config", {}).get("start", ""))
    chosen = result.get("chosen") or []
    if len(chosen) == 1:
        return shares_of(out, chosen[0])
    shares: dict[str, list[float]] | None = result.get("shares")
    return shares


def folders(out: Path, identities: Sequence[str]) -> list[Path | str]:
    """Return the checkpoint folders of models; the identity of an external checkpoint."""
    return [i if is_external(i) else Run(out / i).checkpoint for i in identities]


def _seconds(config: Config, source: Source) -> float:
    """Return how long a merge took, its refinement included; 0 for external checkpoints."""
    record = Run(Path(config.runtime.out) / source.identity).record
    if record is None:
        return 0.0
    seconds: float = sum(record["provenance"]["seconds"].values())
    fitted = record["config"].get("refined")
    return seconds + (_seconds(config, replace(source, identity=fitted)) if fitted else 0.0)


def _gains(config: Config, dataset: EncodedDataset, merged: Source, best_source: Source) -> bool:
    """Return whether a merge is above the best source by ``merge.margin`` standard errors."""
    if not config.merge.margin or merged == best_source:
        return True
    label = dataset.labels(dataset.rows("valid"))
    logits = [predictions(config, dataset, source)["valid"] for source in (merged, best_source)]
    test = delong(label, *logits)
    if test.estimate is None or test.variance is None:
        return True
    return bool(test.estimate > config.merge.margin * test.variance**0.5)
