"""Second moments of the activations at the units of symmetries, for any module.

Shape legend: K models, N rows (of a batch, or of its positions), D coordinates of an activation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cki_rec.merging.calling import call, check_moments, evaluating
from cki_rec.merging.nesting import find_nests, joined
from cki_rec.merging.params import Params
from cki_rec.merging.symmetry import Symmetry

Place: TypeAlias = tuple[str, int]
"""A parameter and an axis: the coordinates that they have in an activation."""
LARGEST = 16_384
"""Coordinates of all models together; a wider layer is matched by weights."""
ROWS = 2
"""Rows per coordinate of a head that its rotation is found from; with fewer weights decide."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def unit_moments(
    module: nn.Module,
    models: Sequence[Params],
    batches: Iterable[Any],
    symmetries: Sequence[Symmetry],
) -> dict[Place, Tensor]:
    """Return the second moments ``(K, D + 1, K, D + 1)`` float64 where permuted units are visible.

    They are visible in inputs of linear maps and convolutions, in outputs of these, of embeddings
    and of recurrent layers. Inputs are preferred, except for units with rotations inside. The
    last coordinate is the constant 1. Left out are activations of which models have unlike
    numbers, and those with too few rows.

    Args:
        module: The network; its own parameters are not used.
        models: Parameters to run the network with.
        batches: The sample, as for ``calling.call``.
        symmetries: Symmetries of the network.

    Raises:
        MergeError: Activations are NaN or infinite.
    """
    recorded: dict[Place, list[Tensor]] = {}
    wanted = _wanted(module, symmetries)
    handles = [_record(part, places, recorded) for part, places in wanted.items()]
    second: dict[Place, Tensor] = {}
    rows: dict[Place, int] = {}
    try:
        with evaluating(module):
            for batch in batches:
                seen = []
                for model in models:
                    recorded.clear()
                    call(module, batch, model)
                    seen.append({place: torch.cat(parts) for place, parts in recorded.items()})
                for place, first in seen[0].items():
                    parts = [other[place] for other in seen if place in other]
                    is_alike = all(part.shape == first.shape for part in parts)
                    width = len(models) * (first.shape[1] + 1)
                    if len(parts) == len(models) and is_alike and width <= LARGEST:
                        x_NKD = torch.stack(parts, 1).double()
                        x_NKD = torch.cat([x_NKD, torch.ones_like(x_NKD[..., :1])], 2)
                        flat, shape = x_NKD.flatten(1), x_NKD.shape[1:]
                        gram = (flat.T @ flat).unflatten(0, shape).unflatten(2, shape).cpu()
                        second[place] = second[place] + gram if place in second else gram
                        rows[place] = rows.get(place, 0) + len(flat)
    finally:
        for handle in handles:
            handle.remove()
    check_moments({name: moments for (name, _), moments in second.items()})
    needed = _needed_rows(symmetries)
    return {p: t / rows[p] for p, t in second.items() if rows[p] >= needed.get(p, 1)}


def _wanted(
    module: nn.Module, symmetries: Sequence[Symmetry]
) -> dict[nn.Module, dict[Place, tuple[bool, int]]]:
    """Return per submodule the places to record: whether in its input, and the axis there."""
    visible = {
        place: (part, form)
        for name, part in module.named_modules()
        for place, form in _visible(name, part).items()
    }
    symmetries = [joined(symmetry) for symmetry in symmetries]
    nests, _ = find_nests(symmetries)
    wanted: dict[nn.Module, dict[Place, tuple[bool, int]]] = {}
    for number, symmetry in enumerate(symmetries):
        if symmetry.kind not in ("permutation", "signed_permutation"):
            continue
        places = {(part.parameter, part.axis) for part in symmetry.slices} & set(visible)
        inputs = {place for place in places if visible[place][1][0]}
        is_nest = number in nests and nests[number].inside
        for place in places if is_nest else inputs or places:
            part, form = visible[place]
            wanted.setdefault(part, {})[place] = form
    return wanted


def _visible(name: str, part: nn.Module) -> dict[Place, tuple[bool, int]]:
    """Return the places of a submodule's parameters in its input (True) or output (False)."""
    weight = f"{name}.weight".removeprefix(".")
    if isinstance(part, nn.Linear):
        return {(weight, 1): (True, -1), (weight, 0): (False, -1)}
    if isinstance(part, CONVOLUTIONS):
        axis = 1 - len(part.kernel_size) - 2  # channels, with or without a batch axis
        inputs = {(weight, 1): (True, axis)} if part.groups == 1 else {}
        return {**inputs, (weight, 0): (False, axis)}
    if isinstance(part, nn.Embedding | nn.EmbeddingBag):
        return {(weight, 1): (False, -1)}
    if isinstance(part, nn.RNNBase) and not (part.bidirectional or part.proj_size):
        last = f"{name}.weight_hh_l{part.num_layers - 1}".removeprefix(".")
        return {(last, 1): (False, -1)}
    return {}


def _record(
    part: nn.Module,
    places: dict[Place, tuple[bool, int]],
    recorded: dict[Place, list[Tensor]],
) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        for place, (is_input, axis) in places.items():
            if is_input and not arguments:
                continue
            value = arguments[0] if is_input else output
            value = value[0] if isinstance(value, tuple) else value
            value = getattr(value, "data", value)
            if isinstance(value, Tensor):
                rows = value.movedim(axis, -1)
                recorded.setdefault(place, []).append(rows.reshape(-1, rows.shape[-1]))

    return part.register_forward_hook(hook)


def _needed_rows(symmetries: Sequence[Symmetry]) -> dict[Place, int]:
    symmetries = [joined(symmetry) for symmetry in symmetries]
    nests, _ = find_nests(symmetries)
    return {
        (part.parameter, part.axis): ROWS * part.width
        for place, nest in nests.items()
        for part in symmetries[place].slices
        if nest.inside
    }
