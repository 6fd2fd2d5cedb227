"""Trials: random group elements act on random states, and the outputs must not change.

This is the only proof of a symmetry. Everything before it is a proposal. A trial runs in float64
on the twin of a module, on several states:

- States are random. An initial state is special (zero biases, unit norms).
- Some states are reserved for the final trial. With a piecewise constant function, some class
  always holds on the states that served to find it.
- Elements are of three kinds. In a group of two elements, a uniform draw is the identity half of
  the time and proves nothing. So elements that move all units or only two are drawn as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from cki_rec.merging.calling import reason_of
from cki_rec.merging.discovery.twin import Twin, UnseenRow
from cki_rec.merging.discovery.values import is_float, map_tensors, relative_difference
from cki_rec.merging.symmetry import Symmetry, transform

SEARCHED, RESERVED = 2, 3
"""Random states for the search, and for the final trial."""
KINDS = LARGE, SMALL, UNIFORM = "large", "small", "uniform"


class CannotRun(RuntimeError):
    """The module runs, but its float64 twin on random states does not."""


def draw(symmetry: Symmetry, how: str, generator: torch.Generator) -> Tensor:
    """Return a random element of a group.

    Args:
        symmetry: Of any kind.
        how: ``large``: one cycle of all units, an odd number of signs. ``small``: one swap, at
            most one sign, or a reflection. ``uniform``: uniform over the group.
        generator: Source of randomness.

    Returns:
        ``(S, S)``, float64.
    """
    size, kind = symmetry.size, symmetry.kind
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    order, coins = noise[0].argsort(), noise[-1] > 0
    if kind == "rotation":
        if how == SMALL:
            axis = noise[:1] / noise[0].norm()
            reflection: Tensor = torch.eye(size, dtype=torch.float64) - 2 * axis.T @ axis
            return reflection
        rotation: Tensor = torch.linalg.qr(noise)[0] * (1 - 2 * coins.double())
        return rotation
    permutation, signs = torch.zeros_like(noise), torch.ones(size, dtype=torch.float64)
    if how == LARGE:
        images, flipped = order.roll(1), order[: size // 2 | 1]
    elif how == SMALL:
        images = torch.cat([order[:2].flip(0), order[2:]])
        flipped = order[: 1 if kind == "signs" else int(coins[0])]
    else:
        images = torch.randn(size, generator=generator, dtype=torch.float64).argsort()
        flipped = coins.nonzero().flatten()
    permutation[order, images] = 1.0
    signs[flipped] = -1.0
    if kind == "permutation":
        return permutation
    element: Tensor = signs.diag() if kind == "signs" else permutation * signs
    return element


class Trial:
    """A twin with random states, their inputs, and the outputs that must not change.

    Args:
        module: Any module; it is copied without its large tables, never changed.
        inputs: Inputs of one run. Numbers in them are changed a little from state to state.

    Raises:
        CannotRun: The twin fails.
    """

    def __init__(self, module: nn.Module, inputs: Any, ids: Mapping[int, Tensor]) -> None:
        try:
            self._set_up(Twin(module, ids), inputs)
        except UnseenRow:  # ids depend on numbers: nothing may shrink
            self._set_up(Twin(module, {}), inputs)

    def _set_up(self, twin: Twin, inputs: Any) -> None:
        self.twin = twin
        self.inputs = map_tensors(lambda x: x.double() if is_float(x) else x, inputs)
        self.runs = 0
        self.notes: list[str] = []
        """Facts about the module that limit the search."""
        self.buffers = {n: b for n, b in twin.module.named_buffers() if is_float(b)}
        parameters = {n: p for n, p in twin.module.named_parameters() if is_float(p)}
        self._current: dict[str, tuple[Tensor, int]] = {}
        self.points: list[tuple[dict[str, Tensor], Any, list[Tensor]]] = []
        try:
            self.tensors: dict[str, Tensor] = parameters | self._trained_buffers()
            for _ in range(SEARCHED + RESERVED):
                self._add_point()
        except UnseenRow:
            raise
        except Exception as error:
            raise CannotRun(f"the module fails in float64 ({reason_of(error)})") from error

    def _add_point(self) -> None:
        state = {name: self._random(name, tensor) for name, tensor in self.tensors.items()}
        self.load(state)
        inputs = self.inputs
        if self.points:
            inputs = map_tensors(_noisy, inputs)
            try:
                self.points.append((state, inputs, self.run(inputs)))
                return
            except UnseenRow:
                raise
            except Exception:  # inputs that must be whole numbers, or probabilities
                inputs = self.inputs
        self.points.append((state, inputs, self.run(inputs)))

    def _trained_buffers(self) -> dict[str, Tensor]:
        """Return buffers that training changes (running statistics); a constant never moves."""
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}
        try:
            self.twin.module.train()
            self.run(self.inputs)
        except Exception as error:
            if before:
                reason = reason_of(error)
                self.notes.append(f"buffers: the module fails in training mode ({reason})")
        self.twin.module.eval()
        current = dict(self.twin.module.named_buffers())
        return {
            name: current[name]
            for name, old in before.items()
            if name in current and not torch.equal(old, current[name])
        }

    def _random(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.buffers:  # a running variance must stay positive
            return tensor * (0.5 + torch.rand_like(tensor)) + 0.1 * torch.rand_like(tensor)
        width = tensor.shape[-1] if tensor.ndim > 1 else 100
        least = max(0.1, width**-0.5)  # attention on tiny embeddings would hardly be seen
        scale = tensor.square().mean().sqrt().clamp(min=least)
        return tensor + 0.5 * scale * torch.randn_like(tensor)

    def watch_all_buffers(self) -> None:
        """Let symmetries act on constant buffers too; a state holds their values."""
        for name, buffer in self.buffers.items():
            self.tensors.setdefault(name, buffer)
            for state, _, _ in self.points:
                state.setdefault(name, buffer.clone())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state into the twin, but for tensors that it holds already."""
        for name, value in state.items():
            tensor = self.tensors[name]
            current, version = self._current.get(name, (None, -1))
            if current is not value or tensor._version != version:  # a forward may write too
                tensor.copy_(value)
                self._current[name] = (value, tensor._version)

    def run(self, inputs: Any) -> list[Tensor]:
        """Return the outputs of the twin."""
        self.runs += 1
        return self.twin.run(inputs)

    def change(
        self, symmetries: Sequence[Symmetry], point: int, how: str, arbitrary: bool = False
    ) -> float:
        """Return the largest relative change of an output under random elements of symmetries.

        Args:
            symmetries: They act one after the other.
            point: The state.
            how: The kind of elements, see ``draw``.
            arbitrary: Apply any matrices instead, which change the outputs if anything does.
        """
        state, inputs, reference = self.points[point]
        generator = torch.Generator().manual_seed(self.runs)
        matrices = [draw(symmetry, how, generator) for symmetry in symmetries]
        if arbitrary:
            symmetries = [replace(symmetry, kind="rotation") for symmetry in symmetries]
            matrices = [
                torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in matrices
            ]
        device = next(iter(state.values())).device
        self.load(transform(state, symmetries, [matrix.to(device) for matrix in matrices]))
        try:
            outputs = self.run(inputs)
        except Exception:  # a state that the module refuses
            return float("inf")
        differences = (relative_difference(a, b) for a, b in zip_longest(outputs, reference))
        return max(differences, default=0.0)

    def worst(
        self,
        symmetries: Sequence[Symmetry],
        draws: Sequence[tuple[int, str]],
        tolerance: float,
    ) -> float:
        """Return the largest change over several draws; stop after the first above tolerance."""
        worst = 0.0
        for point, how in draws:
            worst = max(worst, self.change(symmetries, point, how))
            if not worst <= tolerance:
                break
        return worst

    def searched(self, symmetries: Sequence[Symmetry], tolerance: float) -> float:
        """Return the change on the states of the search; most wrong proposals end here."""
        draws = [(0, LARGE), (1, SMALL), (0, UNIFORM)]
        return self.worst(symmetries, draws, tolerance)

    def final(self, symmetries: Sequence[Symmetry], tolerance: float) -> float:
        """Return the change on the reserved states, which served for nothing else."""
        draws = [
            (SEARCHED + i, KINDS[(i + shift) % 3]) for shift in (0, 1) for i in range(RESERVED)
        ]
        return self.worst(symmetries, draws, tolerance)

    def is_seen(self, symmetries: Sequence[Symmetry], tolerance: float) -> bool:
        """Return whether other changes of the same entries are seen; else nothing was proved."""
        return any(
            self.change(symmetries, point, UNIFORM, arbitrary=True) > 1e6 * tolerance
            for point in range(SEARCHED)
        )


def _noisy(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn_like(x) if is_float(x) else x
