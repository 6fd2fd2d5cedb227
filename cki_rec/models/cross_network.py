"""Cross networks: explicit products of the input with itself, one more degree per layer.

Shape legend: B rows, W width of the input, E experts, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossNet(nn.Module):
    r"""A weight vector per layer.

    .. math:: x_{l+1} = x_0\,(w_l^T x_l) + b_l + x_l

    Args:
        width: W.
        layers: Number of layers.

    Reference:
        Wang et al., Deep & Cross Network for Ad Click Predictions, ADKDD 2017, equation 3.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Vector(width) for _ in range(layers))

    def forward(self, x0_BW: Tensor) -> Tensor:
        """Return ``(B, W)``."""
        x_BW = x0_BW
        for layer in self.layers:
            x_BW = layer(x0_BW, x_BW)
        return x_BW


class _Vector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BW: Tensor, x_BW: Tensor) -> Tensor:
        next_BW: Tensor = x0_BW * self.map(x_BW) + self.bias + x_BW
        return next_BW


class CrossNetV2(nn.Module):
    r"""A full matrix per layer.

    .. math:: x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l

    Args:
        width: W.
        layers: Number of layers.

    Reference:
        Wang et al., DCN V2, WWW 2021, equation 1.
    """

    multiplies_coordinates = True
    """It cannot read projected embeddings (``cki_rec.merging.traits``)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x0_BW: Tensor) -> Tensor:
        """Return ``(B, W)``."""
        x_BW = x0_BW
        for layer in self.layers:
            x_BW = x0_BW * layer(x_BW) + x_BW
        return x_BW


class CrossNetMix(nn.Module):
    r"""A gated mixture of low-rank matrices per layer.

    .. math::
        x_{l+1} = \sum_i G_i(x_l)\,E_i(x_l) + x_l,\quad
        E_i(x_l) = x_0 \odot \big(U_l^i\, g(C_l^i\, g(V_l^{iT} x_l)) + b_l\big)

    with tanh for g and softmax over the experts for G. All layers share the gate.

    Args:
        width: W.
        layers: Number of layers.
        rank: R of every matrix.
        experts: E, matrices per layer; a single one has no gate.

    Reference:
        Wang et al., DCN V2, WWW 2021, equations 3 and 4.
    """

    multiplies_coordinates = True
    """It cannot read projected embeddings (``cki_rec.merging.traits``)."""

    def __init__(self, width: int, layers: int, rank: int, experts: int) -> None:
        super().__init__()
        self.rank, self.experts = rank, experts
        self.layers = nn.ModuleList(_Mixture(width, rank, experts) for _ in range(layers))
        self.gate = nn.Linear(width, experts, bias=False) if experts > 1 else None

    def forward(self, x0_BW: Tensor) -> Tensor:
        """Return ``(B, W)``."""
        x_BW = x0_BW
        for layer in self.layers:
            share_BE = self.gate(x_BW).softmax(1) if self.gate is not None else None
            x_BW = layer(x0_BW, x_BW, share_BE)
        return x_BW


class _Mixture(nn.Module):
    """One layer: ``down`` is V, ``core`` is C, ``up`` is U; the first axis holds the experts."""

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.down = _matrices(experts, width, rank)
        self.core = _matrices(experts, rank, rank)
        self.up = _matrices(experts, width, rank)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0_BW: Tensor, x_BW: Tensor, share_BE: Tensor | None) -> Tensor:
        low_BER = torch.einsum("bw,ewr->ber", x_BW, self.down).tanh()
        low_BER = torch.einsum("ber,esr->bes", low_BER, self.core).tanh()
        if share_BE is not None:  # shares sum to one, so the bias stays outside
            low_BER = low_BER * share_BE.unsqueeze(2)
        high_BW = torch.einsum("ber,ewr->bw", low_BER, self.up)
        return x0_BW * (high_BW + self.bias) + x_BW


def _matrices(number: int, rows: int, columns: int) -> nn.Parameter:
    """Return ``(number, rows, columns)``, each matrix Xavier uniform."""
    matrices = [nn.init.xavier_uniform_(torch.empty(rows, columns)) for _ in range(number)]
    return nn.Parameter(torch.stack(matrices))
