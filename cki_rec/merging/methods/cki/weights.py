"""The paper's method: weights of every entry from the compatibility of its sources.

Shapes: weights are ``(K, *s)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cki_rec.merging.methods.cki.assessment import (
    Histogram,
    compute_global_terms,
    dual_compatibility,
    language_shares,
    local_compatibility,
    signed_compatibility,
)
from cki_rec.merging.methods.cki.gate import check_gate
from cki_rec.merging.methods.evidence import evidence_shares
from cki_rec.merging.mixing import harden, soften
from cki_rec.merging.params import MergeError, MixingWeights, Params, check_same, compute_dtype

DUAL = ("released", "signed", "language")
"""How both perspectives are joined: as the released recommendation code does, as its unused
``load_param`` would, or as the released language code does."""


def cki_weights(
    models: Sequence[Params],
    *,
    perspective: str,
    splice: str,
    gates: Mapping[str, Tensor | None],
    global_terms: Mapping[str, Tensor] | None = None,
    counts: Sequence[Params] | None = None,
    dual: str = "released",
    scale: float = 1.0,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
) -> MixingWeights:
    """Weigh every entry by the compatibility of its sources.

    Differentiable with respect to the gates when ``splice`` is ``soft``. The
    release for a recommendation head is ``dual``, ``soft`` and full gates on the weights of its
    Linear layers. There ``override_weights`` sets biases to ``first``.

    Args:
        models: One per source.
        perspective: ``dual``; or ``local`` or ``global``, where soft weights are the terms
            themselves, divided by their sum for more than two sources.
        splice: ``soft`` or ``hard``.
        gates: Per parameter a gate, or None for L = 1/2. Not read by ``global``, nor for
            tables in ``counts``.
        global_terms: Result of ``compute_global_terms``; None: computed here with ``a``, ``c``,
            ``bins`` and ``histogram``.
        counts: Per source, ``(V,)`` counts of some tables; their shares are the local term
            of those tables.
        dual: How ``dual`` joins both terms: one of ``DUAL``.
        scale: Factor of the gates' output, before the sigmoid.
        a: Width of the global term.
        c: Steepness of the global term.
        bins: Of the histogram.
        histogram: Range of the histogram.

    Returns:
        ``(K, *s)`` per parameter; full shape wherever a gate acts.

    Raises:
        MergeError: An unknown option, differing models, a missing or unfitting gate, by name.

    Reference:
        CKI (arXiv 2501.07596), released recommendation code for ``dual``; of its language code v1
        to v6 are ``dual`` with ``language``, ``local`` and ``global`` are v7 and v8.

    Differs:
        More than two sources, gates other than full and affine, ranges other than ``own`` and
        counts are our extensions.
    """
    check_same(models)
    if perspective not in ("local", "global", "dual"):
        raise MergeError(f"perspective: {perspective!r} is none of local, global, dual")
    if splice not in ("soft", "hard"):
        raise MergeError(f"splice: {splice!r} is none of soft, hard")
    if dual not in DUAL:
        raise MergeError(f"dual: {dual!r} is none of {', '.join(DUAL)}")
    for name in [*gates, *(global_terms or {})]:
        if name not in models[0]:
            raise MergeError(f"{name}: has a gate or a global term but is no parameter")
    if global_terms is None and perspective != "local":
        global_terms = compute_global_terms(models, a, c, bins, histogram)
    signed = perspective == "dual" and dual == "signed"
    shares = evidence_shares(models, counts) if counts is not None else {}
    weights = {}
    for name, tensor in models[0].items():
        if perspective != "global":
            local = _local_term(models, name, gates, shares, signed, scale)
        if perspective == "local":
            scores = local
        else:
            assert global_terms is not None
            if name not in global_terms:
                raise MergeError(f"{name}: has no global term")
            scores = global_terms[name].to(tensor.device, compute_dtype(tensor))
            scores = scores.reshape(-1, *[1] * tensor.ndim)
        if perspective == "dual":
            scores = _JOIN[dual](scores.reshape(-1), local)
        if splice == "hard":
            weights[name] = harden(scores)
        elif perspective == "dual" and dual != "language":
            weights[name] = soften(scores)
        else:
            weights[name] = _normalize(scores)
    return weights


_JOIN = {
    "released": dual_compatibility,
    "signed": signed_compatibility,
    "language": language_shares,
}


def _local_term(
    models: Sequence[Params],
    name: str,
    gates: Mapping[str, Tensor | None],
    shares: Mapping[str, Tensor],
    signed: bool,
    scale: float,
) -> Tensor:
    if name in shares:
        return shares[name]
    if name not in gates:
        raise MergeError(f"{name}: has no gate; give None for L = 1/2")
    gate = gates[name]
    if gate is not None:
        check_gate(name, models[0][name].shape, gate)
    return local_compatibility([model[name] for model in models], gate, signed, scale)


def _normalize(scores_K: Tensor) -> Tensor:
    return scores_K if len(scores_K) == 2 else scores_K / scores_K.sum(dim=0)  # 2: sum is 1
