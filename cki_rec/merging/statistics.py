"""Statistics of the activations and gradients of several models on the same rows.

A batch is any argument that the network takes; labels are not used. Shape legend: B rows,
K models, I inputs of a layer and the constant 1, O outputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cki_rec.merging.calling import call, check_moments, is_logits, logits_of, num_rows
from cki_rec.merging.params import Params
from cki_rec.merging.repair import Moments
from cki_rec.merging.traits import valid_positions_of

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(slots=True)
class ActivationStatistics:
    """Statistics of models on one sample of rows."""

    network: nn.Module
    """A network with unsharded tables; its own parameters are not used."""
    batches: Sequence[Any]
    """The sample."""

    def __call__(self, models: Sequence[Params], layers: Sequence[str] | None = None) -> Moments:
        """Return ``linear_moments`` of ``models`` on the sample."""
        return linear_moments(self.network, models, self.batches, layers)

    def gradients(self, models: Sequence[Params], layers: Collection[str]) -> dict[str, Tensor]:
        """Return ``output_gradients`` of ``models`` on the sample."""
        return output_gradients(self.network, models, self.batches, layers)

    def adds_to_logit(self, params: Params, layer: str) -> bool:
        """Return ``adds_to_logit`` on the first batch of the sample."""
        return adds_to_logit(self.network, params, self.batches[0], layer)


@torch.no_grad()
def linear_moments(
    network: nn.Module,
    models: Sequence[Params],
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
) -> Moments:
    """Return second moments of the inputs of every Linear layer, over all models side by side.

    Batch norms are observed beside them: mean and variance of their inputs in the first model.
    Three kinds of Linear layers are left out: layers that run more than once per batch, layers
    without input, and layers whose input is the same for all rows. Layers inside a module with
    ``valid_positions`` count valid positions only: the module drops the outputs of the others.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: Parameters to run the network with.
        batches: The sample.
        layers: Names of weights, and of batch norms; None: those of all Linear layers and norms.

    Returns:
        The moments, divided by the number of rows of each layer. There are none with logits if
        the module does not return one number per row.

    Raises:
        MergeError: Activations are NaN or infinite.
    """
    second: dict[str, Tensor] = {}
    logit: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    order: dict[str, None] = {}
    norms = batch_norms(network)
    total = 0
    network.eval()
    with _recorded_inputs(network, layers) as (inputs, valid):
        for batch in batches:
            inputs.clear()
            outputs = [call(network, batch, model) for model in models]
            size = num_rows(outputs[0], batch)
            total += size
            order |= dict.fromkeys(inputs)
            logit_BK = None
            if all(map(is_logits, outputs)):
                logit_BK = torch.stack([output.flatten() for output in outputs], 1).double()
            for name, parts in inputs.items():
                if name in norms:
                    x_BI = torch.cat(parts[: len(parts) // len(models)]).double()  # first model
                    if len(x_BI):
                        _add(sums, name, torch.stack([x_BI.sum(0), x_BI.square().sum(0)]))
                        rows[name] = rows.get(name, 0) + len(x_BI)
                    continue
                if len(parts) != len(models) or not len(parts[0]):  # shared, or without input
                    continue
                if name not in valid and len(parts[0]) != size:
                    continue
                x_BKI = torch.stack(parts, 1).double()
                flat, shape = x_BKI.flatten(1), x_BKI.shape[1:]
                _add(second, name, (flat.T @ flat).unflatten(0, shape).unflatten(2, shape))
                if name not in valid and logit_BK is not None:
                    _add(logit, name, (flat.T @ logit_BK).unflatten(0, shape))
                rows[name] = rows.get(name, 0) + len(flat)
    check_moments({**second, **sums})
    seen = [n for n in order if n in second and (n in valid or rows[n] == total)]
    return Moments(
        {name: second[name] / rows[name] for name in seen},
        {name: logit[name] / rows[name] for name in seen if name in logit},
        {name: rows[name] for name in seen},
        {name: _mean_and_variance(total / rows[name]) for name, total in sums.items()},
        [name for name in order if name in seen or name in sums],
    )


@torch.no_grad()
def adds_to_logit(network: nn.Module, params: Params, batch: Any, layer: str) -> bool:
    """Return whether the logit of every row is the output of a Linear layer plus other terms.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        params: Parameters to run the network with.
        batch: Any batch.
        layer: Name of a weight.
    """
    module = untied_linears(network)[layer]
    if module.out_features != 1:
        return False
    network.eval()
    before = call(network, batch, params)
    handle = module.register_forward_hook(lambda _, __, output: output + 1)
    try:
        after = call(network, batch, params)
    finally:
        handle.remove()
    if not is_logits(before):
        return False
    error = (after - before - 1).abs().max()
    return bool(error <= 1e-3 * before.abs().max().clamp_min(1))


@torch.inference_mode(False)
@torch.enable_grad()
def output_gradients(
    network: nn.Module,
    models: Sequence[Params],
    batches: Iterable[Any],
    layers: Collection[str],
) -> dict[str, Tensor]:
    r"""Return per Linear layer the mean over rows of :math:`g g^T` ``(K, O, K, O)`` float64.

    g concatenates the gradients of the models' logits in the outputs of the layer. Layers that
    run more than once per batch, or that do not read one input per row, are left out.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: Parameters to run the network with.
        batches: The sample.
        layers: Names of weights.
    """
    models = [{n: t.clone() if t.is_inference() else t for n, t in m.items()} for m in models]
    nudges: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add_nudge(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nudges[name].append(torch.zeros_like(output, requires_grad=True))
            return output + nudges[name][-1]

        return module.register_forward_hook(hook)

    modules = dict(network.named_modules())
    handles = [add_nudge(name, modules[name.removesuffix(".weight")]) for name in layers]
    products: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)
    total = 0
    network.eval()
    try:
        for batch in batches:
            for parts in nudges.values():
                parts.clear()
            logits = torch.stack([logits_of(network, batch, model) for model in models])
            num_rows = logits.shape[1]
            total += num_rows
            once = {
                n: parts
                for n, parts in nudges.items()
                if [tuple(x.shape[:-1]) for x in parts] == [(num_rows,)] * len(models)
            }
            inputs = [part for parts in once.values() for part in parts]
            gradients = iter(torch.autograd.grad(logits.sum(), inputs) if inputs else ())
            for name, parts in once.items():
                g_BKO = torch.stack([next(gradients) for _ in parts], 1).double()
                flat, shape = g_BKO.flatten(1), g_BKO.shape[1:]
                _add(products, name, (flat.T @ flat).unflatten(0, shape).unflatten(2, shape))
                rows[name] += num_rows
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / total for name, value in products.items() if rows[name] == total}


def untied_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers by the names of their weights, without weights of other modules."""
    held = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    return {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and held[id(module.weight)] == 1
    }


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norms with running statistics by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


@contextmanager
def _recorded_inputs(
    network: nn.Module, layers: Sequence[str] | None
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, Tensor]]]:
    """Record the inputs of Linear layers and batch norms while the network runs.

    Yields:
        The inputs per layer, call by call, valid positions only, those of Linear layers with a
        constant 1; and the masks of layers inside a module with ``valid_positions``.
    """
    linears, norms = untied_linears(network), batch_norms(network)
    everything = [*linears, *norms]
    inputs: dict[str, list[Tensor]] = {}
    valid: dict[str, Tensor] = {}

    def record_mask(unit: str, module: nn.Module) -> RemovableHandle | None:
        valid_positions = valid_positions_of(module)
        if valid_positions is None:
            return None
        inside = [name for name in everything if name.startswith(f"{unit}.")]

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            mask = valid_positions(*arguments)
            if mask is not None:
                valid.update(dict.fromkeys(inside, mask))

        return module.register_forward_pre_hook(hook)

    def record_input(name: str, module: nn.Linear) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            x = x[valid[name]] if name in valid else x
            inputs.setdefault(name, []).append(torch.cat([x, torch.ones_like(x[:, :1])], 1))

        return module.register_forward_pre_hook(hook)

    def record_norm(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].movedim(1, -1).flatten(0, -2)
            inputs.setdefault(name, []).append(x[valid[name]] if name in valid else x)

        return module.register_forward_pre_hook(hook)

    handles = [
        record_norm(n, norms[n]) if n in norms else record_input(n, linears[n])
        for n in (everything if layers is None else layers)
    ]
    masks = [record_mask(name, module) for name, module in network.named_modules()]
    handles += [handle for handle in masks if handle is not None]
    try:
        yield inputs, valid
    finally:
        for handle in handles:
            handle.remove()


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value


def _mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, square = moments
    return mean, (square - mean.square()).clamp_min(0)
