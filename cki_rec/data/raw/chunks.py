"""Chunks of raw rows that are parsed later, by any thread or process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import polars as pl

from cki_rec.data.raw.reading import Reading

Step = Callable[[pl.DataFrame], pl.DataFrame]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one file, not parsed yet; it can be pickled.

    Steps take no part in the search for bad rows: they turn the columns of a file into the common
    form of ``cki_rec.data.raw.reading``.
    """

    parse: Callable[[Reading], pl.DataFrame]
    """Return the good rows and record the bad ones."""
    steps: tuple[Step, ...] = ()
    """Functions from frame to frame, in order."""

    def frame(self, reading: Reading) -> pl.DataFrame:
        """Return the rows.

        Raises:
            UserError: A row is bad and ``reading.on_bad_row`` is ``error``.
        """
        frame = self.parse(reading)
        for step in self.steps:
            frame = step(frame)
        return frame


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the pass so far, at a place between chunks."""

    run: Callable[[Reading], None]


def frames(chunks: Iterable[Chunk | Check], reading: Reading) -> Iterator[pl.DataFrame]:
    """Yield the rows of each chunk that has some, and run the checks in between.

    Raises:
        UserError: A row is bad, or a check fails.
    """
    for chunk in chunks:
        if isinstance(chunk, Check):
            chunk.run(reading)
            continue
        own = reading.fork()
        frame = chunk.frame(own)
        reading.merge(own, frame.height)
        if frame.height:
            yield frame
