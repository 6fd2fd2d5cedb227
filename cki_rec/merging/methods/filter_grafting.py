"""Filter Grafting: the entropy criterion from which the global assessment of CKI comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cki_rec.merging.methods.cki.assessment import (
    Histogram,
    compute_global_terms,
    global_terms_of,
)
from cki_rec.merging.params import MixingWeights, Params, check_same, compute_dtype
from cki_rec.merging.registry import method


@method(
    reference="Filter Grafting (Meng et al., CVPR 2020)",
    statistics=lambda rows, **options: global_terms_of(rows, **options),
    row_wise=True,
)
def filter_grafting(
    models: Sequence[Params],
    statistics: Mapping[str, Tensor] | None,
    *,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
) -> MixingWeights:
    """Weigh layers by the entropy of their matrix, with weights rounded to two digits.

    A vector takes the weights of the matrix of its layer (``x.bias`` those of ``x.weight``). A
    vector without a matrix is assessed by itself.

    Args:
        models: One per source.
        statistics: ``compute_global_terms`` of the models; None: computed here.
        a: Width of the global term.
        c: Steepness of the global term.
        bins: Number of bins of the histogram.
        histogram: Range of the histogram.

    Returns:
        ``(K, 1, ..., 1)`` per parameter.

    Raises:
        MergeError: Models differ, or have NaN or infinite entries, by name.

    Reference:
        Filter Grafting (Meng et al., CVPR 2020), its entropy criterion, applied once.

    Differs:
        There networks graft in a ring after every epoch of training. This keeps them in one
        basin. Layers without a convolution take the weight of the last layer with one. More
        than two sources are weighted by their rounded terms, divided by their sum.
    """
    check_same(models)
    if statistics is None:
        statistics = compute_global_terms(models, a, c, bins, histogram)
    weights = {}
    for name, tensor in models[0].items():
        layer = name.rpartition(".")[0]
        matrix = f"{layer}.weight"
        is_vector = tensor.ndim < 2 and matrix in models[0]
        rounded = [round(term, 2) for term in statistics[matrix if is_vector else name].tolist()]
        if len(rounded) == 2:
            rounded[1] = 1 - rounded[0]
        terms = tensor.new_tensor(rounded, dtype=compute_dtype(tensor))
        if len(rounded) != 2:
            terms = terms / terms.sum()
        weights[name] = terms.reshape(-1, *[1] * tensor.ndim)
    return weights
