"""Fit the layers of a merged model to those of its sources, one by one, in closed form.

The repair reads training rows, never their labels.

Shape legend: K sources, I inputs of a layer and the constant 1, O outputs, S units of a layer, C
candidate units, T targets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from cki_rec.merging.params import STATISTICS, MergeError, Params
from cki_rec.merging.symmetry import LogitScale, Symmetry

RIDGE = 1e-6
"""Ridge of a regression, as a share of the mean square of each input."""


Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and variance of every unit of a layer."""


@dataclass(slots=True)
class Moments:
    """Means over rows of products; layers by the name of their weight, in order of execution."""

    second: dict[str, Tensor]
    """``(K, I, K, I)`` float64: inputs with inputs, of every two models; the last input is 1."""
    logit: dict[str, Tensor]
    """``(K, I, K)`` float64: inputs with logits; only of layers that see one input a row, in
    networks with one number per row."""
    rows: dict[str, int]
    """Number of inputs of a layer that the means are taken over."""
    norms: dict[str, Statistics]
    """Per batch norm, mean and variance of its inputs in the first model."""
    order: list[str]
    """Layers and batch norms in order of execution."""


class Observe(Protocol):
    """Runs models on one sample of rows."""

    def __call__(self, models: Sequence[Params], layers: Sequence[str] | None = None) -> Moments:
        """Return moments of the named Linear layers and batch norms, of all without names."""

    def gradients(self, models: Sequence[Params], layers: Collection[str]) -> Mapping[str, Tensor]:
        r"""Return per layer :math:`E[g g^T]` ``(K, O, K, O)``, g the logits' gradients there."""

    def adds_to_logit(self, params: Params, layer: str) -> bool:
        """Return whether the logit is the output of a layer plus other terms."""


def rescale(
    merged: Params,
    sources: Sequence[Params],
    shares: Sequence[float],
    observe: Observe,
    symmetries: Sequence[Symmetry],
) -> Params:
    r"""Return the merged model with mean and deviation of its hidden units as in its sources.

    .. math:: z' = (z - \mu) / \sigma \cdot \textstyle\sum_k \alpha_k \sigma_k
        + \sum_k \alpha_k \mu_k

    z is the input of a unit's activation. Averages of units that are not copies of each other vary
    less than either, layer after layer. Running statistics of batch norms are set to the means and
    variances that the merged model has on the rows.

    Args:
        merged: The merge of ``sources``.
        sources: Aligned models.
        shares: :math:`\alpha`, sum 1.
        observe: Runs models on a sample of rows.
        symmetries: Symmetries of the network; they list the slices of each unit.

    Reference:
        Jordan et al., REPAIR, ICLR 2023, section 3.
    """
    fitted = dict(merged)
    first = observe([merged])
    units = _units(symmetries, list(first.second), merged)
    last: Statistics | None = None
    for name in first.order:
        if name in first.norms:
            _set_running(fitted, name, observe, last)
        if name not in units:
            continue
        second = observe([fitted, *sources], [name]).second[name]
        mean, deviation = _statistics(_map(fitted, name), second[0, :, 0])
        each = [
            _statistics(_map(source, name), second[k, :, k])
            for k, source in enumerate(sources, start=1)
        ]
        target_mean = _mixed([m for m, _ in each], shares)
        target = _mixed([d for _, d in each], shares)
        is_alive = deviation > 1e-6 * deviation.max().clamp_min(1e-12)
        scale = torch.where(is_alive, target / deviation.clamp_min(1e-30), 1.0)
        weights = _map(fitted, name) * scale[:, None]
        weights[:, -1] += target_mean - mean * scale
        _set(fitted, name, weights)
        last = _mean_and_variance(fitted, name, second[0, :, 0])
    return fitted


def fit_layers(
    merged: Params,
    sources: Sequence[Params],
    shares: Sequence[float],
    observe: Observe,
    symmetries: Sequence[Symmetry],
    selects_units: bool = False,
    fixed: Collection[str] = (),
) -> Params:
    r"""Return the merged model with each Linear refitted to the mean of the sources' outputs.

    .. math:: W = \arg\min_W E \| W x - \textstyle\sum_k \alpha_k W_k x_k \|^2

    x is the input of the layer in the merged model as fitted so far; :math:`x_k` is the input in
    source k. Directions of W that the rows do not determine stay near
    :math:`\sum_k \alpha_k W_k`. The last layer is fitted to the mean logit, if the logit is its
    output plus other terms. Running statistics of batch norms are set to the means and variances
    that the merged model has on the rows.

    Args:
        merged: The merge of ``sources``; only its Linear layers change.
        sources: Aligned models.
        shares: :math:`\alpha`, sum 1.
        observe: Runs models on a sample of rows.
        symmetries: Symmetries of the network; they list the slices of each hidden unit.
        selects_units: Select hidden units from all sources instead of averaging matched ones. The
            selected units best predict the next layers of all sources (``choose``). Errors there
            are weighted by their first-order effect on the mean logit.
        fixed: Names of weights of layers, and of statistics of norms, that do not change.

    Reference:
        Singh and Jaggi, PLeaS (arXiv 2407.02447) for least squares after matching; Jin et al.,
        RegMean, ICLR 2023, Eq. 2.

    Differs:
        Inputs are those of the merged model, which corrects errors of earlier layers. Units may
        be selected from the union of sources.
    """
    fitted = dict(merged)
    first = observe([merged])
    names = [name for name in first.second if name not in fixed]
    units = _units(symmetries, names, merged)
    readers = {name: next(p for p in units[name].slices if p.axis == 1) for name in units}
    gradients: Mapping[str, Tensor] = {}
    if selects_units and readers:
        gradients = observe.gradients(sources, {part.parameter for part in readers.values()})
    last: Statistics | None = None
    for name in first.order:
        if name in first.norms and f"{name}.{STATISTICS[0]}".removeprefix(".") not in fixed:
            _set_running(fitted, name, observe, last)
        if name not in names:
            continue
        seen = observe([fitted, *sources], [name])
        if name == names[-1] and name in seen.logit and observe.adds_to_logit(fitted, name):
            _set(fitted, name, _last(fitted, name, seen, shares))
            continue
        second = seen.second[name]
        each = []
        for k, source in enumerate(sources, start=1):
            weights = _map(source, name)
            missing = weights @ (second[k, :, 0] - second[0, :, 0])
            each.append(weights + _regress(second[0, :, 0], missing, _bias(name) in fitted))
        mean = _mixed(each, shares)
        reader = readers[name].parameter if name in units else ""
        if reader in gradients:
            share = torch.tensor(shares, dtype=torch.float64)
            metric = torch.einsum("k,kojp,j->kojp", share, gradients[reader], share)
            _choose_units(fitted, sources, metric, units[name], name, each, observe)
        else:
            _set(fitted, name, mean)
        last = _mean_and_variance(fitted, name, second[0, :, 0])
    return fitted


def recalibrate(params: Params, how: LogitScale, scale: float, shift: float) -> Params:
    """Return parameters with which a network's logit is ``scale * logit + shift``.

    Args:
        params: One model; parameters that do not change are shared with the result.
        how: Declaration of its network.
        scale: Factor of the logit, positive.
        shift: Term added to the logit.

    Raises:
        MergeError: The scale is not positive.

    Reference:
        Platt, Probabilistic Outputs for Support Vector Machines, 1999.
    """
    if not scale > 0:
        raise MergeError(f"scale is {scale}, not positive")
    scaled = dict(params)
    for name, degree in how.degrees.items():
        scaled[name] = params[name] * scale**degree
    scaled[how.shift] = scaled[how.shift] + shift
    return scaled


def choose(gram_CC: Tensor, targets_CT: Tensor, size: int) -> list[int]:
    """Return ``size`` candidates, by removing the least useful one again and again.

    The least useful candidate is the one whose removal raises the squared error least. The error
    is that of all targets, predicted by least squares from the remaining candidates.

    Args:
        gram_CC: Covariance of the candidates.
        targets_CT: Covariance of the candidates with the targets.
        size: Number of candidates to return; C is a multiple of it.

    Returns:
        Indices, sorted by their place modulo ``size``, so that equal sources keep their order.

    Reference:
        Couvreur and Bresler, On the Optimality of the Backward Greedy Algorithm for the Subset
        Selection Problem, SIAM J. Matrix Anal. Appl. 2000.
    """
    num = len(gram_CC)
    deviation = gram_CC.diagonal().clamp_min(0).sqrt()
    unit = torch.where(deviation > 0, 1 / deviation.clamp_min(1e-150), 0.0)
    gram = unit[:, None] * gram_CC * unit + RIDGE * torch.eye(num, dtype=gram_CC.dtype)
    inverse = torch.linalg.inv(gram)
    coefficients = inverse @ (unit[:, None] * targets_CT)
    left = torch.ones(num, dtype=torch.bool)
    for _ in range(num - size):
        loss = coefficients.square().sum(1) / inverse.diagonal()
        worst = int(torch.where(left, loss, torch.inf).argmin())
        left[worst] = False
        column = inverse[:, worst] / inverse[worst, worst]
        coefficients = coefficients - torch.outer(column, coefficients[worst])
        inverse = inverse - torch.outer(column, inverse[worst])
    return sorted(left.nonzero().flatten().tolist(), key=lambda index: index % size)


def _units(
    symmetries: Sequence[Symmetry], names: Sequence[str], params: Params
) -> dict[str, Symmetry]:
    """Return, by the Linear that makes them, the hidden units that exactly one Linear reads."""
    units = {}
    for symmetry in symmetries:
        made = [p for p in symmetry.slices if p.axis == 0]
        read = [p for p in symmetry.slices if p.axis != 0]
        layers = [p.parameter for p in made if p.parameter in names]
        is_plain = all(
            len(params[p.parameter]) == symmetry.size and p.width == 1 and not p.within
            for p in made
        )
        is_known = all(
            p.parameter in names and p.axis == 1 and p.width == 1 and not p.within for p in read
        )
        if len(layers) == 1 and len(read) == 1 and is_plain and is_known:
            units[layers[0]] = symmetry
    return units


def _statistics(weights: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the outputs of ``(O, I)`` from input moments."""
    mean = weights @ second[:, -1]
    square = torch.einsum("oi,ij,oj->o", weights, second, weights)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def _mean_and_variance(params: Params, name: str, second: Tensor) -> Statistics:
    mean, deviation = _statistics(_map(params, name), second)
    return mean, deviation.square()


def _set_running(params: Params, norm: str, observe: Observe, last: Statistics | None) -> None:
    """Set the running statistics of a batch norm to those of its inputs in a model.

    Args:
        params: The model.
        norm: Name of the batch norm.
        observe: Runs models on a sample of rows.
        last: Statistics of the layer fitted last, in closed form. If the norm reads its outputs,
            they are the same but for rounding, and more exact.
    """
    seen = observe([params], [norm]).norms[norm]
    if last is not None and all(
        old.shape == new.shape and torch.allclose(old, new, rtol=1e-4, atol=1e-6)
        for old, new in zip(last, seen, strict=True)
    ):
        seen = last
    for word, value in zip(STATISTICS, seen, strict=True):
        name = f"{norm}.{word}".removeprefix(".")
        params[name] = value.to(params[name].dtype)


def _mixed(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for share, value in zip(shares, values, strict=True):
        total = total + share * value
    return total


def _choose_units(
    fitted: Params,
    sources: Sequence[Params],
    metric: Tensor,
    symmetry: Symmetry,
    name: str,
    maps: Sequence[Tensor],
    observe: Observe,
) -> None:
    """Set a layer's units to units chosen from ``maps``, the sources' units on the merged inputs.

    ``metric`` ``(K, O, K, O)`` is the cost of errors of the sources' outputs of the next layer.
    """
    reader = next(p for p in symmetry.slices if p.axis == 1)
    made = [p.parameter for p in symmetry.slices if p.axis == 0 and p.parameter != name]
    candidates = []
    for source, weights in zip(sources, maps, strict=True):
        model = fitted | {parameter: source[parameter] for parameter in made}
        _set(model, name, weights)
        candidates.append(model)
    second = observe([*candidates, *sources], [reader.parameter]).second[reader.parameter]
    num, span = len(candidates), slice(reader.start, reader.start + symmetry.size)
    mean_KI = second[:, :, 0, -1]
    covariance = second - torch.einsum("ki,jm->kijm", mean_KI, mean_KI)
    units = covariance[:num, span].flatten(0, 1)
    outputs = [
        units[:, num + k] @ _map(source, reader.parameter).T for k, source in enumerate(sources)
    ]
    targets = torch.cat(outputs, 1) @ _root(metric.flatten(2).flatten(0, 1))
    gram = units[:, :num, span].flatten(1)
    chosen = choose(gram, targets, symmetry.size)
    for parameter in [name, *made]:
        union = torch.stack([candidate[parameter] for candidate in candidates])
        fitted[parameter] = union[
            [index // symmetry.size for index in chosen],
            [index % symmetry.size for index in chosen],
        ]


def _root(metric: Tensor) -> Tensor:
    """Return R with ``R R^T`` the metric."""
    values, vectors = torch.linalg.eigh(metric)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _last(fitted: Params, name: str, seen: Moments, shares: Sequence[float]) -> Tensor:
    logit = seen.logit[name][0]
    missing = _mixed([logit[:, k] for k in range(1, len(shares) + 1)], shares) - logit[:, 0]
    has_bias = _bias(name) in fitted
    return _map(fitted, name) + _regress(seen.second[name][0, :, 0], missing[None], has_bias)


def _regress(gram_II: Tensor, product_OI: Tensor, has_bias: bool) -> Tensor:
    """Return the least-squares map ``(O, I)``; without a bias its last column is zero."""
    size = len(gram_II) if has_bias else len(gram_II) - 1
    gram, product = gram_II[:size, :size], product_OI[:, :size]
    ridge = RIDGE * gram.diagonal().clamp_min(RIDGE * float(gram.diagonal().mean()))
    solution = torch.zeros_like(product_OI)
    solution[:, :size] = torch.linalg.solve(gram + ridge.diag(), product.T).T
    return solution


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _map(params: Params, name: str) -> Tensor:
    """Return weight and bias as ``(O, I)`` float64."""
    weight = params[name].double()
    bias = params.get(_bias(name))
    column = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return torch.cat([weight, column[:, None]], 1)


def _set(params: Params, name: str, weights: Tensor) -> None:
    params[name] = weights[:, :-1].to(params[name].dtype)
    if _bias(name) in params:
        params[_bias(name)] = weights[:, -1].to(params[name].dtype)
