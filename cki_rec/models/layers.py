"""Blocks that several models contain.

Shape legend: B rows, F fields, D embedding size, H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchNorm(nn.BatchNorm1d):
    """Batch norm without the integer counter of batches, so its whole state can be merged."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.num_batches_tracked = None

    def _check_input_dim(self, x_BH: Tensor) -> None:
        """Accept any input: a check of its shape cannot be traced."""

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch adds the counter to a state without a version
        metadata, keys = {**local_metadata, "version": 2}, (missing_keys, unexpected_keys)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *keys, error_msgs)


class Dice(nn.Module):
    r"""PReLU with a smooth bend at the mean of the data.

    .. math:: p\,s + (1 - p)\,\alpha s,\quad p = \sigma((s - E[s]) / \sqrt{Var[s] + \epsilon})

    Mean and variance are those of the batch in training, and running statistics otherwise, with
    momentum 0.1. Epsilon is 1e-8.

    Args:
        width: H; every unit has its alpha, initially 0.

    Reference:
        Zhou et al., Deep Interest Network, KDD 2018, section 5.2.

    Differs:
        The paper gives no momentum; 0.1 is torch's, FuxiCTR has 0.01.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width, eps=1e-8, momentum=0.1, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x_BH: Tensor) -> Tensor:
        """Return ``(B, H)``."""
        above_BH = torch.sigmoid(self.norm(x_BH))
        return x_BH * (above_BH + (1 - above_BH) * self.alpha)


LEVELS = 2**16
"""Levels of the random numbers of dropout."""
MASKS = "16 bits of SFC64"
"""How dropout is drawn on CPU; part of the identity of a training."""


class Dropout(nn.Dropout):
    """Dropout with 16 random bits per entry on CPU, several times as fast as torch's.

    The generator of a mask (SFC64) is seeded from torch's default generator, so masks follow from
    ``torch.manual_seed``.

    Differs:
        The rate is rounded to a multiple of 1 / 65536, and the scale fits the rounded rate. On
        other devices and in compiled networks the mask is torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with entries set to 0 and the others scaled; ``x`` outside of training."""
        return drop_entries(x, self.p) if self.training and self.p else x


@torch.fx.wrap
def drop_entries(x: Tensor, rate: float) -> Tensor:
    """Return ``x`` with a share of ``rate`` of the entries set to 0 and the others scaled."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return functional.dropout(x, rate)
    dropped = min(round(LEVELS * rate), LEVELS - 1)
    seed = int(torch.randint(torch.iinfo(torch.int64).max, ()))
    drawn = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)
    bits = torch.from_numpy(drawn)[: x.numel()].view(x.shape)
    keep = torch.ge(bits, dropped - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))
    return x * keep.mul_(LEVELS / (LEVELS - dropped))


MLP_OPTIONS = ("hidden", "activation", "batch_norm")
"""Options that shape the MLP of a network; the default of the trait ``reads``."""
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "dice": Dice,
    "prelu": nn.PReLU,
    "sigmoid": lambda _: nn.Sigmoid(),
    "tanh": lambda _: nn.Tanh(),
}
"""Name -> module for a number of hidden units."""


class MLP(nn.Module):
    """Linear, optional batch norm, activation and dropout for every hidden width.

    Args:
        width: Width of the input.
        hidden: Widths of the hidden layers.
        dropout: Dropout rate after each hidden layer.
        activation: A row of ``ACTIVATIONS``.
        batch_norm: Whether to normalize before the activation.
        scores: Outputs of a last Linear layer; 0: the last hidden layer is the output.

    Attributes:
        width: Width of the output.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        dropout: float,
        activation: str = "relu",
        batch_norm: bool = False,
        scores: int = 1,
    ) -> None:
        super().__init__()
        self.hidden, self.scores = list(hidden), scores
        self.width = scores or (hidden[-1] if hidden else width)
        widths = [width, *hidden, *([scores] if scores else [])]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.norms = nn.ModuleList(BatchNorm(width) for width in hidden if batch_norm)
        self.activations = nn.ModuleList(ACTIVATIONS[activation](width) for width in hidden)
        self.dropout = Dropout(dropout)

    def forward(self, x_BH: Tensor) -> Tensor:
        """Return ``(B,)`` for one score, else ``(B, scores)`` or ``(B, H)``."""
        for position, activation in enumerate(self.activations):
            x_BH = self.layers[position](x_BH)
            if self.norms:
                x_BH = self.norms[position](x_BH)
            x_BH = self.dropout(activation(x_BH))
        if self.scores:
            x_BH = self.layers[-1](x_BH)
        return x_BH.squeeze(1) if self.scores == 1 else x_BH


def fm_interaction(emb_BFD: Tensor) -> Tensor:
    r"""Sum the pairwise inner products of the field embeddings.

    .. math:: \tfrac12 \sum_d \big[(\sum_f e_{fd})^2 - \sum_f e_{fd}^2\big]

    Args:
        emb_BFD: One embedding per field.

    Returns:
        ``(B,)``, one score per row.

    Reference:
        Rendle, Factorization Machines, ICDM 2010, Lemma 3.1.
    """
    return 0.5 * (emb_BFD.sum(1).square() - emb_BFD.square().sum(1)).sum(1)
