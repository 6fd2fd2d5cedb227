"""The assessment of models before a merge: which parameters fit together, and which do not.

It is the first half of the paper's method (integration is assessment, then splicing), with
distances, seen rows and the barrier beside it. Nothing is merged or trained.

Shape legend: K sources, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cki_rec.merging.api import network_symmetries
from cki_rec.merging.assessment_rows import assessment_rows, seen_rows
from cki_rec.merging.barrier import Loss, by_deviation, by_loss, by_score, measure_barrier
from cki_rec.merging.calling import evaluating
from cki_rec.merging.extras import Processes
from cki_rec.merging.inputs import (
    base_of,
    batches_of,
    check_module,
    checked_score,
    counts_of,
    network_of,
    sources_of,
    tables_of,
)
from cki_rec.merging.measures import Sums, pair_sums, paper_sums
from cki_rec.merging.methods.cki.assessment import Histogram, entropies_of, global_terms
from cki_rec.merging.methods.cki.gate import check_gate, initialize_gate
from cki_rec.merging.methods.cki.method import Gate
from cki_rec.merging.methods.evidence import evidence_shares
from cki_rec.merging.params import MergeError, Params, check_finite
from cki_rec.merging.registry import Score
from cki_rec.merging.rows import in_blocks
from cki_rec.merging.states import Model
from cki_rec.merging.statistics import ActivationStatistics
from cki_rec.merging.steps import Network, align_models, row_weights_of
from cki_rec.merging.suggestions import facts_of, suggest
from cki_rec.merging.symmetry import Symmetry
from cki_rec.merging.terminal import assessment_text

if TYPE_CHECKING:
    import pandas as pd

PER_SOURCE = ("entropy", "global", "local", "dual", "hard", "soft", "evidence", "rows_one")
"""Entries of a row that hold one value per source."""


@dataclass(frozen=True, slots=True, repr=False)
class Assessment:
    """Figures of several models, as plain values: they can be stored as JSON and read again."""

    rows: list[dict[str, Any]]
    """One per parameter, layer, module and for the whole model, in this order; within each, the
    least compatible first. ``assess`` lists the entries. An undefined one is None."""
    barrier: dict[str, Any] | None
    """Result of ``measure_barrier``; None: not measured."""
    suggestion: str
    """One sentence: the recipe that these figures suggest, and the reason."""
    num_sources: int

    def __repr__(self) -> str:
        """Return a table as wide as the terminal, the barrier and the suggestion."""
        return assessment_text(self.rows, self.barrier, self.suggestion)

    def flat_rows(self) -> list[dict[str, Any]]:
        """Return the rows with one entry per source, ``hard_0`` and so on, instead of lists."""
        flat = []
        for row in self.rows:
            cells: dict[str, Any] = {}
            for name, value in row.items():
                if name in PER_SOURCE:
                    values = [None] * self.num_sources if value is None else value
                    cells |= {f"{name}_{k}": each for k, each in enumerate(values)}
                else:
                    cells[name] = "x".join(map(str, value)) if name == "shape" and value else value
            flat.append(cells)
        return flat

    def frame(self) -> pd.DataFrame:
        """Return ``flat_rows`` as a frame (pandas must be installed)."""
        import pandas as pd

        flat = self.flat_rows()
        numbers = [name for name in flat[0] if name.startswith("rows")]
        return pd.DataFrame(flat).astype(dict.fromkeys(numbers, "Int64"))  # whole or undefined


def assess(
    models: Sequence[Model],
    *,
    counts: Sequence[Mapping[str, Any]] = (),
    base: Model | None = None,
    symmetries: Sequence[Symmetry] | None = None,
    tables: Collection[str] = (),
    module: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    score: Score | None = None,
    loss: Loss | None = None,
    points: int = 11,
    align: str | None = None,
    starts: int = 1,
    gate: Gate = "identity",
    gates: Mapping[str, Tensor | None] | None = None,
    scale: float = 1.0,
    a: float = 0.4,
    c: float = 500.0,
    bins: int = 10,
    histogram: Histogram = "own",
    seed: int = 0,
    processes: Processes | None = None,
) -> Assessment:
    r"""Compare models parameter by parameter, before they are merged.

    A row of the result has these entries; lists hold one value per source:

    - ``kind``: ``table``, ``tensor``, ``layer`` (several parameters of one layer), ``module`` or
      ``model``; ``name``, ``shape``, ``entries``.
    - ``entropy``, ``global``: entropies and global terms G. ``local``, ``dual``: means over
      entries of the local terms L and of the joined scores K. ``hard``, ``soft``: share of the
      entries that a source gives in hard splicing, and its mean weight in soft splicing.
    - ``global_compatibility``, ``local_compatibility``, ``compatibility``: mean over entries of
      the smallest score of a source over the largest, for G, L and K; 1 for equal sources.
    - ``distance``, ``cosine``: relative distance and cosine of two sources, the mean over pairs.
      ``aligned_distance``, ``aligned_cosine``: after alignment.
    - ``task_cosine``, ``conflicts``: cosine of the changes since the base, and the share of
      entries that two sources moved in opposite directions.
    - ``rows``, ``rows_all``, ``rows_some``, ``rows_one``, ``rows_none``: rows of a table, and
      those that all sources have seen, several but not all, one alone (a list), or none.
      ``evidence``: mean share of each source's counts.

    The paper's terms are those of the aligned sources if they are aligned, because these are
    merged. Layers and modules have means over their entries.

    Args:
        models: Two or more state dicts or modules. Integer tensors are left out, tied ones are
            compared once.
        counts: Per source and table ``(V,)`` training rows that looked a row up.
        base: The model that all sources started from.
        symmetries: Symmetries of the sources' network; None: those that ``module`` declares, or
            those that are found with ``module`` and ``batches``.
        tables: Names of embedding tables, besides those in ``counts`` and in ``module``.
        module: The network of the models; its own parameters are not used.
        batches: Inputs of the network: for activations, for the barrier and to verify symmetries.
        score: Score of a model, larger is better; the barrier is measured with it.
        loss: (output, batch) -> mean loss of a batch; the barrier is measured with it. Without
            score and loss, the barrier is that of the outputs (``by_deviation``).
        points: Fractions of the straight line between two sources, both ends included; 0: no
            barrier.
        align: ``none``, ``weights`` or ``activations``; None: by weights if there are symmetries.
        starts: Starts of the search for an alignment.
        gate: Kind of the first gate of the local term; ``identity`` needs no training.
        gates: Learned gates instead, for some or all parameters.
        scale: Factor of the gate's output, before the sigmoid.
        a: Width of the global term.
        c: Steepness of the global term.
        bins: Number of bins of the histogram.
        histogram: Range of the histogram.
        seed: Seed of the alignment and of random gates.
        processes: The processes that hold the models; None: this one.

    Raises:
        MergeError: Models that differ or have NaN or infinite entries, by name; inputs that do
            not fit together.

    Reference:
        CKI (arXiv 2501.07596), local, global and dual assessment, as in the released
        recommendation code.

    Differs:
        Compatibility as a ratio, distances, rows and the barrier are ours. So is the form for
        more than two sources.
    """
    sample, processes = batches_of(batches) or [], processes or Processes()
    network = None if module is None else network_of(module)
    if sample and network is None:
        raise MergeError("batches: module, the network that reads them, is missing")
    known = sources_of(models, None, network)
    sources = known.models
    if len(sources) < 2:
        raise MergeError(f"assess compares two or more models, not {len(sources)}")
    if network is not None:
        check_module(network, known)
    check_finite(sources)
    start = None if base is None else base_of(base, known)
    if start is not None:
        check_finite([start], "the base")
    seen_by = counts_of(counts, known)
    seen = evidence_shares(sources, seen_by) if seen_by else {}
    for name in gates or {}:
        if name not in sources[0]:
            raise MergeError(f"{name}: has a gate but is no parameter")
    modules = [network, *(network_of(m) for m in models if isinstance(m, nn.Module))]
    in_modules = [name for each in modules for name in tables_of(each, seen_by, known)]
    is_table = {known.tied.get(name, name) for name in (*tables, *in_modules)} & set(sources[0])
    symmetries = (
        ()
        if align == "none"
        else network_symmetries(symmetries, known, network, sample, None, True, seed)
    )
    with evaluating(network):
        aligned = _aligned(
            *(sources, seen_by, symmetries, is_table, network, sample, align, starts, seed),
            processes,
        )
    measured, shapes = {}, {}
    compared = in_blocks(sources if aligned is None else aligned, reduction=processes)
    for name, tensor in sources[0].items():
        tensors = [source[name] for source in sources]
        moved = tensors if aligned is None else [source[name] for source in aligned]
        used = (gates or {}).get(name, initialize_gate(tensor.shape, gate, seed, name))
        if used is not None:
            check_gate(name, tensor.shape, used)
            used = used.to(tensor.device)
        try:
            entropies_K = entropies_of(compared[name], bins, histogram)
            terms = global_terms(entropies_K, a, c)
        except MergeError as error:
            raise MergeError(f"{name}: {error}") from None
        sums = paper_sums(moved, terms, used, scale)
        sums |= pair_sums(tensors, None if start is None else start[name])
        if aligned is not None:
            parts = pair_sums(moved) if _is_moved(tensors, moved) else sums
            sums |= {f"aligned_{key}": parts[key] for key in ("products", "squares")}
        shapes[name] = _whole_shape(name, tensor, processes)
        measured[name] = (_total(name, sums, processes), entropies_K)
    checked = None if score is None else checked_score(score, known)
    barrier = _barrier(sources, aligned, network, sample, checked, loss, points)
    shares = {n: s.flatten(1).mean(1, dtype=torch.float64).tolist() for n, s in seen.items()}
    shares = processes.mean_shares(shares)
    rows = assessment_rows(shapes, measured, is_table, seen_rows(seen_by, processes), shares)
    facts = facts_of(rows, barrier, aligned is not None)
    return Assessment(rows, barrier, suggest(facts), len(sources))


def _aligned(
    sources: list[Params],
    counts: Sequence[Params],
    symmetries: Sequence[Symmetry],
    tables: Collection[str],
    module: nn.Module | None,
    sample: list[Any],
    align: str | None,
    starts: int,
    seed: int,
    processes: Processes,
) -> list[Params] | None:
    """Return the sources in a shared basis; None if they are not to be aligned."""
    if align not in (None, "none", "weights", "activations"):
        raise MergeError(f"align={align!r}: one of none, weights, activations")
    if align == "none" or (align is None and not symmetries):
        return None
    if not symmetries:
        raise MergeError(f"align={align}: symmetries of the network are missing (symmetries)")
    if align == "activations" and not sample:
        raise MergeError("align=activations: module and batches are missing")
    counted = [name for name in tables if not counts or name in counts[0]]
    probe = None if not sample else sample[0]
    network = Network(symmetries, counted, module if sample else None, probe)
    activations = ActivationStatistics(module, sample) if module and sample else None
    row_weights = row_weights_of(sources, counts, {}, counted)
    seen = activations if align == "activations" else None
    aligned, _ = align_models(sources, network, row_weights, seen, starts, seed, processes, False)
    return aligned


def _whole_shape(name: str, tensor: Tensor, processes: Processes) -> list[int]:
    """Return the shape of a parameter with the rows of all processes."""
    if not tensor.ndim:
        return []
    num_rows = processes.reduce(name, torch.tensor(len(tensor)), "sum")
    return [int(num_rows), *tensor.shape[1:]]


def _total(name: str, sums: Sums, processes: Processes) -> Sums:
    """Return sums over the entries of a parameter on all processes."""
    joined = torch.cat([value.reshape(-1) for value in sums.values()])
    parts = processes.reduce(name, joined, "sum").split([v.numel() for v in sums.values()])
    return {
        key: part.reshape(value.shape)
        for (key, value), part in zip(sums.items(), parts, strict=True)
    }


def _is_moved(tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> bool:
    return any(one is not other for one, other in zip(tensors, moved, strict=True))


def _barrier(
    sources: Sequence[Params],
    aligned: Sequence[Params] | None,
    module: nn.Module | None,
    sample: list[Any],
    score: Score | None,
    loss: Loss | None,
    points: int,
) -> dict[str, Any] | None:
    """Return the barrier, if there is anything to measure it with."""
    if score is not None and loss is not None:
        raise MergeError("score and loss: the barrier is measured with one of them")
    if loss is not None and not sample:
        raise MergeError("loss: module and batches are missing")
    if points == 0 or (score is None and not sample):
        return None
    models_of = {"raw": sources} | ({} if aligned is None else {"aligned": aligned})
    if score is not None:
        return measure_barrier(models_of, "score", by_score(score), points)
    assert module is not None
    if loss is not None:
        return measure_barrier(models_of, "loss", by_loss(module, sample, loss), points)
    evaluate = by_deviation(module, sample, sources)
    return measure_barrier(models_of, "deviation", evaluate, points)
