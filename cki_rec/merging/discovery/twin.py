"""A float64 twin of a module with small vocabularies, on which changes of parameters are tried.

Tables that a forward reads by id only are replaced by the rows of the example ids. The twin
translates the ids. So the search costs the same for tables of thousands and of millions of rows,
and no large table is copied. Symmetries act on columns and never name a row, so they carry over.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cki_rec.merging.calling import call, cuda_devices, reason_of
from cki_rec.merging.discovery.values import is_float, operands, tensors_in
from cki_rec.merging.params import MergeError

SHARED = 1 << 16
"""Parameters of more entries are not copied before their use is known."""
LOOKUPS = ("embedding", "_embedding_bag", "_embedding_bag_forward_only", "index_select", "index")
"""Operations that read rows of their first argument by id."""


SHORT = frozenset({torch.float32, torch.float16, torch.bfloat16})


class UnseenRow(RuntimeError):
    """A forward looked up a row that the example inputs do not look up."""


class _Written(Exception):
    """A forward writes into one of its parameters."""


@contextlib.contextmanager
def exact(seed: int) -> Iterator[None]:
    """Make runs exact and repeatable, and split fused attention into plain operations.

    Default dtype and random state are restored.
    """
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(torch.float64)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices()), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fast)


def operation(func: Any) -> str:
    """Return the bare name of an operation, without its in-place mark."""
    name: str = func._schema.name.split("::")[1]
    return name.rstrip("_")


def arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by name, defaults included."""
    expected = func._schema.arguments
    defaults = {a.name: a.default_value for a in expected if a.has_default_value()}
    names = [a.name for a in expected]
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def row_ids(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return the ids with which an operation reads rows of its first argument, or None."""
    name = operation(func)
    if name not in LOOKUPS:
        return None
    if name == "index_select":
        return args[2] if args[1] == 0 else None
    if name == "index":
        (ids, *others) = args[1]
        is_plain = isinstance(ids, Tensor) and not others and not ids.dtype == torch.bool
        return ids if is_plain and not bool((ids < 0).any()) else None
    ids = args[1]
    return ids if isinstance(ids, Tensor) else None


class Mode(TorchDispatchMode):
    """A dispatch mode that PyTorch does not hide from its compiler.

    To hide a mode imports the compiler, which takes seconds, and slows every operation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Watch(Mode):
    """Records which parameters a run reads by id only, and with which ids.

    Args:
        tables: By the identity of a parameter of the copy that runs: that of the original.
        shared: By the address of a table that the copy shares: the identity of the original.
    """

    def __init__(self, tables: Mapping[int, int], shared: Mapping[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tables = tables
        self.shared = shared
        self.ids: dict[int, list[Tensor]] = {}
        self.others: set[int] = set()
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [id(t) for t in operands(args, kwargs) if id(t) in self.tables]
        if func._schema.is_mutable:  # through a view, perhaps
            starts = {_start_of(t) for t in operands(args, kwargs)}
            self.written = {self.shared[start] for start in starts if start in self.shared}
            if self.written:
                raise _Written
        for key in read:
            ids = row_ids(func, args) if args and id(args[0]) == key else None
            if ids is None:
                self.others.add(key)
            else:
                self.ids.setdefault(key, []).append(ids.unique())
        return func(*args, **kwargs)


class Float64(Mode):
    """Keeps a run in float64, and translates the ids of small tables.

    A cast to a shorter type stays float64. A constant of a shorter type is cast where it meets a
    float64 tensor.

    Args:
        rows: By the identity of a small table: the sorted rows of the large one that it holds.
    """

    def __init__(self, rows: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in SHORT:
            kwargs["dtype"] = torch.float64
        if args and id(args[0]) in self.rows and operation(func) in LOOKUPS:
            args = self._translated(func, args)
        if not func._schema.is_mutable:
            dtypes = {t.dtype for t in operands(args, kwargs)}
            if torch.float64 in dtypes and dtypes & SHORT:
                args, kwargs = tree_map(_lengthened, (args, kwargs))
        return func(*args, **kwargs)

    def _translated(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, new = self.rows[id(args[0])], list(args)
        ids = row_ids(func, args)
        if ids is None:
            raise UnseenRow(operation(func))
        places = torch.searchsorted(rows, ids.to(rows.dtype).contiguous()).clamp(max=len(rows) - 1)
        if not torch.equal(rows[places], ids.to(rows.dtype)):
            raise UnseenRow(f"{operation(func)} reads rows that depend on numbers")
        name = operation(func)
        if name == "index":
            new[1] = [places]
        else:
            new[2 if name == "index_select" else 1] = places.to(ids.dtype)
        if "bag" in name and len(new) > 8 and new[8] >= 0:  # ids that a bag leaves out
            place = (rows == new[8]).nonzero().flatten().tolist()
            new[8] = place[0] if place else -1
        return tuple(new)


def _lengthened(value: Any) -> Any:
    """Return a tensor of a shorter type in float64; all else stays as it is."""
    if isinstance(value, Tensor) and value.dtype in SHORT:
        return torch.ops.aten._to_copy(value, dtype=torch.float64)
    return value


class Twin:
    """A float64 copy of a module, in eval mode, that leaves the module as it is.

    Args:
        module: Any module.
        ids: By the identity of a parameter: the sorted rows to which it shrinks.
    """

    def __init__(self, module: nn.Module, ids: Mapping[int, Tensor]) -> None:
        memo: dict[int, Any] = {}
        self.rows: dict[int, Tensor] = {}
        for parameter in module.parameters():
            if id(parameter) in ids:
                rows = ids[id(parameter)]
                table = nn.Parameter(parameter.detach()[rows].double(), requires_grad=False)
                memo[id(parameter)] = table
                self.rows[id(table)] = rows
        self.module: nn.Module = copy.deepcopy(module, memo).double().eval()

    def run(self, inputs: Any) -> list[Tensor]:
        """Return copies of the output tensors; random numbers are the same in every run."""
        torch.default_generator.manual_seed(0)  # torch.manual_seed costs more than a small run
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        with Float64(self.rows):
            return [tensor.clone() for tensor in tensors_in(call(self.module, inputs))]


def rows_read(module: nn.Module, inputs: Any) -> dict[int, Tensor]:
    """Return the sorted rows of every table that a run reads by id only.

    Large tables are shared with the copy that runs, not copied.

    Args:
        module: Any module; it does not change.
        inputs: Inputs of one run.

    Returns:
        Rows by the identity of the parameter.

    Raises:
        MergeError: The module cannot be copied, fails on these inputs, or returns no tensor.
    """
    tables = {id(p): p for p in module.parameters() if p.ndim == 2 and is_float(p)}
    while True:
        shared = {key: table for key, table in tables.items() if table.numel() > SHARED}
        try:
            probe = copy.deepcopy(module, dict(shared)).eval()
        except Exception as error:
            raise MergeError(f"module cannot be copied ({reason_of(error)})") from error
        pairs = list(zip(module.parameters(), probe.parameters(), strict=True))
        originals = {id(b): id(a) for a, b in pairs if id(a) in tables}
        starts = {_start_of(table): key for key, table in shared.items()}
        watch = _Watch(originals, starts)
        try:
            with torch.no_grad(), torch.random.fork_rng(cuda_devices()), watch:
                torch.manual_seed(0)
                outputs = tensors_in(call(probe, inputs))
        except _Written:  # copy these, and do not replace them
            tables = {key: t for key, t in tables.items() if key not in watch.written}
            continue
        except Exception as error:
            raise MergeError(f"module fails on these inputs ({reason_of(error)})") from error
        if not outputs:
            raise MergeError("module returns no tensor on these inputs")
        if not any(map(_has_numbers, outputs)):
            raise MergeError("module returns no finite number on these inputs")
        return {
            originals[key]: torch.cat(ids).unique()
            for key, ids in watch.ids.items()
            if key not in watch.others and len(ids)
        }


def _has_numbers(output: Tensor) -> bool:
    return output.layout is not torch.strided or bool(output.isfinite().any())


def _start_of(tensor: Tensor) -> int:
    """Return the address of the storage of a tensor; 0: it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
