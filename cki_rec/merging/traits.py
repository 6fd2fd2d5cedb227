"""Traits: the facts about a module that merging reads from the module itself.

Every trait has a default, so a network without declarations can be merged.

- ``symmetries() -> list[Symmetry]``, on a network. Default: none, so alignment moves nothing.
- ``logit_scale() -> LogitScale``, on a network. Default: unknown, so recalibration is impossible.
- ``multiplies_coordinates: bool``, on any module: it multiplies coordinates of embeddings one by
  one, so it cannot read projected embeddings. Default: false.
- ``valid_positions(*inputs) -> Tensor | None``, on any module: a flat boolean mask of the rows
  that the Linear layers inside it read, for the inputs of its ``forward``. Default: all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cki_rec.merging.symmetry import LogitScale, Symmetry


def symmetries_of(network: nn.Module) -> list[Symmetry]:
    """Return the symmetries that a network declares; an empty list without a declaration."""
    declare = _method(network, "symmetries")
    return [] if declare is None else list(declare())


def logit_scale_of(network: nn.Module) -> LogitScale | None:
    """Return the parameters that scale and shift the logit; None without a declaration."""
    declare = _method(network, "logit_scale")
    return None if declare is None else declare()


def elementwise_parameters(network: nn.Module) -> set[str]:
    """Return the parameters and buffers of modules that multiply coordinates one by one."""
    prefixes = tuple(
        f"{name}."
        for name, module in network.named_modules()
        if getattr(module, "multiplies_coordinates", False)
    )
    return {name for name in network.state_dict() if name.startswith(prefixes)}


def valid_positions_of(module: nn.Module) -> Callable[..., Tensor | None] | None:
    """Return the method ``valid_positions`` of a module; None if it has none."""
    return _method(module, "valid_positions")


def _method(module: nn.Module, name: str) -> Callable[..., Any] | None:
    method = getattr(module, name, None)
    return method if callable(method) else None
