"""Linear maps from the tables of several sources to one table.

Shape legend: K sources, V rows of a table, D columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cki_rec.merging.params import BLOCK, Params
from cki_rec.merging.teachers import lookup_modules


class TableMaps:
    """One map ``(K * D, D)`` per table; all begin as the rows of one source.

    A row of the new table is the row of all sources, side by side, times the map. The maps are
    fitted at the looked up rows, so the time of a step does not depend on the size of the tables.

    Args:
        module: A module that reads the tables.
        sources: Parameters of the sources.
        lead: The source that the maps begin as.
        kept: Parameters that other modules read too, which have no map.
    """

    def __init__(
        self, module: nn.Module, sources: Sequence[Params], lead: int, kept: Collection[str] = ()
    ) -> None:
        self._sources = sources
        self._owners = {
            name: owner
            for name, owner in lookup_modules(module).items()
            if name in sources[0] and name not in kept and is_linear(owner)
        }
        self.maps: Params = {}
        for name in self._owners:
            width = sources[0][name].shape[1]
            table_map = sources[0][name].new_zeros(len(sources) * width, width)
            table_map[lead * width : (lead + 1) * width].fill_diagonal_(1)
            self.maps[name] = table_map

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module look up mapped rows within the block."""
        with ExitStack() as stack:
            for name, owner in self._owners.items():
                hook = owner.register_forward_hook(self._lookup(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def tables(self) -> Params:
        """Return the new tables, made a few rows at a time."""
        new: Params = {}
        for name, table_map in self.maps.items():
            first = self._sources[0][name]
            new[name] = torch.empty_like(first)
            for start in range(0, len(first), BLOCK):
                rows = slice(start, start + BLOCK)
                side_by_side = torch.cat([source[name][rows] for source in self._sources], 1)
                new[name][rows] = side_by_side @ table_map.detach()
        return new

    def _lookup(self, name: str) -> Any:
        is_inside = False

        def hook(
            owner: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], _: Any
        ) -> Tensor | None:
            nonlocal is_inside
            if is_inside:
                return None
            is_inside = True
            try:
                with torch.no_grad():
                    rows = [
                        functional_call(owner, {"weight": s[name]}, arguments, dict(named))
                        for s in self._sources
                    ]
            finally:
                is_inside = False
            return torch.cat(rows, -1) @ self.maps[name]

        return hook


def is_linear(owner: nn.Embedding | nn.EmbeddingBag) -> bool:
    """Return whether a lookup is linear in its table."""
    return owner.max_norm is None and getattr(owner, "mode", "sum") != "max"
