"""Merges of other programs' checkpoints from disk to disk, in blocks of rows: ``merge.memory_gb``.

The merge itself is that of ``streamed``. Here are its sources, its plan, and the files that take
the result: they are made without values in the form that is configured, and filled row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cki_rec.checkpoints.formats import BLANKS, Entry, Place
from cki_rec.config import Config, UserError
from cki_rec.data import prefetch
from cki_rec.engine.placed_writer import PlacedWriter
from cki_rec.engine.record import Run
from cki_rec.merging.api import network_symmetries
from cki_rec.merging.extras import Processes
from cki_rec.merging.inputs import sources_of
from cki_rec.merging.params import MergeError, Params, compute_dtype
from cki_rec.merging.result import MergeResult, Recipe
from cki_rec.merging.symmetry import Symmetry
from cki_rec.pipelines import preflight
from cki_rec.pipelines.foreign_evidence import evidence_kind, evidence_rows, state_of
from cki_rec.pipelines.foreign_inputs import SampleRows
from cki_rec.pipelines.foreign_sources import Foreign
from cki_rec.pipelines.stream_plan import Plan, described, plan_of
from cki_rec.pipelines.stream_sources import Stream
from cki_rec.pipelines.streamed import mean_shares, merge_tensors
from cki_rec.pipelines.unfinished import PARTIAL, begin, forget, kept_or_forgotten

FILES, JOURNAL = "files", "journal.jsonl"


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Rows of one source by the names of the network, as ``RowReader`` gives those of ours."""

    source: Foreign
    types: Mapping[str, torch.dtype]
    """Types to compute in."""
    kind: str
    """Measure of trained rows."""
    name: str
    entries: Mapping[str, Entry]

    def read(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of ``model.NAME`` or ``counts.NAME``."""
        group, name = key.split(".", 1)
        if group == "counts":
            return evidence_rows(self.source, name, self.kind, first, stop)
        return self.source.rows(name, first, stop).to(self.types[name])

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened."""
        for stored in (self.source.stored, *self.source.beside):
            stored.check_unchanged()


@dataclass(frozen=True, slots=True)
class Outline:
    """The tensors of a source on ``meta``, and those of its evidence."""

    params: Params
    accumulators: Params = field(default_factory=dict)
    counts: Params = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A merge from disk to disk, before any value is read."""

    everyone: Sequence[Foreign]
    """The sources, then the base, if there is one."""
    num: int
    """Number of the sources."""
    tables: Sequence[str]
    kind: str
    """Measure of trained rows."""
    counted: Sequence[str]
    """Tables that have it in all sources."""
    tied: Mapping[str, str]
    """Second names of tensors -> first ones."""
    plan: Plan
    symmetries: Sequence[Symmetry]


def symmetries_of(
    config: Config, module: nn.Module | None, rows: SampleRows | None
) -> Sequence[Symmetry]:
    """Return the symmetries by which sources are aligned; none without alignment.

    Raises:
        UserError: There is no network, or none are declared and no batch finds them.
    """
    options = config.merge
    if options.align.by == "none" or len(options.sources) == 1:
        return ()
    if module is None:
        raise UserError(
            f"merge.align.by={options.align.by}: merge.module gives the network, whose symmetries"
            " align sources"
        )
    state = module.state_dict()
    try:
        known = sources_of([state, state], None, module)
        batches = rows.batches if rows else None
        purpose = f"align={options.align.by}"
        return network_symmetries(None, known, module, batches, purpose, False, config.seed)
    except MergeError as error:
        raise UserError(f"merge.align.by={options.align.by}: {error}") from error


def prepare(
    config: Config,
    everyone: Sequence[Foreign],
    tables: Sequence[str],
    symmetries: Sequence[Symmetry],
) -> Task:
    """Return a merge from disk to disk, with its plan.

    Raises:
        UserError: A table cannot be read by rows, or the budget is below the smallest block.
    """
    options, rule = config.merge, preflight.method_of(config.merge)
    num = len(options.sources)
    try:
        rule.check(options.options, num)
    except MergeError as error:
        raise UserError(f"merge.options: {error}") from None
    for source in everyone:
        if turned := [name for name in tables if source.naming.is_transposed(name)]:
            raise UserError(
                f"{source.path}: table {turned[0]} is stored transposed, so its rows cannot be"
                " read alone; use merge.memory_gb=null"
            )
    kind, counted = evidence_kind(everyone[:num], tables, options.evidence)
    if preflight.needs_counts(options) and not counted:
        raise UserError(
            f"merge.method={options.method} weighs rows by evidence, and no table has any in all"
            " sources; cki-rec inspect lists tables (merge.table_names) with their evidence"
        )
    first, ties = everyone[0], [source.tied() for source in everyone]
    tied = {n: to for n, to in ties[0].items() if all(each.get(n) == to for each in ties)}
    outlines = [
        Outline(
            {name: _meta(source.parts.entries[name]) for name in first.parts.names},
            {n: state_of(source, n) for n in counted} if kind == "optimizer" else {},
            {n: _meta(Entry((1,), torch.int64)) for n in counted} if k < num else {},
        )
        for k, source in enumerate(everyone)
    ]
    plan = plan_of(config, outlines, num, {name: name for name in tables})
    written = sum(entry.bytes for entry in _result_entries(config, first).values())
    plan = replace(plan, written=written)
    return Task(everyone, num, tables, kind, counted, tied, plan, symmetries)


def plan_lines(config: Config, task: Task) -> list[str]:
    """Return the plan in words."""
    files = task.everyone[0].stored.files()
    return list(described(task.plan, files, Path(config.runtime.out)))


def digests(sources: Sequence[Foreign]) -> list[str]:
    """Return the digests of all sources; their files are read side by side."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: source.stored.digest(), sources))


def merge(
    config: Config, task: Task, run: Run, reads: Mapping[str, Any]
) -> tuple[MergeResult, dict[str, Any], Path]:
    """Merge into a folder; return the result without its tensors, facts, and its file or folder.

    Args:
        config: The configuration.
        task: The merge.
        run: It takes the files, once they are whole.
        reads: Everything that the result depends on.

    Raises:
        UserError: Sources that have NaN or change, or a method that refuses them.
        OSError: The files cannot be written.
    """
    options, first = config.merge, task.everyone[0]
    torch.set_num_threads(1)  # of one operation: blocks are small
    folder = run.path.parent / PARTIAL / run.path.name
    target = folder / FILES
    plan, is_resumed = begin(folder, FILES, task.plan, dict(reads))
    with kept_or_forgotten(folder, options.method), prefetch.threads(plan.threads) as blocks:
        stream = _stream(task, plan, blocks)
        path, places, turned = _blank(config, task, target)
        with PlacedWriter(places, turned, folder / JOURNAL, is_resumed) as writer:
            facts = merge_tensors(config, stream, writer, folder, is_disjoint=False)
            writer.finish()
    for part in sorted(target.iterdir()):
        part.rename(run.path / part.name)
    forget(folder)
    rule = preflight.method_of(options)
    filled = rule.filled(options.options)
    notes = []
    if filled != options.options:
        chosen = ", ".join(f"{n}={filled[n]}" for n in rule.without_score)
        notes.append(f"without a score: {chosen} ({rule.reference})")
    shares = mean_shares(stream, facts["shares"], writer.written)
    recipe = str(Recipe(options.method, options.align.by, options=filled))
    result = MergeResult({}, shares, facts["alignment"], recipe, warnings=notes)
    entries = _result_entries(config, first).values()
    types = {str(e.dtype) for e in entries if e.dtype.is_floating_point}
    return (
        result,
        {
            "types": {"result": sorted(types)},
            "streamed": {"block_rows": plan.rows, "memory_gb": options.memory_gb},
        },
        run.path / path.relative_to(target),
    )


def _stream(task: Task, plan: Plan, blocks: prefetch.Run) -> Stream:
    """Return the sources, opened for reading in blocks."""
    first = task.everyone[0]
    names = [name for name in first.parts.names if name not in task.tied]
    types = {
        name: _widest([source.parts.entries[name].dtype for source in task.everyone])
        for name in names
    }
    readers = [
        SourceRows(s, types, task.kind, s.path, {f"model.{n}": s.parts.entries[n] for n in names})
        for s in task.everyone
    ]
    params = {n: _meta(replace(first.parts.entries[n], dtype=types[n])) for n in names}
    tables = {name: name for name in task.tables if name in names}
    return Stream(
        *(readers, params, tables, {n: f"counts.{n}" for n in task.counted}, task.symmetries),
        *(task.num, plan, Processes(), blocks),
        anchored_start=True,
    )


def _blank(
    config: Config, task: Task, target: Path
) -> tuple[Path, dict[str, list[Place]], list[str]]:
    """Write the files of the result without values.

    Returns:
        The model, the places of its tensors, and those of them that are stored transposed.
    """
    options, first = config.merge, task.everyone[0]
    entries, turned = _result_entries(config, first), list[str]()
    if options.format is not None and options.format != first.stored.form:
        blank = BLANKS[options.format](entries, target)
        full = {name: name for name in entries}
    else:
        full = first.parts.names
        stored = {full[name]: entry for name, entry in entries.items()}
        ties = {full[name]: full[to] for name, to in task.tied.items()}
        blank = first.stored.blank(stored, target, ties)
        turned = [f"model.{name}" for name in entries if first.naming.is_transposed(name)]
    places: dict[str, list[Place]] = {}
    for name in entries:
        places.setdefault(f"model.{task.tied.get(name, name)}", []).append(
            blank.places[full[name]]
        )
    return blank.path, {k: list(dict.fromkeys(each)) for k, each in places.items()}, turned


def _result_entries(config: Config, first: Foreign) -> dict[str, Entry]:
    """Return shapes and types of the tensors of the result, by the names of the network."""
    options, entries = config.merge, dict[str, Entry]()
    is_own_form = options.format in (None, first.stored.form)
    for name, entry in first.parts.entries.items():
        is_turned = is_own_form and first.naming.is_transposed(name)
        shape = entry.shape[::-1] if is_turned else entry.shape
        is_changed = options.dtype is not None and entry.dtype.is_floating_point
        entries[name] = Entry(
            shape, getattr(torch, str(options.dtype)) if is_changed else entry.dtype
        )
    return entries


def _widest(types: Sequence[torch.dtype]) -> torch.dtype:
    """Return the type to compute in; integers stay as they are in the first source."""
    if not types[0].is_floating_point:
        return types[0]
    wide = {compute_dtype(torch.empty(0, dtype=dtype, device="meta")) for dtype in types}
    return torch.float64 if torch.float64 in wide else torch.float32


def _meta(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
