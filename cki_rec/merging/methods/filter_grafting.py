"""The ancestor of the paper's global assessment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cki_rec.merging.methods.cki.assessment import compute_global_terms
from cki_rec.merging.params import MixingWeights, Params, check_same, compute_dtype


def grafting_weights(
    models: Sequence[Params],
    *,
    global_terms: Mapping[str, Tensor] | None = None,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    over: str = "own",
) -> MixingWeights:
    """Weigh layers by the entropy of their matrix, with weights rounded to two digits.

    A vector takes the weights of the matrix of its layer (``x.bias`` those of ``x.weight``); one
    without a matrix is assessed by itself.

    Args:
        models: One per source.
        global_terms: What ``compute_global_terms`` gave; None: computed here.
        a: Width of the global term.
        c: Its steepness.
        bins: Of the histogram.
        over: Its range: one of ``RANGES``.

    Returns:
        ``(K, 1, ..., 1)`` per parameter.

    Raises:
        ValueError: Models differ, or have NaN or infinite entries, by name.

    Reference:
        Filter Grafting (Meng et al., CVPR 2020), its entropy criterion, applied once.

    Differs:
        There networks graft in a ring after every epoch of training, which keeps them in one
        basin, and layers without a convolution take the weight of the last one that had it. More
        than two sources are weighted by their rounded terms, divided by their sum.
    """
    check_same(models)
    if global_terms is None:
        global_terms = compute_global_terms(models, a, c, bins, over)
    weights = {}
    for name, tensor in models[0].items():
        layer = name.rpartition(".")[0]
        matrix = f"{layer}.weight"
        is_vector = tensor.ndim < 2 and matrix in models[0]
        rounded = [round(term, 2) for term in global_terms[matrix if is_vector else name].tolist()]
        if len(rounded) == 2:
            rounded[1] = 1 - rounded[0]
        terms = tensor.new_tensor(rounded, dtype=compute_dtype(tensor))
        if len(rounded) != 2:
            terms = terms / terms.sum()
        weights[name] = terms.reshape(-1, *[1] * tensor.ndim)
    return weights
