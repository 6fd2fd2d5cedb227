"""Reducible statistics: facts about whole parameters that are computed block by block.

A method that needs a fact about a whole table computes it per block of rows. ``Rows.reduce`` adds
it up (or takes the smallest or largest) over the blocks and over the processes. Then each block is
merged alone. Tables in memory, on several processes and on disk differ in ``Rows.each`` and in
``Processes``, and in nothing else.

Shape legend: K sources, V rows of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cki_rec.merging.params import Params

How = Literal["sum", "min", "max"]
COMBINE: Mapping[How, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of one parameter in all sources."""

    first: int
    """Number of the first row in the whole parameter."""
    models: Sequence[Tensor]
    base: Tensor | None = None
    fisher: Sequence[Tensor] = ()
    counts: Sequence[Tensor] = ()
    """Per source ``(V,)``: how often training looked each row up."""


class Reduction:
    """The processes that hold the rows; here one, which holds all of them."""

    def reduce(self, name: str, value: Tensor, how: How) -> Tensor:
        """Return the sum, minimum or maximum of a fact over the rows of all processes."""
        return value

    def first_row(self, name: str) -> int:
        """Return the number of the first row of a parameter that this process holds."""
        return 0


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one parameter in all sources, in blocks."""

    name: str
    each: Callable[[Callable[[Block], Any]], Iterable[Any]]
    """``each(fact)``: facts about the blocks of the rows of this process in order, at least one;
    every call reads them anew. Threads may compute several at a time."""
    reduction: Reduction = field(default_factory=Reduction)

    def read(self) -> Iterable[Block]:
        """Return the blocks of the rows of this process in order, at least one."""
        return self.each(lambda block: block)

    def reduce(self, fact: Callable[[Block], Tensor], how: How = "sum") -> Tensor:
        """Return a fact about the whole parameter, in one pass over its rows.

        Args:
            fact: Fact about the rows of a block, of one shape and dtype for all blocks.
            how: Combination of the facts of two blocks, or of two processes.
        """
        total: Tensor | None = None
        for value in self.each(fact):
            total = value if total is None else COMBINE[how](total, value)
        assert total is not None
        return self.reduction.reduce(self.name, total, how)

    def in_pieces(self, size: int) -> Rows:
        """Return the rows in blocks of ``size``, so that sums round alike for larger blocks.

        They do if the size of a larger block is a multiple of it.
        """

        def each(fact: Callable[[Block], Any]) -> Iterator[Any]:
            for facts in self.each(lambda block: [fact(piece) for piece in pieces(block, size)]):
                yield from facts

        return replace(self, each=each)


def in_blocks(
    models: Sequence[Params],
    base: Params | None = None,
    fisher: Sequence[Params] = (),
    size: int | None = None,
    reduction: Reduction | None = None,
) -> dict[str, Rows]:
    """Return the rows of every parameter of models in memory.

    Args:
        models: One per source, or the rows of this process.
        base: The model that all sources started from.
        fisher: Per source the diagonal of the Fisher information of some parameters.
        size: Rows of a block; None: all rows in one.
        reduction: The processes that hold the models; None: this one alone.
    """
    reduction = reduction or Reduction()

    def blocks(name: str, fact: Callable[[Block], Any]) -> Iterator[Any]:
        tensors = [model[name].detach() for model in models]
        scores = [f[name].detach() for f in fisher if name in f]
        scores = scores if len(scores) == len(models) else []
        origin = None if base is None else base[name].detach()
        num_rows = len(tensors[0]) if tensors[0].ndim else 1
        first = reduction.first_row(name)
        whole = Block(first, tensors, origin, scores)
        if size is None or size >= num_rows or tensors[0].ndim == 0:
            yield fact(whole)
            return
        for start in range(0, num_rows, size):
            yield fact(cut(whole, slice(start, start + size)))

    return {
        name: Rows(name, partial(blocks, name), reduction)
        for name in (models[0] if models else ())
    }


def in_memory(tensors: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Rows:
    """Return the rows of one parameter, from its whole tensor in every source."""
    block = Block(0, [tensor.detach() for tensor in tensors], counts=counts)
    return Rows("", lambda fact: [fact(block)])


def pieces(block: Block, size: int) -> Iterator[Block]:
    """Yield the rows of a block, ``size`` at a time; an empty block once."""
    for start in range(0, len(block.models[0]), size) or [0]:
        yield cut(block, slice(start, start + size))


def cut(block: Block, rows: slice) -> Block:
    """Return some rows of a block."""
    return Block(
        block.first + rows.start,
        [tensor[rows] for tensor in block.models],
        None if block.base is None else block.base[rows],
        [scores[rows] for scores in block.fisher],
        [counts[rows] for counts in block.counts],
    )
