"""How often training looked each row of a table up, from checkpoints of ours: ``merge.evidence``.

Shape legend: V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

from cki_rec.checkpoints import Checkpoint
from cki_rec.config import UserError
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.optimizer_state import squared_gradients
from cki_rec.merging.params import Params


def kind_of(checkpoints: Sequence[Checkpoint], kind: str) -> str:
    """Return the measure that a merge reads: ``counts``, ``optimizer`` or ``none``.

    Args:
        checkpoints: Sources; outlines are enough.
        kind: ``merge.evidence``. With ``auto`` it is the first that all sources hold.

    Raises:
        UserError: A source lacks the configured one.
    """
    if kind == "scores":
        raise UserError(
            "merge.evidence=scores: checkpoints of cki-rec hold no scores; use counts, optimizer"
            " or auto"
        )
    lacking = {
        "counts": [k for k, saved in enumerate(checkpoints) if not saved.counts],
        "optimizer": [k for k, saved in enumerate(checkpoints) if not _has_accumulators(saved)],
    }
    if kind == "auto":
        return next((word for word, sources in lacking.items() if not sources), "none")
    if lacking.get(kind):
        what = "row counts" if kind == "counts" else "accumulators of Adagrad for every table"
        raise UserError(
            f"merge.evidence={kind}: merge.sources[{lacking[kind][0]}] holds no {what}; use"
            " merge.evidence=auto"
        )
    return kind


def counts_of(
    checkpoints: Sequence[Checkpoint], is_needed: bool, kind: str = "auto"
) -> list[Params]:
    """Return the measure per source and table parameter, ``(V,)``; of all sources or of none.

    Args:
        checkpoints: The sources.
        is_needed: The merge cannot do without.
        kind: ``merge.evidence``.

    Raises:
        UserError: It is needed, and there is none.
    """
    word = kind_of(checkpoints, kind)
    if word == "none":
        if is_needed and kind == "none":
            raise UserError("merge.evidence=none: the method weighs rows by evidence; use auto")
        if is_needed:
            k = next(k for k, source in enumerate(checkpoints) if not source.counts)
            raise UserError(f"merge.sources[{k}]: its checkpoint holds no row counts (evidence)")
        return []
    if word == "counts":
        return [
            {name: source.counts[table] for name in source.params if (table := table_of(name))}
            for source in checkpoints
        ]
    return [
        {
            name: values
            for name, sums in source.accumulators.items()
            if (values := squared_gradients({"accumulator": sums})) is not None
        }
        for source in checkpoints
    ]


def keys_of(saved: Checkpoint, kind: str) -> dict[str, str]:
    """Return the table parameters -> the key of their measure in a checkpoint."""
    tables = {name: table for name in saved.params if (table := table_of(name))}
    if kind == "none":
        return {}
    if kind == "counts":
        return {name: f"counts.{table}" for name, table in tables.items()}
    return {name: f"accumulator.{name}" for name in tables}


def _has_accumulators(saved: Checkpoint) -> bool:
    return all(name in saved.accumulators for name in saved.params if table_of(name))
