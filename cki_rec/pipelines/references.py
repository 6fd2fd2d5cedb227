"""References: baselines that merge no parameters, with which merge methods are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cki_rec.config import Config
from cki_rec.data.columns import Ints
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.pipelines.sources import Source

Logits = Mapping[str, NDArray[Any]]
"""Name of rows -> their logits by one model."""
RowsOf = Mapping[str, Ints]
"""Name of rows -> the row numbers whose shard they belong to, in the shape of their logits."""
Choose = Callable[[Sequence[Source], Callable[[Source], float]], Source]
Combine = Callable[
    [Sequence[Logits], Config, EncodedDataset, RowsOf], dict[str, NDArray[np.float64]]
]


@dataclass(frozen=True, slots=True)
class Reference:
    """One baseline: it chooses a source, or combines the scores of all sources."""

    summary: str
    reference: str
    cost: str
    choose: Choose | None = None
    """(sources, validation AUC of a source) -> the source that is returned unchanged."""
    combine: Combine | None = None
    """(logits of all sources, configuration, data set, row numbers) -> logits by name of rows."""
    always_needs: frozenset[str] = frozenset()
    refusal: Callable[[Config], str | None] = lambda _: None
    """Reason why a configuration has no such reference; None: it has one."""

    @property
    def single_model(self) -> bool:
        """Whether the result is one model of unchanged size."""
        return self.choose is not None

    def needs(self, _: Mapping[str, Any]) -> frozenset[str]:
        """Return the inputs that it needs (``merging.registry.Method.needs``)."""
        return self.always_needs


def mean_logits(scores: Sequence[Logits], *_: Any) -> dict[str, NDArray[np.float64]]:
    """Return the mean of the models' logits, by name of rows."""
    return {
        split: np.stack([score[split] for score in scores]).mean(0, dtype=np.float64)
        for split in scores[0]
    }


def mean_probabilities(scores: Sequence[Logits], *_: Any) -> dict[str, NDArray[np.float64]]:
    """Return the logit of the mean of the models' probabilities, by name of rows."""
    result = {}
    for split in scores[0]:
        logit = np.stack([score[split] for score in scores]).astype(np.float64)
        click, none = (-np.logaddexp(0, sign * logit) for sign in (-1, 1))  # logarithms
        result[split] = np.logaddexp.reduce(click, 0) - np.logaddexp.reduce(none, 0)
    return result


def routed_logits(
    scores: Sequence[Logits], config: Config, dataset: EncodedDataset, rows_of: RowsOf
) -> dict[str, NDArray[np.float64]]:
    """Return per row the logit of the source that was trained on the row's first shard."""
    partition = config.data.partition
    shards = [partition.number(source["data.part"]) for source in config.merge.sources]
    parts = dataset.parts(partition)
    own = parts.groups or [[part] for part in range(partition.size)]
    shard = np.array([first for first, *_ in own])[parts.part]
    result = {}
    for name, rows in rows_of.items():
        by_shard = np.stack([scores[shards.index(p)][name] for p in range(partition.size)])
        routed = np.take_along_axis(by_shard, shard[rows][None].astype(np.int64), axis=0)[0]
        result[name] = routed.astype(np.float64)
    return result


def _lacks_shards(config: Config) -> str | None:
    partition = config.data.partition
    named = [source.get("data.part") for source in config.merge.sources]
    shards = {None if part is None else partition.number(part) for part in named}
    if len(named) == partition.size and shards == set(range(partition.size)):
        return None
    return "needs one source for each shard of the data, as suite=shards has them"


REFERENCES: dict[str, Reference] = {
    "best_source": Reference(
        summary="Return the source with the best validation AUC, unchanged",
        reference="CKI (arXiv 2501.07596), single model",
        cost="scores of all sources",
        choose=lambda sources, valid_auc: max(sources, key=valid_auc),
        always_needs=frozenset({"score"}),
    ),
    "newest_source": Reference(
        summary="Return the last source, unchanged: daily retraining in suite drift",
        reference="ours",
        cost="none",
        choose=lambda sources, _: sources[-1],
    ),
    "output_ensemble": Reference(
        summary="Average the logits of all sources, at K times the cost of inference",
        reference="CKI (arXiv 2501.07596), baseline output ensemble",
        cost="none, but K times the inference",
        combine=mean_logits,
    ),
    "probability_ensemble": Reference(
        summary="Average the probabilities of all sources, at K times the cost of inference",
        reference="Lakshminarayanan et al., NeurIPS 2017",
        cost="none, but K times the inference",
        combine=mean_probabilities,
    ),
    "oracle_router": Reference(
        summary="Score each row by the source that was trained on its shard",
        reference="ours: the gain of a known right source",
        cost="none, but K models in memory",
        combine=routed_logits,
        refusal=_lacks_shards,
    ),
}
