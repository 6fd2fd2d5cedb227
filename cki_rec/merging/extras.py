"""Facts and steps that the pipelines add to a merge.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from cki_rec.merging.params import MixingWeights, Params
from cki_rec.merging.rows import Reduction
from cki_rec.merging.symmetry import LogitScale

T = TypeVar("T")
Rule = Literal["first", "evidence"]
"""Mixing weights that replace those of the method: the first source alone, or row counts."""
Gates = Mapping[str, Tensor | None]


class Weigh(Protocol):
    """Mixing weights of some parameters, or of some rows of tables, for given gates."""

    def __call__(
        self, models: Sequence[Params], counts: Sequence[Params], gates: Gates
    ) -> MixingWeights:
        """Return ``(K, *s)`` per parameter."""


@dataclass(slots=True)
class Learned:
    """Result of learning: the best epoch of gates, and of parameters trained beside them."""

    gates: Gates
    trunk: Params
    epoch: int
    valid_metric: float | None


class Learn(Protocol):
    """Training of gates: gradients reach them through the mixed parameters."""

    def __call__(self, models: Sequence[Params], gates: Gates, weigh: Weigh) -> Learned:
        """Return the gates of the best epoch."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scale and shift that fit a model's logits to validation rows."""

    scale: float | None
    """None: there is no best scale."""
    shift: float | None
    reason: str | None = None
    """Reason why the logits stay as they are."""


class Processes(Reduction):
    """The processes that hold the models; here one, which holds all rows."""

    def total(self, products: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return per table the sum of ``products`` over all processes."""
        return products

    def agree(self, value: T) -> T:
        """Return the value of the first process."""
        return value

    def mean_shares(self, shares: dict[str, list[float]]) -> dict[str, list[float]]:
        """Return per parameter the mean share of each source over all processes' rows."""
        return shares


@dataclass(frozen=True, slots=True)
class Extras:
    """Facts and steps that the pipelines add to a merge; few users need them."""

    tables: Collection[str] | None = None
    """Names of the embedding tables; None: lookups in the module, and tables with counts."""
    probe: Any = None
    """A batch on which aligned sources must score as before; None: the first batch."""
    logit_scale: LogitScale | None = None
    fisher: Callable[[Sequence[Params]], Sequence[Params]] | None = None
    """(aligned models) -> the diagonal of the Fisher information of each."""
    learn: Learn | None = None
    """Training of the method's gates; None: closed form."""
    calibrate: Callable[[Params], Calibration] | None = None
    """(parameters) -> the scale and shift of the logit that fit validation rows."""
    fixed: Mapping[str, Rule] = field(default_factory=dict)
    """Parameters whose mixing weights the method does not decide."""
    row_mask: Mapping[str, Tensor] = field(default_factory=dict)
    """Per table of joined vocabularies ``(K, V)`` bool, the rows that a source has."""
    processes: Processes = field(default_factory=Processes)
    """The processes that hold the models; here one."""
    recorded_alignment: bool = False
    """Search an alignment from the identity alone, and compare activations at inputs of Linear
    layers alone. The pipelines do, so that recorded results stay."""
    in_place: bool = False
    """Alignment may transform the tensors of the sources, and the result may share them."""
