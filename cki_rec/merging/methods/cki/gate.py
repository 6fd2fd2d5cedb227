"""The local gate: turns differences between sources into scores.

Shapes: ``in`` is the last axis of a parameter; a parameter of fewer than 2 axes counts as a
column ``(n, 1)``, so its ``in`` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.params import MergeError, generator

KINDS = ("full", "affine", "diagonal", "low_rank", "scalar", "identity", "none")


def initialize_gate(
    shape: Sequence[int], kind: str, seed: int, name: str, rank: int = 8
) -> Tensor | None:
    """Return the initial gate of one parameter, float32 on the CPU.

    ``full`` is Xavier-uniform ``(in, in)``, the released gate. ``affine`` ``(in, in + 1)`` is a
    matrix and, as last column, a bias, drawn as ``nn.Linear`` draws both. ``low_rank``
    ``(2, in, r)`` holds U and V of ``P = U V^T``, whose entries have the variance of those of
    ``full``. ``diagonal`` ``(in,)`` and ``scalar`` ``()`` start at one: a source weighs more
    where it differs more. ``identity`` is a scalar gate that is not trained. ``none`` is None.

    Args:
        shape: Of the parameter.
        kind: One of ``KINDS``.
        seed: Of the draw, with the name.
        name: Of the parameter.
        rank: r of ``low_rank``; at most ``in``.

    Raises:
        MergeError: ``kind`` is unknown.

    Reference:
        CKI (arXiv 2501.07596), released code: one matrix per layer, without bias for
        recommendation, with one for language.

    Differs:
        The released code has full and affine gates only.
    """
    size = _num_inputs(shape)
    if kind in ("full", "affine"):
        columns = size + (kind == "affine")
        uniform = torch.rand(size, columns, generator=generator(seed, name))
        return (2 * uniform - 1) * math.sqrt((3 if kind == "full" else 1) / size)
    if kind == "low_rank":
        rank = min(rank, size)
        uniform = torch.rand(2, size, rank, generator=generator(seed, name))
        return (2 * uniform - 1) * math.sqrt(3 / math.sqrt(size * rank))
    if kind == "diagonal":
        return torch.ones(size)
    if kind in ("scalar", "identity"):
        return torch.ones(())
    if kind == "none":
        return None
    raise MergeError(f"{name}: gate kind {kind!r} is none of {', '.join(KINDS)}")


def num_gate_parameters(shape: Sequence[int], kind: str, rank: int = 8) -> int:
    """Return how many numbers of a gate are learned."""
    size = _num_inputs(shape)
    return {
        "full": size * size,
        "affine": size * (size + 1),
        "low_rank": 2 * size * min(rank, size),
        "diagonal": size,
        "scalar": 1,
        "identity": 0,
        "none": 0,
    }[kind]


def check_gate(name: str, shape: Sequence[int], gate: Tensor) -> None:
    """Check that a gate fits a parameter.

    Raises:
        MergeError: It is none of ``(in, in)``, ``(in, in + 1)``, ``(2, in, r)``, ``(in,)``,
            ``()``.
    """
    size = _num_inputs(shape)
    is_low_rank = gate.ndim == 3 and tuple(gate.shape[:2]) == (2, size)
    if not is_low_rank and tuple(gate.shape) not in ((size, size), (size, size + 1), (size,), ()):
        actual, expected = tuple(gate.shape), tuple(shape)
        raise MergeError(f"{name}: a gate of shape {actual} does not fit a parameter {expected}")


def apply_gate(delta: Tensor, gate: Tensor) -> Tensor:
    r"""Return Z = \Delta P^T, same shape as ``delta``.

    A diagonal or scalar P scales columns; an affine one adds its last column to each row; one of
    low rank, :math:`P = U V^T`, is never multiplied out.

    Reference:
        CKI (arXiv 2501.07596), local assessment, as in the released recommendation code.
    """
    gate = gate.to(delta.dtype)
    if gate.ndim == 0 and not gate.requires_grad and gate == 1:
        return delta
    matrix = delta if delta.ndim >= 2 else delta.reshape(-1, 1)
    if gate.ndim == 3:
        scores = matrix @ gate[1] @ gate[0].T
    elif gate.ndim == 2 and gate.shape[1] > gate.shape[0]:
        scores = matrix @ gate[:, :-1].T + gate[:, -1]
    elif gate.ndim == 2:
        scores = matrix @ gate.T
    else:
        scores = matrix * gate
    return scores.reshape(delta.shape)


def _num_inputs(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) >= 2 else 1
