"""The local gate: turns differences between sources into scores.

Shapes: ``in`` is the last axis of a parameter; a parameter of fewer than 2 axes counts as a
column ``(n, 1)``, so its ``in`` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.integration.params import generator

KINDS = ("full", "diagonal", "scalar", "identity", "none")


def initialize_gate(shape: Sequence[int], kind: str, seed: int, name: str) -> Tensor | None:
    """Return the initial gate of one parameter, float32 on the CPU.

    ``full`` is Xavier-uniform ``(in, in)``, the released gate. ``diagonal`` ``(in,)`` and
    ``scalar`` ``()`` start at one: a source is trusted more where it differs more, as
    ``identity`` (a scalar one that is not meant to be trained) keeps doing. ``none`` is None.

    Raises:
        ValueError: ``kind`` is unknown.

    Reference:
        CKI (arXiv 2501.07596), released recommendation code: one matrix per layer, no bias.

    Differs:
        The released code has the full gate only.
    """
    size = _num_inputs(shape)
    if kind == "full":
        uniform = torch.rand(size, size, generator=generator(seed, name))
        return (2 * uniform - 1) * math.sqrt(3 / size)
    if kind == "diagonal":
        return torch.ones(size)
    if kind in ("scalar", "identity"):
        return torch.ones(())
    if kind == "none":
        return None
    raise ValueError(f"{name}: gate kind {kind!r} is none of {', '.join(KINDS)}")


def num_gate_parameters(shape: Sequence[int], kind: str) -> int:
    """Return how many numbers of a gate are learned."""
    size = _num_inputs(shape)
    return {"full": size * size, "diagonal": size, "scalar": 1, "identity": 0, "none": 0}[kind]


def check_gate(name: str, shape: Sequence[int], gate: Tensor) -> None:
    """Check that a gate fits a parameter.

    Raises:
        ValueError: It is neither ``(in, in)`` nor ``(in,)`` nor ``()``.
    """
    size = _num_inputs(shape)
    if tuple(gate.shape) not in ((size, size), (size,), ()):
        found, wanted = tuple(gate.shape), tuple(shape)
        raise ValueError(f"{name}: a gate of shape {found} does not fit a parameter {wanted}")


def apply_gate(delta: Tensor, gate: Tensor) -> Tensor:
    r"""Return Z = \Delta P^T, same shape as ``delta``; a diagonal or scalar P scales columns.

    Reference:
        CKI (arXiv 2501.07596), local assessment, as in the released recommendation code.
    """
    gate = gate.to(delta.dtype)
    matrix = delta if delta.ndim >= 2 else delta.reshape(-1, 1)
    scores = matrix @ gate.T if gate.ndim == 2 else matrix * gate
    return scores.reshape(delta.shape)


def _num_inputs(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) >= 2 else 1
