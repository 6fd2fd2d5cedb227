"""Trace: one eager run of a module, in which labels follow every operation.

The run happens under a dispatch mode, which sees every aten operation with real tensors. So Python
control flow, jagged inputs and recurrent layers need no support of their own. Operations that only
move data (view, cat, index) are run again on the labels, so offsets and flattened axes need no
rules. Operations that combine tensors unite nodes. Nodes that cannot move are fixed.

The result proposes symmetries and proves none: see ``trial``.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cki_rec.merging.discovery.labels import (
    UNFIT,
    axes_of,
    channels,
    compact,
    first,
    inner_axis,
    lifted,
    varying,
)
from cki_rec.merging.discovery.twin import Mode, arguments, operation
from cki_rec.merging.discovery.values import operands

MOVES = frozenset(
    "_unsafe_view cat stack index index_select gather flip roll repeat embedding transpose t "
    "squeeze unsqueeze unsafe_split unsafe_split_with_sizes split_with_sizes_copy".split()
)
"""Operations that move data without reading it, besides the views that PyTorch marks itself."""
LIKE_POINTWISE = frozenset(
    "to _to_copy lift_fresh _softmax _log_softmax _safe_softmax native_layer_norm _fused_rms_norm "
    "zeros_like ones_like full_like empty_like native_dropout _prelu_kernel".split()
)
"""Operations not marked pointwise that commute with a permutation of any axis all the same."""
REDUCTIONS = frozenset(
    "sum mean amax amin prod logsumexp var std var_mean std_mean linalg_vector_norm norm "
    "any all".split()
)
ORDERED = frozenset("cumsum cumprod logcumsumexp sort topk max min median argmax argmin".split())
"""Operations for which places along an axis matter, but which treat all other axes alike."""
CONTRACTIONS = frozenset("mm bmm addmm baddbmm mv dot _sparse_mm _sparse_addmm".split())
READS_VALUES = frozenset("_local_scalar_dense is_nonzero nonzero unique _unique2 equal".split())
"""Operations with which values of tensors decide about Python code or shapes."""

Operand = tuple[list[Tensor], frozenset[int]]
"""Labels of a tensor, and the axes that it spans."""
Owner = tuple[str, int, int]
"""Parameter and axis of nodes, and their place on axis 0 (``EVERY``: all places)."""
EVERY = -1


def is_move(func: Any) -> bool:
    """Return whether an operation only moves data."""
    name = operation(func)
    return (func.is_view and name != "as_strided") or name in MOVES


def moved(func: Any, arrays: Sequence[Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Return a moving operation's result on other arrays than its operands."""
    operand = list(arrays) if isinstance(args[0], (list, tuple)) else arrays[0]
    try:
        return func(operand, *args[1:], **kwargs)
    except RuntimeError:  # a view that an expanded tensor does not admit
        return func(arrays[0].contiguous(), *args[1:], **kwargs)


class Tracer(Mode):
    """Follows labels through every operation of one run.

    A tensor without a label along an axis is fixed along it, unless its values do not change along
    it (the zero state of a recurrent cell).

    Args:
        tensors: The parameters and buffers that may move.
        stacked: Parameters whose places on axis 0 have nodes of their own on the other axes. A
            place is a block that holds them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stacked: Set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 1  # node 0 stands for all that is fixed
        self.owners: list[tuple[int, Owner]] = [(0, ("", 0, EVERY))]
        self.fixed: list[Tensor] = [torch.zeros(1, dtype=torch.long)]
        self.unions: list[Tensor] = []
        self.parents: list[Tensor] = []  # pairs: a node moves only with the block that holds it
        self.tags: list[Tensor] = []  # pairs: only nodes with equal tags may change places
        self.labels: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.unknown: dict[str, list[Tensor]] = defaultdict(list)
        self.reads: set[str] = set()  # operations that read values which depend on parameters
        self.sources: dict[int, str] = {}  # tensors that are a parameter, or a view of one
        self.uses: dict[str, set[str]] = defaultdict(set)
        for name, tensor in tensors.items():
            self.put(tensor, self._labels_of(name, tensor, name in stacked))
            self.sources[id(tensor)] = name

    def _labels_of(self, name: str, tensor: Tensor, is_stacked: bool) -> list[Tensor]:
        def shaped(nodes: Tensor, axis: int) -> Tensor:
            shape = [1] * tensor.ndim
            shape[axis] = len(nodes)
            return nodes.view(shape).to(tensor.device)

        labels = []
        for axis, size in enumerate(tensor.shape):
            if axis and is_stacked:
                rows = [
                    shaped(self.new(size, (name, axis, row)), axis) for row in range(len(tensor))
                ]
                labels.append(torch.cat(rows))
                self.pair(self.parents, labels[-1], labels[0])
            else:
                labels.append(shaped(self.new(size, (name, axis, EVERY)), axis))
        return labels

    def new(self, size: int, owner: Owner = ("", 0, EVERY)) -> Tensor:
        """Return new nodes."""
        self.owners.append((self.count, owner))
        self.count += size
        return torch.arange(self.count - size, self.count)

    def get(self, tensor: Tensor) -> list[Tensor]:
        """Return the labels of a tensor."""
        return self.labels[id(tensor)][1] if id(tensor) in self.labels else []

    def put(self, tensor: Tensor, labels: list[Tensor]) -> None:
        """Label a tensor; a single node for all of it is a unit singled out, hence fixed."""
        chosen: list[Tensor] = []
        for label in map(compact, labels):
            if not axes_of(label):
                self.fix(label)
            elif not any(axes_of(label) == axes_of(other) for other in chosen):
                chosen.append(label)
        chosen = [a for a in chosen if not any(axes_of(a) < axes_of(b) for b in chosen)]
        self.labels[id(tensor)] = (tensor, chosen)  # a tensor held keeps its identity

    def fix(self, *labels: Tensor) -> None:
        """Fix nodes."""
        self.fixed += [label.unique().cpu() for label in labels]

    def pair(self, store: list[Tensor], a: Tensor, b: Tensor) -> None:
        """Store pairs of nodes, place by place."""
        a, b = torch.broadcast_tensors(a, b)
        store.append(torch.stack([a.flatten(), b.flatten()]).unique(dim=1).cpu())

    def meet(self, label: Tensor, others: list[Tensor], wide: frozenset[int]) -> Tensor:
        """Tie a label to an operand that spans the axes ``wide``; return the rest of it."""
        axes, inner = axes_of(label), inner_axis(label)
        bare = wide & axes
        for other in others:
            theirs = axes_of(other)
            shared = axes & theirs
            bare -= theirs
            if theirs == axes or (inner in shared and inner_axis(other) in shared):
                self.pair(self.unions, label, other)
                label = first(label, axes - shared)
            elif shared and theirs < axes:
                self.pair(self.parents, label, other)
            elif shared and inner not in shared and inner_axis(other) not in shared:
                blocks = first(label, axes - shared)  # different units of the same blocks
                names = self.new(blocks.numel()).view(blocks.shape).to(label.device)
                self.pair(self.parents, label, names)
                self.pair(self.parents, other, names)
            elif shared and not axes < theirs:
                self.fix(label, other)
        if bare == axes:
            self.fix(label)
        elif bare:
            places = first(label, axes - bare)
            numbers = self.new(places.numel()).view(places.shape).to(label.device)
            self.pair(self.tags, label, numbers)
        return label

    def merge(self, parts: list[Operand]) -> list[Tensor]:
        """Return the labels of an element-wise combination of operands of equal rank."""
        merged = []
        for i, (labels, _) in enumerate(parts):
            for label in labels:
                for others, wide in parts[:i] + parts[i + 1 :]:
                    label = self.meet(label, others, wide)
                merged.append(label)
        return merged

    def reduce(self, labels: list[Tensor], gone: set[int], ordered: bool = False) -> list[Tensor]:
        """Return the labels after a reduction over some axes, which stay with size one."""
        rest = []
        for label in labels:
            axes = axes_of(label)
            place = first(label, axes & gone)
            if axes & gone and ordered:
                self.fix(label)
            elif axes <= gone:
                continue
            elif axes & gone and inner_axis(label) in gone:  # a block read as a whole: name it
                values, inverse = place.unique(return_inverse=True)
                place = self.new(len(values)).to(label.device)[inverse]
                self.pair(self.parents, label, place)
            elif axes & gone:  # blocks summed up: they turn alike
                self.pair(self.unions, label, place)
            rest.append(place)
        return rest

    def operand(self, tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Operand:
        """Return the labels and axes of a tensor, seen through a view."""
        labels = self.get(tensor)
        wide = varying(tensor).union(*map(axes_of, labels))
        mask = torch.zeros([2 if d in wide else 1 for d in range(tensor.ndim)])
        return [view(label) for label in labels], axes_of(view(mask))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = operands(args, kwargs)
        name, moves = operation(func), is_move(func)
        if name in READS_VALUES and any(id(t) in self.labels for t in tensors):
            self.reads.add(name)
        if not any(self.get(t) for t in tensors):
            out = func(*args, **kwargs)
            if any(id(t) in self.labels for t in tensors):  # computed from parameters
                for result in tree_leaves(out):
                    if isinstance(result, Tensor):
                        self.labels.setdefault(id(result), (result, []))
            return out
        if not func.is_view:
            for tensor in tensors:
                if id(tensor) in self.sources:
                    self.uses[self.sources[id(tensor)]].add(name)
        try:  # before the run, which may overwrite an operand
            labels = self.combine(func, name, tensors, arguments(func, args, kwargs))
        except UNFIT:
            labels = None
        is_simple = labels is not None or moves or name in REDUCTIONS | ORDERED
        is_simple = is_simple or "embedding_bag" in name
        if not is_simple and func in decompositions():
            with contextlib.suppress(*UNFIT), self:
                return decompositions()[func](*args, **kwargs)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        try:
            if labels is not None:
                self.put(results[0], labels)
            elif name in REDUCTIONS or name in ORDERED:
                gone = arguments(func, args, kwargs).get("dim")
                self.shrink(tensors[0], gone, results, ordered=name in ORDERED)
            elif "embedding_bag" in name:
                rows = [x for x in self.get(tensors[0]) if 0 in axes_of(x)]
                self.fix(*rows)
                self.put(results[0], [x for x in self.get(tensors[0]) if 0 not in axes_of(x)])
            elif "_pool" in name:
                self.pool(tensors[0], results)
            elif moves:
                self.move(func, args, kwargs, results)
                if func.is_view and len(results) == 1 and id(tensors[0]) in self.sources:
                    self.sources[id(results[0])] = self.sources[id(tensors[0])]
            else:
                raise NotImplementedError
        except UNFIT:
            labels = [label for tensor in tensors for label in self.get(tensor)]
            self.unknown[name] += [label.unique().cpu() for label in labels]
            self.fix(*labels)
            for result in results:
                self.put(result, [])
        return out

    def combine(
        self, func: Any, name: str, tensors: list[Tensor], named: dict[str, Any]
    ) -> list[Tensor] | None:
        """Return the labels of the result of a combining operation; None for other operations."""
        rank = max(t.ndim for t in tensors)
        if torch.Tag.pointwise in func.tags or name in LIKE_POINTWISE:
            return self.merge([self.operand(t, lifted(rank)) for t in tensors])
        if "batch_norm" in name:
            shifts = [self.operand(t, channels(rank)) for t in tensors[1:]]
            return self.merge([self.operand(tensors[0], lifted(rank)), *shifts])
        if name == "convolution" and named["groups"] == 1 and not named["transposed"]:
            x, weight, *bias = tensors
            self._fix_places(x, weight)
            a = self.operand(x, lambda y: y.movedim(1, -1).unsqueeze(1))
            b = self.operand(weight, lambda y: y[None].movedim(2, -1))
            return self.product(a, b, rank, [self.operand(t, channels(rank)) for t in bias])
        if name not in CONTRACTIONS:
            return None
        *bias, left, right = tensors
        if right.ndim == 1:
            a, b = self.operand(left, lifted(rank)), self.operand(right, lifted(rank))
            return self.product(a, b, rank - 1, [])
        a = self.operand(left, lambda y: y.unsqueeze(-2))
        b = self.operand(right, lambda y: y.mT.unsqueeze(-3))
        return self.product(a, b, rank, [self.operand(t, lifted(rank)) for t in bias])

    def product(self, a: Operand, b: Operand, last: int, bias: list[Operand]) -> list[Tensor]:
        """Return the labels of an element-wise product, summed over the last axis and shifted."""
        labels = [y.squeeze(last) for y in self.reduce(self.merge([a, b]), {last})]
        return self.merge([(labels, frozenset(range(last))), *bias])

    def _fix_places(self, x: Tensor, weight: Tensor) -> None:
        """Fix the positions that a convolution reads, unless its kernel has size one."""
        for tensor in (x, weight) if weight[0, 0].numel() > 1 else ():
            is_place = [max(axes_of(label)) > 1 for label in self.get(tensor)]
            self.fix(*itertools.compress(self.get(tensor), is_place))
            rest = [y for y, p in zip(self.get(tensor), is_place, strict=True) if not p]
            self.put(tensor, rest)

    def shrink(self, tensor: Tensor, dims: Any, results: list[Tensor], ordered: bool) -> None:
        """Label the results of a reduction."""
        dims = range(tensor.ndim) if dims is None or dims == [] else dims
        gone = {d % tensor.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        labels = self.reduce(self.get(tensor), gone, ordered)
        for result in results:
            squeezed = result.ndim < tensor.ndim
            self.put(result, [x.squeeze(tuple(gone)) for x in labels] if squeezed else labels)

    def pool(self, tensor: Tensor, results: list[Tensor]) -> None:
        """Label the results of a pooling over the places of each channel; places are fixed."""
        labels = self.get(tensor)
        is_place = [max(axes_of(label)) > 1 for label in labels]
        self.fix(*itertools.compress(labels, is_place))
        for result in results:
            self.put(result, [y for y, p in zip(labels, is_place, strict=True) if not p])

    def move(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Run an operation on labels; labels of several operands are joined slot by slot."""
        name, many = func._schema.name, isinstance(args[0], (list, tuple))
        parts = list(args[0]) if many else [args[0]]
        named = arguments(func, args, kwargs)
        dim = named["dim"] % parts[0].ndim if name == "aten::cat" else None
        slots: dict[frozenset[int | None], list[Tensor]] = {}
        for place, tensor in enumerate(parts):
            for label in self.get(tensor):
                if name == "aten::embedding" and 0 in axes_of(label):
                    self.fix(label)  # ids are fixed, and so are rows
                    continue
                blank = torch.zeros((), dtype=torch.long, device=label.device)
                slot = slots.setdefault(
                    axes_of(label) - {dim}, [blank.expand(t.shape) for t in parts]
                )
                slot[place] = label.expand(tensor.shape)
        labels_of: list[list[Tensor]] = [[] for _ in results]
        for slot in slots.values():
            for place, label in enumerate(tree_leaves(moved(func, slot, args, kwargs))):
                if label.dtype != torch.long:
                    raise TypeError(f"{name} does more than moving data")
                labels_of[place].append(compact(label))
        for result, labels in zip(results, labels_of, strict=True):
            chosen: list[Tensor] = []
            # two hidden axes flattened into one: only the longer moves
            for label in sorted(labels, key=lambda x: (len(axes_of(x)), -len(x.unique()))):
                inside = [axes_of(other) for other in chosen if axes_of(other) <= axes_of(label)]
                shared = frozenset[int]().union(*inside)
                if shared == axes_of(label):
                    self.fix(label)
                    continue
                if shared:
                    self.pair(self.unions, label, first(label, shared))
                chosen.append(first(label, shared))
            self.put(result, chosen)


_DECOMPOSITIONS: list[Mapping[Any, Callable[..., Any]]] = []


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Return PyTorch's decompositions of operations; loaded when the first one is needed."""
    if not _DECOMPOSITIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _DECOMPOSITIONS.append(torch.export.default_decompositions())
    return _DECOMPOSITIONS[0]
