"""The methods by name, with what each asks for.

A method either weighs its sources entry by entry, and ``splicing.splice`` applies the weights, or
makes the parameters of the new model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from cki_rec.merging.methods.average import average_weights, base_weights, random_weights
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.methods.distillation import distill
from cki_rec.merging.methods.evidence import evidence_weights
from cki_rec.merging.methods.filter_grafting import grafting_weights
from cki_rec.merging.methods.fisher import fisher_weights
from cki_rec.merging.methods.ot_fusion import ot_fusion
from cki_rec.merging.methods.regmean import regmean
from cki_rec.merging.methods.slerp import karcher, model_stock, slerp
from cki_rec.merging.methods.soups import greedy_soup, prune, weighted_average
from cki_rec.merging.methods.task_vectors import breadcrumbs, dare, della, task_arithmetic, ties
from cki_rec.merging.methods.zipit import zipit
from cki_rec.merging.options import check_arguments, defaults
from cki_rec.merging.params import MixingWeights, Params
from cki_rec.merging.symmetry import Symmetry

Need = Literal["counts", "fisher", "moments", "training", "base", "labels"]
"""``counts`` of table rows; ``fisher``, ``moments``: a pass over training rows; ``training``: many
passes; ``base``: the model that all sources come from; ``labels``: of validation rows."""


@dataclass(frozen=True, slots=True)
class MergeInputs:
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
    symmetries: Sequence[Symmetry] = ()
    """Of the sources' network, always filled: which hidden units it has."""
    imitate: Callable[[Params, int, float], Params] | None = None
    """Start, epochs, learning rate -> a model trained to give the sources' mean logit
    (``training``)."""
    base: Params | None = None
    """The model that all sources started from."""
    score: Callable[[Params], float] | None = None
    """Validation AUC of a model (``labels``)."""
    owners: Mapping[str, Tensor] = field(default_factory=dict)
    """Per table of joined vocabularies ``(K, U)`` bool: which rows a source has
    (``integration.vocabulary``); no concern of methods."""


def _base(given: MergeInputs) -> Params:
    if given.base is None:
        raise ValueError("needs the model that all sources started from")
    return given.base


@dataclass(frozen=True, slots=True)
class Method:
    """One way to make one predictor out of several models."""

    idea: str
    reference: str
    weigh: Callable[..., MixingWeights] | None = None
    """``weigh(models, given, **options)``: shares of the sources, which are then spliced."""
    merge: Callable[..., Params] | None = None
    """``merge(models, given, **options)``: the new model."""
    options: Callable[..., Params] | None = None
    """The function whose parameters with a default value are the options of the method, as
    ``merge.options`` names them; None: it has none. Where one is None, validation rows decide
    (``labels``)."""
    needs: frozenset[Need] = frozenset()
    models: str = "any"
    """How many it takes: ``any``, or ``2``."""
    cost: str = "one pass over parameters"
    single: bool = True
    """The result is one model of unchanged size."""
    is_ordered: bool = False
    """The result depends on the order of the sources."""
    row_wise: bool = False
    """A row of a merged table depends on that row of its sources alone, so tables can be merged a
    few rows at a time, or by several processes (``pipelines.several`` says with which
    options)."""

    @property
    def merges_parameters(self) -> bool:
        """Return whether it makes parameters; others keep sources as they are."""
        return self.weigh is not None or self.merge is not None


SCALED = "one pass; scores of 10 scales"
METHODS: dict[str, Method] = {
    "best_source": Method(
        idea="keep the parent that is best on validation; a reference, not a parameter method",
        needs=frozenset({"labels"}),
        reference="CKI (arXiv 2501.07596), single model",
        cost="scores of all parents",
    ),
    "newest_source": Method(
        idea="keep the last parent, the newest of suite drift; a reference, not a parameter "
        "method",
        reference="ours: what training day after day does",
        cost="none",
        is_ordered=True,
    ),
    "output_ensemble": Method(
        idea="average the logits of all parents, at K times the cost; a reference, not a "
        "parameter method",
        reference="CKI (arXiv 2501.07596), baseline output ensemble",
        cost="none, but K times the inference",
        single=False,
    ),
    "probability_ensemble": Method(
        idea="average the probabilities of all parents, at K times the cost; a reference, not a "
        "parameter method",
        reference="Lakshminarayanan et al., NeurIPS 2017",
        cost="none, but K times the inference",
        single=False,
    ),
    "distillation": Method(
        merge=lambda models, given, **options: distill(
            models, given.score, given.imitate, **options
        ),
        options=distill,
        idea="TRAINS: one parent trained on to give the mean logit of all parents; an upper "
        "reference",
        needs=frozenset({"training"}),
        reference="Hinton et al., arXiv 1503.02531",
        cost="a training; K + 1 forward passes a step",
        is_ordered=True,
    ),
    "oracle_router": Method(
        idea="each row scored by the source that trained on its part; a reference, not "
        "a parameter method",
        reference="ours: what knowing the right parent gives",
        cost="none, but K models are kept",
        single=False,
    ),
    "best_of": Method(
        idea="the best on validation of several ways to integrate (merge.recipes); "
        "not a parameter method of its own",
        needs=frozenset({"labels"}),
        reference="ours",
        cost="all recipes and their scores",
    ),
    "first": Method(
        weigh=lambda models, _: base_weights(models),
        idea="the first parent as it is: a control of what trains along with a merged head",
        reference="ours",
        is_ordered=True,
        row_wise=True,
    ),
    "average": Method(
        weigh=lambda models, _: average_weights(models),
        idea="the mean of all parents, entry by entry; of checkpoints of one run: SWA",
        reference="CKI (arXiv 2501.07596), baseline averaging",
        row_wise=True,
    ),
    "weighted_average": Method(
        weigh=lambda models, given, **options: weighted_average(models, given.score, **options),
        options=weighted_average,
        idea="the mean with one share per parent, given or chosen on validation",
        reference="CKI (arXiv 2501.07596), baseline averaging",
        cost="scores of a grid",
        is_ordered=True,
        row_wise=True,
    ),
    "greedy_soup": Method(
        weigh=lambda models, given: greedy_soup(models, given.score),
        idea="the mean of those parents whose addition does not lower validation AUC",
        needs=frozenset({"labels"}),
        reference="Model soups (Wortsman et al., ICML 2022)",
        cost="scores of 2K - 1 models",
    ),
    "pruning": Method(
        merge=lambda models, given, **options: prune(models, given.score, **options),
        options=prune,
        idea="one parent without its smallest entries: what fewer numbers cost",
        reference="CKI (arXiv 2501.07596), baseline pruning",
        cost="scores of all parents",
        is_ordered=True,
    ),
    "slerp": Method(
        merge=lambda models, _, **options: slerp(models, **options),
        options=slerp,
        idea="a point on the great circle between two parents, per parameter",
        reference="Shoemake, SIGGRAPH 1985",
        models="2",
        is_ordered=True,
    ),
    "karcher": Method(
        merge=lambda models, _: karcher(models),
        idea="the mean direction on the sphere, times the mean norm, per parameter",
        reference="Karcher, 1977; Buss and Fillmore, ACM TOG 2001",
    ),
    "task_arithmetic": Method(
        merge=lambda models, given, **options: task_arithmetic(
            models, _base(given), given.score, **options
        ),
        options=task_arithmetic,
        idea="the base plus the scaled sum of what each parent learnt since",
        needs=frozenset({"base"}),
        reference="Ilharco et al., ICLR 2023",
        cost=SCALED,
        row_wise=True,
    ),
    "ties": Method(
        merge=lambda models, given, **options: ties(models, _base(given), given.score, **options),
        options=ties,
        idea="the largest changes since the base, per entry the mean of those that agree in sign",
        needs=frozenset({"base"}),
        reference="TIES-Merging (Yadav et al., NeurIPS 2023)",
        cost=SCALED,
    ),
    "dare": Method(
        merge=lambda models, given, **options: dare(
            models, _base(given), given.score, given.seed, **options
        ),
        options=dare,
        idea="changes since the base, some dropped at random, the others enlarged, then summed",
        needs=frozenset({"base"}),
        reference="DARE (Yu et al., ICML 2024)",
        cost=SCALED,
        is_ordered=True,
    ),
    "della": Method(
        merge=lambda models, given, **options: della(
            models, _base(given), given.score, given.seed, **options
        ),
        options=della,
        idea="like dare, but small changes are dropped more often and signs elected",
        needs=frozenset({"base"}),
        reference="DELLA-Merging (Deep et al., arXiv 2406.11617)",
        cost=SCALED,
        is_ordered=True,
    ),
    "breadcrumbs": Method(
        merge=lambda models, given, **options: breadcrumbs(
            models, _base(given), given.score, **options
        ),
        options=breadcrumbs,
        idea="changes since the base without the smallest and the very largest, summed",
        needs=frozenset({"base"}),
        reference="Model Breadcrumbs (Davari and Belilovsky, ECCV 2024)",
        cost=SCALED,
    ),
    "model_stock": Method(
        merge=lambda models, given: model_stock(models, _base(given)),
        idea="between base and mean, the nearer to the mean the smaller the parents' angle",
        needs=frozenset({"base"}),
        reference="Model Stock (Jang et al., ECCV 2024)",
    ),
    "random": Method(
        weigh=lambda models, given, **options: random_weights(models, given.seed, **options),
        options=random_weights,
        idea="random weights in the range that soft CKI can reach: a control",
        reference="ours",
        is_ordered=True,
    ),
    "evidence": Method(
        weigh=lambda models, given: evidence_weights(models, given.counts),
        idea="table rows weighted by how often each parent saw them, the rest averaged",
        needs=frozenset({"counts"}),
        reference="RegMean (Jin et al., ICLR 2023) for one-hot inputs",
        row_wise=True,
    ),
    "fisher": Method(
        weigh=lambda models, given, **options: fisher_weights(models, given.fisher, **options),
        options=fisher_weights,
        idea="entries weighted by how much each parent's own scores depend on them",
        needs=frozenset({"fisher"}),
        reference="Fisher merging (Matena and Raffel, NeurIPS 2022)",
        cost="gradients of each sampled row",
    ),
    "regmean": Method(
        merge=lambda models, given, **options: regmean(
            models, given.moments, given.counts, **options
        ),
        options=regmean,
        idea="linear layers by least squares on their inputs, table rows by counts, the rest "
        "averaged",
        needs=frozenset({"moments", "counts"}),
        reference="RegMean (Jin et al., ICLR 2023)",
        cost="one pass over sampled rows; a matrix inverse a layer",
    ),
    "ot_fusion": Method(
        merge=lambda models, given, **options: ot_fusion(models, given.symmetries, **options),
        options=ot_fusion,
        idea="hidden units moved softly onto the first parent's by optimal transport, then "
        "averaged",
        reference="OTFusion (Singh and Jaggi, NeurIPS 2020)",
        cost="a transport plan a layer",
        is_ordered=True,
    ),
    "zipit": Method(
        merge=lambda models, given: zipit(models, given.symmetries, given.moments),
        idea="the most correlated hidden units, of two parents or of one, become one unit",
        needs=frozenset({"moments"}),
        reference="ZipIt! (Stoica et al., ICLR 2024)",
        cost="one pass over sampled rows",
        is_ordered=True,
    ),
    "filter_grafting": Method(
        weigh=lambda models, _, **options: grafting_weights(models, **options),
        idea="weights from the entropy of each layer, rounded: the ancestor of the global term",
        reference="Filter Grafting (Meng et al., CVPR 2020)",
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


def needs_of(name: str, options: Mapping[str, Any]) -> frozenset[Need]:
    """Return what a method needs with these options: labels too where validation rows decide."""
    method = METHODS[name]
    chosen = {**defaults(method.options), **options}.values()
    return method.needs | {"labels"} if any(value is None for value in chosen) else method.needs


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check that a method has these options, and that their values have the right types.

    Raises:
        ValueError: The first one that does not fit, and what the method takes.
    """
    check_arguments(name, METHODS[name].options, options)
