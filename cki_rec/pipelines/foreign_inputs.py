"""The network and the rows of checkpoints of other programs, by functions and files of users."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cki_rec.checkpoints.formats.stored import bytes_of
from cki_rec.config import Config, UserError
from cki_rec.evaluation.metrics import auc
from cki_rec.merging.calling import arguments_of, evaluating, logits_of, reason_of
from cki_rec.merging.params import MergeError, Params
from cki_rec.plugins import load_function

LABEL = "label"
"""Column of labels in ``merge.data``."""
LARGE = 1 << 20
"""Entries of a tensor from which a network has a stub in its place, if it may take no memory."""
BATCH = 4096
"""Rows of a batch of ``merge.data``."""


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Rows that a merge looks at."""

    batches: list[Any]
    """Inputs of the network."""
    labels: Tensor | None
    """``(B,)`` of all rows, 0 or 1; None: unknown."""

    def digest(self) -> str:
        """Return a digest of all numbers."""
        total = hashlib.sha256()
        for batch in self.batches:
            positional, named = arguments_of(batch)
            for value in (*positional, *named.values()):
                total.update(_bytes(value))
        total.update(_bytes(self.labels))
        return total.hexdigest()

    def score(self, module: nn.Module) -> Callable[[Params], float] | None:
        """Return a function (state dict) -> AUC; None without labels."""
        labels = self.labels
        if labels is None:
            return None

        def value_of(params: Params) -> float:
            with torch.no_grad(), evaluating(module):
                logits = torch.cat([logits_of(module, batch, params) for batch in self.batches])
            value = auc(labels.numpy(), logits.float().numpy())
            if value is None:
                raise MergeError("all labels are equal, so there is no AUC to compare recipes by")
            return value

        return value_of


class _Stubs(TorchDispatchMode):
    """Makes large tensors of one row that stands for all, so that no table takes memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and func._schema.is_mutable and _is_stub(first):
            return first  # initial values, which nobody reads
        if isinstance(first, list | tuple) and all(isinstance(n, int) for n in first):
            if len(first) > 1 and math.prod(first) > LARGE:
                row = func([1, *first[1:]], *args[1:], **kwargs)
                return (row.normal_() if row.is_floating_point() else row).expand(first)
        return func(*args, **kwargs)


def _is_stub(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.stride(0) == 0 and tensor.numel() > LARGE


def network_of(config: Config) -> nn.Module | None:
    """Return the network that ``merge.module`` makes; None: it is unknown.

    With ``merge.memory_gb`` its tables take no memory: their rows are one row.

    Raises:
        UserError: The function is not there, fails, or returns no module.
    """
    if config.merge.module is None:
        return None
    with nullcontext() if config.merge.memory_gb is None else _Stubs():  # type: ignore[no-untyped-call]
        module = _called(config.merge.module, "merge.module")
    if not isinstance(module, nn.Module):
        raise UserError(
            f"merge.module={config.merge.module}: returns a {type(module).__name__}; it must"
            " return the network, a torch.nn.Module"
        )
    return module


def rows_of(config: Config, module: nn.Module | None) -> SampleRows | None:
    """Return the rows of ``merge.batches`` or ``merge.data``; None without either.

    Raises:
        UserError: Both are set, there is no network, or they are not readable.
    """
    options = config.merge
    if options.batches is None and options.data is None:
        return None
    if options.batches is not None and options.data is not None:
        raise UserError("merge.batches and merge.data: set one of them")
    if module is None:
        raise UserError("merge.batches and merge.data are inputs of the network: set merge.module")
    if options.batches is not None:
        return _from_function(options.batches)
    return _from_file(Path(str(options.data)), module, options.sample)


def _called(name: str, option: str) -> Any:
    """Return the result of a function of the user without arguments."""
    function = load_function(name, option)
    try:
        return function()
    except Exception as error:
        raise UserError(f"{option}={name}: fails, {reason_of(error)}") from error


def _from_function(name: str) -> SampleRows:
    held = _called(name, "merge.batches")
    if isinstance(held, Tensor | Mapping | str) or not isinstance(held, Iterable):
        raise UserError(
            f"merge.batches={name}: returns a {type(held).__name__}; return a list of batches"
        )
    try:
        batches = list(held)
    except Exception as error:  # of a generator
        raise UserError(f"merge.batches={name}: fails, {reason_of(error)}") from error
    if not batches:
        raise UserError(f"merge.batches={name}: returns no batch")
    if not all(_has_labels(batch) for batch in batches):
        return SampleRows(batches, None)
    labels = torch.cat([torch.as_tensor(batch[1]).reshape(-1) for batch in batches])
    return SampleRows([batch[0] for batch in batches], _checked(labels, f"merge.batches={name}"))


def _has_labels(batch: Any) -> bool:
    """Return whether a batch is (inputs, labels): inputs are a tuple or a dictionary."""
    is_pair = isinstance(batch, tuple | list) and len(batch) == 2
    return is_pair and isinstance(batch[0], tuple | list | Mapping) and _is_numbers(batch[1])


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _from_file(path: Path, module: nn.Module, sample: int) -> SampleRows:
    """Return rows of a csv or Parquet file whose columns are arguments of the network."""
    option = f"merge.data={path}"
    try:
        is_parquet = path.suffix == ".parquet"
        frame = pl.read_parquet(path) if is_parquet else pl.read_csv(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{option}: unreadable ({str(error).splitlines()[0]})") from None
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and (p.name in frame.columns or p.default is p.empty)
    ]
    if missing := [name for name in names if name not in frame.columns]:
        raise UserError(
            f"{option}: no column {missing[0]}, an argument of the network; its columns are"
            f" {', '.join(frame.columns[:12])}. For other inputs set merge.batches"
        )
    if len(frame) > sample:
        frame = frame.sample(sample, seed=0)
    columns = {name: _tensor(frame[name], option) for name in names}
    labels = _tensor(frame[LABEL], option) if LABEL in frame.columns else None
    batches = [
        {name: column[start : start + BATCH] for name, column in columns.items()}
        for start in range(0, len(frame), BATCH)
    ]
    if not batches:
        raise UserError(f"{option}: has no row")
    return SampleRows(batches, None if labels is None else _checked(labels, option))


def _tensor(column: pl.Series, option: str) -> Tensor:
    if not column.dtype.is_numeric() or column.null_count():
        kind = "empty values" if column.null_count() else f"values of type {column.dtype}"
        raise UserError(f"{option}: column {column.name} has {kind}; all must be numbers")
    dtype = torch.int64 if column.dtype.is_integer() else torch.float32
    return torch.tensor(column.to_numpy(), dtype=dtype)


def _checked(labels: Tensor, option: str) -> Tensor:
    """Return labels of 0 and 1.

    Raises:
        UserError: There are others.
    """
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise UserError(f"{option}: labels must be 0 or 1")
    return labels.double()


def _bytes(value: Any) -> bytes:
    return b"".join(_parts(value))


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield bytes_of(value).tobytes()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key).encode()
            yield from _parts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parts(inner)
    elif hasattr(value, "values") and callable(value.values):  # of torchrec: KeyedJaggedTensor
        yield from _parts([value.values(), value.lengths()])
    else:
        yield repr(value).encode()
