"""Reduce the ensemble of aligned sources to one model of their size, layer by layer, closed form.

The mean of K models is one model K times as wide. Its embeddings are projected to the width of one
source, of its hidden units as many are kept as one source has, and every linear map is then the
least-squares one, from what the reduced model computes so far to what the sources compute there.
Rows of the training data are looked at, their labels are not.

Shape legend: K sources, I inputs of a layer and the constant 1, O outputs, S size of a symmetry,
C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cki_rec.integration.params import Params, Weights
from cki_rec.integration.splicing import splice
from cki_rec.symmetry import Slice, Symmetry

RIDGE = 1e-6
"""Of a regression, as a share of the mean square of its inputs."""
READERS = 5.0
"""Weight of what the first layers read, against what tables hold, in the choice of a frame: of
0.3, 1, 3, 5 and 10 the best on validation rows of MovieLens 1M (DeepFM, suite seeds, seed 1)."""


@dataclass(slots=True)
class Moments:
    """Means over rows of products; layers by the name of their weight, in order of execution."""

    second: dict[str, Tensor]
    """``(K, I, K, I)`` float64: inputs with inputs, of every two models; the last input is 1."""
    logit: dict[str, Tensor]
    """``(K, I, K)`` float64: inputs with logits; only of layers that see one input a row."""


Observe = Callable[[Sequence[Params], Sequence[str] | None], Moments]
"""Models, names of weights (None: all Linear layers) -> what they compute on the same rows."""


def fit_layers(
    merged: Params,
    sources: Sequence[Params],
    shares: Sequence[float],
    observe: Observe,
    symmetries: Sequence[Symmetry] = (),
) -> Params:
    r"""Return the merged model with each Linear refitted to the mean of the sources' outputs.

    .. math:: W = \arg\min_W E \| W x - \textstyle\sum_k \alpha_k W_k x_k \|^2

    x is the input of the layer in the merged model as fitted so far, :math:`x_k` that in source k.
    The last layer gets what is missing to the mean logit. Hidden units of ``symmetries`` are not
    averaged but chosen, see ``choose``: among those of all sources, and the means of matched ones.

    Args:
        merged: Where to start from: all that no Linear holds stays as it is.
        sources: Aligned models.
        shares: :math:`\alpha`, sum 1.
        observe: What models compute on a sample of rows.
        symmetries: Whose hidden units are to be chosen; none: averaged.

    Reference:
        Singh and Jaggi, PLeaS (arXiv 2407.02447) for least squares after matching; Jin et al.,
        RegMean, ICLR 2023, Eq. 2.

    Differs:
        Inputs are those of the merged model, so errors of earlier layers are made up for; units
        are chosen from the union of sources.
    """
    fitted = dict(merged)
    names = list(observe([merged], None).second)
    units = {layer: s for s in symmetries if (layer := _producer(s, names))}
    for name in names:
        seen = observe([fitted, *sources], [name])
        if name == names[-1]:
            _set(fitted, name, _last(fitted, name, seen, shares))
            continue
        each = [
            _regress(seen.second[name][0, :, 0], _outputs(source, name, seen.second[name], k))
            for k, source in enumerate(sources, start=1)
        ]
        mean = sum((a * w for a, w in zip(shares, each, strict=True)), torch.zeros_like(each[0]))
        if name in units:
            _choose_units(fitted, sources, shares, units[name], name, [*each, mean], observe)
        else:
            _set(fitted, name, mean)
    return fitted


def choose(gram_CC: Tensor, target_C: Tensor, size: int) -> list[int]:
    """Return ``size`` candidates, chosen one by one, that explain a target best by least squares.

    Args:
        gram_CC: Covariance of the candidates.
        target_C: Their covariance with the target.
        size: How many; candidates that others already explain come last.

    Reference:
        Pati et al., Orthogonal matching pursuit, 1993.
    """
    gram, target = gram_CC.clone(), target_C.clone()
    least = 1e-9 * float(gram.diagonal().max().clamp_min(1e-300))
    free = torch.ones(len(gram), dtype=torch.bool)
    chosen: list[int] = []
    for _ in range(size):
        left = gram.diagonal()
        gain = torch.where(left > least, target.square() / left.clamp_min(least), 0.0)
        best = int(torch.where(free, gain, -1.0).argmax())
        chosen.append(best)
        free[best] = False
        if left[best] > least:
            share = gram[:, best] / left[best]
            target = target - share * target[best]
            gram = gram - share[:, None] * gram[best]
    return chosen


def reduce_frames(
    merged: Params,
    models: Sequence[Params],
    symmetries: Sequence[Symmetry],
    products: Mapping[str, Tensor],
    shares: Weights,
) -> Params:
    r"""Return the merged model with embeddings projected from all sources' frames, not averaged.

    .. math:: E = \sqrt{K} \sum_k \alpha_k E_k R_k, \quad R^T R = 1

    The columns of R are the leading directions of the concatenated tables' second moment plus that
    of the first layers that read them; the mean of aligned tables is the case
    :math:`R_k = 1 / \sqrt{K}`. Inner products survive as well as can be; linear readers must be
    fitted anew (``fit_layers``).

    Args:
        merged: What it is to replace frames of.
        models: Aligned sources.
        symmetries: Those of kind rotation are reduced.
        products: ``table_products``.
        shares: Splicing weights of all parameters.

    Reference:
        Eckart and Young, Psychometrika 1936.
    """
    reduced, num_sources = dict(merged), len(models)
    for symmetry in symmetries:
        if symmetry.kind != "rotation":
            continue
        size = symmetry.size
        wide = num_sources * size
        held, read = (torch.zeros(wide, wide, dtype=torch.float64) for _ in range(2))
        for part in symmetry.slices:
            if part.parameter in products:
                span = slice(part.start, part.start + size)
                block = products[part.parameter][:, :, span, span]
                held += block.permute(0, 2, 1, 3).reshape(wide, wide)
            elif part.axis == 1 and part.parameter not in shares_of_tables(shares, products):
                rows = torch.cat([_columns(m[part.parameter], part, size) for m in models], 1)
                read += rows.T @ rows
        if float(held.trace()) <= 0:
            continue
        metric = held / held.trace()
        if float(read.trace()) > 0:
            metric = metric + READERS * read / read.trace()
        directions = torch.linalg.eigh(metric).eigenvectors[:, -size:]
        mean = torch.eye(size, dtype=torch.float64).repeat(num_sources, 1) / num_sources**0.5
        left, _, right = torch.linalg.svd(directions.T @ mean)
        directions = directions @ (left @ right)  # as near to the mean as the subspace allows
        for part in symmetry.slices:
            if part.parameter in products or part.axis == 0:
                _project(reduced, models, part, directions, shares[part.parameter])
    return reduced


def shares_of_tables(shares: Weights, products: Mapping[str, Tensor]) -> set[str]:
    """Return the names of parameters that are tables."""
    return set(products) & set(shares)


def _project(
    reduced: Params, models: Sequence[Params], part: Slice, directions: Tensor, share: Tensor
) -> None:
    size = directions.shape[1]
    scaled = []
    for k, model in enumerate(models):
        own = directions[k * size : (k + 1) * size] * len(models) ** 0.5
        moved = model[part.parameter].clone()
        view = moved.narrow(part.axis, part.start, size).movedim(part.axis, -1)
        view.copy_((view.double() @ own).to(moved.dtype))
        scaled.append(moved)
    spliced = splice([{"x": tensor} for tensor in scaled], {"x": share})["x"]
    target = reduced[part.parameter] = reduced[part.parameter].clone()
    target.narrow(part.axis, part.start, size).copy_(spliced.narrow(part.axis, part.start, size))


def _columns(tensor: Tensor, part: Slice, size: int) -> Tensor:
    return (
        tensor.double()
        .narrow(part.axis, part.start, size)
        .movedim(part.axis, -1)
        .reshape(-1, size)
    )


def _producer(symmetry: Symmetry, names: Sequence[str]) -> str | None:
    """Return the Linear that makes a symmetry's units, if one does and Linear layers read them."""
    made = [p for p in symmetry.slices if p.axis == 0]
    read = [p for p in symmetry.slices if p.axis == 1]
    layers = [p.parameter for p in made if p.parameter in names]
    simple = all(p.start == 0 and p.width == 1 and not p.within for p in made)
    known = all(p.parameter in names and p.width == 1 and not p.within for p in read)
    return layers[0] if len(layers) == 1 and len(read) == 1 and simple and known else None


def _choose_units(
    fitted: Params,
    sources: Sequence[Params],
    shares: Sequence[float],
    symmetry: Symmetry,
    name: str,
    maps: Sequence[Tensor],
    observe: Observe,
) -> None:
    made = [p.parameter for p in symmetry.slices if p.axis == 0 and p.parameter != name]
    reader = next(p for p in symmetry.slices if p.axis == 1)
    own = [n for n in made if n != _bias(name)]
    candidates = []
    for place, weights in enumerate(maps):
        model = dict(fitted)
        _set(model, name, weights)
        for parameter in own:
            values = [source[parameter] for source in sources]
            model[parameter] = (
                values[place]
                if place < len(sources)
                else torch.stack([a * v.double() for a, v in zip(shares, values, strict=True)])
                .sum(0)
                .to(values[0].dtype)
            )
        candidates.append(model)
    seen = observe([*candidates, *sources], [reader.parameter])
    num, span = len(candidates), slice(reader.start, reader.start + symmetry.size)
    second, logit = seen.second[reader.parameter], seen.logit.get(reader.parameter)
    mean = second[:num, span, 0, -1].reshape(-1)
    gram = second[:num, span, :num, span].flatten(0, 1).flatten(1) - torch.outer(mean, mean)
    if logit is None:
        return _set(fitted, name, maps[-1])
    ensemble = sum(
        (a * logit[..., num + k] for k, a in enumerate(shares)), torch.zeros_like(logit[..., 0])
    )
    target = ensemble[:num, span].reshape(-1) - mean * ensemble[0, -1]
    for place, index in enumerate(choose(gram, target, symmetry.size)):
        model, unit = candidates[index // symmetry.size], index % symmetry.size
        for parameter in [name, *made]:
            if place == 0:
                fitted[parameter] = fitted[parameter].clone()
            fitted[parameter][place] = model[parameter][unit]
    return None


def _outputs(source: Params, name: str, second: Tensor, k: int) -> Tensor:
    """Return ``(O, I)``: the mean product of a source's outputs with the merged model's inputs."""
    return _map(source, name) @ second[k, :, 0]


def _last(fitted: Params, name: str, seen: Moments, shares: Sequence[float]) -> Tensor:
    logit = seen.logit[name][0]
    missing = sum((a * logit[:, k] for k, a in enumerate(shares, start=1)), -logit[:, 0])
    return _map(fitted, name) + _regress(seen.second[name][0, :, 0], missing[None])


def _regress(gram_II: Tensor, product_OI: Tensor) -> Tensor:
    ridge = RIDGE * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=gram_II.dtype)
    return torch.linalg.solve(gram_II + ridge, product_OI.T).T


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
