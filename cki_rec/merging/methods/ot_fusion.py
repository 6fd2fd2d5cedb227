"""Fusion of hidden layers by optimal transport of their units.

Shape legend: S units of a layer, C numbers that describe one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cki_rec.merging.hidden_units import Layer, copied, hidden_layers, map_units
from cki_rec.merging.methods.average import average
from cki_rec.merging.mixing import mix
from cki_rec.merging.params import MergeError, Params, check_finite, check_same, compute_dtype
from cki_rec.merging.registry import method
from cki_rec.merging.symmetry import Symmetry, units_of


@method(
    is_ordered=True,
    row_wise=True,
    reference="OTFusion (Singh and Jaggi, NeurIPS 2020)",
    cost="a transport plan a layer",
)
def ot_fusion(
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    temperature: float = 0.01,
    iterations: int = 500,
) -> Params:
    r"""Move hidden units softly onto those of the first source by optimal transport, then average.

    .. math:: \hat W_l = n_l T_l^T W_l\, (n_{l-1} T_{l-1})

    T is the transport plan (``sinkhorn``) from a source's units to the first source's, at the cost
    of squared distances between their incoming weights and biases, inputs already moved. With
    equal masses n T is a soft permutation. Everything that is no hidden layer is averaged as it
    is: embeddings, crossings, the output.

    Args:
        models: One per source; the others are moved to the first.
        symmetries: Of their network; which units it has.
        temperature: Of the plan, as a share of the mean cost; toward 0 it becomes a permutation.
        iterations: Most steps to a plan.

    Raises:
        MergeError: Models differ, a source has NaN or infinite entries, or an option is not
            positive.

    Reference:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, algorithm 1
        (by weights).

    Differs:
        Signs of odd activations are not matched. Batch norms move with their units.
    """
    check_same(models)
    check_finite(models)
    if temperature <= 0 or iterations < 1:
        raise MergeError(
            f"temperature={temperature}, iterations={iterations}: must be positive, at least 1"
        )
    layers = hidden_layers(models[0], symmetries)
    moved = copied(models, layers)
    for model in moved[1:]:
        for layer in layers:
            ours, theirs = (_described(m, layer) for m in (model, moved[0]))
            cost = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").square()
            plan = sinkhorn(cost, temperature, iterations)
            map_units(model, (*layer.made, *layer.read), plan)
    return averaged(moved, models[0])


def sinkhorn(cost_SS: Tensor, temperature: float, iterations: int = 500) -> Tensor:
    r"""Return the doubly stochastic matrix P that minimizes cost minus temperature times entropy.

    .. math:: P_{ij} = \exp\big((f_i + g_j - C_{ij} / \bar C) / t\big), \quad P 1 = P^T 1 = 1

    Computed in logarithms; columns sum to 1 up to rounding, rows to 1e-9 or as far as
    ``iterations`` go.

    Args:
        cost_SS: Square, not negative.
        temperature: t, as a share of the mean cost.
        iterations: Most steps.

    Reference:
        Cuturi, Sinkhorn Distances, NeurIPS 2013; Peyre and Cuturi, Computational Optimal
        Transport, 2019, section 4.4 (in logarithms).
    """
    mean = cost_SS.mean()
    score = -cost_SS / (temperature * mean) if float(mean) > 0 else torch.zeros_like(cost_SS)
    for _ in range(iterations):
        score = score - score.logsumexp(1, keepdim=True)
        excess = score.logsumexp(0, keepdim=True)
        score = score - excess
        if float(excess.abs().max()) < 1e-9:
            break
    return score.exp()


def averaged(moved: Sequence[Params], like: Params) -> Params:
    """Return the mean of models, in the dtypes of ``like``."""
    mean = mix(moved, average(moved))
    return {n: t.to(compute_dtype(like[n])).to(like[n].dtype) for n, t in mean.items()}


def _described(model: Params, layer: Layer) -> Tensor:
    """Return ``(S, C)``: weights and bias of each unit."""
    name = layer.made[0].parameter.removesuffix("weight")
    incoming = [part for part in layer.made if part.parameter in (f"{name}weight", f"{name}bias")]
    views = [units_of(model[part.parameter], part, layer.size) for part in incoming]
    return torch.cat([view.reshape(-1, layer.size) for view in views]).T
