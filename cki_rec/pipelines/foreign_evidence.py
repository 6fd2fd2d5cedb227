"""How often the rows of a table were trained, from files of other programs: ``merge.evidence``.

Shape legend: V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cki_rec.checkpoints.formats import Stored
from cki_rec.config import EVIDENCE, UserError
from cki_rec.merging.optimizer_state import ADAGRAD, ADAM, squared_gradients
from cki_rec.merging.params import Params
from cki_rec.pipelines.foreign_sources import Foreign

READ = (*ADAGRAD, *ADAM, "step")
"""Optimizer state that is read."""


def evidence(
    sources: Sequence[Foreign], tables: Sequence[str], kind: str
) -> tuple[str, list[Params]]:
    """Return the measure of how often rows were trained, and per source table -> ``(V,)``.

    Raises:
        UserError: As ``evidence_kind``.
    """
    word, held = evidence_kind(sources, tables, kind)
    if not held:
        return word, []
    return word, [{name: evidence_rows(s, name, word) for name in held} for s in sources]


def evidence_kind(
    sources: Sequence[Foreign], tables: Sequence[str], kind: str
) -> tuple[str, list[str]]:
    """Return the measure of how often rows were trained, and the tables that have it everywhere.

    Args:
        sources: The sources.
        tables: Names of the tables.
        kind: ``merge.evidence``.

    Raises:
        UserError: The configured measure is in no table of all sources.
    """
    if kind == "none":
        return "none", []
    for word in EVIDENCE if kind == "auto" else (kind,):
        if held := [name for name in tables if all(has_evidence(s, name, word) for s in sources)]:
            return word, held
    if kind == "auto":
        return "none", []
    lacking = next(
        (
            f"{s.path}: {name}"
            for name in tables
            for s in sources
            if not has_evidence(s, name, kind)
        ),
        "there is no table",
    )
    hint = "; ".join(note for source in sources for note in source.parts.notes)
    fix = {"counts": "{path: ..., counts: FILE}", "optimizer": "{path: ..., optimizer: FILE}"}
    more = f", add {fix[kind]}," if kind in fix else ""
    raise UserError(
        f"merge.evidence={kind}: {lacking} has none{f' ({hint})' if hint else ''};{more} or use"
        " merge.evidence=auto"
    )


def has_evidence(source: Foreign, table: str, kind: str) -> bool:
    """Return whether a source holds a measure of how often the rows of a table were trained."""
    if kind == "optimizer":
        rows, held = source.parts.entries[table].shape[0], source.parts.state.get(table, {})
        shapes = [holder.entries[key].shape for name, (holder, key) in held.items()]
        is_known = squared_gradients({name: torch.ones(1, 1) for name in held}) is not None
        return is_known and all(not s or s == (1,) or s[0] % max(1, rows) == 0 for s in shapes)
    return table in (source.parts.counts if kind == "counts" else source.parts.scores)


def evidence_rows(
    source: Foreign, table: str, kind: str, first: int = 0, stop: int | None = None
) -> Tensor:
    """Return the measure for some rows of a table, float64, and read no others.

    Raises:
        UserError: It is negative or not finite.
    """
    size = source.parts.entries[table].shape[0]
    stop = size if stop is None else min(stop, size)
    if kind == "optimizer":
        options: dict[str, Any] = source.parts.groups[0] if source.parts.groups else {}
        held = source.parts.state[table]
        state = {n: _state(*held[n], size, first, stop) for n in held if n in READ}
        initial = float(options.get("initial_accumulator_value", 0.0))
        beta = float(options.get("betas", (0.9, 0.999))[1])
        squares = squared_gradients(state, initial, beta)
        assert squares is not None
        values = squares.reshape(-1, stop - first).mean(0) if stop > first else squares
    else:
        holder, key = (source.parts.counts if kind == "counts" else source.parts.scores)[table]
        values = holder.rows(key, first, stop).double()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise UserError(f"{source.path}: evidence ({kind}) of {table} is negative or not finite")
    return values


def state_of(source: Foreign, table: str) -> Tensor:
    """Return a tensor on ``meta`` as large, per row, as the optimizer state of a table."""
    entries = [h.entries[key] for n, (h, key) in source.parts.state[table].items() if n in READ]
    size = source.parts.entries[table].shape[0]
    return torch.empty(
        size, -(-sum(e.bytes for e in entries) // max(1, size)), device="meta", dtype=torch.uint8
    )


def _state(holder: Stored, key: str, size: int, first: int, stop: int) -> Tensor:
    """Return the optimizer state of some rows of a table of ``size`` rows.

    TorchRec writes the accumulators of the parts of columns one after the other: rows of all
    parts, in this order.
    """
    shape = holder.entries[key].shape
    if not shape or shape == (1,):
        return holder.rows(key)
    starts = range(0, shape[0], max(1, size))
    return torch.cat([holder.rows(key, start + first, start + stop) for start in starts])
