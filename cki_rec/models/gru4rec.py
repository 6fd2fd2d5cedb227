"""GRU4Rec. Shape legend: B rows, L ids of a history, W width, H hidden units."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cki_rec.config import SequenceOptions
from cki_rec.merging.symmetry import Slice, Symmetry
from cki_rec.models.layers import Dropout
from cki_rec.models.sequential import SequentialNetwork, latest
from cki_rec.models.symmetries import Basis

GATES = 3
"""Blocks of a GRU's matrices: reset, update, candidate."""
CANDIDATE = 2


class GRU(nn.Module):
    r"""One layer of gated recurrent units, with the parameters of ``torch.nn.GRU``.

    .. math:: h_l = (1 - z) \odot n + z \odot h_{l-1},\quad n = \tanh(W_n x_l + b_n
        + r \odot (U_n h_{l-1} + c_n))

    r and z are the sigmoids of such maps of :math:`x_l` and :math:`h_{l-1}`. The first state is 0.

    Args:
        width: W.
        hidden: H.
        length: L.

    Reference:
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, EMNLP 2014.

    Differs:
        The candidate resets the mapped state, as torch's does. Steps are written out, since
        torch's layer can neither be exported nor have gradients per row.
    """

    def __init__(self, width: int, hidden: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.weight_ih = nn.Parameter(torch.empty(GATES * hidden, width))
        self.weight_hh = nn.Parameter(torch.empty(GATES * hidden, hidden))
        self.bias_ih = nn.Parameter(torch.zeros(GATES * hidden))
        self.bias_hh = nn.Parameter(torch.zeros(GATES * hidden))
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.xavier_uniform_(weight)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """Return ``(B, L, H)``, the state after each step."""
        of_input = linear(x_BLW, self.weight_ih, self.bias_ih)
        state_BH: Tensor | None = None
        states = []
        for step in range(self.length):
            reset, update, candidate = of_input[:, step].chunk(GATES, dim=1)
            of_state: Tensor = self.bias_hh
            if state_BH is not None:
                of_state = linear(state_BH, self.weight_hh, self.bias_hh)
            add_reset, add_update, from_state = of_state.chunk(GATES, dim=-1)
            reset, update = (reset + add_reset).sigmoid(), (update + add_update).sigmoid()
            candidate = (candidate + reset * from_state).tanh()
            new_BH = (1 - update) * candidate
            state_BH = new_BH if state_BH is None else new_BH + update * state_BH
            states.append(state_BH)
        return torch.stack(states, dim=1)


class RecurrentEncoder(nn.Module):
    """A GRU over a history; a linear map of its output at the latest id is the state.

    Ids come first and empty positions last, so that none of these is read. An empty history has
    the bias of the map as its state.
    """

    def __init__(self, width: int, options: SequenceOptions) -> None:
        super().__init__()
        hidden = options.hidden
        self.dropout = Dropout(options.dropout)
        self.layers = nn.ModuleList(
            GRU(hidden if layer else width, hidden, options.length)
            for layer in range(options.layers)
        )
        self.output = nn.Linear(hidden, width)

    def forward(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, W)``; ``mask_BL`` is true at valid positions."""
        state_BW: Tensor = self.output(latest(self.states(ids_BLW, mask_BL), mask_BL))
        return state_BW

    def states(self, ids_BLW: Tensor, mask_BL: Tensor) -> Tensor:
        """Return ``(B, L, H)``; each state depends on its id and earlier ones."""
        states_BLH: Tensor = self.dropout(ids_BLW)
        for layer in self.layers:
            states_BLH = layer(states_BLH)
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
        yield from basis.blocks(f"{name}.layers.0.weight_ih", order, dim)
        for key in ("weight", "bias"):
            yield from basis.blocks(f"{name}.output.{key}", order, dim, axis=0)

    def inner_symmetries(self, number: int) -> list[Symmetry]:
        """Return the signed permutations of the hidden units of every layer.

        A unit and its candidate may change signs. Gates are no odd functions and keep theirs.
        """
        symmetries = []
        layers = self.encoders[number].layers
        assert isinstance(layers, nn.ModuleList)
        for place, layer in enumerate(layers):
            assert isinstance(layer, GRU)
            name, size = f"encoders.{number}.layers.{place}", layer.weight_hh.shape[1]
            is_last = place + 1 == len(layers)
            after = f"layers.{place + 1}.weight_ih" if not is_last else "output.weight"
            slices = [Slice(f"encoders.{number}.{after}", 1), Slice(f"{name}.weight_hh", 1)]
            for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                slices += [
                    Slice(f"{name}.{key}", 0, gate * size, signed=gate == CANDIDATE)
                    for gate in range(GATES)
                ]
            symmetries.append(Symmetry("signed_permutation", size, tuple(slices)))
        return symmetries
