"""Elements of a group that match two sets of units best: closed forms.

Shape legend: S size of a symmetry.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_element(kind: str, signed: Tensor, unsigned: Tensor) -> Tensor:
    """Return the element of a group with the largest product, ``(S, S)``.

    Args:
        kind: The group.
        signed: ``(S, S)`` products of the units that its signs reach.
        unsigned: ``(S, S)`` products of those that they do not reach.
    """
    if kind == "rotation":
        return polar(signed)
    if kind == "signs":
        return torch.where(signed.diagonal() < 0, -1.0, 1.0).to(signed).diag()
    is_signed = kind == "signed_permutation"
    gain = unsigned + (signed.abs() if is_signed else signed)
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    element = torch.zeros_like(signed)
    negative = (signed[rows, columns] < 0) & is_signed
    element[rows, columns] = torch.where(negative, -1.0, 1.0).to(element)
    return element


def product_with(element: Tensor, signed: Tensor, unsigned: Tensor) -> float:
    """Return the sum of products of units after an element has moved them."""
    return float((element * signed).sum() + (element.abs() * unsigned).sum())


def polar(product: Tensor) -> Tensor:
    r"""Return the orthogonal matrix Q that maximizes :math:`\langle Q, M \rangle`.

    Reference:
        Schönemann, Psychometrika 1966.
    """
    left, _, right = torch.linalg.svd(product)
    orthogonal: Tensor = left @ right
    return orthogonal
