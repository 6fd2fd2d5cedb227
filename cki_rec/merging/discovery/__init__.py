"""Symmetries of any module, found without a declaration.

1. ``twin`` makes a float64 copy in which tables hold only the rows of the example ids.
2. ``trace`` watches one run and labels every element with the unit it belongs to.
3. ``propose`` turns labels into classes of hidden units that may change places.
4. ``search`` finds the largest group of every class, with sign patterns from ``parity``.
5. ``trial`` proves every group: random elements on random states leave all outputs as they are.

Whatever steps 2 to 4 propose, step 5 alone decides. The guarantee is numerical. It holds for the
branches, ids and units that the example inputs reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cki_rec.merging.discovery.result import Symmetries
from cki_rec.merging.discovery.search import Search
from cki_rec.merging.discovery.trial import CannotRun, Trial
from cki_rec.merging.discovery.twin import exact, rows_read
from cki_rec.merging.discovery.verification import changes
from cki_rec.merging.inputs import network_of
from cki_rec.merging.params import MergeError
from cki_rec.merging.symmetry import Symmetry

__all__ = ["Symmetries", "find_symmetries", "verify"]


@torch.inference_mode(False)  # in which a trace does not see the operations inside of layers
def find_symmetries(
    module: nn.Module, example_inputs: Any, *, tolerance: float = 1e-9, seed: int = 0
) -> Symmetries:
    """Return the groups that act on hidden units of a module and leave its outputs unchanged.

    Args:
        module: Any module. It does not change; its large tables are not copied. Wrappers of
            ``DistributedDataParallel`` and ``torch.compile`` are taken off.
        example_inputs: Inputs of one run: a tuple of positional arguments, a dict of keyword
            arguments, or one argument of any other type. They should reach all branches.
        tolerance: Largest relative change of an output, in float64.
        seed: Of the random states, inputs and group elements.

    Returns:
        Verified symmetries. They hold one by one and together. Axes that are frozen by an unknown
        operation, by control flow that depends on values or by a failed trace are listed in
        ``frozen`` with the reason.

    Raises:
        MergeError: It is no module, it cannot be copied, or it fails on these inputs.
    """
    module = _checked(module, tolerance)
    ids = rows_read(module, example_inputs)
    with exact(seed):
        try:
            trial = Trial(module, example_inputs, ids)
        except CannotRun as error:
            return Symmetries(frozen=[f"everything: {error}"])
        return Search(trial, tolerance).result()


@torch.inference_mode(False)
def verify(
    module: nn.Module,
    symmetries: Sequence[Symmetry],
    inputs: Any,
    *,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> list[float]:
    """Return the largest relative change of an output under random elements of each symmetry.

    Args:
        module: Any module, perhaps wrapped. It does not change.
        symmetries: Found or declared. Tied tensors may go by any of their names.
        inputs: As ``example_inputs`` of ``find_symmetries``.
        tolerance: Largest relative change of an output, in float64.
        seed: Of the random states, inputs and group elements.

    Raises:
        MergeError: A symmetry changes the outputs, names a parameter that the module lacks, or
            does not fit its shape; names the first one. Or the module fails on these inputs.
    """
    module = _checked(module, tolerance)
    ids = rows_read(module, inputs)
    with exact(seed):
        return changes(module, symmetries, inputs, ids, tolerance)


def _checked(module: Any, tolerance: Any) -> nn.Module:
    """Return a module without wrappers."""
    if not isinstance(tolerance, int | float) or not tolerance > 0:
        raise MergeError(f"tolerance={tolerance!r}: must be a number above 0")
    return network_of(module)
