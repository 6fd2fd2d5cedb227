"""Verification of symmetries that somebody else found or declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cki_rec.merging.discovery.result import member, members
from cki_rec.merging.discovery.trial import CannotRun, Trial
from cki_rec.merging.params import MergeError
from cki_rec.merging.states import matched
from cki_rec.merging.symmetry import Slice, Symmetry, check_list, fits


def changes(
    module: nn.Module,
    symmetries: Sequence[Symmetry],
    inputs: Any,
    ids: Mapping[int, Tensor],
    tolerance: float,
) -> list[float]:
    """Return the largest relative change of an output under each symmetry.

    Args:
        module: Any module.
        symmetries: Of the module.
        inputs: Inputs of one run.
        ids: By the identity of a table: the rows that a run reads.
        tolerance: Largest change that passes.

    Raises:
        MergeError: A symmetry is wrong, or does not fit the module.
    """
    names = _canonical(module)
    check_list(symmetries)
    for number, symmetry in enumerate(symmetries):
        for part in symmetry.slices:
            _check_slice(part, symmetry.size, number, names)
    moves_rows = {p.parameter for s in symmetries for p in s.slices if p.axis == 0}
    tables = {id(t) for name, t in names.values() if name in moves_rows}
    try:
        trial = Trial(
            module, inputs, {key: rows for key, rows in ids.items() if key not in tables}
        )
    except CannotRun as error:
        raise MergeError(f"cannot verify: {error}") from error
    trial.watch_all_buffers()
    result = []
    for number, symmetry in enumerate(symmetries):
        slices = dict.fromkeys(
            replace(part, parameter=names[matched(part.parameter, names)][0])
            for part in symmetry.slices
        )
        canonical = [replace(symmetry, slices=tuple(slices))]
        change = trial.searched(canonical, tolerance)
        if change <= tolerance:
            change = max(change, trial.final(canonical, tolerance))
        if not change <= tolerance:
            raise MergeError(
                f"symmetry {number} ({symmetry.kind} of {symmetry.size} units: "
                f"{members(symmetry)}) changes the outputs by {change:.1e}; expected at most "
                f"{tolerance:.1e}; leave it out"
            )
        result.append(change)
    return result


def _canonical(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Return, for every name of a tensor, its first name and the tensor."""
    everything = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    firsts: dict[int, str] = {}
    for name, tensor in everything:
        firsts.setdefault(id(tensor), name)
    return {name: (firsts[id(tensor)], tensor) for name, tensor in everything}


def _check_slice(
    part: Slice, size: int, number: int, names: Mapping[str, tuple[str, Tensor]]
) -> None:
    name = matched(part.parameter, names)
    if name not in names:
        raise MergeError(
            f"symmetry {number}: the module has no parameter {part.parameter}; it has "
            f"{', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        )
    shape = tuple(names[name][1].shape)
    if not fits(part, size, shape):
        raise MergeError(f"symmetry {number}: {member(part, size)} does not fit the shape {shape}")
