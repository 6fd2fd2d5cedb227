"""``cki-rec assess`` of checkpoints that other programs have written."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from cki_rec.config import Config, UserError, run_id, section
from cki_rec.engine.record import open_run
from cki_rec.evaluation.assessment_plot import assessment_plot
from cki_rec.evaluation.tables import csv_bytes
from cki_rec.files import write_atomically
from cki_rec.merging.assessment import Assessment, assess
from cki_rec.merging.params import MergeError
from cki_rec.pipelines import foreign, preflight
from cki_rec.pipelines.foreign_evidence import evidence
from cki_rec.pipelines.foreign_inputs import network_of, rows_of
from cki_rec.pipelines.foreign_sources import load, open_source, tables_of
from cki_rec.pipelines.sources import check_distinct
from cki_rec.plugins import load_function, source_digest

TABLE, FIGURE = "assess.csv", "assess.svg"

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Assess the sources of the configured merge; print the table and the suggestion.

    Symmetries need ``merge.module`` and ``merge.batches``; labels of these are read by a barrier.

    Raises:
        UserError: Options, sources or rows that do not fit together.
    """
    options = config.merge
    foreign.check_paths(options)
    if len(options.sources) < 2:
        raise UserError("merge.sources: assess compares two or more models; name more sources")
    with ExitStack() as stack:
        module = network_of(config)
        sources = [open_source(s, "merge.sources", module, stack) for s in options.sources]
        everyone = list(sources)
        if options.base is not None and preflight.needs_base(config):
            everyone.append(open_source(options.base, "merge.base", module, stack))
        tables = tables_of(config, sources[0], module)
        foreign.check_sources(everyone, tables, module)
        rows = rows_of(config, module)
        if config.assess.barrier and rows is None:
            raise UserError(
                f"assess.barrier={config.assess.barrier}: reads rows; set merge.module and"
                " merge.batches or merge.data, or assess.barrier=0"
            )
        digests = [source.stored.digest() for source in everyone]
        check_distinct(digests[: len(sources)], [s.path for s in sources], "merge.sources")
        name = options.module
        reads = {
            "foreign": [source.identity() for source in everyone],
            "assess": section(config.assess),
            "measure": options.evidence,
            "tables": tables,
            "module": name and source_digest(load_function(name, "merge.module")),
            "rows": rows.digest() if rows else None,
            "starts": options.align.starts,
            "seed": config.seed,
        }
        out = Path(config.runtime.out)
        with open_run(out, run_id("assess", reads), config.runtime.force) as done:
            if done.record is None:
                kind, counts = evidence(sources, tables, options.evidence)
                models = load(everyone, module, len(sources))
                can_align = rows is not None or config.assess.align == "activations"
                try:
                    with done.phase("assess"):
                        result = assess(
                            models[: len(sources)],
                            counts=counts,
                            base=models[-1] if len(models) > len(sources) else None,
                            tables=tables,
                            module=module,
                            batches=rows.batches if rows else None,
                            score=rows.score(module) if rows and module is not None else None,
                            points=config.assess.barrier,
                            align=config.assess.align if can_align else None,
                            starts=options.align.starts,
                            seed=config.seed,
                        )
                except MergeError as error:
                    hint = "" if rows else " (merge.module gives the network, merge.batches rows)"
                    raise UserError(f"assess: {error}{hint}") from error
                write_atomically(done.path / TABLE, csv_bytes(result.frame()))
                figure = assessment_plot(result.rows, result.barrier)
                write_atomically(done.path / FIGURE, figure.encode())
                done.facts["evidence"] = kind
                done.finish(reads, {"hash": ""}, asdict(result))
    assert done.record is not None
    log.info("%s", Assessment(**done.record["result"]))
    log.info("assessment: %s", out / done.path.name)
