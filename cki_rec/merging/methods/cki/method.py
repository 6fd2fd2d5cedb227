"""The paper's method as it is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from cki_rec.merging.methods.cki.assessment import Histogram, global_terms_of
from cki_rec.merging.methods.cki.gate import initialize_gate
from cki_rec.merging.methods.cki.weights import cki_weights
from cki_rec.merging.params import STATISTICS, MixingWeights, Params, check_same
from cki_rec.merging.registry import method
from cki_rec.merging.rows import Rows

Gate = Literal["full", "affine", "diagonal", "low_rank", "scalar", "identity", "none"]
NOT_LEARNED = ("identity", "none")


def _initial_gate(
    name: str, shape: Sequence[int], seed: int, *, gate: str = "full", rank: int = 8, **_: Any
) -> Tensor | None:
    """Return the first gate of a parameter; statistics of batch norms have none."""
    kind = "none" if name.endswith(STATISTICS) else gate  # no gradient reaches statistics
    return initialize_gate(shape, kind, seed, name, rank)


def _global_term(
    rows: Rows,
    *,
    perspective: str = "dual",
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
    **_: Any,
) -> Tensor | None:
    """Return the global term of a parameter; None where the local one decides alone."""
    if perspective == "local":
        return None
    return global_terms_of(rows, a, c, bins, histogram)


@method(
    needs=lambda options: ("counts",) if options["local"] == "evidence" else (),
    reference="CKI (arXiv 2501.07596)",
    cost="one pass; a learned gate trains",
    full_weights=True,
    initial_gates=_initial_gate,
    learnable=lambda options: options["gate"] not in NOT_LEARNED,
    while_learning={"splice": "soft"},  # hard weights pass no gradient
    statistics=_global_term,
    row_wise=True,
)
def cki(
    models: Sequence[Params],
    counts: Sequence[Params],
    gates: Mapping[str, Tensor | None] | None,
    statistics: Mapping[str, Tensor] | None,
    seed: int,
    *,
    perspective: Literal["local", "global", "dual"] = "dual",
    dual: Literal["released", "signed", "language"] = "released",
    local: Literal["gate", "evidence"] = "gate",
    splice: Literal["soft", "hard"] = "soft",
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
    gate: Gate = "full",
    rank: int = 8,
    scale: float = 1.0,
) -> MixingWeights:
    """Weigh entries by the entropy of each tensor and a gate on the sources' differences.

    Args:
        models: One per source.
        counts: Per source, ``(V,)`` row counts of tables; read if ``local`` is ``evidence``.
        gates: Gate per parameter; None: ``gate`` drawn with ``seed``.
        statistics: Global term per parameter; None: computed here.
        seed: Seed of the first gates.
        perspective: Local or global assessment, or both.
        dual: Combination of both: as in the released code, its unused ``load_param`` (signed), or
            the released language code.
        local: Local term of tables: the gate, or row counts.
        splice: Soft or hard splicing.
        a: Width of the global term.
        c: Steepness of the global term.
        bins: Number of bins of the histogram.
        histogram: Range of the histogram.
        gate: Kind of the gate; ``none`` is L = 1/2.
        rank: Rank of a gate of kind ``low_rank``.
        scale: Factor of the gate's output, before the sigmoid.

    Raises:
        MergeError: As ``cki_weights``.

    Reference:
        CKI (arXiv 2501.07596), as in the released recommendation and language code.

    Differs:
        As ``cki_weights``.
    """
    check_same(models)
    if gates is None:
        gates = {
            name: _initial_gate(name, tensor.shape, seed, gate=gate, rank=rank)
            for name, tensor in models[0].items()
        }
    return cki_weights(
        models,
        perspective=perspective,
        splice=splice,
        gates=gates,
        global_terms=None if statistics is None else _of(statistics, models[0]),
        counts=counts if local == "evidence" else None,
        dual=dual,
        scale=scale,
        a=a,
        c=c,
        bins=bins,
        histogram=histogram,
    )


def _of(statistics: Mapping[str, Tensor], params: Params) -> Mapping[str, Tensor] | None:
    """Return the global terms of some parameters; None where the local one decides alone."""
    return {name: statistics[name] for name in params if name in statistics} or None
