"""What the linear layers of several models see on the same rows.

Shape legend: B rows, K models, I inputs of a layer and the constant 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from cki_rec.data.loader import Loader
from cki_rec.data.schema import FeatureSchema
from cki_rec.data.store import EncodedDataset
from cki_rec.integration.params import Params
from cki_rec.integration.reduction import Moments

BATCH = 4096


@torch.no_grad()
def linear_moments(
    network: nn.Module,
    models: Sequence[Params],
    dataset: EncodedDataset,
    schema: FeatureSchema,
    rows: NDArray[np.int64],
    layers: Sequence[str] | None = None,
) -> Moments:
    """Return second moments of the inputs of every Linear, over all models side by side.

    Args:
        network: A network with unsharded tables; its own parameters are not used.
        models: Parameters to run it with.
        dataset: Where rows are.
        schema: The features that ``network`` reads.
        rows: Rows to look at; their labels are not used.
        layers: Names of weights; None: of all Linear layers.
    """
    linears = {f"{n}.weight": m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    linears = {name: linears[name] for name in (linears if layers is None else layers)}
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name, module in linears.items()
    ]
    second: dict[str, Tensor] = {}
    with_logit: dict[str, Tensor] = {}
    network.eval()
    try:
        for batch in Loader(dataset, schema, rows, BATCH):
            inputs: dict[str, list[Tensor]] = {}
            logits = []
            for model in models:
                seen.clear()
                logits.append(functional_call(network, model, (batch,)))
                for name, x in seen.items():
                    x = x.flatten(0, -2)
                    inputs.setdefault(name, []).append(
                        torch.cat([x, torch.ones_like(x[:, :1])], 1)
                    )
            logit_BK = torch.stack(logits, 1).double()
            for name, parts in inputs.items():
                x_BKI = torch.stack(parts, 1).double()
                flat = x_BKI.flatten(1)
                share = len(batch) / len(rows) / len(flat)
                product = (
                    (flat.T @ flat).unflatten(0, x_BKI.shape[1:]).unflatten(2, x_BKI.shape[1:])
                )
                _add(second, name, product * share)
                if len(flat) == len(logit_BK):
                    _add(
                        with_logit, name, (flat.T @ logit_BK).unflatten(0, x_BKI.shape[1:]) * share
                    )
    finally:
        for handle in handles:
            handle.remove()
    return Moments(second, with_logit)


def sample(rows: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return ``size`` of the rows, drawn without replacement and in order; all if they are fewer."""
    if len(rows) <= size:
        return rows
    drawn: NDArray[np.int64] = np.random.default_rng(seed).choice(rows, size, replace=False)
    drawn.sort()
    return drawn


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name] + value if name in totals else value
