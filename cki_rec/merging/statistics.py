"""What several models compute on the same rows.

Shape legend: B rows, K models, I inputs of a layer and the constant 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from cki_rec.data.columns import Ints
from cki_rec.data.encoding.store import EncodedDataset
from cki_rec.data.loader import Loader
from cki_rec.data.schema import Batch, FeatureSchema
from cki_rec.merging.params import Params
from cki_rec.merging.repair import Moments
from cki_rec.models.attention import ActivationUnit

BATCH = 4096


@dataclass(slots=True)
class ActivationStatistics:
    """Runs models on one sample of rows; their labels are not used."""

    network: nn.Module
    """With unsharded tables; its own parameters are not used."""
    batches: Sequence[Batch]

    def __call__(self, models: Sequence[Params], layers: Sequence[str] | None = None) -> Moments:
        """Return ``linear_moments`` of ``models`` on the sample."""
        return linear_moments(self.network, models, self.batches, layers)

    def gradients(self, models: Sequence[Params], layers: Collection[str]) -> dict[str, Tensor]:
        """Return ``output_gradients`` of ``models`` on the sample."""
        return output_gradients(self.network, models, self.batches, layers)


def observer(
    network: nn.Module,
    dataset: EncodedDataset,
    schema: FeatureSchema,
    size: int,
    seed: int,
    rows: Ints | None = None,
) -> ActivationStatistics:
    """Return an observer of ``size`` training rows, drawn without replacement; of all if fewer.

    ``rows`` are those to draw from; None: all training rows.
    """
    rows = dataset.rows("train") if rows is None else rows
    if len(rows) > size:
        rows = np.sort(np.random.default_rng(seed).choice(rows, size, replace=False))
    return ActivationStatistics(network, list(Loader(dataset, schema, rows, BATCH)))


@torch.no_grad()
def linear_moments(
    network: nn.Module,
    models: Sequence[Params],
    batches: Iterable[Batch],
    layers: Sequence[str] | None = None,
) -> Moments:
    """Return second moments of the inputs of every Linear, over all models side by side.

    Layers that a network uses more than once are left out, and so are layers that see no input, or
    one that is the same for all rows. Those of an attention to histories see the valid places:
    what they give for empty ones is dropped by the network.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: Parameters to run it with.
        batches: Rows to look at.
        layers: Names of weights; None: of all Linear layers.
    """
    second: dict[str, Tensor] = {}
    logit: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    order: dict[str, None] = {}
    total = 0
    network.eval()
    with _listening(network, layers) as (inputs, valid):
        for batch in batches:
            inputs.clear()
            scores = [functional_call(network, model, (batch,)) for model in models]
            logit_BK = torch.stack(scores, 1).double()
            total += len(logit_BK)
            order |= dict.fromkeys(inputs)
            for name, parts in inputs.items():
                if len(parts) != len(models) or not len(parts[0]):  # used several times, or not
                    continue
                if name not in valid and len(parts[0]) != len(logit_BK):
                    continue
                x_BKI = torch.stack(parts, 1).double()
                flat, shape = x_BKI.flatten(1), x_BKI.shape[1:]
                _add(second, name, (flat.T @ flat).unflatten(0, shape).unflatten(2, shape))
                if name not in valid:
                    _add(logit, name, (flat.T @ logit_BK).unflatten(0, shape))
                rows[name] = rows.get(name, 0) + len(flat)
    seen = [n for n in order if n in second and (n in valid or rows[n] == total)]
    return Moments(
        {name: second[name] / rows[name] for name in seen},
        {name: logit[name] / rows[name] for name in seen if name in logit},
        {name: rows[name] for name in seen},
    )


def output_gradients(
    network: nn.Module,
    models: Sequence[Params],
    batches: Iterable[Batch],
    layers: Collection[str],
) -> dict[str, Tensor]:
    r"""Return per Linear the mean over rows of :math:`g g^T` ``(K, O, K, O)`` float64.

    g are the gradients of the models' logits in the outputs of the layer, side by side. Layers
    that do not see one input a row, or are used more than once, are left out.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: Parameters to run it with.
        batches: Rows to look at.
        layers: Names of weights.
    """
    nudges: dict[str, list[Tensor]] = {name: [] for name in layers}

    def listen(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nudges[name].append(torch.zeros_like(output, requires_grad=True))
            return output + nudges[name][-1]

        return module.register_forward_hook(hook)

    modules = dict(network.named_modules())
    handles = [listen(name, modules[name.removesuffix(".weight")]) for name in layers]
    found: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)
    total = 0
    network.eval()
    try:
        for batch in batches:
            for parts in nudges.values():
                parts.clear()
            logits = torch.stack([functional_call(network, model, (batch,)) for model in models])
            num_rows = logits.shape[1]
            total += num_rows
            once = {
                n: p for n, p in nudges.items() if [len(x) for x in p] == [num_rows] * len(models)
            }
            inputs = [part for parts in once.values() for part in parts]
            gradients = iter(torch.autograd.grad(logits.sum(), inputs) if inputs else ())
            for name, parts in once.items():
                g_BKO = torch.stack([next(gradients) for _ in parts], 1).double()
                flat, shape = g_BKO.flatten(1), g_BKO.shape[1:]
                _add(found, name, (flat.T @ flat).unflatten(0, shape).unflatten(2, shape))
                rows[name] += num_rows
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / total for name, value in found.items() if rows[name] == total}


@contextmanager
def _listening(
    network: nn.Module, layers: Sequence[str] | None
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, Tensor]]]:
    """Yield what Linear layers see as the network runs, and which places are valid.

    The first holds per layer the inputs and a constant 1, flat, call by call; of layers inside an
    attention, those at valid places, which the second holds.
    """
    linears = {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    inputs: dict[str, list[Tensor]] = {}
    valid: dict[str, Tensor] = {}

    def listen_to_mask(unit: str, module: nn.Module) -> RemovableHandle:
        inside = [name for name in linears if name.startswith(f"{unit}.")]

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            valid.update(dict.fromkeys(inside, arguments[2].flatten()))

        return module.register_forward_pre_hook(hook)

    def listen(name: str, module: nn.Linear) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            x = x[valid[name]] if name in valid else x
            inputs.setdefault(name, []).append(torch.cat([x, torch.ones_like(x[:, :1])], 1))

        return module.register_forward_pre_hook(hook)

    handles = [listen(name, linears[name]) for name in (linears if layers is None else layers)]
    units = [(n, m) for n, m in network.named_modules() if isinstance(m, ActivationUnit)]
    handles += [listen_to_mask(*unit) for unit in units]
    try:
        yield inputs, valid
    finally:
        for handle in handles:
            handle.remove()


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value
