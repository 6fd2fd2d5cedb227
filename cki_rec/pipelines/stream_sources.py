"""Sources of a merge from disk to disk, read in blocks of rows.

Shape legend: K sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cki_rec.config import UserError
from cki_rec.data.prefetch import Run, one_by_one
from cki_rec.engine import distributed, sharded
from cki_rec.merging.extras import Processes
from cki_rec.merging.params import Params, compute_dtype, is_finite
from cki_rec.merging.rows import Block, Rows
from cki_rec.merging.symmetry import Symmetry
from cki_rec.pipelines.stream_plan import Plan
from cki_rec.progress import Advance


class Reader(Protocol):
    """The tensors of one source, as ``checkpoints.rows.RowReader`` reads them."""

    @property
    def name(self) -> str:
        """Return the name of the source, for messages."""

    @property
    def entries(self) -> Mapping[str, Any]:
        """Return its tensors by key."""

    def read(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows of a tensor; all of it without ``stop``."""

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened."""


class Writer(Protocol):
    """The merged tensors, as ``engine.block_writer.BlockWriter`` writes them."""

    def has(self, key: str, first: int) -> bool:
        """Return whether the block of a tensor that begins at a row is written."""

    def write(
        self, key: str, first: int, block: Tensor, shares: list[float] | None = None
    ) -> None:
        """Write rows of a tensor."""


@dataclass(slots=True)
class Stream:
    """Sources that are open, and the part of their rows that this process merges."""

    readers: Sequence[Reader]
    """One per source, then that of the base, if there is one."""
    params: Params
    """The model of the first source on ``meta``."""
    tables: Mapping[str, str]
    """Parameters that are tables -> name of their counts."""
    counted: Mapping[str, str]
    """Those with a measure of trained rows in all sources -> its key."""
    symmetries: Sequence[Symmetry]
    num: int
    """K."""
    plan: Plan
    processes: Processes
    run: Run = one_by_one
    """Applies a function to blocks, in threads."""
    digests: Sequence[Future[None]] = ()
    """Checks of the files of sources, which run beside the passes over their rows."""
    checked: set[tuple[str, int]] = field(default_factory=set)
    """Blocks that are known to be finite."""
    anchored_start: bool = False
    """Search an alignment from one more start, as the library does (``alignment.align``)."""

    def spans(self, name: str) -> list[slice]:
        """Return the blocks of rows of a table that this process merges."""
        size = len(self.params[name])
        mine = sharded.rows_of(size)
        if not sharded.is_divided(size) and distributed.rank() > 0:
            mine = slice(0, size)
        starts = range(mine.start, mine.stop, self.plan.rows) or [0]
        return [slice(start, min(start + self.plan.rows, mine.stop)) for start in starts]

    def block(self, name: str, span: slice) -> Block:
        """Return rows of a table in all sources, in the type to compute in.

        Raises:
            UserError: A row is not finite.
        """
        read = [each.read(f"model.{name}", span.start, span.stop) for each in self.readers]
        tensors = widened(read)
        if (name, span.start) not in self.checked:
            for reader, tensor in zip(self.readers, tensors, strict=True):
                check_rows(tensor, span.start, name, reader.name)
            self.checked.add((name, span.start))
        counts = []
        if key := self.counted.get(name):
            sources = self.readers[: self.num]
            counts = [per_row(reader.read(key, span.start, span.stop)) for reader in sources]
        base = tensors[self.num] if len(tensors) > self.num else None
        return Block(span.start, tensors[: self.num], base, counts=counts)

    def rows(self, name: str, advance: Advance) -> Rows:
        """Return the rows of a table; each pass over them counts as progress."""

        def each(fact: Callable[[Block], Any]) -> Iterator[Any]:
            spans = self.spans(name)
            values = self.run(lambda span: fact(self.block(name, span)), spans)
            for span, value in zip(spans, values, strict=True):
                yield value
                advance(span.stop - span.start)
                self.check_digests(wait=False)

        return Rows(name, each, self.processes)

    def check_digests(self, wait: bool) -> None:
        """Check the files of the sources whose digests are known; or wait for all of them.

        Raises:
            UserError: A file has changed since its checkpoint was written.
        """
        for digest in self.digests:
            if wait or digest.done():
                digest.result()

    def dense(self) -> list[Params]:
        """Return the parameters that are not tables, per source and in the type to compute in.

        Raises:
            UserError: An entry is not finite.
        """
        floats = [name for name, x in self.params.items() if x.is_floating_point()]
        models: list[Params] = [{} for _ in self.readers]
        for name in (name for name in floats if name not in self.tables):
            tensors = widened([reader.read(f"model.{name}") for reader in self.readers])
            for reader, model, tensor in zip(self.readers, models, tensors, strict=True):
                if not is_finite(tensor):
                    raise UserError(f"{name} of {reader.name}: entries are NaN or infinite")
                model[name] = tensor
        return models

    def integers(self) -> Params:
        """Return the integer tensors, which come from the first source."""
        names = [n for n, x in self.params.items() if not x.is_floating_point()]
        return {name: self.readers[0].read(f"model.{name}") for name in names}

    def groups(self, name: str) -> list[str]:
        """Return the tensors with a row per row of a table that all sources have; last it."""
        sources, table = self.readers[: self.num], self.tables[name]
        keys = [f"accumulator.{name}"]
        if name == next(n for n, each in self.tables.items() if each == table):
            keys.append(f"counts.{table}")
        return [key for key in keys if all(key in r.entries for r in sources)] + [f"model.{name}"]

    def with_state(
        self, name: str, span: slice, keys: Sequence[str]
    ) -> tuple[Block, dict[str, list[Tensor]]]:
        """Return rows of a table, and those of its accumulators and counts, in all sources."""
        sources = self.readers[: self.num]
        state = {key: [r.read(key, span.start, span.stop) for r in sources] for key in keys}
        return self.block(name, span), state


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the type to compute in, that of the widest."""
    types = {compute_dtype(tensor) for tensor in tensors}
    wide = torch.float64 if torch.float64 in types else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def per_row(measure: Tensor) -> Tensor:
    """Return one number per row: counts as they are, of accumulators the mean over columns."""
    if measure.ndim == 1:
        return measure
    return measure.double().mean(1)


def check_rows(tensor: Tensor, first: int, name: str, source: str) -> None:
    """Check that rows of a table are finite.

    Raises:
        UserError: Some are not; names the first of them.
    """
    if is_finite(tensor):
        return
    bad = (~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero()[:, 0] + first
    more = f" and {len(bad) - 3:,} more" if len(bad) > 3 else ""
    rows = ", ".join(f"{row:,}" for row in bad[:3].tolist())
    raise UserError(
        f"{name} of {source}: rows {rows}{more} have NaN or infinite entries; train that source"
        " again, or leave it out"
    )
