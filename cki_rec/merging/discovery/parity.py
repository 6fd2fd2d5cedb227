"""Sign patterns of a class by linear algebra over GF(2).

A unit has k atoms: its entries in one copy of one member. A *pattern* is a set of atoms that
change sign together. The patterns that leave the outputs unchanged are a linear subspace of
GF(2)^k, because two of them in a row are one. One run yields its equations: every tensor carries
the parity of its elements, a linear function of the atoms of one unit. A product adds parities. A
sum requires that they are equal. An odd function keeps parities, an even one clears them. Every
other operation, and the outputs, require that they are zero.

So k atoms cost one run, not 2^k. The result is a proposal: ``trial`` proves every pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cki_rec.merging.discovery.labels import UNFIT, channels, compact, first, lifted
from cki_rec.merging.discovery.propose import Member
from cki_rec.merging.discovery.trace import (
    CONTRACTIONS,
    EVERY,
    LIKE_POINTWISE,
    ORDERED,
    REDUCTIONS,
    decompositions,
    is_move,
    moved,
)
from cki_rec.merging.discovery.twin import Mode, arguments, operation
from cki_rec.merging.discovery.values import operands

ODD = frozenset(
    "tanh sin neg asinh atan erf sinh tan asin sgn sign reciprocal clone alias detach lift_fresh "
    "to _to_copy contiguous trunc fix copysign".split()
)
EVEN = frozenset("abs square cos cosh".split())
SIMPLE = LIKE_POINTWISE | REDUCTIONS | ORDERED
"""Operations that are not decomposed where no rule fits."""
CREATES = frozenset("zeros_like ones_like full_like empty_like new_zeros new_ones".split())
"""Operations whose result does not depend on values."""


class Parity(Mode):
    """Follows the parity of elements through one run.

    Args:
        tensors: Parameters and buffers by name.
        atoms: The parts of the class that may change sign; parities are those of their first unit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], atoms: Sequence[Member]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sets: list[int] = [0]  # number -> atoms, as bits
        self.numbers: dict[int, int] = {0: 0}
        self.equations: set[int] = set()
        self.parities: dict[int, tuple[Tensor, Tensor]] = {}
        for place, atom in enumerate(atoms):
            tensor = tensors[atom.parameter]
            parity = self.get(tensor).expand(tensor.shape).clone()
            row = atom.row(0)
            part = parity if row == EVERY else parity[row : row + 1]
            unit = part.select(atom.axis, int(atom.index[0, 0, 0]))
            unit.copy_(self.add(unit, torch.full_like(unit, self.number(1 << place))))
            self.put(tensor, parity)

    def number(self, atoms: int) -> int:
        """Return the number of a set of atoms."""
        if atoms not in self.numbers:
            self.numbers[atoms] = len(self.sets)
            self.sets.append(atoms)
        return self.numbers[atoms]

    def get(self, tensor: Tensor) -> Tensor:
        """Return the parity of a tensor, broadcastable to it."""
        if id(tensor) in self.parities:
            return self.parities[id(tensor)][1]
        return torch.zeros((1,) * tensor.ndim, dtype=torch.long, device=tensor.device)

    def put(self, tensor: Tensor, parity: Tensor) -> None:
        """Set the parity of a tensor."""
        if bool(parity.any()):
            self.parities[id(tensor)] = (tensor, compact(parity))
        else:
            self.parities.pop(id(tensor), None)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of parities over GF(2), place by place."""
        if not bool(a.any()) or not bool(b.any()):
            return a + b
        codes, inverse = (a * len(self.sets) + b).unique(return_inverse=True)
        count = len(self.sets)
        sums = [self.number(self.sets[c // count] ^ self.sets[c % count]) for c in codes.tolist()]
        return torch.tensor(sums, device=a.device)[inverse]

    def require_zero(self, *parities: Tensor) -> None:
        """Require that elements do not change sign."""
        for parity in parities:
            self.equations |= {self.sets[n] for n in parity.unique().tolist()}

    def require_equal(self, a: Tensor, b: Tensor) -> Tensor:
        """Require that two operands change sign together; return their parity."""
        self.require_zero(self.add(a, b))
        a, _ = torch.broadcast_tensors(a, b)
        return a

    def summed(self, parity: Tensor, axes: Sequence[int]) -> Tensor:
        """Return the parity of a sum over axes, which stay with size one."""
        return first(self.require_equal(first(parity, axes), parity), axes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = operands(args, kwargs)
        if not any(id(t) in self.parities for t in tensors):
            return func(*args, **kwargs)
        seen = [self.get(tensor) for tensor in tensors]
        parity: Tensor | None = None
        try:
            parity = self.combine(func, tensors, args, kwargs)
        except UNFIT:  # as for an operation without a rule
            parity = None
        is_simple = torch.Tag.pointwise in func.tags or operation(func) in SIMPLE
        moves = is_move(func)
        if parity is None and not moves and not is_simple and func in decompositions():
            try:
                with self:
                    return decompositions()[func](*args, **kwargs)
            except UNFIT:
                parity = None
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if moves:
            try:
                self.move(func, args, kwargs, results)
                return out
            except UNFIT:
                parity = None
        if parity is None:
            self.require_zero(*seen)
        for result in results:
            self.put(result, torch.zeros_like(self.get(result)) if parity is None else parity)
        return out

    def combine(
        self, func: Any, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return the parity of the result; None: there is no rule."""
        name, named = operation(func), arguments(func, args, kwargs)
        rank = max(t.ndim for t in tensors)
        seen = [self.get(t)[(None,) * (rank - t.ndim)] for t in tensors]
        if name in CREATES:
            return torch.zeros((1,) * rank, dtype=torch.long, device=tensors[0].device)
        if name in ODD or (name == "masked_fill" and float(named["value"]) == 0):
            return seen[0]
        if name in EVEN or (name == "pow" and named["exponent"] in (2, 4, 6)):
            return torch.zeros_like(seen[0])
        if name == "pow" and named["exponent"] in (1, 3, 5):
            return seen[0]
        if name in ("mul", "div") and named.get("rounding_mode") is None:
            return seen[0] if len(seen) == 1 else self.add(*seen)
        if name in ("add", "sub"):
            if len(seen) == 1:  # and a number
                return seen[0] if named["other"] == 0 else None
            return self._sum(tensors, seen)
        if name == "where" and len(tensors) == 3:
            self.require_zero(seen[0])
            return self._sum(tensors[1:], seen[1:])
        if name == "addcmul":
            return self.require_equal(self.add(seen[1], seen[2]), seen[0])
        if name in ("sum", "mean"):
            axes = _axes(named.get("dim"), rank)
            parity = self.summed(seen[0], axes)
            return parity if named.get("keepdim") else parity.squeeze(axes)
        if name in ("linalg_vector_norm", "norm"):
            shrunk = _axes(named.get("dim"), rank)
            blank = torch.zeros_like(first(seen[0], shrunk))
            return blank if named.get("keepdim") else blank.squeeze(shrunk)
        return self._layer(name, tensors, named, rank)

    def _sum(self, tensors: list[Tensor], parities: list[Tensor]) -> Tensor:
        """Return the parity of a sum of two tensors; zeros (an initial state) have any parity."""
        (a, b), (x, y) = parities, tensors
        for parity, other in ((a, y), (b, x)):
            if id(other) not in self.parities and not bool(other.any()):
                return parity.expand(torch.broadcast_shapes(a.shape, b.shape))
        return self.require_equal(a, b)

    def _layer(
        self, name: str, tensors: list[Tensor], named: dict[str, Any], rank: int
    ) -> Tensor | None:
        """Return the parity of the result of a norm, a contraction or a pooled lookup."""
        if "batch_norm" in name:
            x = self.get(tensors[0])

            def vector(key: str) -> Tensor:
                return channels(rank)(self.get(named[key])) if named.get(key) is not None else zero

            zero = torch.zeros((1,) * rank, dtype=torch.long, device=x.device)
            self.require_equal(x, vector("running_mean"))
            self.require_zero(vector("running_var"))
            scaled = self.add(x, vector("weight"))
            return (
                scaled if named.get("bias") is None else self.require_equal(scaled, vector("bias"))
            )
        if name in ("native_layer_norm", "_fused_rms_norm"):
            shape = named["normalized_shape"]
            x = self.get(tensors[0])
            if name == "native_layer_norm":  # subtracts a mean
                axes = list(range(rank - len(shape), rank))
                self.summed(x, axes)
            weight, bias = named.get("weight"), named.get("bias")
            scaled = x if weight is None else self.add(x, lifted(rank)(self.get(weight)))
            return (
                scaled
                if bias is None
                else self.require_equal(scaled, lifted(rank)(self.get(bias)))
            )
        if "embedding_bag" in name:
            table = self.get(tensors[0])
            if table.shape[0] > 1 or named["mode"] == 2:  # rows differ, or a maximum
                return None
            return table
        if name == "convolution" and named["groups"] == 1 and not named["transposed"]:
            x, weight = self.get(tensors[0]), self.get(tensors[1])
            if x[0, 0].numel() > 1 or weight[0, 0].numel() > 1:  # places or taps differ
                return None
            a, b = x.movedim(1, -1).unsqueeze(1), weight[None].movedim(2, -1)
            parity = self._contracted(a, b)
            for shift in tensors[2:]:
                parity = self.require_equal(parity, channels(rank)(self.get(shift)))
            return parity
        if name not in CONTRACTIONS:
            return None
        *bias, left, right = tensors
        if right.ndim == 1:
            parity = self._contracted(self.get(left), lifted(rank)(self.get(right)))
        else:
            a, b = self.get(left).unsqueeze(-2), self.get(right).mT.unsqueeze(-3)
            parity = self._contracted(a, b)
        for shift in bias:
            parity = self.require_equal(parity, lifted(parity.ndim)(self.get(shift)))
        return parity

    def _contracted(self, a: Tensor, b: Tensor) -> Tensor:
        return self.summed(self.add(a, b), [max(a.ndim, b.ndim) - 1]).squeeze(-1)

    def move(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Run an operation that moves data on parities."""
        tensors = list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]]
        arrays = [self.get(tensor).expand(tensor.shape) for tensor in tensors]
        for result, parity in zip(
            results, tree_leaves(moved(func, arrays, args, kwargs)), strict=True
        ):
            if parity.dtype != torch.long or parity.shape != result.shape:
                raise TypeError(f"{operation(func)} does more than moving data")
            self.put(result, parity)


def _axes(dims: Any, rank: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def null_space(equations: Sequence[int], size: int) -> list[int]:
    """Return a basis of the vectors that all equations map to zero, over GF(2).

    Args:
        equations: Rows, as bits.
        size: Number of unknowns.
    """
    pivots: dict[int, int] = {}
    for equation in equations:
        for bit, row in pivots.items():
            if equation >> bit & 1:
                equation ^= row
        if equation:
            pivot = equation.bit_length() - 1
            pivots = {b: row ^ equation if row >> pivot & 1 else row for b, row in pivots.items()}
            pivots[pivot] = equation
    basis = []
    for free in [bit for bit in range(size) if bit not in pivots]:
        basis.append(sum(1 << b for b, row in pivots.items() if row >> free & 1) | 1 << free)
    return basis
