"""Is a difference between entropies more than the luck of the draw?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cki_rec.merging.methods.cki.assessment import compare_entropies, entropy, histogram_bounds
from cki_rec.merging.params import compute_dtype, generator

RESAMPLES = 100
TAIL = 64
"""The extreme of a resample is among so many of each end, but once in exp(64) times."""
MOST = 1 << 20
"""Entries of a larger tensor that stand for all of it between its two ends."""


def entropy_differences(
    tensors: Sequence[Tensor], bins: int = 10, over: str = "own", seed: int = 0, name: str = ""
) -> dict[str, list[float]]:
    r"""Return how sources of one parameter differ in entropy, and how sure that is.

    The global term is all but a step of the difference at the released steepness: a difference of
    0.01 gives 0.675 of at most 0.7. So it means something only where it exceeds its noise.

    Returns:
        Per source ``entropy``; ``difference``, to the mean of the others; ``noise``, the standard
        deviation of that difference over bootstrap resamples of the entries, each source's drawn
        by itself.

    Reference:
        Ours; the bootstrap is Efron, Annals of Statistics 1979. A resample is drawn as its two
        extremes, which set the range, and the counts between: of large tensors these are from
        evenly spaced entries. Quantiles of range ``quantile`` stay.
    """
    bounds = histogram_bounds(tensors, over)
    entropies = [entropy(w, bins, ends) for w, ends in zip(tensors, bounds, strict=True)]
    found = {"entropy": entropies, "difference": compare_entropies(entropies)}
    if tensors[0].numel() == 0 or len(tensors) == 1:
        return found | {"noise": [0.0] * len(tensors)}
    draw = np.random.default_rng(generator(seed, f"{name}/entropy").initial_seed())
    samples = [_Sample.of(tensor) for tensor in tensors]
    fixed = [tuple(float(end) for end in ends) for ends in bounds] if over == "quantile" else []
    resampled = []
    for _ in range(RESAMPLES):
        extremes = [sample.extremes(draw) for sample in samples]
        ends = fixed or [
            (s.low[i], s.high[j]) for s, (i, j) in zip(samples, extremes, strict=True)
        ]
        if over == "shared":
            ends = [(min(low for low, _ in ends), max(high for _, high in ends))] * len(ends)
        drawn = [
            sample.entropy(draw, place, bins, *own)
            for sample, place, own in zip(samples, extremes, ends, strict=True)
        ]
        resampled.append(compare_entropies(drawn))
    noise: list[float] = np.std(resampled, axis=0, ddof=1).tolist()
    return found | {"noise": noise}


@dataclass(frozen=True, slots=True)
class _Sample:
    """Entries of a tensor: how many, the outer ones, and those between (all, or some)."""

    size: int
    low: NDArray[Any]
    """Ascending."""
    high: NDArray[Any]
    """Descending."""
    values: NDArray[Any]
    """Ascending."""

    @classmethod
    def of(cls, tensor: Tensor) -> _Sample:
        flat = tensor.detach().reshape(-1).to(compute_dtype(tensor)).cpu()
        ends = min(TAIL, len(flat))
        low = flat.topk(ends, largest=False).values.double().numpy()
        high = flat.topk(ends).values.double().numpy()
        some = flat[:: max(1, math.ceil(len(flat) / MOST))]
        return cls(len(flat), low, high, torch.sort(some).values.double().numpy())

    def extremes(self, draw: np.random.Generator) -> tuple[int, int]:
        """Return the places, from each end, of the extremes of as many draws as there are."""
        low, high = (self.size * (1 - u ** (1 / self.size)) for u in 1 - draw.random(2))
        first = min(int(low), len(self.low) - 1)
        return first, min(int(high), len(self.high) - 1, self.size - 1 - first)

    def entropy(
        self,
        draw: np.random.Generator,
        extremes: tuple[int, int],
        bins: int,
        low: float,
        high: float,
    ) -> float:
        """Return the entropy of a resample between its extremes, binned from low to high."""
        edges = low + np.arange(bins + 1) * ((high - low) / bins)
        inner = np.clip(edges, self.low[extremes[0]], self.high[extremes[1]])
        shares = np.diff(np.searchsorted(self.values, inner)) / len(self.values)
        shares *= self.size / (self.size - sum(extremes))
        total = shares.sum()
        shares = shares / max(1.0, total)
        counts = draw.multinomial(self.size, [*shares, max(0.0, 1 - shares.sum())])[:-1]
        drawn = counts[counts > 0] / self.size
        return float(-(drawn * np.log(drawn)).sum())
