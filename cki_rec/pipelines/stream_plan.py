"""The plan of a merge from disk to disk: size of blocks, bytes read and written, memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cki_rec.config import Config, Merge, UserError
from cki_rec.engine import distributed
from cki_rec.engine.embeddings import table_of
from cki_rec.merging.params import BLOCK, Params
from cki_rec.merging.registry import Method
from cki_rec.pipelines import preflight
from cki_rec.pipelines.compatibility import num_bytes

PROCESS_BYTES = 0.65e9
"""Memory of a process that has imported the framework and read nothing."""
SMALLEST = 256
"""Rows of the smallest block."""
INPUTS_HELD, ROWS_HELD = 4, 16
"""Copies of a block: of all that is read, and of the rows of one model in a computation."""
MOST_THREADS = 4
"""Threads beyond which one that writes is the slowest, if ``runtime.threads`` sets no number."""
PROBE = 1 << 26
"""Bytes that are read and written to estimate the time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a merge in blocks."""

    rows: int
    """Rows of a block."""
    threads: int
    """Threads of a process that merge blocks."""
    memory: float
    """Bytes that all processes of this machine may take."""
    needed: float
    """Bytes that they are expected to take."""
    passes: int
    """Times that tables are read."""
    read: int
    """Bytes that all processes read."""
    written: int


class Outline(Protocol):
    """The tensors of a source on ``meta``: of its model, and of all that is read beside it."""

    @property
    def params(self) -> Params:
        """Return those of the model."""

    @property
    def accumulators(self) -> Params:
        """Return those with a row per row of a table, by the name of its parameter."""

    @property
    def counts(self) -> Params:
        """Return counts, by the names of tables."""


def tables_of(params: Iterable[str]) -> dict[str, str]:
    """Return the parameters of a network of ours that are tables -> the names of their counts."""
    return {name: table for name in params if (table := table_of(name))}


def check_options(config: Config) -> None:
    """Check all options of a merge that can be checked without files.

    Raises:
        UserError: As ``preflight.check_options`` and ``check_streamed``.
    """
    if config.merge.memory_gb is not None:
        check_streamed(config.merge)
    preflight.check_options(config)


def check_streamed(options: Merge) -> None:
    """Check that a merge can be made in blocks of rows.

    Raises:
        UserError: It needs whole models, or rows of data.
    """
    entry = preflight.entry_of(options)
    where = f"merge.memory_gb={options.memory_gb:g} merges tables in blocks of rows"
    if not isinstance(entry, Method) or not entry.row_wise:
        raise UserError(
            f"{where}, but merge.method={options.method} needs whole models; use"
            " merge.memory_gb=null"
        )
    for name, is_set in {
        f"align.by={options.align.by}": options.align.by == "activations",
        f"repair={options.repair}": options.repair != "none",
        f"refine={options.refine}": options.refine != "none",
        "recalibrate=true": options.recalibrate,
        f"learn.what={options.learn.what}": options.learn.what != "none",
        f"ablation={options.ablation}": options.ablation != "none",
        "vocabularies": bool(options.vocabularies),
        f"method={options.method}": preflight.needs_rows(options),
    }.items():
        if is_set:
            raise UserError(
                f"{where}, but merge.{name} needs whole models or rows of data; leave it out, set"
                " options that are null, or use merge.memory_gb=null"
            )


def plan_of(
    config: Config, outlines: Sequence[Outline], num_sources: int, tables: Mapping[str, str]
) -> Plan:
    """Return the plan of a merge.

    Args:
        config: The configuration.
        outlines: Of the sources, then of the base, if there is one.
        num_sources: Number of the sources.
        tables: Parameters that are tables -> names of their counts.

    Raises:
        UserError: The budget is below the smallest block.
    """
    options, first = config.merge, outlines[0]
    assert options.memory_gb is not None
    rule, (_, processes) = preflight.method_of(options), distributed.local_position()
    dense = sum(
        num_bytes({n: saved.params[n]})
        for saved in outlines
        for n in saved.params
        if n not in tables
    )
    threads = config.runtime.threads or min(MOST_THREADS, (os.cpu_count() or 1) // processes) or 1
    per_row = threads * max((_row_bytes(outlines, *table) for table in tables.items()), default=0)
    fixed = PROCESS_BYTES + 3 * dense
    budget = options.memory_gb * 1e9 / processes - fixed
    rows = BLOCK
    while rows > SMALLEST and rows * per_row > budget:
        rows //= 2
    if rows * per_row > budget:
        least = processes * (fixed + SMALLEST * per_row)
        raise UserError(
            f"merge.memory_gb={options.memory_gb:g} is below the smallest block: {processes}"
            f" process(es) with blocks of {SMALLEST} rows take {least / 1e9:.2f} GB; set"
            f" merge.memory_gb={-(-least // 1e7) / 100:g} or more"
        )
    table_bytes = sum(num_bytes({n: saved.params[n]}) for saved in outlines for n in tables)
    is_aligned = options.align.by != "none" and num_sources > 1
    passes = 1 + is_aligned + (2 if rule.statistics is not None else 0)
    state = [*(num_bytes(saved.accumulators) + num_bytes(saved.counts) for saved in outlines)]
    read = passes * table_bytes + dense + sum(state)
    written = num_bytes(first.params) + state[0]
    return Plan(
        rows,
        threads,
        options.memory_gb * 1e9,
        processes * (fixed + rows * per_row),
        passes,
        read,
        written,
    )


def described(plan: Plan, files: Iterable[Path], out: Path) -> Iterator[str]:
    """Yield the plan in words, with the time that it takes at the speed of these disks.

    Args:
        plan: The plan.
        files: Files of a source.
        out: Folder of the result.
    """
    yield f"streams tables in blocks of {plan.rows:,} rows; they are read {plan.passes} times"
    yield (
        f"reads {plan.read / 1e9:.2f} GB, writes {plan.written / 1e9:.2f} GB; takes about"
        f" {plan.needed / 1e9:.2f} GB of memory, the budget is {plan.memory / 1e9:.2f} GB"
    )
    seconds = plan.read / _read_rate(files) + plan.written / _write_rate(out)
    yield f"about {max(1, round(seconds)):,} s for reading and writing alone"


def _row_bytes(outlines: Sequence[Outline], name: str, table: str) -> int:
    """Return the bytes of memory that one row of a table takes, with all that is made of it."""
    inputs = 0
    for saved in outlines:
        for tensor in (saved.params[name], saved.accumulators.get(name)):
            if tensor is not None:
                inputs += tensor[:1].numel() * tensor.element_size()
        inputs += 8 if table in saved.counts else 0
    wide = outlines[0].params[name][:1].numel() * 4
    return INPUTS_HELD * inputs + ROWS_HELD * wide


def _read_rate(files: Iterable[Path]) -> float:
    """Return bytes per second of reading a source."""
    file = max(files, key=lambda path: path.stat().st_size)
    start = time.perf_counter()
    with file.open("rb") as content:
        size = len(content.read(PROBE))
    return max(size, 1) / max(time.perf_counter() - start, 1e-9)


def _write_rate(out: Path) -> float:
    """Return bytes per second of writing to the disk of ``out``, by a file that is removed."""
    while not out.exists():
        out = out.parent
    content, start = bytes(PROBE), time.perf_counter()
    with tempfile.TemporaryFile(dir=out) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content) / max(time.perf_counter() - start, 1e-9)
