"""GRU4Rec. Shape legend: B rows, L ids of a history, W width, H hidden units."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from cki_rec.config import SequenceOptions
from cki_rec.merging.symmetry import Slice, Symmetry
from cki_rec.models.layers import Dropout
from cki_rec.models.sequential import SequentialNetwork, latest
from cki_rec.models.symmetries import Basis

GATES = 3
"""Blocks of a GRU's matrices: reset, update, candidate."""
CANDIDATE = 2


class RecurrentEncoder(nn.Module):
    """A GRU over a history; a linear map of its output at the latest id is the state.

    An empty history has the map's bias as its state.
    """

    def __init__(self, width: int, options: SequenceOptions) -> None:
        super().__init__()
        self.dropout = Dropout(options.dropout)
        self.gru = nn.GRU(width, options.hidden, options.layers, batch_first=True)
        for name, parameter in self.gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
        self.output = nn.Linear(options.hidden, width)

    def forward(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, W)``; ``mask_BL`` is true at valid positions, which come first."""
        state_BW: Tensor = self.output(latest(self.states(ids_BLW, mask_BL), mask_BL))
        return state_BW

    def states(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, L, H)``; each state depends on its id and earlier ones."""
        x_BLW = self.dropout(ids_BLW)
        zero_1B1 = x_BLW[:, :1, :1].transpose(0, 1) * 0  # of the input, so that it can be vmapped
        first_KBH = zero_1B1.expand(self.gru.num_layers, -1, self.gru.hidden_size).contiguous()
        states_BLH: Tensor = self.gru(x_BLW, first_KBH)[0]
        return states_BLH


class GRU4Rec(SequentialNetwork):
    """A GRU over histories; inner products with targets, and an MLP.

    Reference:
        Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016;
        with a table shared by inputs and targets as in Tan et al., DLRS 2016.

    Differs:
        The papers have no MLP. They train all positions at once on ranking losses; here a row is
        one target.
    """

    encoder = RecurrentEncoder
    kind = "rotation"

    def slices_of(self, number: int, basis: Basis, dim: int) -> Iterator[Slice]:
        """Yield the slices of encoder ``number`` that a basis moves."""
        name, order = f"encoders.{number}", self.pairs[number].histories
        yield from basis.blocks(f"{name}.gru.weight_ih_l0", order, dim)
        for key in ("weight", "bias"):
            yield from basis.blocks(f"{name}.output.{key}", order, dim, axis=0)

    def inner_symmetries(self, number: int) -> list[Symmetry]:
        """Return the signed permutations of the hidden units of every layer.

        A unit and its candidate may change signs. Gates are no odd functions and keep theirs.
        """
        name, symmetries = f"encoders.{number}", []
        gru = self.encoders[number].gru
        assert isinstance(gru, nn.GRU)
        size = gru.hidden_size
        for layer in range(gru.num_layers):
            is_last = layer + 1 == gru.num_layers
            after = "output.weight" if is_last else f"gru.weight_ih_l{layer + 1}"
            slices = [Slice(f"{name}.{after}", 1), Slice(f"{name}.gru.weight_hh_l{layer}", 1)]
            for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                slices += [
                    Slice(f"{name}.gru.{key}_l{layer}", 0, g * size, signed=g == CANDIDATE)
                    for g in range(GATES)
                ]
            symmetries.append(Symmetry("signed_permutation", size, tuple(slices)))
        return symmetries
