"""Compare models before a merge: ``cki-rec assess``. Nothing is merged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cki_rec.checkpoints import Checkpoint, outline
from cki_rec.config import Config, UserError, run_id, section
from cki_rec.data.encoding import store
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.engine import distributed, sharded
from cki_rec.engine.lookups import merging_module
from cki_rec.engine.networks import merging_network
from cki_rec.engine.record import Run, open_run
from cki_rec.engine.sampling import sample_statistics
from cki_rec.evaluation.assessment_plot import assessment_plot
from cki_rec.evaluation.tables import csv_bytes
from cki_rec.files import write_atomically
from cki_rec.merging.assessment import Assessment, assess
from cki_rec.merging.params import MergeError, Params
from cki_rec.merging.registry import Score
from cki_rec.pipelines import foreign_assess, preflight, vocabularies
from cki_rec.pipelines.compatibility import compare, finite, require
from cki_rec.pipelines.evidence import counts_of, kind_of
from cki_rec.pipelines.foreign_sources import is_foreign
from cki_rec.pipelines.predictions import scorer
from cki_rec.pipelines.provenance import check_data, data_facts
from cki_rec.pipelines.sources import Sources, resolve
from cki_rec.pipelines.vocabularies import Joined
from cki_rec.progress import Advance, progress

TABLE, FIGURE = "assess.csv", "assess.svg"

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Assess the sources of the configured merge; print the table and the suggestion.

    Raises:
        UserError: Options, sources or data that do not fit together.
    """
    if is_foreign(config):
        if distributed.rank() == 0:
            foreign_assess.run(config)
        return
    done = ensure(config, force=config.runtime.force)
    assert done.record is not None
    log.info("%s", Assessment(**done.record["result"]))
    log.info("assessment: %s", done.path)


def ensure(config: Config, force: bool = False) -> Run:
    """Return the finished assessment of ``config``; make it, and missing sources, if needed.

    The base is read if the configured method needs one.

    Args:
        config: The configuration.
        force: Assess again.

    Raises:
        UserError: Options, sources or data that do not fit together.
    """
    check_options(config)
    models = resolve(config, preflight.needs_base(config), needs_suite=False)
    dataset = None
    if reads_rows(config):
        dataset = store.prepared(config)
    check_sources(config, models, dataset)
    reads = _reads(config, models, dataset)
    with open_run(Path(config.runtime.out), run_id("assess", reads), force) as run:
        if run.record is None:
            with run.phase("assess"):
                joined = load_sources(config, models, dataset)
                sources = joined.checkpoints[: len(models.merged)]
                run.facts["evidence"] = kind_of(sources, config.merge.evidence)
                result = _assess(config, joined, dataset, models.base is not None)
            if distributed.rank() == 0:
                write_atomically(run.path / TABLE, csv_bytes(result.frame()))
                figure = assessment_plot(result.rows, result.barrier)
                write_atomically(run.path / FIGURE, figure.encode())
                data = {"hash": joined.checkpoints[0].origin.data_hash}
                run.finish(reads, data_facts(dataset) if dataset else data, asdict(result))
    return run


def reads_rows(config: Config) -> bool:
    """Return whether the assessment reads rows of the data set."""
    return config.assess.barrier > 0 or config.assess.align == "activations"


def check_options(config: Config) -> None:
    """Check all options that can be checked without files.

    Raises:
        UserError: Too few sources, or rows that joined vocabularies do not fit.
    """
    options = config.merge
    preflight.check_deltas(config)
    if len(options.sources) < 2:
        raise UserError("merge.sources: assess compares two or more models; name more sources")
    num_bases = int(preflight.needs_base(config))
    if num_bases and options.base is None:
        raise UserError(
            f"merge.method={options.method} needs the model that all sources started from; set"
            " merge.base={path: ...}, or assess without it: merge=average"
        )
    if options.vocabularies:
        vocabularies.check_folders(options.vocabularies, len(options.sources) + num_bases)
        if reads_rows(config) and not config.data.vocabularies:
            raise UserError(
                "merge.vocabularies: the assessment reads rows. These are not encoded with the"
                " joined vocabularies; set assess.barrier=0 and assess.align=weights, or"
                " data.vocabularies=[FOLDER,...] to the encoded data sets of the sources"
            )


def check_sources(config: Config, models: Sources, dataset: EncodedDataset | None) -> None:
    """Check that all models hold the same network and fit the rows, by their outlines.

    Raises:
        UserError: A damaged checkpoint, the first difference, or rows that do not fit.
    """
    preflight.check_sources(config, models, None)
    if dataset is not None and not config.merge.vocabularies:
        for source in models.merged:
            check_data(outline(source.folder, distributed.share()), dataset, source.name)


def load_sources(config: Config, models: Sources, dataset: EncodedDataset | None) -> Joined:
    """Return the sources, and the base after them, with joined tables if so configured.

    Raises:
        UserError: A tensor has NaN or infinite entries, vocabularies cannot be joined, or joined
            tables do not fit the rows.
    """
    everyone = [*models.merged, *([models.base] if models.base else [])]
    loaded = sharded.load([source.folder for source in everyone])
    names = [source.name for source in everyone]
    require(finite(loaded, names, is_required=True))
    if not config.merge.vocabularies:
        return Joined(loaded)
    pairs = [(source.folder, c) for source, c in zip(everyone, loaded, strict=True)]
    folders = vocabularies.folders_of(config, pairs)
    joined = vocabularies.joined(loaded, folders, len(models.merged))
    require(compare(joined.checkpoints, names))
    if dataset is not None:
        for checkpoint, source in zip(joined.checkpoints, models.merged, strict=False):
            check_data(checkpoint, dataset, source.name)
    return joined


def _reads(config: Config, models: Sources, dataset: EncodedDataset | None) -> dict[str, Any]:
    """Return everything that the result depends on."""
    reads = {
        "sources": [source.identity for source in models.merged],
        "base": None if models.base is None else models.base.identity,
        "assess": section(config.assess),
        "starts": config.merge.align.starts,
        "sample": config.merge.sample if config.assess.align == "activations" else None,
        "data": dataset.hash if dataset else None,
        "seed": config.seed,
    }
    if config.merge.evidence != "auto":
        reads["evidence"] = config.merge.evidence
    if config.merge.vocabularies:  # which ones: their hashes are in the sources
        reads["vocabularies"] = "joined"
    return reads


def _assess(
    config: Config, joined: Joined, dataset: EncodedDataset | None, has_base: bool
) -> Assessment:
    """Call the assessment of the library with all that the configuration names."""
    options, first = config.assess, joined.checkpoints[0]
    checkpoints: Sequence[Checkpoint] = joined.checkpoints
    base = checkpoints[-1] if has_base else None
    checkpoints = checkpoints[: len(config.merge.sources)]
    network = merging_network(first, config.seed, is_aligned=options.align != "none")
    is_aligned = bool(network.symmetries) and options.align != "none"
    batches: Sequence[Any] = [network.probe] if is_aligned else []
    if is_aligned and options.align == "activations":
        assert dataset is not None
        module = merging_module(first.schema, first.model)
        size, seed = config.merge.sample, config.seed
        batches = sample_statistics(module, dataset, first.schema, size, seed).batches
    score = None if dataset is None else scorer(config, dataset, first)
    num_pairs = len(checkpoints) * (len(checkpoints) - 1) // 2
    with (
        progress("barrier", num_pairs * options.barrier, "models") as advance,
        _one_line("assess"),
    ):
        return assess(
            [checkpoint.params for checkpoint in checkpoints],
            counts=counts_of(checkpoints, is_needed=False, kind=config.merge.evidence),
            base=None if base is None else base.params,
            symmetries=network.symmetries,
            tables=network.tables,
            module=network.module,
            batches=batches or None,
            score=None if score is None or not options.barrier else counted(score, advance),
            points=options.barrier,
            align=options.align if is_aligned else "none",
            starts=config.merge.align.starts,
            seed=config.seed,
            processes=sharded.ShardProcesses(first.schema),
        )


def counted(score: Score, advance: Advance) -> Score:
    """Return a score that shows the progress of its calls."""

    def scored(params: Params) -> float:
        value = score(params)
        advance(1)
        return value

    return scored


@contextmanager
def _one_line(title: str) -> Iterator[None]:
    """Turn an error of the library into one line."""
    try:
        yield
    except MergeError as error:
        raise UserError(f"{title}: {error}") from error
