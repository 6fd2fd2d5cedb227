"""Pruning: one source without its smallest entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cki_rec.merging.params import Params, check_finite, check_same, compute_dtype
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Block, Rows, in_blocks
from cki_rec.merging.selection import Score, check_fraction, check_source, select_best
from cki_rec.merging.sparsification import keep_magnitudes, kept_magnitudes


def _ends(rows: Rows, *, density: float = 0.5, source: int | None = None) -> Tensor:
    """Return ``(K, 2)``: the magnitudes that stay, of every source or of the one."""

    def keys(block: Block) -> list[Tensor]:
        models = block.models if source is None else [block.models[source]]
        return [tensor.to(compute_dtype(tensor)) for tensor in models]

    return kept_magnitudes(rows, keys, density)


@method(
    is_ordered=True,
    row_wise=True,
    statistics=_ends,
    reference="CKI (arXiv 2501.07596), baseline pruning",
    cost="scores of all sources",
)
def pruning(
    models: Sequence[Params],
    score: Score | None,
    density: float = 0.5,
    source: int | None = None,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Params:
    """Remove the smallest entries of one source: the price of fewer parameters.

    The threshold is exact and each parameter's own (``sparsification.order_statistics``).
    Parameters of fewer than two axes (biases, scales, statistics) stay.

    Args:
        models: One per source.
        score: Validation AUC of a model; needed if ``source`` is None.
        density: Share of the entries of a parameter that stay.
        source: Index of the source. None: the one with the best score, the first of equals.
        statistics: Per parameter the smallest and largest magnitude that stay; None: computed
            here.

    Raises:
        MergeError: Models differ, an option is out of range, the source has NaN or infinite
            entries, or there is no score to choose by.

    Reference:
        Han et al., Learning both weights and connections, NeurIPS 2015, section 3;
        CKI (arXiv 2501.07596), baseline pruning.

    Differs:
        CKI's released code keeps ``w > 0.02``, by sign: it deletes all negative weights. We go by
        magnitude, as pruning does.
    """
    check_same(models)
    check_fraction("density", density)
    check_source(source, len(models))
    place = 0 if source is not None else None
    if source is None:
        source = 0 if len(models) == 1 else select_best(models, score, "source")
    check_finite(models[source : source + 1], f"source {source}")
    result, rows = {}, in_blocks(models)
    for name, tensor in models[source].items():
        pruned = tensor.to(compute_dtype(tensor))
        if tensor.ndim >= 2:
            if statistics is None:
                ends = _ends(rows[name], density=density, source=source)[0]
            else:
                ends = statistics[name][source if place is None else place]
            pruned = keep_magnitudes(pruned, ends)
        result[name] = pruned.to(tensor.dtype).clone()
    return result
