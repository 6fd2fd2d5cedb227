"""The paper's method: weights of every entry from the compatibility of its sources.

Shapes: weights are ``(K, *s)`` per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cki_rec.integration.assessment import (
    compute_global_terms,
    dual_compatibility,
    local_compatibility,
)
from cki_rec.integration.evidence import evidence_shares
from cki_rec.integration.gate import check_gate
from cki_rec.integration.params import Params, Weights, check_same, compute_dtype
from cki_rec.integration.splicing import harden, soften


def cki_weights(
    models: Sequence[Params],
    *,
    perspective: str,
    splice: str,
    gates: Mapping[str, Tensor | None],
    global_terms: Mapping[str, Tensor] | None = None,
    counts: Sequence[Params] | None = None,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
) -> Weights:
    """Weigh every entry by the compatibility of its sources.

    Differentiable with respect to the gates when ``splice`` is ``soft``. What was released for a
    recommendation head is ``dual``, ``soft`` and full gates on the weights of its Linear layers,
    with ``override_weights`` setting biases to ``base_weights``.

    Args:
        models: One per source.
        perspective: ``dual``; or ``local`` or ``global``, where soft weights are the terms
            themselves, divided by their sum for more than two sources.
        splice: ``soft`` or ``hard``.
        gates: Per parameter a gate, or None for L = 1/2. Not read by ``global``, nor for
            tables in ``counts``.
        global_terms: What ``compute_global_terms`` gave; None: computed here with ``a``, ``c``
            and ``bins``.
        counts: Per source, ``(V,)`` counts of some tables; their shares are the local term
            of those tables.
        a: Width of the global term.
        c: Steepness of the global term.
        bins: Of the histogram.

    Returns:
        ``(K, *s)`` per parameter; full shape wherever a gate acts.

    Raises:
        ValueError: An unknown option, differing models, a missing or unfitting gate, by name.

    Reference:
        CKI (arXiv 2501.07596), released recommendation code for ``dual``; ``local`` and
        ``global`` are variants v7 and v8 of its language code.

    Differs:
        More than two sources, gates other than full and counts are our extensions.
    """
    check_same(models)
    if perspective not in ("local", "global", "dual"):
        raise ValueError(f"perspective: {perspective!r} is none of local, global, dual")
    if splice not in ("soft", "hard"):
        raise ValueError(f"splice: {splice!r} is none of soft, hard")
    for name in [*gates, *(global_terms or {})]:
        if name not in models[0]:
            raise ValueError(f"{name}: has a gate or a global term but is no parameter")
    if global_terms is None and perspective != "local":
        global_terms = compute_global_terms(models, a, c, bins)
    shares = evidence_shares(models, counts) if counts is not None else {}
    weights = {}
    for name, tensor in models[0].items():
        if perspective == "local":
            scores = _local_term(models, name, gates, shares)
        else:
            assert global_terms is not None
            if name not in global_terms:
                raise ValueError(f"{name}: has no global term")
            scores = global_terms[name].to(tensor.device, compute_dtype(tensor))
            scores = scores.reshape(-1, *[1] * tensor.ndim)
        if perspective == "dual":
            scores = dual_compatibility(
                scores.reshape(-1), _local_term(models, name, gates, shares)
            )
        if splice == "hard":
            weights[name] = harden(scores)
        else:
            weights[name] = soften(scores) if perspective == "dual" else _normalize(scores)
    return weights


def _local_term(
    models: Sequence[Params],
    name: str,
    gates: Mapping[str, Tensor | None],
    shares: Mapping[str, Tensor],
) -> Tensor:
    if name in shares:
        return shares[name]
    if name not in gates:
        raise ValueError(f"{name}: has no gate; give None for L = 1/2")
    gate = gates[name]
    if gate is not None:
        check_gate(name, models[0][name].shape, gate)
    return local_compatibility([model[name] for model in models], gate)


def _normalize(scores_K: Tensor) -> Tensor:
    return scores_K if len(scores_K) == 2 else scores_K / scores_K.sum(dim=0)
