"""The methods by name, with what each asks for.

A method either weighs its sources entry by entry, and ``splicing.splice`` applies the weights, or
makes the parameters of the new model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from cki_rec.integration.baselines import average_weights, base_weights, random_weights
from cki_rec.integration.cki import cki_weights
from cki_rec.integration.evidence import evidence_weights
from cki_rec.integration.grafting import grafting_weights
from cki_rec.integration.params import Params, Weights

Need = Literal["counts", "fisher", "moments", "start", "labels"]
"""``counts`` of table rows; ``fisher``, ``moments``: a pass over training rows; ``start``: the
model that all sources come from; ``labels``: of validation rows."""


@dataclass(frozen=True, slots=True)
class Given:
    """What methods may ask for besides models; a field is filled where ``needs`` names it."""

    seed: int = 0
    """Of what a method draws."""
    counts: Sequence[Params] = ()
    """Per source, under the name of each table: ``(V,)`` training rows that looked a row up."""
    fisher: Sequence[Params] = ()
    """Per source, for every parameter: the diagonal of the Fisher information, of its shape."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Per weight of a Linear: ``(K, I, K, I)`` float64, the mean over rows of the products of its
    inputs in every two sources; I = inputs + 1, the last being the constant 1."""
    start: Params | None = None
    """The model that all sources started from."""
    score: Callable[[Params], float] | None = None
    """Validation AUC of a model (``labels``)."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to make one predictor out of several models."""

    idea: str
    reference: str
    weigh: Callable[..., Weights] | None = None
    """``weigh(models, given, **options)``: shares of the sources, which are then spliced."""
    merge: Callable[..., Params] | None = None
    """``merge(models, given, **options)``: the new model."""
    needs: frozenset[Need] = frozenset()
    models: str = "any"
    """How many it takes: ``any``, or ``2``."""
    cost: str = "one pass over parameters"
    single: bool = True
    """The result is one model of unchanged size."""
    is_ordered: bool = False
    """The result depends on the order of the sources."""

    @property
    def is_rule(self) -> bool:
        """Return whether it makes parameters; others keep sources as they are."""
        return self.weigh is not None or self.merge is not None


METHODS: dict[str, Method] = {
    "best_parent": Method(
        idea="keep the parent that is best on validation; a reference, not a parameter method",
        needs=frozenset({"labels"}),
        reference="CKI (arXiv 2501.07596), single model",
        cost="scores of all parents",
    ),
    "output_ensemble": Method(
        idea="average the logits of all parents, at K times the cost; a reference, not a "
        "parameter method",
        reference="CKI (arXiv 2501.07596), baseline output ensemble",
        cost="none, but K times the inference",
        single=False,
    ),
    "average": Method(
        weigh=lambda models, _: average_weights(models),
        idea="the mean of all parents, entry by entry",
        reference="CKI (arXiv 2501.07596), baseline averaging",
    ),
    "random": Method(
        weigh=lambda models, given, **options: random_weights(models, given.seed, **options),
        idea="random weights in the range that soft CKI can reach: a control",
        reference="ours",
        is_ordered=True,
    ),
    "first": Method(
        weigh=lambda models, _: base_weights(models),
        idea="the first parent as it is: a control of what trains along with a merged head",
        reference="ours",
        is_ordered=True,
    ),
    "filter_grafting": Method(
        weigh=lambda models, _, **options: grafting_weights(models, **options),
        idea="weights from the entropy of each layer, rounded: the ancestor of the global term",
        reference="Filter Grafting (Meng et al., CVPR 2020)",
    ),
    "evidence": Method(
        weigh=lambda models, given: evidence_weights(models, given.counts),
        idea="table rows weighted by how often each parent saw them, the rest averaged",
        needs=frozenset({"counts"}),
        reference="RegMean (Jin et al., ICLR 2023) for one-hot inputs",
    ),
    "cki": Method(
        weigh=lambda models, _, **options: cki_weights(models, **options),
        idea="weights from the entropy of each tensor and a gate on the parents' differences",
        needs=frozenset({"labels"}),
        reference="CKI (arXiv 2501.07596)",
        cost="one pass; a learned gate trains",
    ),
}
"""``labels`` of ``cki`` are for the learned gate; without one it takes none."""
