"""Encoded data set -> batches: shuffled, sharded by rank, resumable.

Shape legend: B rows of a batch, F features, N rows of the data set, R rows to be loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cki_rec.config import UserError
from cki_rec.data.columns import Ints, Ragged
from cki_rec.data.permutation import Permutation
from cki_rec.data.prefetch import prefetch
from cki_rec.data.schema import Batch, FeatureSchema

Targets = Callable[[Ints], NDArray[np.float32]]
"""Row numbers -> the logits of a teacher on these rows."""
CPU = torch.device("cpu")
SMALLEST_SHARE = 2
"""Fewest rows per rank in the last step of an epoch; fewer rows join the previous step. (Batch
normalization requires a variance, so batches of one row are impossible.)"""
SHUFFLE_STREAM = 3
"""Seed word of this permutation; other permutations of the same seed use other words."""


class LoadedRows(Protocol):
    """A holder of rows: an encoded data set, or rows in memory."""

    schema: FeatureSchema
    id_columns: list[str]
    ids: NDArray[np.int32]
    """``(N, C)``."""
    numbers: NDArray[np.float32]
    """``(N, numeric fields)``."""

    def column(self, name: str) -> NDArray[Any] | Ragged:
        """Return the ids or numbers of a field."""

    def labels(self, rows: Ints) -> NDArray[np.float32]:
        """Return the labels of ``rows``; NaN where there are none."""


class Loader:
    """Batches of selected rows. One iteration yields the rest of an epoch; then the next begins.

    All ranks have the same number of batches, and the rows of a step do not depend on the number
    of ranks. Every row comes once per epoch: a remainder of fewer than ``SMALLEST_SHARE`` rows per
    rank joins the last step. (One exception: an epoch that is resumed with fewer rows left than
    ranks ends without them.)

    ``state_dict`` holds the epoch and the number of rows that all ranks together have finished. It
    can be loaded at any world size and batch size.

    Args:
        dataset: The data set; only one batch is read into memory at a time.
        schema: Features, in the order of the batch.
        rows: ``(R,)`` row numbers, may be memory-mapped.
        batch_size: Rows of a step, shared evenly by all ranks.
        seed: Seed of the order of every epoch; None: keep the order of ``rows``.
        rank: Rank of this process.
        world_size: Number of processes.
        device: Device of the batches. Batches are copied to CUDA from page-locked memory, on a
            separate stream, while the previous batch is in use.
        targets: The teacher's logits; None: batches have no target.

    Raises:
        UserError: ``batch_size`` or the number of rows is below the number of processes.
    """

    def __init__(
        self,
        dataset: LoadedRows,
        schema: FeatureSchema,
        rows: Ints,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        targets: Targets | None = None,
    ) -> None:
        if batch_size < world_size:
            raise UserError(
                f"train.batch_size={batch_size}: below the number of processes; set it to "
                f"{world_size} or more"
            )
        if len(rows) < world_size:
            raise UserError(f"{len(rows)} rows for {world_size} processes; start fewer processes")
        self._gather, self._targets = Gather(dataset, schema), targets
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._rank, self._world_size, self._device = rank, world_size, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._epoch, self._done = 0, 0

    def __len__(self) -> int:
        """Return the number of batches left in this epoch, the same on every rank."""
        return sum(1 for _ in self._steps())

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch; each batch is read while the previous one is in use."""
        steps = list(self._steps())
        batches = prefetch(self._batch(start, stop) for start, stop in steps)
        for (_, stop), batch in zip(steps, batches, strict=True):
            self._done = stop
            if self._copies is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_stream(self._copies)
                batch.record_stream(current)
            yield batch
        self._epoch, self._done = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last yielded batch, as plain JSON values."""
        return {
            "epoch": self._epoch,
            "rows_done": self._done,
            "rows": len(self._rows),
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that ``state_dict`` returned, at any world size.

        Raises:
            UserError: The position belongs to other rows or to another order.
        """
        rows, seed = state.get("rows"), state.get("seed")
        if (rows, seed) != (len(self._rows), self._seed):
            raise UserError(
                f"position of the loader: belongs to {rows} rows with seed {seed}, expected "
                f"{len(self._rows)} rows with seed {self._seed}; resume with the data options and "
                "the seed of the run"
            )
        self._epoch, self._done = int(state["epoch"]), int(state["rows_done"])

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Yield start and stop of every remaining step of the epoch."""
        start, num_rows = self._done, len(self._rows)
        while num_rows - start >= self._world_size:
            stop = start + self._batch_size
            stop = num_rows if num_rows - stop < SMALLEST_SHARE * self._world_size else stop
            yield start, stop
            start = stop

    def places(self, rank: int) -> NDArray[np.int64]:
        """Return the positions of the remaining epoch that ``rank`` reads, in its order."""
        shares = [np.arange(*self._share(*step, rank)) for step in self._steps()]
        return np.concatenate(shares) if shares else np.empty(0, np.int64)

    def _share(self, start: int, stop: int, rank: int) -> tuple[int, int]:
        """Return start and stop of the share of ``rank`` in a step."""
        first, last = (start + (stop - start) * r // self._world_size for r in (rank, rank + 1))
        return first, last

    def _batch(self, start: int, stop: int) -> Batch:
        """Return the share of this rank in a step."""
        first, last = self._share(start, stop, self._rank)
        if self._seed is None:
            rows = self._rows[first:last]
        else:
            order = Permutation(len(self._rows), self._seed, self._epoch, SHUFFLE_STREAM)
            rows = self._rows[order(np.arange(first, last))]
        batch = self._gather(np.asarray(rows))
        if self._targets is not None:
            batch.target = torch.from_numpy(self._targets(np.asarray(rows)))
        batch.step_rows = stop - start
        batch.stride = -(-batch.step_rows // self._world_size)
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):
            return batch.pin_memory().to(self._device, non_blocking=True)


class Gather:
    """Gather rows from the memory-mapped columns of a data set.

    Args:
        dataset: The data set.
        schema: Features, in the order of the batch.
    """

    def __init__(self, dataset: LoadedRows, schema: FeatureSchema) -> None:
        columns = [dataset.column(feature.name) for feature in schema.lookups]
        self._ragged = [c if isinstance(c, Ragged) else None for c in columns]
        names = [f.name for f, r in zip(schema.lookups, self._ragged, strict=True) if r is None]
        self._ids, self._labels = dataset.ids, dataset.labels
        self._places = [dataset.id_columns.index(name) for name in names]
        self._has_all_ids = self._places == list(range(self._ids.shape[1]))
        numbers = [feature.name for feature in dataset.schema.numbers]
        self._number_places = [numbers.index(feature.name) for feature in schema.numbers]
        self._numbers = dataset.numbers
        self._is_fixed = len(names) == len(columns)

    def __call__(self, rows: Ints) -> Batch:
        """Return ``rows`` as one batch; labels of test rows are NaN."""
        label = torch.from_numpy(self._labels(rows))
        numbers = None
        if self._number_places:
            numbers = torch.from_numpy(self._numbers[rows][:, self._number_places])
        block = np.take(self._ids, rows, axis=0)
        fixed_FB = (block if self._has_all_ids else block[:, self._places]).T
        if self._is_fixed:
            fixed = fixed_FB.astype(np.int64, order="C").reshape(-1)
            return Batch(torch.from_numpy(fixed), None, label, numbers)
        values, lengths = self._with_ragged(rows, fixed_FB)
        return Batch(values, lengths, label, numbers)

    def _with_ragged(self, rows: Ints, fixed_FB: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Return values and lengths if some features hold several ids per row."""
        fixed = iter(fixed_FB)
        values, lengths = [], np.ones((len(self._ragged), len(rows)), dtype=np.int32)
        for position, ragged in enumerate(self._ragged):
            if ragged is None:
                values.append(next(fixed))
            else:
                ids, lengths[position] = ragged.ids(rows)
                values.append(ids)
        joined = np.concatenate(values, dtype=np.int64) if values else np.empty(0, np.int64)
        return torch.from_numpy(joined), torch.from_numpy(lengths.reshape(-1))
