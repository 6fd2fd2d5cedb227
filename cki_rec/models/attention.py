"""Attention over the ids of a history.

Shape legend: B rows, L ids of a history, W width of a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cki_rec.models.layers import MLP

NOWHERE = -1e9
"""Score of an empty position before softmax: weight 0, and no NaN for an empty history."""


class ActivationUnit(nn.Module):
    r"""Sum of the keys of a history, each weighted by a small network of query and key.

    .. math:: \sum_l a(q, k_l)\, k_l,\quad a(q, k) = MLP([q,\; k,\; q - k,\; q \odot k])

    The sum is over valid positions. Without softmax the weights are not normalized: their sum
    measures how relevant the history is to the query. An empty history returns zeros.

    Args:
        width: W.
        hidden: Widths of the hidden layers.
        activation: A row of ``ACTIVATIONS``.
        dropout: Dropout rate after each hidden layer.
        softmax: Whether the weights of a history sum to one.

    Reference:
        Zhou et al., Deep Interest Network, KDD 2018, section 4.3.

    Differs:
        The paper's figure adds the outer product of query and key. The authors' code uses
        difference and elementwise product, as we do. In training, the statistics of Dice include
        empty positions.
    """

    multiplies_coordinates = True
    """It cannot read projected embeddings (``cki_rec.merging.traits``)."""

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        activation: str = "dice",
        dropout: float = 0.0,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.mlp = MLP(4 * width, hidden, dropout, activation)

    def valid_positions(self, query_BW: Tensor, keys_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B * L,)``: the rows of the MLP's inputs that hold a key."""
        return mask_BL.flatten()

    def forward(self, query_BW: Tensor, keys_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, W)``; ``mask_BL`` is true at valid positions."""
        query_BLW = query_BW.unsqueeze(1).expand_as(keys_BLW)
        inputs = [query_BLW, keys_BLW, query_BLW - keys_BLW, query_BLW * keys_BLW]
        weight_BL = self.mlp(torch.cat(inputs, dim=2).flatten(0, 1)).view_as(mask_BL)
        if self.softmax:
            weight_BL = weight_BL.masked_fill(~mask_BL, NOWHERE).softmax(1)
        weight_BL = weight_BL.masked_fill(~mask_BL, 0.0)
        pooled_BW: Tensor = torch.einsum("bl,blw->bw", weight_BL, keys_BLW)
        return pooled_BW
